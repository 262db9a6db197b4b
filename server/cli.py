"""The `jax-engine` command: serve, generate, chat, run-batch. Parsing needs no JAX, transformers or FastAPI."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from jax_engine.config import EngineConfig
from jax_engine.server.cli_flags import (
    Flag,
    Parser,
    add_engine_flags,
    add_flag,
    as_flags,
    count,
    dashed,
    engine_config,
)
from jax_engine.server.logs import LEVELS, set_up_logging
from jax_engine.server.parsers.names import AUTO, NONE, REASONING_PARSERS, TOOL_PARSERS
from jax_engine.server.settings import BUILT_IN_MODEL_NAME, ServerSettings

MODEL_HELP = "a folder, a Hugging Face name, or nothing for the small built-in demo model"

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

GENERATE_EPILOG = """\
examples:
  jax-engine generate --chat "What is 17 + 25?"
  jax-engine generate --max-tokens 40 --temperature 0 "Once upon a time" "Long ago"
  jax-engine generate --file prompts.jsonl --jsonl > answers.jsonl
  echo "Once upon a time" | jax-engine generate --model ./my-model
"""

CHAT_EPILOG = """\
examples:
  jax-engine chat
  jax-engine chat ./my-model --system "Answer in one sentence."
  jax-engine chat --url http://localhost:8000 --api-key SECRET

in the chat:
  /reset   forget the conversation      /exit or Ctrl-D   leave
  /help    show this                    Ctrl-C            stop an answer
"""

RUN_BATCH_EPILOG = """\
examples:
  jax-engine run-batch -i in.jsonl -o out.jsonl --model ./my-model --summary summary.json

a line of the input, and of the output, which has them in the order in which they were answered:
  {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}
  {"id": "batch_req_1", "custom_id": "a", "response": {"status_code": 200, ...}, "error": null}

A line that cannot be answered has its error there, and the others go on. Run again, whatever ended it, it keeps the
results that are in the output and answers the rest. Exit code 0: every line has a result.
"""

HTTP_FLAGS = (
    Flag("host", "address to listen on; 127.0.0.1 for this machine alone", metavar="ADDRESS"),
    Flag("port", "port to listen on; 0 takes a free one", type=int, metavar="PORT"),
    Flag("max_request_body_bytes", "largest request body: 16M", type=count, metavar="BYTES"),
    Flag("shutdown_timeout", "seconds that requests in flight have after SIGTERM", type=float, metavar="SECONDS"),
    Flag("api_server_count", "processes that answer HTTP, all before one engine", type=int, metavar="N"),
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
    Flag(
        "allow_runtime_lora_updating",
        "let clients load LoRA adapters from this machine's folders, and unload them; by default not",
        type=bool,
    ),
    Flag("enable_tokenizer_info_endpoint", "answer GET /tokenizer_info; by default it does not", type=bool),
)
SAMPLING_FLAGS = (
    Flag("n", "answers for each prompt", type=int, metavar="N"),
    Flag("temperature", "0 always takes the likeliest token", type=float, metavar="T"),
    Flag("top_p", "smallest set of tokens of this probability", type=float, metavar="P"),
    Flag("top_k", "the k likeliest tokens; 0: all", type=int, metavar="K"),
    Flag("min_p", "tokens at least this likely relative to the likeliest", type=float, metavar="P"),
    Flag("max_tokens", "longest answer, in tokens", type=count, metavar="TOKENS"),
)


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The command's parser, and that of each subcommand."""
    parser = Parser(
        prog="jax-engine",
        description="LLM inference and serving in JAX, on TPU, NVIDIA GPU and CPU.",
        epilog=TOP_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"jax-engine {metadata.version('jax-engine')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    adders = {"serve": add_serve, "generate": add_generate, "chat": add_chat, "run-batch": add_run_batch}
    return parser, {name: add(commands) for name, add in adders.items()}


def add_serve(commands: "argparse._SubParsersAction[Parser]") -> Parser:
    text = "Serve a model over HTTP: OpenAI's API, /generate, /health, /metrics."
    parser = commands.add_parser(
        "serve",
        usage="jax-engine serve [MODEL] [options]",
        help="serve a model over HTTP",
        description=text,
        epilog=SERVE_EPILOG,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    http = parser.add_argument_group("server")
    defaults = {field.name: field.default for field in dataclasses.fields(ServerSettings)}
    for flag in HTTP_FLAGS:
        add_flag(http, flag, defaults[flag.field])
    http.add_argument(
        "--api-key", action="append", metavar="KEY", help="ask clients for this key; repeat it for several keys"
    )
    add_answer_options(http)
    http.add_argument("--log-level", choices=LEVELS, default="info", help="how much to log (default: info)")
    http.add_argument("--disable-log-requests", action="store_true", help="no line in the log for each request")
    add_engine_flags(parser)
    return parser


def add_answer_options(group: argparse._ArgumentGroup) -> None:
    """What decides how requests are answered, wherever they come from."""
    group.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="names that clients may use for the model; its own name if left out. Write MODEL before this option",
    )
    group.add_argument("--chat-template", metavar="FILE", help="Jinja chat template instead of the tokenizer's own")


def add_run_batch(commands: "argparse._SubParsersAction[Parser]") -> Parser:
    text = "Answer a file of requests in OpenAI's batch format, without a server."
    parser = commands.add_parser(
        "run-batch",
        usage="jax-engine run-batch -i FILE -o FILE [options]",
        help="answer a file of requests",
        description=text,
        epilog=RUN_BATCH_EPILOG,
    )
    parser.add_argument("-i", "--input-file", required=True, type=Path, metavar="FILE", help="requests, one a line")
    parser.add_argument("-o", "--output-file", required=True, type=Path, metavar="FILE", help="results, one a line")
    parser.add_argument("--model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--summary", type=Path, metavar="FILE", help="write the printed figures there too, as JSON")
    parser.add_argument(
        "--max-concurrency",
        type=count,
        metavar="N",
        help="requests in hand at once; twice --max-num-seqs if left out",
    )
    add_answer_options(parser.add_argument_group("answers"))
    add_engine_flags(parser)
    return parser


def add_generate(commands: "argparse._SubParsersAction[Parser]") -> Parser:
    text = "Complete prompts without a server and print the answers."
    parser = commands.add_parser(
        "generate",
        usage="jax-engine generate [options] [PROMPT ...]",
        help="complete prompts, no server",
        description=text,
        epilog=GENERATE_EPILOG,
    )
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="text to complete; without any, from --file or standard input"
    )
    parser.add_argument("--model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--file", metavar="FILE", help='prompts, one a line; in a .jsonl file, lines such as {"prompt": "..."}'
    )
    parser.add_argument("--chat", action="store_true", help="each prompt is a user's message, not text to continue")
    parser.add_argument("--jsonl", action="store_true", help="print a JSON object a line instead of text")
    sampling = parser.add_argument_group("sampling (what is left out, the model decides)")
    for flag in SAMPLING_FLAGS:
        add_flag(sampling, flag, None)
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before this text; repeatable")
    sampling.add_argument("--sampling-seed", type=int, metavar="N", help="the same answer every time")
    add_engine_flags(parser)
    return parser


def add_chat(commands: "argparse._SubParsersAction[Parser]") -> Parser:
    text = "Talk to a model in the terminal."
    parser = commands.add_parser(
        "chat", usage="jax-engine chat [MODEL] [options]", help="talk to a model", description=text, epilog=CHAT_EPILOG
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--url", metavar="URL", help="a running server instead, such as http://localhost:8000")
    parser.add_argument("--api-key", metavar="KEY", help="the server's API key")
    parser.add_argument("--system", metavar="TEXT", help="system message before the conversation")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token")
    parser.add_argument("--max-tokens", type=count, metavar="TOKENS", help="longest answer, in tokens")
    add_engine_flags(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, 2 for a user's mistake."""
    parser, subparsers = build_parser()
    given = dashed(sys.argv[1:] if arguments is None else arguments)
    options, unknown = parser.parse_known_args(given)
    chosen = subparsers.get(options.command or "", parser)
    if unknown:
        chosen.suggest(unknown[0])
    if options.command is None:
        parser.print_help()
        return 0
    try:
        run = {"serve": run_serve, "generate": run_generate, "chat": run_chat, "run-batch": run_run_batch}
        return run[options.command](options)
    except ValueError as error:
        fields = [*EngineConfig.__dataclass_fields__, *ServerSettings.__dataclass_fields__]
        chosen.error(as_flags(str(error), fields))
    except KeyboardInterrupt:
        return 130


def run_serve(options: argparse.Namespace) -> int:
    config = engine_config(options)
    names = {flag.field for flag in HTTP_FLAGS}
    given = {name: value for name, value in vars(options).items() if name in names}
    settings = ServerSettings(
        **given,
        **answer_settings(options, config),
        api_keys=tuple(options.api_key or ()),
        log_requests=not options.disable_log_requests,
    )
    set_up_logging(options.log_level)
    from jax_engine.server.listening import listening_sockets

    # Before anything slow: the port may be in use.
    listening = listening_sockets(settings.host, settings.port, settings.api_server_count)
    if settings.api_server_count > 1:
        from jax_engine.server.supervisor import supervise

        return supervise(config, settings, listening, log_level=options.log_level)
    from jax_engine.server.serve import serve

    return serve(config, settings, listening[0])


def answer_settings(options: argparse.Namespace, config: EngineConfig) -> dict[str, Any]:
    """The fields of `ServerSettings` that decide how requests are answered."""
    return {
        "served_model_names": tuple(options.served_model_name or (config.model or BUILT_IN_MODEL_NAME,)),
        "chat_template": read_template(options.chat_template),
    }


def run_run_batch(options: argparse.Namespace) -> int:
    config = engine_config(options)
    settings = ServerSettings(**answer_settings(options, config), log_requests=False)
    set_up_logging("warning")
    from jax_engine.server.cli_run_batch import run_batch

    return run_batch(
        config,
        settings,
        options.input_file,
        options.output_file,
        summary_file=options.summary,
        max_concurrency=options.max_concurrency,
    )


def read_template(path: str | None) -> str | None:
    """The text of a chat template's file."""
    try:
        return None if path is None else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--chat-template {path} cannot be read: {error}") from error


def run_generate(options: argparse.Namespace) -> int:
    set_up_logging("warning")
    from jax_engine.server.cli_generate import generate

    sampling = {flag.field for flag in SAMPLING_FLAGS}
    given = {name: value for name, value in vars(options).items() if name in sampling}
    if options.stop:
        given["stop"] = options.stop
    if options.sampling_seed is not None:
        given["seed"] = options.sampling_seed
    return generate(
        engine_config(options), options.prompts, file=options.file, chat=options.chat, jsonl=options.jsonl, given=given
    )


def run_chat(options: argparse.Namespace) -> int:
    set_up_logging("warning")
    from jax_engine.server.cli_chat import chat

    given = {"temperature": options.temperature, "max_tokens": options.max_tokens}
    given = {name: value for name, value in given.items() if value is not None}
    return chat(engine_config(options), url=options.url, api_key=options.api_key, system=options.system, given=given)


if __name__ == "__main__":
    sys.exit(main())
