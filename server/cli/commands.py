"""The commands besides `serve`: what each takes, and how it begins."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax_engine.config import EngineConfig
from jax_engine.server.cli.bench import MODEL, bench_commands
from jax_engine.server.cli.compile import compile_command
from jax_engine.server.cli.convert import convert_command
from jax_engine.server.cli.flags import Flag, Options, count, engine_config, engine_groups
from jax_engine.server.cli.parser import Command
from jax_engine.server.cli.plan import plan_command
from jax_engine.server.logs import set_up_logging
from jax_engine.server.settings import ServerSettings

AnswerSettings = Callable[[Options, EngineConfig], dict[str, Any]]

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
  jax-engine chat ./my-model --system-prompt "Answer in one sentence."
  jax-engine chat --url http://localhost:8000 --api-key SECRET

in the chat:
  /reset   forget the conversation      /exit or Ctrl-D   leave
  /help    show this                    Ctrl-C            stop an answer
"""

COMPLETE_EPILOG = """\
examples:
  jax-engine complete --url http://localhost:8000 --max-tokens 40
  jax-engine complete --quick "Once upon a time" --temperature 0
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

SAMPLING_FLAGS = (
    Flag("n", "answers for each prompt", type=int, metavar="N"),
    Flag("temperature", "0 always takes the likeliest token", type=float, metavar="T"),
    Flag("top_p", "smallest set of tokens of this probability", type=float, metavar="P"),
    Flag("top_k", "the k likeliest tokens; 0: all", type=int, metavar="K"),
    Flag("min_p", "tokens at least this likely relative to the likeliest", type=float, metavar="P"),
    Flag("max_tokens", "longest answer, in tokens", type=count, metavar="TOKENS"),
)
GENERATE_FLAGS = (
    MODEL,
    Flag("file", 'prompts, one a line; in a .jsonl file, lines such as {"prompt": "..."}', metavar="FILE"),
    Flag("chat", "each prompt is a user's message, not text to continue", type=bool),
    Flag("jsonl", "print a JSON object a line instead of text", type=bool),
)
OWN_SAMPLING_FLAGS = (
    Flag("stop", "end the answer before this text", metavar="TEXT", repeated=True),
    Flag("sampling_seed", "the same answer every time", type=int, metavar="N"),
)
PARTNER_FLAGS = (
    Flag("url", "a running server instead, such as http://localhost:8000", metavar="URL"),
    Flag("api_key", "the server's API key", metavar="KEY"),
    Flag("quick", "answer this alone, and end", metavar="TEXT", short="-q"),
    Flag("temperature", "0 always takes the likeliest token", type=float, metavar="T"),
    Flag("max_tokens", "longest answer, in tokens", type=count, metavar="TOKENS"),
)
SYSTEM_PROMPT = Flag("system_prompt", "system message before the conversation", metavar="TEXT")
COLLECT_FLAGS = (Flag("json", "as JSON, for programs", type=bool),)
BATCH_FLAGS = (
    Flag("input_file", "requests, one a line", metavar="FILE", short="-i", required=True, type=Path),
    Flag("output_file", "results, one a line", metavar="FILE", short="-o", required=True, type=Path),
    MODEL,
    Flag("summary", "write the printed figures there too, as JSON", metavar="FILE", type=Path),
    Flag("max_concurrency", "requests in hand at once; twice --max-num-seqs if left out", type=count, metavar="N"),
)


def commands(answer_flags: tuple[Flag, ...], answer_settings: AnswerSettings) -> tuple[Command, ...]:
    """The commands; `answer_flags` decide how requests are answered, and `answer_settings` makes settings of them."""
    generate = Command(
        "generate",
        "Complete prompts without a server and print the answers.",
        run_generate,
        usage="[options] [PROMPT ...]",
        argument=Flag(
            "prompts", "text to complete; without any, from --file or standard input", str, "PROMPT", nargs="*"
        ),
        groups={
            "input and output": GENERATE_FLAGS,
            "sampling (what is left out, the model decides)": (*SAMPLING_FLAGS, *OWN_SAMPLING_FLAGS),
            **engine_groups(),
        },
        epilog=GENERATE_EPILOG,
    )
    chat = Command(
        "chat",
        "Talk to a model in the terminal.",
        lambda options: run_talk(options, answer_settings, is_chat=True),
        usage="[MODEL] [options]",
        argument=MODEL,
        groups={"conversation": (*PARTNER_FLAGS, SYSTEM_PROMPT), "answers": answer_flags, **engine_groups()},
        epilog=CHAT_EPILOG,
    )
    complete = Command(
        "complete",
        "Continue texts in the terminal.",
        lambda options: run_talk(options, answer_settings, is_chat=False),
        usage="[MODEL] [options]",
        argument=MODEL,
        groups={"completion": PARTNER_FLAGS, "answers": answer_flags, **engine_groups()},
        epilog=COMPLETE_EPILOG,
    )
    batch = Command(
        "run-batch",
        "Answer a file of requests in OpenAI's batch format, without a server.",
        lambda options: run_run_batch(options, answer_settings),
        usage="-i FILE -o FILE [options]",
        groups={"batch": BATCH_FLAGS, "answers": answer_flags, **engine_groups()},
        epilog=RUN_BATCH_EPILOG,
    )
    collect = Command(
        "collect-env",
        "Describe this machine: versions, devices, settings. No secrets; for reports of problems.",
        run_collect_env,
        groups={"output": COLLECT_FLAGS},
        configurable=False,
    )
    more = (compile_command(), convert_command(), plan_command())
    return (chat, complete, generate, batch, *bench_commands(), *more, collect)


def run_generate(options: Options) -> int:
    set_up_logging("warning")
    from jax_engine.server.cli.generate import generate

    given = options.of([*(flag.field for flag in SAMPLING_FLAGS), "stop"])
    if options["sampling_seed"] is not None:
        given["seed"] = options["sampling_seed"]
    return generate(
        engine_config(options),
        options["prompts"] or (),
        file=options["file"],
        chat=bool(options["chat"]),
        jsonl=bool(options["jsonl"]),
        given=given,
    )


def run_talk(options: Options, answer_settings: AnswerSettings, *, is_chat: bool) -> int:
    config = engine_config(options)
    settings = ServerSettings(**answer_settings(options, config), enable_log_requests=False)
    set_up_logging("warning")
    from jax_engine.server.cli.chat import chat, complete

    given = options.of(["temperature", "max_tokens"])
    url, api_key, quick = options["url"], options["api_key"], options["quick"]
    check_partner(options, {flag.field for flag in PARTNER_FLAGS} | {"system_prompt", "model"})
    if not is_chat:
        return complete(config, settings, url=url, api_key=api_key, quick=quick, given=given)
    system_prompt = options["system_prompt"]
    return chat(config, settings, url=url, api_key=api_key, system_prompt=system_prompt, quick=quick, given=given)


def check_partner(options: Options, of_any: set[str]) -> None:
    """ValueError for what the command line asks of an engine where a server answers, or the other way round.

    `of_any` are the fields that both have. A file and variables may hold more: they are for other commands too.
    """
    for field in options.values.keys() - options.sources.keys():
        option = f"--{field.replace('_', '-')}"
        if options["url"] is not None and field not in of_any:
            raise ValueError(f"{option} is for an engine of this command's own, and --url asks a server; leave one out")
        if options["url"] is None and field == "api_key":
            raise ValueError(f"{option} is for the server of --url; give that too, or leave it out")


def run_collect_env(options: Options) -> int:
    from jax_engine.server.cli.collect_env import collect_env

    return collect_env(as_json=bool(options["json"]))


def run_run_batch(options: Options, answer_settings: AnswerSettings) -> int:
    config = engine_config(options)
    settings = ServerSettings(**answer_settings(options, config), enable_log_requests=False)
    set_up_logging("warning")
    from jax_engine.server.cli.run_batch import run_batch

    return run_batch(
        config,
        settings,
        options["input_file"],
        options["output_file"],
        summary_file=options["summary"],
        max_concurrency=options["max_concurrency"],
    )
