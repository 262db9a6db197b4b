"""What the HTTP server itself needs to know; the engine's own settings are `EngineConfig`."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jax_engine.config import choice
from jax_engine.log_lines import LOG_FORMATS
from jax_engine.sampling_params import integer, number
from jax_engine.server.parsers.names import AUTO, NONE, REASONING_PARSERS, TOOL_PARSERS

DEFAULT_PORT = 8000
DEFAULT_MAX_REQUEST_BODY_BYTES = 16 * 2**20
DEFAULT_RESPONSE_STORE_BYTES = 64 * 2**20
DEFAULT_SHUTDOWN_TIMEOUT = 30.0
CONTENT_FORMATS = (AUTO, "string", "openai")
BUILT_IN_MODEL_NAME = "demo"
# What a Unix socket's address has room for on every system that has such sockets.
MAX_UDS_BYTES = 100
DAY = 86400


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How the server listens, names its model, protects itself and ends.

    Raises:
        ValueError: a value outside its range; the message names field, value, range and remedy.
    """

    host: str = "0.0.0.0"
    port: int = DEFAULT_PORT  # 0: any free one, printed in the log
    uds: str | None = None  # path of a Unix socket to listen on instead of host and port
    root_path: str = ""  # what a proxy in front puts before every path, such as /llm
    ssl_certfile: str | None = None  # PEM, the whole chain; with it the server speaks HTTPS
    ssl_keyfile: str | None = None  # PEM; None: the key is in ssl_certfile
    ssl_ca_certs: str | None = None  # PEM, the authorities that sign clients' certificates
    ssl_cert_reqs: int = 0  # Python's ssl.CERT_*: 0 asks clients for no certificate, 2 demands one
    # () asks for no key. Not in the repr: keys belong in no log.
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_origins: tuple[str, ...] = ("*",)  # web pages whose scripts may call the server; (): only its own
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False  # browsers may send cookies along
    served_model_names: tuple[str, ...] = (BUILT_IN_MODEL_NAME,)  # the first one stands in responses and metrics
    chat_template: str | None = None  # Jinja source; None: the tokenizer's own
    chat_template_content_format: str = AUTO  # or string, openai (lists of parts); AUTO: as the chat template reads it
    trust_request_chat_template: bool = False  # clients may send templates, which are programs
    default_chat_template_kwargs: Mapping[str, Any] | None = None  # variables of the chat template; requests' own win
    tool_call_parser: str = AUTO  # of TOOL_PARSERS; AUTO: as the chat template shows, NONE: calls stay text
    enable_auto_tool_choice: bool = True  # the model may choose to call a tool
    reasoning_parser: str = AUTO  # of REASONING_PARSERS, likewise
    max_request_body_bytes: int = DEFAULT_MAX_REQUEST_BODY_BYTES
    h11_max_incomplete_event_size: int = 64 * 2**10  # bytes of a request's first line and headers
    h11_max_header_count: int = 256
    limit_concurrency: int | None = None  # connections that are served at once
    receive_timeout: float = 60.0  # seconds that a client has to send a request's headers, and again for its body
    request_timeout: float | None = None  # seconds that a request may take once it has come; None: as long as it needs
    timeout_keep_alive: float = 5.0  # seconds that a connection may wait for its next request
    response_store_bytes: int = DEFAULT_RESPONSE_STORE_BYTES  # room for responses that clients come back to; 0: none
    shutdown_timeout: float = DEFAULT_SHUTDOWN_TIMEOUT  # seconds that requests in flight have after SIGTERM
    log_format: str = "text"  # or json
    enable_log_requests: bool = True  # a line for each request
    disable_log_stats: bool = False  # no line about the throughput every ten seconds
    otlp_traces_endpoint: str | None = None  # URL of an OpenTelemetry collector (OTLP over HTTP); None: no traces
    allow_runtime_lora_updating: bool = False  # clients may load adapters from folders of this machine, and unload them
    enable_tokenizer_info_endpoint: bool = False  # GET /tokenizer_info shows the tokenizer's configuration
    enable_admin_routes: bool = False  # clients may put the engine to sleep, wake it and abort any request
    api_server_count: int = 1  # processes that answer HTTP, all before one engine core
    headless: bool = False  # answers no HTTP: a process that follows the one with node_rank=0

    def __post_init__(self) -> None:
        integer("port", self.port, low=0, high=65535, remedy="8000 is the default, 0 takes any free port")
        integer("api_server_count", self.api_server_count, low=1, high=64, remedy="1 is the default; each takes a core")
        if (value := self.chat_template_content_format) not in CONTENT_FORMATS:
            allowed = ", ".join(CONTENT_FORMATS)
            raise ValueError(f"chat_template_content_format={value!r} is not known; it must be one of {allowed}")
        for name, known in (("tool_call_parser", TOOL_PARSERS), ("reasoning_parser", REASONING_PARSERS)):
            if (value := getattr(self, name)) not in (AUTO, NONE, *known):
                raise ValueError(f"{name}={value!r} is not known; it must be one of {', '.join((AUTO, NONE, *known))}")
        if not all(self.api_keys):
            raise ValueError("api_key has an empty entry; give a key or leave the option out")
        if not self.served_model_names or not all(self.served_model_names):
            raise ValueError("served_model_name has an empty entry; name the model or leave the option out")
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ValueError(
                f"otlp_traces_endpoint={endpoint!r} must be a URL of OTLP over HTTP, such as http://host:4318/v1/traces"
            )
        choice("log_format", self.log_format, LOG_FORMATS)
        self._check_addresses()
        self._check_limits()
        self._check_times()

    def _check_addresses(self) -> None:
        if self.uds is not None and not 0 < len(os.fsencode(self.uds)) <= MAX_UDS_BYTES:
            raise ValueError(
                f"uds={self.uds!r} must be a path of 1 to {MAX_UDS_BYTES} bytes; /tmp/jax-engine.sock is one"
            )
        if not re.fullmatch(r"(/[\w.~-]+)*", self.root_path, re.ASCII):
            raise ValueError(f"root_path={self.root_path!r} must begin with a slash and not end with one, such as /llm")
        choice("ssl_cert_reqs", self.ssl_cert_reqs, (0, 1, 2))
        for name in ("ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs"):
            if getattr(self, name) and not self.ssl_certfile:
                raise ValueError(f"{name}={getattr(self, name)!r} needs ssl_certfile, the server's own certificate")
        if self.ssl_cert_reqs and not self.ssl_ca_certs:
            raise ValueError(f"ssl_cert_reqs={self.ssl_cert_reqs} needs ssl_ca_certs, who may have signed the clients'")
        if self.allow_credentials and "*" in self.allowed_origins:
            raise ValueError(
                "allow_credentials=True with allowed_origins=['*'] would let every web page act for its visitors; "
                "name the origins, such as https://chat.example.com"
            )

    def _check_limits(self) -> None:
        default = f"{DEFAULT_MAX_REQUEST_BODY_BYTES} is the default"
        integer("max_request_body_bytes", self.max_request_body_bytes, low=1024, high=2**40, remedy=default)
        integer(
            "h11_max_incomplete_event_size",
            self.h11_max_incomplete_event_size,
            low=1024,
            high=2**30,
            remedy="bytes of a request's headers; 64K is the default",
        )
        remedy = f"{DEFAULT_RESPONSE_STORE_BYTES} is the default, 0 stores none"
        integer("response_store_bytes", self.response_store_bytes, low=0, high=2**40, remedy=remedy)
        integer("h11_max_header_count", self.h11_max_header_count, low=8, high=2**16, remedy="256 is the default")
        if self.limit_concurrency is not None:
            integer("limit_concurrency", self.limit_concurrency, low=1, high=2**20, remedy="leave it out for no limit")

    def _check_times(self) -> None:
        number("shutdown_timeout", self.shutdown_timeout, low=0, high=DAY, remedy="seconds; 0 ends at once")
        number("receive_timeout", self.receive_timeout, low=0, high=DAY, open_low=True, remedy="60 is the default")
        number("timeout_keep_alive", self.timeout_keep_alive, low=0, high=DAY, remedy="5 seconds is the default")
        if self.request_timeout is not None:
            remedy = "leave it out for no limit"
            number("request_timeout", self.request_timeout, low=0, high=DAY, open_low=True, remedy=remedy)

    @property
    def model_name(self) -> str:
        """The name that responses and metrics carry."""
        return self.served_model_names[0]
