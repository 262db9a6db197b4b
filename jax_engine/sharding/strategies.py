"""Sharding strategies as data: which mesh axes each logical axis of a model's arrays is split over. Needs no JAX.

Logical axes are names for the dimensions of arrays. Those of weights are on the parameters (see `models/layers.py`),
those of a step's other arrays are:

- `tokens`: rows of the residual stream between a layer's blocks, and in its norms
- `block_tokens`: rows within a block, where they meet its weights
- `embed`: what the residual stream has of each row
- `pages`: of the cache; by `page_rule`, each sequence's are spread over their devices or all on one of them
- `heads`, `kv_heads`: of attention, the latter also of the cache's pages
- `output_heads`: of what attention gives, as the projection behind it takes it
- `mlp`, `vocab`: what the feed-forward and the head make of each row
- `experts`: of a mixture; each device puts all rows through its own
- `cache_layers`: the layers of the cache's pages; with the weights' `layers`, of a pipeline's stages (`in_stages`)

What a strategy does not say of those from `embed` on is as with the weights, other than those that it gathers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isqrt, prod

from jax_engine.kv_cache.page_partitions import PAGE_RULES

MESH_AXES = ("data", "stage", "expert", "tensor")
WEIGHT_AXES = ("vocab", "embed", "heads", "kv_heads", "experts", "mlp", "layers")
ACTIVATION_AXES = (
    "tokens",
    "block_tokens",
    "embed",
    "heads",
    "kv_heads",
    "output_heads",
    "experts",
    "mlp",
    "vocab",
    "pages",
    "cache_layers",
)

Axes = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Strategy:
    """A table from logical axes to the mesh axes they are split over; an axis that is not in it is whole everywhere.

    Of one array, a mesh axis splits one dimension only: that whose logical axis comes first in the table.

    Raises:
        ValueError: an axis is unknown, or there is no mesh.
    """

    name: str
    weights: Axes
    activations: Axes = field(default_factory=dict)
    # Mesh axes that the devices are divided between, in parts as equal as can be, the last of them the largest.
    mesh: tuple[str, ...] = ("tensor",)
    # Logical axes of weights that are made whole just before a layer is run.
    gathers: tuple[str, ...] = ()
    page_rule: str = PAGE_RULES[0]  # of PAGE_RULES, where `activations` has `pages`

    def __post_init__(self) -> None:
        for what, table, known in (
            ("weights", self.weights, WEIGHT_AXES),
            ("activations", self.activations, ACTIVATION_AXES),
        ):
            for logical, mesh_axes in table.items():
                if logical not in known:
                    raise ValueError(
                        f"sharding strategy {self.name!r}: {what} has an unknown axis {logical!r}; known are "
                        f"{', '.join(known)}"
                    )
                self._check_mesh_axes(f"{what}.{logical}", mesh_axes)
        for logical in self.gathers:
            if logical not in self.weights:
                raise ValueError(
                    f"sharding strategy {self.name!r}: gathers names {logical!r}, which weights do not split, but "
                    f"{', '.join(self.weights) or 'nothing'}"
                )
        if self.page_rule not in PAGE_RULES:
            raise ValueError(
                f"sharding strategy {self.name!r}: page_rule={self.page_rule!r} must be one of {', '.join(PAGE_RULES)}"
            )
        self._check_mesh_axes("mesh", self.mesh)
        over = self.weights.get("layers", ()), self.activations.get("cache_layers", ())
        if over not in (((), ()), (("stage",), ("stage",))):
            raise ValueError(
                f"sharding strategy {self.name!r}: weights.layers and activations.cache_layers must both be over "
                f"['stage'], or neither be there: a stage has the pages of its own layers"
            )
        if not self.mesh:
            raise ValueError(f"sharding strategy {self.name!r}: mesh must name at least one of {', '.join(MESH_AXES)}")

    def _check_mesh_axes(self, where: str, mesh_axes: tuple[str, ...]) -> None:
        if unknown := [axis for axis in mesh_axes if axis not in MESH_AXES]:
            raise ValueError(
                f"sharding strategy {self.name!r}: {where} names an unknown mesh axis {unknown[0]!r}; a mesh has "
                f"{', '.join(MESH_AXES)}"
            )
        if len(set(mesh_axes)) < len(mesh_axes):
            raise ValueError(f"sharding strategy {self.name!r}: {where} names a mesh axis twice: {list(mesh_axes)}")

    @property
    def all_activations(self) -> Axes:
        """`activations`, with those that are as the weights are."""
        like = {"output_heads": "heads"}
        like |= {axis: axis for axis in ("experts", "vocab", "heads", "kv_heads", "mlp", "embed")}
        derived = {
            axis: self.weights[of]
            for axis, of in like.items()
            if of in self.weights and of not in self.gathers and axis not in self.activations
        }
        return {**self.activations, **derived}

    @property
    def stripes_pages(self) -> bool:
        """Whether each sequence's pages are spread over devices."""
        return "pages" in self.activations and self.page_rule == "striped"

    @property
    def used_axes(self) -> frozenset[str]:
        """The mesh axes that split anything."""
        return frozenset(axis for table in (self.weights, self.activations) for axes in table.values() for axis in axes)

    def mesh_shape(
        self, tensor_parallel_size: int, pipeline_parallel_size: int = 1, *, asked: Mapping[str, int] | None = None
    ) -> dict[str, int]:
        """Devices along each axis of `MESH_AXES`: as `asked`, or as the strategy divides them by default.

        Raises:
            ValueError: what is asked for has another number of devices, or an axis that the strategy splits nothing
                over.
        """
        if asked is None:
            shape = dict.fromkeys(MESH_AXES, 1) | _divided(tensor_parallel_size, self.mesh)
            return shape | ({"stage": pipeline_parallel_size} if pipeline_parallel_size > 1 else {})
        shape = dict.fromkeys(MESH_AXES, 1) | dict(asked)
        devices = tensor_parallel_size * pipeline_parallel_size
        if prod(shape.values()) != devices:
            raise ValueError(
                f"mesh_shape={shape_text(shape)} has {prod(shape.values())} devices, and tensor_parallel_size="
                f"{tensor_parallel_size} times pipeline_parallel_size={pipeline_parallel_size} is {devices}; make them "
                "equal"
            )
        if pipeline_parallel_size > 1 and shape["stage"] != pipeline_parallel_size:
            raise ValueError(
                f"mesh_shape={shape_text(shape)} has {shape['stage']} devices along 'stage' and pipeline_parallel_size="
                f"{pipeline_parallel_size}; make them equal"
            )
        for axis, size in shape.items():
            if size > 1 and axis not in self.used_axes:
                raise ValueError(
                    f"mesh_shape={shape_text(shape)} has {size} devices along {axis!r}, over which the sharding "
                    f"strategy {self.name!r} splits nothing; it uses {', '.join(sorted(self.used_axes))}"
                )
        return shape

    def in_stages(self) -> "Strategy":
        """The same within each stage of a pipeline: layers are split over `stage`, and so is the vocabulary, which all
        stages share.

        Raises:
            ValueError: the strategy uses `stage` for something else, or divides pages.
        """
        if "pages" in self.activations:
            raise ValueError(
                f"sharding strategy {self.name!r} divides pages, and a stage's part of a step needs all of its layers' "
                "pages; leave pipeline_parallel_size out, or use sharding_strategy='tensor'"
            )
        if "stage" in self.used_axes and self.weights.get("layers") != ("stage",):
            raise ValueError(
                f"sharding strategy {self.name!r} splits something else than layers over 'stage', which "
                "pipeline_parallel_size splits layers over; use another axis, or leave pipeline_parallel_size out"
            )
        if self.gathers:
            raise ValueError(
                f"sharding strategy {self.name!r} gathers weights, and a pipeline's stages keep "
                "those of their layers; use another strategy, or leave pipeline_parallel_size out"
            )
        if "stage" in self.used_axes:
            return self

        def staged(table: Axes, layers: str) -> Axes:
            vocabulary = {"vocab": ("stage", *table["vocab"])} if "vocab" in table else {}
            return {layers: ("stage",)} | dict(table) | vocabulary

        return replace(
            self, weights=staged(self.weights, "layers"), activations=staged(self.activations, "cache_layers")
        )


def _divided(size: int, axes: tuple[str, ...]) -> dict[str, int]:
    """A number of devices in factors as equal as can be, the last the largest."""
    first, *rest = axes
    if not rest:
        return {first: size}
    root = isqrt(size) if len(axes) == 2 else round(size ** (1 / len(axes)))
    factor = max(divisor for divisor in range(1, max(root, 1) + 1) if size % divisor == 0)
    return {first: factor} | _divided(size // factor, tuple(rest))


def shape_text(shape: Mapping[str, int]) -> str:
    """A mesh's shape as a flag has it."""
    return ",".join(f"{axis}={size}" for axis, size in shape.items() if size > 1) or f"{MESH_AXES[-1]}=1"


_BY_TENSOR: Axes = dict.fromkeys(("vocab", "heads", "kv_heads", "mlp"), ("tensor",))
# Whole experts on each device along `expert`; all else as by `tensor`, over both. Of an expert's weights, `mlp` is left
# to be split over `tensor` alone.
_BY_EXPERT: Axes = {"experts": ("expert",)} | dict.fromkeys(_BY_TENSOR, ("expert", "tensor"))
_BY_BOTH = ("tensor", "data")
_BY_ALL: Axes = dict.fromkeys(("vocab", "mlp"), ("data", "tensor"))
STRATEGIES: Mapping[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        # Megatron (arXiv 1909.08053): two sums over devices a layer, after attention and after the feed-forward.
        Strategy("tensor", weights=_BY_TENSOR),
        # Its sequence parallelism (arXiv 2205.05198): each sum in two halves, with rows split in between.
        Strategy("tensor_sequence", weights=_BY_TENSOR, activations={"tokens": ("tensor",)}),
        # ZeRO's third stage (arXiv 1910.02054): rows are split, weights come to them layer by layer. Attention is by
        # heads, as in DeepSpeed-Ulysses (arXiv 2309.14509), since a row's keys are of all rows before it.
        Strategy(
            "fully_sharded",
            weights={"vocab": ("tensor",), "embed": ("tensor",)},
            activations=dict.fromkeys(("tokens", "block_tokens", "heads", "kv_heads"), ("tensor",)),
            gathers=("embed",),
        ),
        # Weights stay and are split both ways (arXiv 2211.05102, 2D weight-stationary); heads over all devices.
        Strategy(
            "tensor_2d",
            weights={**_BY_TENSOR, "embed": ("data",)},
            activations={"heads": _BY_BOTH, "kv_heads": _BY_BOTH},
            mesh=("data", "tensor"),
        ),
        # GShard's placement (arXiv 2006.16668), with the rows everywhere: the same two sums a layer as of tensor.
        Strategy("expert", weights=_BY_EXPERT, mesh=("expert",)),
        # A sequence's pages on all devices of `data`: all attend over what they have of it, and their softmaxes are
        # merged, as in ring attention (arXiv 2310.01889) but with a maximum and a sum over devices for the ring.
        # Between, each device has its part of the rows.
        Strategy(
            "context",
            weights=_BY_TENSOR,
            activations=dict.fromkeys(("tokens", "block_tokens", "pages"), ("data",)),
            mesh=("data",),
        ),
        # Each sequence's pages on one device of `data`, which attends for it: with few key and value heads, devices
        # would hold the same ones (DeepSeek-V3's serving, arXiv 2412.19437). The feed-forward is over all devices.
        Strategy(
            "data_attention",
            weights={**_BY_TENSOR, **_BY_ALL},
            activations={"pages": ("data",)},
            mesh=("data",),
            page_rule="owned",
        ),
    )
}


def check_sharding(
    *,
    strategy: str,
    rules: str | None,
    mesh_shape: Mapping[str, int] | None,
    sizes: tuple[int, int],
    expert_parallel: bool,
    scan_layers: bool | None,
) -> None:
    """Check the settings of an `EngineConfig` against each other; `sizes` are its tensor and pipeline parallel ones.

    Raises:
        ValueError: a strategy is unknown or not supported, or the mesh has another number of devices.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"sharding_strategy={strategy!r} must be one of {', '.join(STRATEGIES)}")
    if rules is not None and strategy != "tensor":
        raise ValueError(
            f"sharding_rules={rules!r} and sharding_strategy={strategy!r} both say how the model is split; leave one "
            "of them out"
        )
    if sizes[1] > 1 and scan_layers is False:
        raise ValueError(
            f"scan_layers=False unrolls the layers, and pipeline_parallel_size={sizes[1]} stacks them to divide them "
            "between its stages; leave scan_layers out"
        )
    if expert_parallel and (rules is not None or strategy not in ("tensor", "expert")):
        asked = f"sharding_strategy={strategy!r}" if rules is None else f"sharding_rules={rules!r}"
        raise ValueError(
            f"enable_expert_parallel=True and {asked} both say how the model is split; leave one of them out"
        )
    for axis, size in (mesh_shape or {}).items():
        if axis not in MESH_AXES or isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(
                f"mesh_shape has {axis}={size!r}; it must give a number of devices, 1 or more, to some of "
                f"{', '.join(MESH_AXES)}"
            )
    if rules is None:
        known = STRATEGIES[strategy_name(strategy, expert_parallel=expert_parallel)]
        (known.in_stages() if sizes[1] > 1 else known).mesh_shape(*sizes, asked=mesh_shape)


def strategy_name(asked: str, *, expert_parallel: bool) -> str:
    """The name of the strategy that settings ask for."""
    return "expert" if expert_parallel else asked
