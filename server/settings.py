"""What the HTTP server itself needs to know; the engine's own settings are `EngineConfig`."""

from dataclasses import dataclass

from jax_engine.sampling_params import integer, number
from jax_engine.server.parsers.names import AUTO, NONE, REASONING_PARSERS, TOOL_PARSERS

DEFAULT_PORT = 8000
DEFAULT_MAX_REQUEST_BODY_BYTES = 16 * 2**20
DEFAULT_SHUTDOWN_TIMEOUT = 30.0
BUILT_IN_MODEL_NAME = "demo"


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How the server listens, names its model, protects itself and ends.

    Raises:
        ValueError: a value outside its range; the message names field, value, range and remedy.
    """

    host: str = "0.0.0.0"
    port: int = DEFAULT_PORT  # 0: any free one, printed in the log
    api_keys: tuple[str, ...] = ()  # (): no key is asked for
    served_model_names: tuple[str, ...] = (BUILT_IN_MODEL_NAME,)  # the first one stands in responses and metrics
    chat_template: str | None = None  # Jinja source; None: the tokenizer's own
    tool_call_parser: str = AUTO  # of TOOL_PARSERS; AUTO: as the chat template shows, NONE: calls stay text
    enable_auto_tool_choice: bool = True  # the model may choose to call a tool
    reasoning_parser: str = AUTO  # of REASONING_PARSERS, likewise
    max_request_body_bytes: int = DEFAULT_MAX_REQUEST_BODY_BYTES
    shutdown_timeout: float = DEFAULT_SHUTDOWN_TIMEOUT  # seconds that requests in flight have after SIGTERM
    log_requests: bool = True
    allow_runtime_lora_updating: bool = False  # clients may load adapters from folders of this machine, and unload them
    enable_tokenizer_info_endpoint: bool = False  # GET /tokenizer_info shows the tokenizer's configuration
    api_server_count: int = 1  # processes that answer HTTP, all before one engine core

    def __post_init__(self) -> None:
        integer("port", self.port, low=0, high=65535, remedy="8000 is the default, 0 takes any free port")
        integer(
            "max_request_body_bytes",
            self.max_request_body_bytes,
            low=1024,
            high=2**40,
            remedy=f"{DEFAULT_MAX_REQUEST_BODY_BYTES} is the default",
        )
        number("shutdown_timeout", self.shutdown_timeout, low=0, high=86400, remedy="seconds; 0 ends at once")
        integer("api_server_count", self.api_server_count, low=1, high=64, remedy="1 is the default; each takes a core")
        for name, known in (("tool_call_parser", TOOL_PARSERS), ("reasoning_parser", REASONING_PARSERS)):
            if (value := getattr(self, name)) not in (AUTO, NONE, *known):
                raise ValueError(f"{name}={value!r} is not known; it must be one of {', '.join((AUTO, NONE, *known))}")
        if not all(self.api_keys):
            raise ValueError("api_key has an empty entry; give a key or leave the option out")
        if not self.served_model_names or not all(self.served_model_names):
            raise ValueError("served_model_name has an empty entry; name the model or leave the option out")

    @property
    def model_name(self) -> str:
        """The name that responses and metrics carry."""
        return self.served_model_names[0]
