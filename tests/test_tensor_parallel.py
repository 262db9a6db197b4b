"""A model over several devices talks no more than its strategy must, and one that does not fit is refused.

Steps compile for eight devices in a child process over eight that the CPU pretends to be. That the tokens are those of
one device is in `test_sharded_answers.py`.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from sharded_engines import HF, MIXTURE

from jax_engine.config import EngineConfig
from jax_engine.core.core_client import InProcessCore
from jax_engine.execution.step_batch import BatchLayout, Bucket
from jax_engine.models.config import ModelConfig
from jax_engine.models.registry import resolve_model
from jax_engine.sampling.sampler import SamplingMode
from jax_engine.sharding.placed_model import PlacedModel, StateSize
from jax_engine.sharding.sharding import make_mesh, place
from jax_engine.sharding.sharding_rules import read_strategy, strategy_of
from jax_engine.sharding.strategies import MESH_AXES, STRATEGIES, Strategy
from jax_engine.sharding.widening import Spread, Widening

# How often each strategy moves a layer's values over the devices, in a step whose rows they divide.
PER_LAYER = {
    # After attention and after the feed-forward.
    "tensor": {"all-reduce": 2},
    # The same in two halves: the sum of a device's rows, and all rows for the next block.
    "tensor_sequence": {"all-reduce": 2, "all-gather": 2},
    # Seven weights; queries, keys and values to their heads, and back.
    "fully_sharded": {"all-gather": 7, "all-to-all": 4},
    # One sum over the other axis for each product (queries, keys and values are one, and the two of the feed-forward)
    # and for each norm; and heads as the output projection takes them.
    "tensor_2d": {"all-reduce": 6, "all-gather": 1},
    # After attention and after the experts, in whatever share of them a device has.
    "expert": {"all-reduce": 2},
    # A softmax's maximum and sums; queries, keys and values of all rows.
    "context": {"all-reduce": 2, "all-gather": 3},
    # Of attention, whose rows are each on one device, and after the feed-forward.
    "data_attention": {"all-reduce": 2},
}
COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


def compile_step(
    hf: dict[str, Any],
    devices: Sequence[jax.Device],
    strategy: str,
    *,
    scan: bool,
    mode: SamplingMode,
    platform: str = "cpu",
    dtype: Any = "float32",
    num_steps: int = 1,
) -> jax.stages.Compiled:
    config = ModelConfig.from_hf(hf)
    placed = PlacedModel.of(
        resolve_model(config.architecture),
        config,
        platform=platform,
        mesh=make_mesh(STRATEGIES[strategy].mesh_shape(8), devices),
        strategy=STRATEGIES[strategy],
        attention_backend="xla",
        dtype=jnp.dtype(dtype),
        page_size=16,
        scan_layers=scan,
    )
    layout = BatchLayout(Bucket(8, 8), page_size=16, num_slots=8)
    return placed.lower(layout, mode, StateSize(num_pages=64, num_slots=8, max_pages=8), num_steps=num_steps).compile()


def collectives(compiled: jax.stages.Compiled) -> dict[str, int]:
    found = COLLECTIVE.findall(compiled.as_text())
    return {name: found.count(name) for name in sorted(set(found))}


def report() -> None:
    """The collectives of each strategy's steps over eight devices, as JSON on standard output."""

    def counted(strategy: str, mode: SamplingMode, *, layers: int, scan: bool, num_steps: int = 1) -> dict[str, int]:
        hf = (MIXTURE if strategy == "expert" else HF) | {"num_hidden_layers": layers}
        return collectives(compile_step(hf, jax.devices(), strategy, scan=scan, mode=mode, num_steps=num_steps))

    greedy = {
        name: [counted(name, SamplingMode.GREEDY, layers=layers, scan=False) for layers in (1, 3)] for name in PER_LAYER
    }
    scanned = counted("tensor", SamplingMode.GREEDY, layers=3, scan=True)
    loop = counted("tensor", SamplingMode.GREEDY, layers=3, scan=True, num_steps=4)
    sampling = {name: counted(name, SamplingMode.SAMPLE, layers=3, scan=True) for name in ("tensor", "fully_sharded")}
    print(json.dumps({"greedy": greedy, "scanned": scanned, "loop": loop, "sampling": sampling}))


def run_child(script: str, *arguments: str, **environment: str) -> Any:
    """What a child process prints, as JSON; it finds this module and the tiny engine's."""
    paths = os.pathsep.join(str(Path(__file__).parent / folder) for folder in ("", "engine", "support"))
    command = [sys.executable, "-c", f"import test_tensor_parallel as tests; {script}", *arguments]
    settings = {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"} | environment
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | settings)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def counted() -> Any:
    flags = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"}
    return run_child("tests.report()", **flags)


@pytest.mark.parametrize("strategy", PER_LAYER)
def test_a_layer_talks_as_its_strategy_says(counted, strategy):
    """A CPU's compiler makes no reduce-scatter: there it is an all-reduce whose result is cut."""
    one, three = counted["greedy"][strategy]
    names = one.keys() | three.keys()
    assert {name: (three[name] - one[name]) / 2 for name in names if three[name] != one[name]} == PER_LAYER[strategy]


def test_beside_its_layers_a_step_sums_the_embedding_and_gathers_the_likeliest_tokens(counted):
    """Those and their values: never the vocabulary."""
    one, _ = counted["greedy"]["tensor"]
    assert one == {"all-reduce": 2 + 1, "all-gather": 1}
    assert counted["scanned"] == one, "a loop over layers has its body once"


def test_a_loop_over_steps_sums_as_a_step_does(counted):
    """What an iteration hands to the next stays where it lies."""
    assert counted["loop"] == counted["scanned"]


def test_sampling_moves_the_logits_once(counted):
    """From a share of the vocabulary of all rows to a share of the rows: the draw's many sums then stay at home.

    Beside these there is a sum of one flag, for whether any row holds tokens back.
    """
    found = counted["sampling"]["tensor"]
    assert found["all-to-all"] == 1
    assert found.get("collective-permute", 0) == 0
    assert found["all-reduce"] + found.get("all-gather", 0) <= 2 + 1 + 1 + 3
    moved = counted["sampling"]["fully_sharded"]["all-to-all"]
    assert moved == PER_LAYER["fully_sharded"]["all-to-all"] + 1, "whatever the strategy"


def tpu_report() -> None:
    """One step of a small model over eight v6e chips that are not here, as JSON on standard output."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x4").devices
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "head_dim": 128}
    hf = HF | sizes | {"num_key_value_heads": 8, "num_hidden_layers": 8, "vocab_size": 4096}
    compiled = compile_step(
        hf, devices, "tensor", scan=True, mode=SamplingMode.GREEDY, platform="tpu", dtype="bfloat16"
    )
    analysis = compiled.memory_analysis()
    assert analysis is not None
    cache = 8 * 64 * 2 * 1 * 16 * 128 * 2
    weights = analysis.argument_size_in_bytes - cache
    figures = {"temporaries": analysis.temp_size_in_bytes, "weights": weights, "cache": cache}
    print(json.dumps({"collectives": collectives(compiled)} | figures))


def test_a_step_compiles_for_chips_that_are_not_here():
    """With the real TPU compiler: the same sums, and no copy of the weights to bring them into another layout."""
    pytest.importorskip("libtpu")
    found = run_child("tests.tpu_report()", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="true")
    assert found["collectives"]["all-reduce"] == 2 + 1
    # Beside the scratch of one layer there may be one copy of the cache, which the XLA form's scatter makes on a TPU.
    assert found["temporaries"] - found["cache"] < found["weights"] / 4


def test_more_devices_than_there_are_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HF))
    with pytest.raises(ValueError, match=r"tensor_parallel_size=4096 must be"):
        EngineConfig(tensor_parallel_size=4096)
    size = len(jax.devices()) + 1
    with pytest.raises(ValueError, match=rf"a mesh of tensor={size} needs {size} devices .* and there are \d+ .*; use"):
        InProcessCore(EngineConfig(model=str(tmp_path), load_format="dummy", tensor_parallel_size=size))


def placed_experts(expert: int, tensor: int, **changes: Any):
    """A mixture over a mesh of so many devices along `expert` and `tensor`."""
    mesh = AbstractMesh((1, 1, expert, tensor), MESH_AXES)
    return place(ModelConfig.from_hf(MIXTURE | changes), mesh, STRATEGIES["expert"])


def test_experts_are_whole_on_their_devices_and_the_rest_is_over_all():
    config = EngineConfig(tensor_parallel_size=8, enable_expert_parallel=True)
    assert strategy_of(config, ModelConfig.from_hf(MIXTURE)) is STRATEGIES["expert"]
    assert STRATEGIES["expert"].mesh_shape(8)["expert"] == 8
    weights = placed_experts(4, 2).weights
    assert weights.spec(("layers", "experts", "embed", "mlp")) == PartitionSpec(None, "expert", None, "tensor")
    assert [weights.num_parts(axis) for axis in ("heads", "vocab", "mlp")] == [8, 8, 8]


@pytest.mark.parametrize(
    ("expert", "tensor", "changes", "message"),
    [
        (4, 1, {"num_experts": 6}, r"over expert, and 4 devices do not divide .* num_experts \(6\); .* 1, 2, 3, 6$"),
        (
            2,
            4,
            {"moe_intermediate_size": 10},
            r"over tensor, and 4 .* moe_intermediate_size \(10\); .* 1, 2, 5, 10$",
        ),
        (8, 1, {"mlp_only_layers": [0], "intermediate_size": 44}, r"8 devices do not divide the model's mlp \(44\)"),
    ],
)
def test_experts_that_do_not_divide_are_refused_with_what_does(expert, tensor, changes, message):
    with pytest.raises(ValueError, match=message):
        placed_experts(expert, tensor, **changes)


def test_a_strategy_that_splits_what_experts_take_whole_is_refused():
    mesh = AbstractMesh((2, 1, 1, 4), MESH_AXES)
    with pytest.raises(ValueError, match=r"'tensor_2d' splits embed, and experts, as Qwen3MoeForCausalLM has them"):
        place(ModelConfig.from_hf(MIXTURE), mesh, STRATEGIES["tensor_2d"])


def test_a_width_that_no_layer_has_divides_nothing():
    """Where every layer has experts, `intermediate_size` is of none."""
    assert placed_experts(8, 1, intermediate_size=44).weights.num_parts("experts") == 8


def placed(size: int, **changes: Any):
    return place(ModelConfig.from_hf(HF | changes), AbstractMesh((1, 1, 1, size), MESH_AXES))


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (16, {}, r"splits heads over tensor, and 16 devices are more than the model's heads \(8\); use at most 8$"),
        (
            4,
            {"intermediate_size": 50},
            r"do not divide the model's mlp \(50\); sizes that fit are 1, 2, 5$",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(size, changes, message):
    with pytest.raises(ValueError, match=message):
        placed(size, **changes)


def test_heads_are_shared_only_by_more_devices_than_there_are_heads():
    assert [placed(size).widening.kv_head_copies for size in (1, 2, 4, 8)] == [1, 1, 2, 4]


@pytest.mark.parametrize(
    ("size", "heads", "kv_heads", "widening"),
    [
        (4, 8, 8, Widening()),
        (4, 12, 6, Widening(2)),  # three on each device, of the same two or of two neighbours
        (4, 6, 2, Widening(2, 1)),  # three query heads of one key are two and two
        (3, 8, 2, Widening(3, 2)),
    ],
)
def test_heads_are_there_as_often_as_it_takes_and_padded(size, heads, kv_heads, widening):
    changes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": 12 * 8}
    fitted = placed(size, **changes)
    assert fitted.widening == widening
    wide = widening.config(ModelConfig.from_hf(HF | changes))
    assert wide.num_attention_heads % size == wide.num_key_value_heads % size == 0


def test_what_is_padded_is_told():
    fitted = placed(4, vocab_size=101, num_attention_heads=6)
    told = fitted.describe(ModelConfig.from_hf(HF | {"vocab_size": 101, "num_attention_heads": 6}))
    assert told.endswith("is there 2 times; query heads padded from 6 to 8; the vocabulary padded from 101 to 104")


def test_heads_of_queries_and_of_keys_lie_alike():
    strategy = Strategy("mine", weights={"heads": ("tensor",)})
    with pytest.raises(ValueError, match=r"splits heads over \['tensor'\] and kv_heads over \[\]; attention needs"):
        place(ModelConfig.from_hf(HF), AbstractMesh((1, 1, 1, 2), MESH_AXES), strategy)


@pytest.mark.parametrize("spread", [Spread(6, 3, padding=1), Spread(2, 1, copies=3), Spread(5, 5, padding=3)], ids=str)
def test_each_part_of_a_wider_dimension_is_that_of_the_whole(spread):
    stored = np.arange(1, 1 + spread.stored, dtype=np.float32)[None]
    whole = np.asarray(spread.widen(jnp.asarray(stored), 1))
    for start, stop in combinations(range(whole.shape[1] + 1), 2):
        first, last = spread.stored_range(start, stop)
        part = spread.fill(stored[:, first:last], 1, start, stop)
        assert part.tolist() == whole[:, start:stop].tolist()
    assert sorted(set(whole[0].tolist()) - {0}) == stored[0].tolist()


RULES = """
mesh = ["data", "tensor"]
[weights]
heads = "tensor"
kv_heads = "tensor"
mlp = ["data", "tensor"]
[activations]
heads = "tensor"
kv_heads = "tensor"
"""


def test_a_strategy_of_ones_own_is_a_file(tmp_path):
    (tmp_path / "mine.toml").write_text(RULES)
    config = EngineConfig(tensor_parallel_size=8, sharding_rules=str(tmp_path / "mine.toml"))
    strategy = strategy_of(config, ModelConfig.from_hf(HF))
    assert (strategy.name, strategy.mesh, strategy.weights["mlp"]) == ("mine", ("data", "tensor"), ("data", "tensor"))
    assert strategy.mesh_shape(8) == {"data": 2, "stage": 1, "expert": 1, "tensor": 4}
    fitted = place(ModelConfig.from_hf(HF), AbstractMesh((2, 1, 1, 4), MESH_AXES), strategy)
    assert [fitted.weights.num_parts(axis) for axis in ("mlp", "heads", "vocab")] == [8, 4, 1]
    assert fitted.widening.kv_head_copies == 2


def test_the_rules_that_are_shown_are_those_that_are_tested():
    shown = (Path(__file__).parents[1] / "jax_engine" / "sharding" / "README.md").read_text()
    assert (Path(__file__).parent / "support" / "hybrid.toml").read_text() in shown


def two_halves(model: ModelConfig, num_devices: int) -> Strategy:
    """A strategy as a function gives it."""
    return Strategy("two halves", weights={"mlp": ("tensor",)}, mesh=("tensor",))


def test_a_strategy_of_ones_own_is_a_function():
    config = EngineConfig(sharding_rules=f"{__name__}:two_halves")
    assert strategy_of(config, ModelConfig.from_hf(HF)).name == "two halves"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("[weights]\nwheels = 'tensor'", r"mine.toml.*weights has an unknown axis 'wheels'; known are vocab, "),
        ("[weights]\nmlp = 'torsor'", r"weights.mlp names an unknown mesh axis 'torsor'; a mesh has data, "),
        ("mesh = []", r"mesh must name at least one of data"),
        ("mesh = 3", r"mesh=3 must be the name of an axis, or a list"),
        ("[weights]\nmlp = ['tensor', 'tensor']", "names a mesh axis twice"),
        ("heads = 'tensor'", r"'heads' is no key of a strategy; those are name, mesh, gathers, page_rule, weights"),
        ("weights = 4", r"weights=4 must be of type dict"),
        ("[weights", r"mine.toml"),
    ],
)
def test_rules_that_mean_nothing_are_refused(tmp_path, rules, message):
    (tmp_path / "mine.toml").write_text(rules)
    with pytest.raises(ValueError, match=message):
        read_strategy(tmp_path / "mine.toml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sharding_strategy": "tonsor"}, "sharding_strategy='tonsor' must be one of tensor"),
        ({"enable_expert_parallel": True}, "is for mixtures of experts, and LlamaForCausalLM has none"),
        (
            {"enable_expert_parallel": True, "sharding_rules": "mine.toml"},
            "enable_expert_parallel=True and sharding_rules='mine.toml' both say how the model is split",
        ),
        ({"mesh_shape": {"tensor": 4}}, "mesh_shape=tensor=4 has 4 devices, and tensor_parallel_size=1 .* is 1"),
        (
            {"mesh_shape": {"data": 2}, "tensor_parallel_size": 2},
            "has 2 devices along 'data', over which the sharding strategy 'tensor' splits nothing",
        ),
        ({"mesh_shape": {"wheels": 2}}, r"mesh_shape has wheels=2; it must give .* to some of data, stage"),
        ({"sharding_rules": "nothing:here"}, "sharding_rules='nothing:here' is no file, and names nothing"),
    ],
)
def test_settings_that_fit_no_mesh_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        strategy_of(EngineConfig(**settings), ModelConfig.from_hf(HF))
