"""The `jax-engine` command. Parsing needs no JAX, transformers or FastAPI."""

import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from jax_engine.config import EngineConfig, environment_settings
from jax_engine.log_lines import LOG_FORMATS
from jax_engine.server.cli import commands
from jax_engine.server.cli.bench import MODEL
from jax_engine.server.cli.flags import (
    Flag,
    Options,
    as_flags,
    count,
    engine_config,
    engine_groups,
    json_object,
    string_list,
    with_defaults,
)
from jax_engine.server.cli.parser import Command, CommandLine, fail, run_command_line
from jax_engine.server.logs import LEVELS, set_up_logging
from jax_engine.server.parsers.names import AUTO, NONE, REASONING_PARSERS, TOOL_PARSERS
from jax_engine.server.settings import BUILT_IN_MODEL_NAME, CONTENT_FORMATS, ServerSettings

TOP_EPILOG = """\
examples:
  jax-engine serve                                      the built-in model on port 8000
  jax-engine serve Qwen/Qwen3-0.6B --max-model-len 8K   a model of the Hugging Face hub
  jax-engine generate --chat "What is 17 + 25?"         one answer, no server
  jax-engine chat                                       talk to it in the terminal
  jax-engine run-batch -i in.jsonl -o out.jsonl         a file of requests in OpenAI's batch format

jax-engine COMMAND --help explains a command's options.
"""

SERVE_EPILOG = """\
examples:
  jax-engine serve
  jax-engine serve ./my-model --port 9000 --api-key SECRET
  jax-engine serve meta-llama/Llama-3.2-1B-Instruct --served-model-name llama --max-model-len 16K
  jax-engine serve ./my-model --load-format dummy --max-num-seqs 256 --kv-cache-memory-bytes 8G

then, from any OpenAI client (base URL http://HOST:8000/v1), or:
  curl http://localhost:8000/v1/chat/completions -d \\
    '{"messages": [{"role": "user", "content": "What is 17 + 25?"}]}'

The server answers at once and says on /health when it is ready. SIGTERM ends it in good order.
"""

# Fields of `ServerSettings`, by the title that they stand under in the help.
HTTP_GROUPS = {
    "server": (
        Flag("host", "address to listen on; 127.0.0.1 for this machine alone", metavar="ADDRESS"),
        Flag("port", "port to listen on; 0 takes a free one", type=int, metavar="PORT"),
        Flag("uds", "path of a Unix socket to listen on instead", metavar="PATH"),
        Flag("root_path", "what a proxy in front puts before every path: /llm", metavar="PATH"),
        Flag("api_server_count", "processes that answer HTTP, all before one engine", type=int, metavar="N"),
        Flag("headless", "answer no HTTP: for every process of --nnodes but the first", type=bool),
        Flag("shutdown_timeout", "seconds that requests in flight have after SIGTERM", type=float, metavar="SECONDS"),
    ),
    "encryption": (
        Flag("ssl_certfile", "certificate chain (PEM): the server speaks HTTPS", metavar="FILE"),
        Flag("ssl_keyfile", "its key (PEM), if that is another file", metavar="FILE"),
        Flag("ssl_ca_certs", "who may have signed the certificates of clients (PEM)", metavar="FILE"),
        Flag(
            "ssl_cert_reqs",
            "certificates of clients: 0 not asked for, 1 checked if given, 2 demanded",
            type=int,
            metavar="0|1|2",
        ),
    ),
    "browsers": (
        Flag(
            "allowed_origins",
            'web pages of other origins whose scripts may call the server, as a JSON list; "[]" for none',
            type=string_list,
            metavar="JSON",
        ),
        Flag("allowed_methods", "methods that they may use, as a JSON list", type=string_list, metavar="JSON"),
        Flag("allowed_headers", "headers that they may send, as a JSON list", type=string_list, metavar="JSON"),
        Flag("allow_credentials", "let browsers send cookies with such calls; by default not", type=bool),
    ),
    "limits": (
        Flag(
            "limit_concurrency",
            "connections at once, one more is a 503; by default any number",
            type=count,
            metavar="N",
        ),
        Flag("h11_max_incomplete_event_size", "largest request head: 64K", type=count, metavar="BYTES"),
        Flag("h11_max_header_count", "headers that a request may have", type=count, metavar="N"),
        Flag(
            "receive_timeout",
            "seconds that a client has to send its headers, and again for the body",
            type=float,
            metavar="SECONDS",
        ),
        Flag(
            "request_timeout",
            "seconds after which a request is ended, with a 504; by default it may take any time",
            type=float,
            metavar="SECONDS",
        ),
        Flag(
            "timeout_keep_alive",
            "seconds that a connection may wait for its next request",
            type=float,
            metavar="SECONDS",
        ),
        Flag("max_request_body_bytes", "largest request body: 16M", type=count, metavar="BYTES"),
        Flag(
            "response_store_bytes",
            "room for answers of /v1/responses that clients come back to: 64M; 0 stores none",
            type=count,
            metavar="BYTES",
        ),
    ),
    "log": (
        Flag("log_format", "of each line in the log", choices=LOG_FORMATS),
        Flag("enable_log_requests", "log a line for each request; by default it does", type=bool),
        Flag("disable_log_stats", "no line about the throughput every ten seconds", type=bool),
        Flag(
            "otlp_traces_endpoint",
            "OpenTelemetry collector (OTLP over HTTP) that gets a trace of each request: http://host:4318/v1/traces",
            metavar="URL",
        ),
    ),
    "routes": (
        Flag(
            "allow_runtime_lora_updating",
            "let clients load LoRA adapters from this machine's folders, and unload them; by default not",
            type=bool,
        ),
        Flag(
            "enable_admin_routes",
            "let clients put the engine to sleep, wake it up and abort any request; by default not",
            type=bool,
        ),
        Flag("enable_tokenizer_info_endpoint", "answer GET /tokenizer_info; by default it does not", type=bool),
    ),
}
HTTP_FLAGS = tuple(flag for flags in HTTP_GROUPS.values() for flag in flags)
# What decides how requests are answered, wherever they come from.
ANSWER_FLAGS = (
    Flag(
        "chat_template_content_format",
        "how the chat template takes the content of messages: openai: a list of parts; auto: as it reads it",
        choices=CONTENT_FORMATS,
    ),
    Flag(
        "trust_request_chat_template",
        "let clients send chat templates, which are programs; by default not",
        type=bool,
    ),
    Flag("default_chat_template_kwargs", "JSON of variables for the chat template", type=json_object, metavar="JSON"),
    Flag(
        "tool_call_parser",
        "how the model writes tool calls; auto: as its chat template shows; none: calls stay text",
        choices=(AUTO, NONE, *TOOL_PARSERS),
    ),
    Flag("enable_auto_tool_choice", "let the model choose whether to call a tool; by default it may", type=bool),
    Flag(
        "reasoning_parser",
        "how the model writes what it thinks before it answers; auto: as its chat template shows; none: it stays text",
        choices=(AUTO, NONE, *REASONING_PARSERS),
    ),
)
NAME_FLAGS = (
    Flag(
        "served_model_name",
        "names that clients may use for the model; its own name if left out. Write MODEL before this option",
        metavar="NAME",
        nargs="+",
    ),
    Flag("chat_template", "Jinja chat template, or a file of one, instead of the tokenizer's", metavar="TEMPLATE"),
)
API_KEY = Flag("api_key", "ask clients for this key; several may be given", metavar="KEY", repeated=True)
LOG_LEVEL = Flag("log_level", "how much to log", choices=LEVELS, default="info")


def command_line() -> CommandLine:
    """All commands."""
    http = {title: with_defaults(flags, ServerSettings) for title, flags in HTTP_GROUPS.items()}
    answer_flags = (*NAME_FLAGS, *with_defaults(ANSWER_FLAGS, ServerSettings))
    serve = Command(
        "serve",
        "Serve a model over HTTP: OpenAI's API, /generate, /health, /metrics.",
        run_serve,
        usage="[MODEL] [options]",
        argument=MODEL,
        groups={
            **http,
            "server": (*http["server"], API_KEY),
            "log": (LOG_LEVEL, *http["log"]),
            "answers": answer_flags,
            **engine_groups(),
        },
        epilog=SERVE_EPILOG,
    )
    return CommandLine((serve, *commands.commands(answer_flags, answer_settings)), TOP_EPILOG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, 2 for a user's mistake."""
    given = sys.argv[1:] if arguments is None else arguments
    version, environment = metadata.version("jax-engine"), environment_settings()
    return run_command_line(command_line(), given, version=version, environment=environment, run=run)


def run(command: Command, options: Options) -> int:
    """Run a command with what it was given; a mistake ends the process with one line."""
    try:
        return command.run(options)
    except ValueError as error:
        flags = [flag.field for flag in command.flags]
        fields = [*EngineConfig.__dataclass_fields__, *ServerSettings.__dataclass_fields__, *flags]
        fail(command.program, as_flags(str(error), fields, options.sources))
    except KeyboardInterrupt:
        return 130


def run_serve(options: Options) -> int:
    config = engine_config(options)
    settings = server_settings(options, config)
    log_level = options["log_level"] or "info"
    set_up_logging(log_level, settings.log_format)
    check_headless(config, settings)
    if settings.headless:
        from jax_engine.server.headless import follow

        return follow(config, shutdown_timeout=settings.shutdown_timeout)
    from jax_engine.server.listening import listening_sockets, tls_context
    from jax_engine.server.tracing import check_tracing

    check_tracing(settings)
    tls_context(settings)  # before anything slow: a file may be missing, and the port in use
    with listening_sockets(settings) as listening:
        if settings.api_server_count > 1:
            from jax_engine.server.supervisor import supervise

            return supervise(config, settings, listening, log_level=log_level)
        from jax_engine.server.serve import serve

        return serve(config, settings, listening[0])


def check_headless(config: EngineConfig, settings: ServerSettings) -> None:
    """ValueError unless the first process answers HTTP, and no other does."""
    if settings.headless and config.node_rank == 0:
        raise ValueError(
            f"--headless is for the processes that follow, and nnodes={config.nnodes} node_rank=0 is the one that "
            "answers HTTP; leave it out, or set node_rank"
        )
    if config.node_rank > 0 and not settings.headless:
        raise ValueError(f"node_rank={config.node_rank} follows process 0 and answers no HTTP; add --headless")


def server_settings(options: Options, config: EngineConfig) -> ServerSettings:
    """What `serve` is told beside the engine's settings."""
    return ServerSettings(
        **options.of(flag.field for flag in HTTP_FLAGS),
        **answer_settings(options, config),
        api_keys=tuple(options["api_key"] or ()),
    )


def answer_settings(options: Options, config: EngineConfig) -> dict[str, Any]:
    """The fields of `ServerSettings` that decide how requests are answered."""
    return {
        **options.of(flag.field for flag in ANSWER_FLAGS),
        "served_model_names": tuple(options["served_model_name"] or (config.model or BUILT_IN_MODEL_NAME,)),
        "chat_template": read_template(options["chat_template"]),
    }


def read_template(given: str | None) -> str | None:
    """A chat template, which is what a file holds or, where `given` is no name of one, what it says itself."""
    if given is None or any(mark in given for mark in "{}\n"):
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--chat-template {given} cannot be read: {error}") from error
