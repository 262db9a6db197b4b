"""Flags of the commands: vLLM's names, each for one field of `EngineConfig` or `ServerSettings`."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jax_engine.config import (
    DTYPES,
    HASH_ALGORITHMS,
    LOAD_FORMATS,
    OFFLOADING_LOADS,
    QUANTIZATIONS,
    SCHEDULING_POLICIES,
    EngineConfig,
)
from jax_engine.kv_cache.cache_settings import KV_CACHE_DTYPES
from jax_engine.sharding.strategies import STRATEGIES

_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def count(text: str) -> int:
    """A whole number, or one with a unit: k, m, g, t are powers of 1000, and K, M, G, T (also KiB, ...) of 1024."""
    match = _COUNT.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a number such as 4096, 32K, 512M or 2G")
    digits, unit, suffix = match.groups()
    binary = unit.isupper() and (suffix or "").lower() != "b"
    value = float(digits) * (1024 if binary else 1000) ** _POWERS[unit.lower()]
    if not value.is_integer():
        raise ValueError(f"{text!r} is not a whole number")
    return int(value)


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{text!r} is not a JSON object")
    return value


def string_list(text: str) -> tuple[str, ...]:
    """A JSON list of strings."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ValueError(f"{text!r} is not a JSON list of strings such as '[\"*\"]'")
    return tuple(value)


def mesh_shape(text: str) -> dict[str, int]:
    """Devices along mesh axes."""
    shape = {}
    for entry in text.split(","):
        axis, _, size = entry.partition("=")
        if not size.strip().isdecimal():
            raise ValueError(f"{text!r} is not of the form data=2,tensor=4")
        shape[axis.strip()] = int(size)
    return shape


@dataclass(frozen=True)
class Flag:
    """One setting of a command: an option of the command line with the name of its field, in dashes; a key of a
    configuration file; an environment variable. Of type bool, it has a `--no-` form and takes no value.
    """

    field: str
    help: str
    type: Callable[[str], Any] = str  # ValueError for a text that is no such value
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    nargs: str | None = None  # "+": one or more values follow the option, or "*" for an argument; the value is a list
    repeated: bool = False  # the option may be given several times; the value is a list
    short: str | None = None  # such as -i
    required: bool = False
    default: object = None  # what is shown as what its absence means

    @property
    def option(self) -> str:
        return "--" + self.field.replace("_", "-")

    @property
    def names(self) -> tuple[str, ...]:
        """As it may stand on the command line."""
        off = ("--no-" + self.option.removeprefix("--"),) if self.type is bool else ()
        return (*((self.short,) if self.short else ()), self.option, *off)

    @property
    def is_list(self) -> bool:
        return self.repeated or self.nargs is not None

    @property
    def takes_json(self) -> bool:
        return self.metavar == "JSON"

    def value(self, texts: Iterable[str]) -> Any:
        """What the texts given for it mean: one value, or a list of them.

        Raises:
            ValueError: a text that is no such value; the message begins with the text.
        """
        values = [self._one(text) for text in texts]
        return values if self.is_list else values[-1]

    def _one(self, text: str) -> Any:
        if self.choices is not None and text not in self.choices:
            raise ValueError(f"{text!r} must be one of {', '.join(self.choices)}")
        if self.type is bool:
            return boolean(text)
        if self.type in (int, float):
            return plain_number(self.type, text)
        return self.type(text)


def plain_number(kind: Callable[[str], Any], text: str) -> Any:
    """An int or a float."""
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{text!r} is not {what}") from None


def boolean(text: str) -> bool:
    """A switch as a configuration file or a variable has it."""
    values = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if text.lower() not in values:
        raise ValueError(f"{text!r} must be true or false")
    return values[text.lower()]


MODEL_FLAGS = (
    Flag("tokenizer", "folder or Hugging Face name of the tokenizer; the model's own if left out", metavar="PATH"),
    Flag("revision", "branch, tag or commit of a Hugging Face model", metavar="REV"),
    Flag("trust_remote_code", "refused: models are this engine's own, and no code comes with a checkpoint", type=bool),
    Flag("dtype", "type of weights and activations; auto: float32 on CPU, else the checkpoint's", choices=DTYPES),
    Flag(
        "quantization",
        "weights of projections as 8-bit numbers: fp8 or int8, made while they are loaded; activations too, where the "
        "device multiplies these faster; by default as the checkpoint stores them",
        choices=QUANTIZATIONS,
    ),
    Flag(
        "load_format",
        "where weights come from; auto: orbax in a folder of jax-engine convert, else safetensors; dummy: random ones, "
        "for measuring",
        choices=LOAD_FORMATS,
    ),
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
    Flag(
        "kv_cache_dtype",
        "type of keys and values in pages; auto: the model's; of 8 bits, twice or four times as many fit",
        choices=KV_CACHE_DTYPES,
    ),
    Flag(
        "calculate_kv_scales",
        "measure at start, on random tokens, what 8-bit keys and values are scaled by, instead of taking the "
        "checkpoint's scales or none; int8 needs it",
        type=bool,
    ),
    Flag("block_size", "tokens a KV page holds; 8 on CPU, 64 elsewhere", type=int, metavar="TOKENS"),
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
    Flag("max_logprobs", "log-probabilities of a position that a request may ask for; -1: all", type=int, metavar="N"),
    Flag(
        "speculative_config",
        'guess tokens ahead and check several in a step, as JSON: {"method": "ngram", "num_speculative_tokens": 4, '
        '"prompt_lookup_max": 4, "prompt_lookup_min": 2} or {"method": "draft_model", "model": "demo-draft", '
        '"num_speculative_tokens": 4}; answers are the same',
        type=json_object,
        metavar="JSON",
    ),
    Flag(
        "pooler_config",
        'how prompts become vectors, as JSON: {"pooling_type": "MEAN", "normalize": true}; or LAST, CLS',
        type=json_object,
        metavar="JSON",
    ),
    Flag("attention_backend", "attention implementation; auto: the best for the device", metavar="NAME"),
    Flag("scan_layers", "run layers as one loop: quick to compile; by default on a TPU", type=bool),
    Flag("tensor_parallel_size", "devices that share each layer", type=count, metavar="N"),
    Flag("pipeline_parallel_size", "stages of layers, of so many devices each", type=count, metavar="N"),
    Flag("enable_expert_parallel", "whole experts on each device, instead of a part of every expert", type=bool),
    Flag("sharding_strategy", "how devices share the model", choices=tuple(STRATEGIES)),
    Flag("sharding_rules", "a strategy of your own: a TOML file, or module:function", metavar="FILE"),
    Flag("mesh_shape", "devices along each mesh axis: data=2,tensor=4", type=mesh_shape, metavar="AXIS=N,..."),
    Flag("data_parallel_size", "replicas of the engine, each on devices of its own", type=count, metavar="N"),
    Flag(
        "logits_processors",
        "functions that change every step's logits, compiled in: module:function, with commas between several",
        type=lambda text: tuple(filter(None, text.split(","))),
        metavar="NAMES",
    ),
    Flag("deterministic", "bitwise equal results whatever shares the batch; slower; by default not", type=bool),
    Flag("compilation_cache_dir", "where compiled programs are kept between starts; '' keeps none", metavar="DIR"),
    Flag(
        "compiled", "start without compiling, from a folder of jax-engine compile; it is code: trust it", metavar="DIR"
    ),
    Flag("profile_dir", "folder for profiles, which clients may then record; XProf shows them", metavar="DIR"),
    Flag("compile_threads", "step programs compiled at once; else half the cores, 4 at most", type=count, metavar="N"),
)
HOST_FLAGS = (
    Flag("nnodes", "processes that run the engine together, one on each host", type=count, metavar="N"),
    Flag("node_rank", "which of them this is; 0 schedules and answers HTTP", type=count, metavar="K"),
    Flag("master_addr", "address of the host of process 0; TPU pods know it themselves", metavar="ADDRESS"),
    Flag("master_port", "port that process 0 listens on for the others, and the next one", type=int, metavar="PORT"),
    Flag(
        "distributed_timeout_seconds",
        "how long the processes wait for each other at the start",
        type=float,
        metavar="SECONDS",
    ),
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
    "several hosts": HOST_FLAGS,
    "speed": STEP_FLAGS,
}


@dataclass(frozen=True)
class Options:
    """What a command was given, by the names of the flags' fields; nothing stands there for what was left out."""

    values: Mapping[str, Any]
    sources: Mapping[str, str]  # where a value comes from, if not from the command line

    def __getitem__(self, field: str) -> Any:
        """The value; None when it was left out."""
        return self.values.get(field)

    def of(self, fields: Iterable[str]) -> dict[str, Any]:
        """Those of `fields` that were given."""
        return {field: self.values[field] for field in fields if field in self.values}


def with_defaults(flags: Iterable[Flag], settings: type) -> tuple[Flag, ...]:
    """The flags with the defaults of the dataclass whose fields they set, for their help."""
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    return tuple(dataclasses.replace(flag, default=defaults[flag.field]) for flag in flags)


def engine_groups() -> dict[str, tuple[Flag, ...]]:
    """All settings of the engine, besides the model's name."""
    groups = {title: with_defaults(flags, EngineConfig) for title, flags in ENGINE_GROUPS.items()}
    *_, last = groups
    return groups | {last: (*groups[last], *with_defaults([COMPILE_FIRST], EngineConfig))}


def engine_config(options: Options) -> EngineConfig:
    """The engine's settings from a command's options; ValueError for a value out of range."""
    return EngineConfig(**options.of(field.name for field in dataclasses.fields(EngineConfig)))


def as_flags(message: str, fields: Iterable[str], sources: Mapping[str, str] | None = None) -> str:
    """A message about fields, in the words of the command line: `max_num_seqs=0` becomes `--max-num-seqs 0`.

    What was not given on the command line is said to be from where `sources` has it.
    """
    told = []
    for name in fields:
        message, count = re.subn(rf"\b{name}=", f"--{name.replace('_', '-')} ", message)
        if count and sources and name in sources:
            told.append(f"{name.replace('_', '-')} is from {sources[name]}")
    return f"{message} ({'; '.join(told)})" if told else message
