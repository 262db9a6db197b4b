"""Flags of the commands: vLLM's names, each for one field of `EngineConfig` or `ServerSettings`."""

import argparse
import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from jax_engine.config import (
    DTYPES,
    HASH_ALGORITHMS,
    LOAD_FORMATS,
    OFFLOADING_LOADS,
    SCHEDULING_POLICIES,
    EngineConfig,
)

_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def count(text: str) -> int:
    """A whole number, or one with a unit: k, m, g, t are powers of 1000, and K, M, G, T (also KiB, ...) of 1024."""
    match = _COUNT.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 4096, 32K, 512M or 2G")
    digits, unit, suffix = match.groups()
    binary = unit.isupper() and (suffix or "").lower() != "b"
    value = float(digits) * (1024 if binary else 1000) ** _POWERS[unit.lower()]
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


@dataclass(frozen=True)
class Flag:
    """One option of the command line; its name is that of the field, with dashes. Of type bool, it has a `--no-` form
    and takes no value.
    """

    field: str
    help: str
    type: Callable[[str], Any] = str
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    nargs: str | None = None

    @property
    def option(self) -> str:
        return "--" + self.field.replace("_", "-")


MODEL_FLAGS = (
    Flag("tokenizer", "folder or Hugging Face name of the tokenizer; the model's own if left out", metavar="PATH"),
    Flag("revision", "branch, tag or commit of a Hugging Face model", metavar="REV"),
    Flag("dtype", "type of weights and activations; auto: float32 on CPU, else the checkpoint's", choices=DTYPES),
    Flag("load_format", "where weights come from; dummy: random ones, for measuring", choices=LOAD_FORMATS),
    Flag(
        "generation_config",
        "where default sampling parameters come from: auto, the model's generation_config.json; vllm: nowhere; or the "
        "folder of such a file",
        metavar="NAME",
    ),
    Flag("override_generation_config", "JSON of default sampling parameters", type=json_object, metavar="JSON"),
    Flag("seed", "makes requests without a seed of their own repeatable", type=int, metavar="N"),
)
MEMORY_FLAGS = (
    Flag("max_model_len", "longest prompt and answer together, in tokens: 8192 or 32K", type=count, metavar="TOKENS"),
    Flag("gpu_memory_utilization", "share of the device's memory to use", type=float, metavar="SHARE"),
    Flag("kv_cache_memory_bytes", "size of the KV cache instead: 512M, 2G", type=count, metavar="BYTES"),
    Flag("enable_prefix_caching", "share the KV pages of equal beginnings; by default it does", type=bool),
    Flag(
        "prefix_caching_hash_algo",
        "what prefixes are known by; xxhash is faster, and unsafe between users who do not trust each other",
        choices=HASH_ALGORITHMS,
    ),
    Flag(
        "kv_offloading_size",
        "GiB of host memory, for all devices, that keep KV pages which the devices give up",
        type=float,
        metavar="GIB",
    ),
    Flag("swap_space", "the same as GiB for each device", type=float, metavar="GIB"),
    Flag(
        "kv_offloading_load",
        "pages come back from host memory if that is measured to be faster than computing them, or always",
        choices=OFFLOADING_LOADS,
    ),
    Flag("block_size", "tokens a KV page holds; 16 on CPU, 64 elsewhere", type=int, metavar="TOKENS"),
)
SCHEDULING_FLAGS = (
    Flag(
        "scheduling_policy",
        "who runs first: fcfs, as they come; priority, the lowest `priority` in a request's body, which also takes "
        "slots and pages of others; sjf, the shortest prompt, aged so that none starves",
        choices=SCHEDULING_POLICIES,
    ),
    Flag(
        "max_num_queued_reqs",
        "sequences in flight, waiting or running, beyond which a request is a 503 with Retry-After; else no bound",
        type=count,
        metavar="N",
    ),
    Flag(
        "long_prefill_token_threshold",
        "tokens of a prompt that one step computes at most, which leaves room for shorter ones; 0: no limit",
        type=count,
        metavar="TOKENS",
    ),
    Flag(
        "enable_chunked_prefill",
        "cut long prompts into chunks; without, --max-num-batched-tokens must hold the longest; by default it does",
        type=bool,
    ),
)
STEP_FLAGS = (
    Flag("max_num_seqs", "sequences that run at once", type=count, metavar="N"),
    Flag("max_num_batched_tokens", "tokens one step processes, all sequences together", type=count, metavar="TOKENS"),
    Flag("num_scheduler_steps", "tokens a request draws in a step while nothing waits", type=count, metavar="N"),
    Flag("max_logprobs", "log-probabilities of a position that a request may ask for", type=count, metavar="N"),
    Flag(
        "speculative_config",
        'guess tokens ahead and check several in a step, as JSON: {"method": "ngram", "num_speculative_tokens": 4, '
        '"prompt_lookup_max": 4, "prompt_lookup_min": 2}; answers are the same',
        type=json_object,
        metavar="JSON",
    ),
    Flag("attention_backend", "attention implementation; auto: the best for the device", metavar="NAME"),
    Flag("scan_layers", "run layers as one loop: quick to compile; by default everywhere but on a CPU", type=bool),
    Flag("tensor_parallel_size", "devices that share each layer", type=count, metavar="N"),
    Flag(
        "logits_processors",
        "functions that change every step's logits, compiled in: module:function, with commas between several",
        type=lambda text: tuple(filter(None, text.split(","))),
        metavar="NAMES",
    ),
    Flag("deterministic", "bitwise equal results whatever shares the batch; slower; by default not", type=bool),
    Flag("compilation_cache_dir", "where compiled programs are kept between starts; '' keeps none", metavar="DIR"),
    Flag("compile_threads", "step programs compiled at once; else half the cores, 4 at most", type=count, metavar="N"),
)
LORA_FLAGS = (
    Flag("enable_lora", "let requests use LoRA adapters, by default it does not", type=bool),
    Flag("max_loras", "adapters on the device at once, and so in one step", type=count, metavar="N"),
    Flag("max_lora_rank", "the largest rank of an adapter", type=count, metavar="RANK"),
    Flag(
        "lora_modules",
        "adapters of a server that clients name as the model, such as shout=demo:shout; folders in PEFT's layout",
        metavar="NAME=PATH",
        nargs="+",
    ),
    Flag(
        "max_cpu_loras", "adapters kept in host memory; as many as on the device if left out", type=count, metavar="N"
    ),
)
COMPILE_FIRST = Flag(
    "compile_before_ready", "compile every step program before the first request, not only the largest", type=bool
)
ENGINE_GROUPS = {
    "model": MODEL_FLAGS,
    "memory": MEMORY_FLAGS,
    "scheduling": SCHEDULING_FLAGS,
    "adapters": LORA_FLAGS,
    "speed": STEP_FLAGS,
}


class Parser(argparse.ArgumentParser):
    """argparse with exact names only, underscores as good as dashes, and a suggestion for a misspelled one."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def suggest(self, unknown: str) -> NoReturn:
        """End with an error that names the nearest option."""
        name = unknown.partition("=")[0]
        known = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; {self.prog} --help lists all"
        what = "option" if unknown.startswith("-") else "argument"
        self.error(f"unknown {what} {name}{hint}")

    def error(self, message: str) -> NoReturn:
        """One line on standard error, exit code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def dashed(arguments: Iterable[str]) -> list[str]:
    """`--max_model_len=8` as `--max-model-len=8`; what follows `--` is left alone."""
    result: list[str] = []
    options = True
    for argument in arguments:
        options = options and argument != "--"
        if options and argument.startswith("--"):
            name, equals, value = argument.partition("=")
            argument = name.replace("_", "-") + equals + value
        result.append(argument)
    return result


def add_flag(group: argparse._ArgumentGroup, flag: Flag, default: object) -> None:
    """Add an option whose absence leaves the field's own default in force, which the help names."""
    if flag.type is bool:
        switch = argparse.BooleanOptionalAction
        group.add_argument(flag.option, dest=flag.field, action=switch, default=argparse.SUPPRESS, help=flag.help)
        return
    shown = "" if default in (None, "", ()) else f" (default: {default})"
    group.add_argument(
        flag.option,
        dest=flag.field,
        type=flag.type,
        metavar=flag.metavar,
        choices=flag.choices,
        nargs=flag.nargs,
        default=argparse.SUPPRESS,
        help=(flag.help + shown).replace("%", "%%"),
    )


def add_engine_flags(parser: Parser) -> None:
    """All settings of the engine, besides the model's name."""
    defaults = {field.name: field.default for field in dataclasses.fields(EngineConfig)}
    for title, flags in ENGINE_GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            add_flag(group, flag, defaults[flag.field])
    add_flag(group, COMPILE_FIRST, defaults[COMPILE_FIRST.field])


def engine_config(options: argparse.Namespace) -> EngineConfig:
    """The engine's settings from parsed options; ValueError for a value out of range."""
    names = {field.name for field in dataclasses.fields(EngineConfig)}
    return EngineConfig(**{name: value for name, value in vars(options).items() if name in names})


def as_flags(message: str, fields: Sequence[str]) -> str:
    """A message about fields, in the words of the command line: `max_num_seqs=0` becomes `--max-num-seqs 0`."""
    for name in fields:
        message = re.sub(rf"\b{name}=", f"--{name.replace('_', '-')} ", message)
    return message
