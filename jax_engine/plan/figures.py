"""What is asked of an engine, and the figures that a plan answers with."""

from dataclasses import dataclass
from typing import Any

from jax_engine.compilation.memory_check import DeviceMemory
from jax_engine.config import EngineConfig
from jax_engine.plan.chips import Target
from jax_engine.plan.hlo_costs import Costs
from jax_engine.plan.roofline import Load, StepTime

ANALYTIC = "analytic"  # a basis: arithmetic, and perhaps counts of a program for other devices
DEFAULT_INPUT, DEFAULT_OUTPUT = 1024, 128  # tokens, as those of `bench serve`


@dataclass(frozen=True)
class Question:
    """What is asked of an engine."""

    config: EngineConfig  # `model` is a folder
    model_name: str
    target: Target
    max_num_seqs: int | None = None  # that must fit at once, as asked for; None: one
    input_len: int = DEFAULT_INPUT
    output_len: int = DEFAULT_OUTPUT


@dataclass(frozen=True)
class CompiledProgram:
    """A step program as the compiler made it; bytes are those of one device."""

    program: str
    rows: int
    predicted_bytes: int  # of its arguments, by arithmetic
    cache_bytes: int  # of that cache
    seconds: float  # tracing, and compiling or finding what an earlier compile said
    argument_bytes: int  # with the cache that it was compiled with
    temporary_bytes: int
    code_bytes: int
    costs: Costs

    @property
    def taken_bytes(self) -> int:
        """All but the cache."""
        return self.argument_bytes - self.cache_bytes + self.temporary_bytes + self.code_bytes


@dataclass(frozen=True)
class PlannedStep:
    """A step of the load: how long it takes at least, and what it does on one device, attention included."""

    program: str
    load: Load
    flops: float
    moved_bytes: float
    sent_bytes: float
    collectives: dict[str, float]  # how often each runs
    time: StepTime | None  # None: of a device without figures


@dataclass(frozen=True)
class Bounds:
    """What no request or server can beat. Seconds; tokens a second are of all replicas."""

    ttft: float  # of a prompt alone
    tpot: float  # at full concurrency
    output_tokens_per_second: float
    requests_at_once: int  # of one replica


@dataclass(frozen=True)
class Plan:
    """What is known of an engine on its devices."""

    model: str
    device: str
    devices: str  # in words
    strategy: str
    mesh: str
    dtype: str
    basis: str  # what figures are taken from: a compiler for such devices, or ANALYTIC
    replicas: int  # engines that the devices have room for
    memory: DeviceMemory
    usable_bytes: int
    num_pages: int
    max_model_len: int
    max_num_seqs: int
    sequences: dict[int, int]  # that fit, by their context
    compiled: tuple[CompiledProgram, ...]
    steps: dict[str, PlannedStep]
    bounds: Bounds | None
    problems: tuple[str, ...]  # why it does not fit
    remedies: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def binds(self) -> str:
        """What to have more of."""
        if not self.fits:
            return "memory"
        decode = self.steps.get("decode")
        return decode.time.binds if decode is not None and decode.time is not None else "not known"


def as_json(plan: Plan) -> dict[str, Any]:
    """A plan in plain types; seconds, bytes, and operations a device."""
    memory = plan.memory
    return {
        "model": plan.model, "device": plan.device, "strategy": plan.strategy, "mesh": plan.mesh, "dtype": plan.dtype,
        "basis": plan.basis, "replicas": plan.replicas, "fits": plan.fits, "binds": plan.binds,
        "problems": list(plan.problems), "remedies": list(plan.remedies), "notes": list(plan.notes),
        "max_model_len": plan.max_model_len, "max_num_seqs": plan.max_num_seqs,
        "memory": {
            "usable": plan.usable_bytes, "weights": memory.weights, "state": memory.state,
            "temporaries": memory.temporaries, "page": memory.page, "page_tokens": memory.page_tokens,
            "num_pages": plan.num_pages, "kv_cache": plan.num_pages * memory.page,
        },
        "sequences_by_context": {str(length): count for length, count in plan.sequences.items()},
        "compiled": [
            {
                "program": one.program, "seconds": one.seconds, "arguments": one.argument_bytes,
                "temporaries": one.temporary_bytes, "code": one.code_bytes, "predicted_arguments": one.predicted_bytes,
            }
            for one in plan.compiled
        ],
        "steps": {name: _step_json(step) for name, step in plan.steps.items()},
        "bounds": None if plan.bounds is None else {
            "ttft": plan.bounds.ttft, "tpot": plan.bounds.tpot,
            "output_tokens_per_second": plan.bounds.output_tokens_per_second,
            "requests_at_once": plan.bounds.requests_at_once,
        },
    }  # fmt: skip


def _step_json(step: PlannedStep) -> dict[str, Any]:
    seconds = step.time and {
        "compute": step.time.compute, "memory": step.time.memory, "communication": step.time.communication,
        "total": step.time.total, "binds": step.time.binds,
    }  # fmt: skip
    return {
        "program": step.program, "sequences": step.load.num_sequences, "new_tokens": step.load.new_tokens,
        "past_tokens": step.load.past_tokens, "flops": step.flops, "moved_bytes": step.moved_bytes,
        "sent_bytes": step.sent_bytes, "collectives": step.collectives, "seconds": seconds,
    }  # fmt: skip
