"""The engine's settings: one frozen object, validated once. The only module that reads environment variables."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from jax_engine.hosts.host_settings import check_hosts
from jax_engine.kv_cache.cache_settings import check_cache_type
from jax_engine.lora_request import split_module
from jax_engine.pooling_params import PoolingParams
from jax_engine.sampling_params import GENERATION_CONFIG_PARAMETERS, SamplingParams, integer, number
from jax_engine.sharding.strategies import check_sharding
from jax_engine.speculation.speculative_config import SpeculativeConfig, check_speculation

DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_SCHEDULER_STEPS = 32  # each keeps a new request waiting
MAX_LOGPROBS = 1024  # beyond it, sorting takes longer than all else that a step does
QUANTIZATIONS = ("fp8", "int8", "compressed-tensors")
LOAD_FORMATS = ("auto", "safetensors", "orbax", "dummy")
SCHEDULING_POLICIES = ("fcfs", "priority", "sjf")
HASH_ALGORITHMS = ("sha256", "xxhash")
OFFLOADING_LOADS = ("auto", "always")
MAX_ADAPTER_SLOTS = 1024
MAX_ADAPTER_RANK = 512
MAX_REPLICAS = 64


ENVIRONMENT_PREFIX = "JAX_ENGINE_"
CACHE_VARIABLE = "JAX_ENGINE_CACHE_DIR"


def environment_settings() -> dict[str, str]:
    """The `JAX_ENGINE_...` variables that stand for flags of the command, each under its whole name."""
    return {
        name: text
        for name, text in os.environ.items()
        if name.startswith(ENVIRONMENT_PREFIX) and name != CACHE_VARIABLE
    }


# XLA's flags that change no program: what is written out of it, and how many devices a CPU pretends to be.
IDLE_XLA_FLAGS = ("--xla_dump", "--xla_force_host_platform_device_count")


def compiler_flags() -> dict[str, str]:
    """The variables that compilers read, their flags in order."""
    texts = {name: os.environ.get(name, "").split() for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    return {
        name: " ".join(sorted(flag for flag in flags if not flag.startswith(IDLE_XLA_FLAGS)))
        for name, flags in texts.items()
    }


def process_environment() -> dict[str, str]:
    """What a child process would inherit."""
    return dict(os.environ)


def set_default_environment(values: Mapping[str, str]) -> None:
    """Set variables that are not set yet, for libraries that read them when they start."""
    for name, text in values.items():
        os.environ.setdefault(name, text)


SHOWN_PREFIXES = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "CUDA_", "NVIDIA_", "HF_", "LD_LIBRARY_PATH", "OMP_")
SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")


def reported_environment() -> dict[str, str]:
    """The variables that change how this program, JAX and its devices behave; of those that may be secret, not what
    they hold.
    """
    shown = {name: text for name, text in sorted(os.environ.items()) if name.startswith(SHOWN_PREFIXES)}
    return {name: "(set)" if any(word in name for word in SECRET_WORDS) else text for name, text in shown.items()}


def default_compilation_cache_dir() -> str:
    """`JAX_ENGINE_CACHE_DIR`, else `jax_engine` in the user's cache folder."""
    base = os.environ.get(CACHE_VARIABLE)
    if base:
        return base
    return str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jax_engine")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything the engine core needs; the caller owns it and nothing edits it afterwards.

    Raises:
        ValueError: a value outside its range; the message names field, value, range and remedy.
    """

    model: str | None = None  # a folder, a Hugging Face name, or None for the built-in demo model
    tokenizer: str | None = None  # None: the model's
    revision: str | None = None
    dtype: str = "auto"  # auto: float32 on CPU, else the checkpoint's
    # fp8, int8: weights of projections in 8 bits, made while they are loaded. None: as the checkpoint says.
    quantization: str | None = None
    load_format: str = "auto"
    seed: int = 0
    # Where the default sampling parameters come from: auto, the model's generation_config.json; vllm, nowhere; or that
    # file in a folder. End-of-sequence ids are the model's own in any case.
    generation_config: str = "auto"
    override_generation_config: dict[str, Any] | None = None  # of these default parameters
    max_model_len: int | None = None  # None: the model's own, or what the pages hold if that is less
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None  # None: max(512, max_num_seqs)
    enable_chunked_prefill: bool = True  # False: each prompt in one step, which max_num_batched_tokens must hold
    long_prefill_token_threshold: int = 0  # tokens of a prompt that a step computes at most; 0: what the budget holds
    # Who runs first: fcfs, in order of arrival; priority, the lowest number first, which also takes slots and pages of
    # higher ones; sjf, the shortest prompt first, aged so that none starves.
    scheduling_policy: str = "fcfs"
    max_num_queued_reqs: int | None = None  # sequences in flight, waiting or running, of a server; None: no bound
    num_scheduler_steps: int = 1  # tokens that a request draws in one step while nothing waits: a loop on the device
    # vLLM's dictionary (see `SpeculativeConfig`): tokens are guessed ahead, and checked several in a step.
    speculative_config: dict[str, Any] | None = None
    block_size: int | None = None  # tokens a page; None: 8 on CPU, 64 elsewhere
    # How vectors are pooled unless a request says otherwise: {"pooling_type": "LAST", "normalize": true}, "dimensions".
    pooler_config: dict[str, Any] | None = None
    max_logprobs: int = 20  # the most that `logprobs` and `prompt_logprobs` may ask for; -1: the whole vocabulary
    gpu_memory_utilization: float = 0.9
    # Of each device. None: from the compiled step's own memory analysis (a fixed default on CPU).
    kv_cache_memory_bytes: int | None = None
    kv_cache_dtype: str = "auto"  # of keys and values in pages; auto: the model's; fp8 is fp8_e4m3
    # Of 8-bit pages: measure at start what keys and values are scaled by, instead of taking a checkpoint's scales or 1.
    calculate_kv_scales: bool = False
    enable_prefix_caching: bool = True  # requests that begin alike share the pages of what they have in common
    prefix_caching_hash_algo: str = "sha256"
    kv_offloading_size: float = 0.0  # GiB of host memory, all devices together, for pages that the device gives up
    swap_space: float = 0.0  # the same in vLLM's older terms: GiB for each device
    kv_offloading_load: str = "auto"  # auto: load a page where that is faster than computing it, as measured
    attention_backend: str = "auto"
    scan_layers: bool | None = None  # None: scanned on a TPU; elsewhere XLA would copy each weight before using it
    tensor_parallel_size: int = 1  # devices that share each layer
    pipeline_parallel_size: int = 1  # stages that the layers are divided between, of tensor_parallel_size devices each
    enable_expert_parallel: bool = False  # whole experts on each device, instead of a part of every expert
    sharding_strategy: str = "tensor"  # how those devices share the model: a name of `strategies.STRATEGIES`
    sharding_rules: str | None = None  # a strategy of one's own in its place: a TOML file, or module:function
    mesh_shape: dict[str, int] | None = None  # devices along each mesh axis; None: as the strategy divides them
    data_parallel_size: int = 1  # replicas of the engine behind one front end, each a core with devices of its own
    # One engine over the devices of several hosts, a process on each: how many, which this one is, and where process 0
    # listens, on this port and the next. Without an address, a TPU pod knows its own.
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int = 29501
    distributed_timeout_seconds: float = 300.0  # that the processes wait for each other at the start
    logits_processors: tuple[str, ...] = ()  # functions, as module:function, that run on every step's logits
    enable_lora: bool = False  # requests may use adapters beside the model's weights
    max_loras: int = 4  # adapters on the device at once, and so in one step
    max_lora_rank: int = 16
    max_cpu_loras: int | None = None  # adapters kept in host memory; None: as many as on the device
    lora_modules: tuple[str, ...] = ()  # adapters that clients of a server may name as a model: NAME=PATH
    deterministic: bool = False  # a request's numbers are the same, bit for bit, whatever shares its steps
    compilation_cache_dir: str | None = None  # None: default_compilation_cache_dir(); "" turns the persistent cache off
    compiled: str | None = None  # folder of executables that `jax-engine compile` has made; None: programs are compiled
    compile_before_ready: bool = False  # every step program before serving, not only the largest
    profile_dir: str | None = None  # folder that start_profile writes into; None: there are no profiles
    compile_threads: int | None = None  # step programs compiled at once; None: half of the cores, 4 at most
    trust_remote_code: bool = False  # nothing but False: there is no remote code that this engine could run

    def __post_init__(self) -> None:
        self._check_switches()
        check_cache_type(self)
        self._check_offloading()
        self._check_adapters()
        choice("dtype", self.dtype, DTYPES)
        choice("quantization", self.quantization, (None, *QUANTIZATIONS))
        choice("load_format", self.load_format, LOAD_FORMATS)
        self._check_sampling()
        integer("seed", self.seed, low=0, high=2**31 - 1, remedy="any fixed number makes unseeded requests repeatable")
        if self.max_model_len is not None:
            integer(
                "max_model_len", self.max_model_len, low=2, high=2**31 - 1, remedy="leave it out for the model's own"
            )
        integer("max_num_seqs", self.max_num_seqs, low=1, high=4096, remedy="64 is the default")
        if self.max_num_batched_tokens is not None:
            integer(
                "max_num_batched_tokens", self.max_num_batched_tokens, low=1, high=2**20, remedy="512 is the default"
            )
            if self.max_num_batched_tokens < self.max_num_seqs:
                raise ValueError(
                    f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                    f"max_num_seqs={self.max_num_seqs}, so that every running sequence can decode in one step; "
                    "raise it or lower max_num_seqs"
                )
        if self.block_size is not None:
            choice("block_size", self.block_size, (8, 16, 32, 64, 128, 256))
        self._check_sharding()
        number(
            "gpu_memory_utilization",
            self.gpu_memory_utilization,
            low=0,
            high=1,
            open_low=True,
            remedy="0.9 is the default",
        )
        if self.compile_threads is not None:
            integer(
                "compile_threads",
                self.compile_threads,
                low=1,
                high=256,
                remedy="leave it out for half of the processor's cores, 4 at most",
            )
        if self.kv_cache_memory_bytes is not None:
            integer(
                "kv_cache_memory_bytes",
                self.kv_cache_memory_bytes,
                low=1,
                high=2**62,
                remedy="leave it out for a default",
            )
        check_hosts(self)
        PoolingParams.of_engine(self.pooler_config)
        self._check_scheduling()

    def _check_switches(self) -> None:
        remedy = "it is how many replicas of the engine this host runs"
        integer("data_parallel_size", self.data_parallel_size, low=1, high=MAX_REPLICAS, remedy=remedy)
        switch("enable_prefix_caching", self.enable_prefix_caching, default=True)
        switch("enable_chunked_prefill", self.enable_chunked_prefill, default=True)
        switch("deterministic", self.deterministic, default=False)
        if self.compiled is not None and (not isinstance(self.compiled, str) or not self.compiled):
            raise ValueError(f"compiled={self.compiled!r} must be a folder that `jax-engine compile` has made")
        if self.trust_remote_code:
            raise ValueError(
                f"trust_remote_code={self.trust_remote_code!r} is refused: a checkpoint's code is for PyTorch, and "
                "models here are this engine's own, in JAX; leave it out: a model that is supported needs none"
            )

    def _check_sharding(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            integer(name, getattr(self, name), low=1, high=1024, remedy="it is how many devices share the model")
        switch("enable_expert_parallel", self.enable_expert_parallel, default=False)
        check_sharding(
            strategy=self.sharding_strategy,
            rules=self.sharding_rules,
            mesh_shape=self.mesh_shape,
            sizes=self.parallel_sizes,
            expert_parallel=self.enable_expert_parallel,
            scan_layers=self.scan_layers,
        )

    def _check_sampling(self) -> None:
        integer(
            "max_logprobs",
            self.max_logprobs,
            low=-1,
            high=MAX_LOGPROBS,
            remedy="20 is the default, -1 the whole vocabulary; every step that is asked for any finds that many",
        )
        if not isinstance(self.generation_config, str) or not self.generation_config:
            raise ValueError(f"generation_config={self.generation_config!r} must be 'auto', 'vllm' or a folder")
        given = self.override_generation_config
        if given is None:
            return
        allowed = ", ".join(GENERATION_CONFIG_PARAMETERS)
        if not isinstance(given, dict) or not set(given) <= set(GENERATION_CONFIG_PARAMETERS):
            raise ValueError(f"override_generation_config={given!r} must be an object whose keys are of {allowed}")
        try:
            SamplingParams(**given)
        except ValueError as error:
            raise ValueError(f"override_generation_config: {error}") from error

    def _check_scheduling(self) -> None:
        choice("scheduling_policy", self.scheduling_policy, SCHEDULING_POLICIES)
        integer(
            "num_scheduler_steps",
            self.num_scheduler_steps,
            low=1,
            high=MAX_SCHEDULER_STEPS,
            remedy="1 is one token a step; more is more throughput for a later first token of new requests",
        )
        if self.deterministic and self.num_scheduler_steps != 1:
            raise ValueError(
                f"num_scheduler_steps={self.num_scheduler_steps} must be 1 with deterministic=True, whose steps "
                "are all the same program; leave one of them out"
            )
        self._check_processors()
        check_speculation(self)
        threshold = self.long_prefill_token_threshold
        integer("long_prefill_token_threshold", threshold, low=0, high=2**31 - 1, remedy="0 is no threshold")
        if threshold and not self.enable_chunked_prefill:
            raise ValueError(
                f"long_prefill_token_threshold={threshold} cuts prompts, and enable_chunked_prefill=False keeps them "
                "whole; drop one of the two"
            )
        if self.max_num_queued_reqs is not None:
            remedy = "leave it out for no bound"
            integer("max_num_queued_reqs", self.max_num_queued_reqs, low=1, high=2**31 - 1, remedy=remedy)
        if self.max_model_len is not None:
            self.check_whole_prompts(self.max_model_len)

    def check_whole_prompts(self, max_model_len: int) -> None:
        """Without chunked prefill, a step must hold the longest sequence: ValueError when `max_model_len` is longer."""
        if not self.enable_chunked_prefill and self.token_budget < max_model_len:
            raise ValueError(
                f"enable_chunked_prefill=False computes every prompt in one step, and max_num_batched_tokens="
                f"{self.token_budget} is less than max_model_len={max_model_len}; raise max_num_batched_tokens to "
                f"{max_model_len}, lower max_model_len, or leave chunked prefill on"
            )

    def _check_processors(self) -> None:
        paths = self.logits_processors
        if isinstance(paths, str):
            raise ValueError(f"logits_processors={paths!r} must be a list of module:function; put it in one")
        object.__setattr__(self, "logits_processors", tuple(paths))  # a list, from JSON
        if paths and self.num_scheduler_steps != 1:
            raise ValueError(
                f"num_scheduler_steps={self.num_scheduler_steps} must be 1 with logits_processors, which see "
                "each token before the next; leave one of them out"
            )

    def _check_adapters(self) -> None:
        switch("enable_lora", self.enable_lora, default=False)
        integer("max_loras", self.max_loras, low=1, high=MAX_ADAPTER_SLOTS, remedy="4 is the default")
        integer("max_lora_rank", self.max_lora_rank, low=1, high=MAX_ADAPTER_RANK, remedy="16 is the default")
        if self.max_cpu_loras is not None:
            remedy = "it must be at least max_loras; leave it out for that many"
            integer("max_cpu_loras", self.max_cpu_loras, low=self.max_loras, high=2**31 - 1, remedy=remedy)
        object.__setattr__(self, "lora_modules", tuple(self.lora_modules))  # another process sends a list
        named = [split_module(module)[0] for module in self.lora_modules]
        if twice := [name for name in named if named.count(name) > 1]:
            raise ValueError(f"lora_modules names {twice[0]!r} twice; give each adapter a name of its own")
        if self.lora_modules and not self.enable_lora:
            raise ValueError(f"lora_modules={self.lora_modules[0]} needs enable_lora=True; set it, or leave them out")

    def _check_offloading(self) -> None:
        choice("prefix_caching_hash_algo", self.prefix_caching_hash_algo, HASH_ALGORITHMS)
        choice("kv_offloading_load", self.kv_offloading_load, OFFLOADING_LOADS)
        for name in ("kv_offloading_size", "swap_space"):
            number(
                name, getattr(self, name), low=0, high=2**20, remedy="it is in GiB, and 0 keeps no pages on the host"
            )
        if self.kv_offloading_size and self.swap_space:
            raise ValueError(
                f"kv_offloading_size={self.kv_offloading_size} and swap_space={self.swap_space} are two names of one "
                "thing; set one of them to 0"
            )
        if self.host_cache_bytes and not self.enable_prefix_caching:
            name = "kv_offloading_size" if self.kv_offloading_size else "swap_space"
            raise ValueError(
                f"{name}={getattr(self, name)} needs enable_prefix_caching=True, since pages in host memory are found "
                "by the prefix they hold; set it, or leave the other out"
            )

    @property
    def speculation(self) -> SpeculativeConfig | None:
        """What `speculative_config` asks for; ValueError for a key or value that it cannot have."""
        return None if self.speculative_config is None else SpeculativeConfig.of(self.speculative_config)

    @property
    def pooling(self) -> PoolingParams:
        """What requests for vectors leave out of theirs."""
        return PoolingParams.of_engine(self.pooler_config)

    @property
    def draft_model(self) -> str | None:
        """What `speculative_config` calls a draft model, if it asks for one."""
        return None if self.speculation is None else self.speculation.model

    @property
    def host_cache_bytes(self) -> int:
        """Host memory for pages, all devices together."""
        return int(2**30 * (self.kv_offloading_size or self.swap_space * prod(self.parallel_sizes)))

    @property
    def parallel_sizes(self) -> tuple[int, int]:
        """Devices that share a layer, and stages of layers; their product is the devices of the engine."""
        return self.tensor_parallel_size, self.pipeline_parallel_size

    @property
    def num_cpu_loras(self) -> int:
        """Adapters kept in host memory."""
        return self.max_cpu_loras or self.max_loras

    @property
    def token_budget(self) -> int:
        """Tokens a step may process, all sequences together."""
        return self.max_num_batched_tokens or max(512, self.max_num_seqs)


def switch(name: str, value: object, *, default: bool) -> None:
    """Raise a ValueError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be true or false; leave it out for {str(default).lower()}")


def choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise a ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, allowed))}")
