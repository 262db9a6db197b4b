"""Several plans side by side: strategies, mesh shapes, devices. One that is impossible is a row with its reason."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import jax

from jax_engine.config import EngineConfig
from jax_engine.plan.chips import Target
from jax_engine.plan.figures import Plan, Question
from jax_engine.plan.planning import make_plan
from jax_engine.sharding.strategies import STRATEGIES, Strategy, shape_text


@dataclass(frozen=True)
class Impossible:
    """A row of a comparison that has no plan."""

    device: str
    strategy: str
    mesh: str
    reason: str
    by_compiler: bool = False  # which was asked, and refused it: for want of memory, most often


@dataclass(frozen=True)
class Candidate:
    """A row to be: settings that may be impossible, which shows when they are made."""

    target: Target
    strategy: str
    mesh: str
    changes: dict[str, Any]  # of the settings


def compare(question: Question, candidates: Sequence[Candidate]) -> Iterator[Plan | Impossible]:
    """The plan of each candidate, one after another; `question` says the rest."""
    for candidate in candidates:
        try:
            config = replace(question.config, **candidate.changes)
            yield make_plan(replace(question, config=config, target=candidate.target))
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            reason, by_compiler = str(error).strip().partition("\n")[0], not isinstance(error, ValueError)
            yield Impossible(candidate.target.name, candidate.strategy, candidate.mesh, reason, by_compiler)


def candidates_of(
    config: EngineConfig,
    targets: Sequence[Target],
    *,
    strategies: Sequence[str] | None,
    spread: bool = True,
    all_meshes: bool = False,
) -> list[Candidate]:
    """Every strategy on every target: those named, or None for all and a pipeline, and the user's own of
    `config.sharding_rules`.

    With `spread`, an engine takes all devices of a target, else as many as are configured. With `all_meshes`,
    strategies that divide the devices between several mesh axes do so in every way. Over stripes of pages, XLA attends,
    since no kernel does: who serves so must ask for it by name.
    """
    found = []
    own = config.sharding_rules
    for target in targets:
        sizes: dict[str, Any] = dict(parallel_sizes(config, target, spread=spread))
        devices = prod(sizes.values())
        for name in STRATEGIES if strategies is None else strategies:
            changes = sizes | {"sharding_strategy": name, "sharding_rules": None}
            if name in STRATEGIES and STRATEGIES[name].stripes_pages and config.attention_backend == "auto":
                changes["attention_backend"] = "xla"
            shapes = _mesh_shapes(STRATEGIES[name], devices) if all_meshes and name in STRATEGIES else []
            if own is not None:  # a mesh that is asked for is that of the user's own rules
                changes["mesh_shape"] = None
            found += [Candidate(target, name, shape_text(shape), changes | {"mesh_shape": shape}) for shape in shapes]
            found += [] if shapes else [Candidate(target, name, "", changes)]
        if strategies is None and spread and config.pipeline_parallel_size == 1:
            found += [_in_stages(target, stages) for stages in _stage_counts(devices, every=all_meshes)]
        if own is not None:
            found.append(Candidate(target, own, "", sizes))
    return found


def _in_stages(target: Target, stages: int) -> Candidate:
    """A pipeline of stages that share their layers by tensor parallelism."""
    tensor = target.num_devices // stages
    sizes = {"tensor_parallel_size": tensor, "pipeline_parallel_size": stages, "mesh_shape": None}
    mesh = shape_text({"stage": stages, "tensor": tensor})
    return Candidate(target, "pipeline", mesh, sizes | {"sharding_strategy": "tensor", "sharding_rules": None})


def _stage_counts(devices: int, *, every: bool) -> list[int]:
    """How many stages a pipeline of so many devices has in a comparison: two, or `every` number that divides them."""
    counts = [count for count in range(2, devices + 1) if devices % count == 0]
    return counts if every else counts[:1]


def parallel_sizes(config: EngineConfig, target: Target, *, spread: bool) -> dict[str, int]:
    """Devices that share a layer, and stages: as configured, or with `spread` so that they take all of a target."""
    tensor, pipeline = config.parallel_sizes
    if spread and target.num_devices % pipeline == 0:
        tensor = target.num_devices // pipeline
    return {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}


def _mesh_shapes(strategy: Strategy, devices: int) -> list[dict[str, int]]:
    """Every way to divide devices between all mesh axes of a strategy."""
    axes = strategy.mesh
    if len(axes) < 2:
        return []
    sizes = [size for size in range(2, devices + 1) if devices % size == 0]
    return [
        dict(zip(axes, chosen, strict=True)) for chosen in product(sizes, repeat=len(axes)) if prod(chosen) == devices
    ]
