"""A model over several devices gives the tokens that it gives on one, and talks no more than it must.

What runs on eight devices does so in a child process over eight that the CPU pretends to be.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh
from tiny_engine import TINY, core_request, run_requests

from jax_engine.config import EngineConfig
from jax_engine.core_client import InProcessCore
from jax_engine.models.config import ModelConfig
from jax_engine.models.registry import resolve_model
from jax_engine.placed_model import PlacedModel, StateSize
from jax_engine.sampler import SamplingMode
from jax_engine.sharding import make_mesh, place
from jax_engine.sharding_rules import read_strategy, strategy_of
from jax_engine.step_batch import BatchLayout, Bucket
from jax_engine.strategies import MESH_AXES, STRATEGIES, Strategy

pytestmark = pytest.mark.timeout(1200)  # a dozen engines on eight devices, in one child of one fixture

# Two key and value heads: over four and eight devices, several hold the same one.
HF = TINY | {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 4, "vocab_size": 104}
MODELS = {"even": HF, "uneven": HF | {"vocab_size": 101}, "tied": HF | {"tie_word_embeddings": True}}
MODELS["windows"] = HF | {
    "architectures": ["Qwen2ForCausalLM"],
    "use_sliding_window": True,
    "sliding_window": 10,
    "max_window_layers": 1,
}
RUNS = [("even", size, scan) for size in (2, 4, 8) for scan in (False, True)] + [
    ("uneven", 4, True),
    ("tied", 4, True),
    ("windows", 2, True),
]
COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


def tokens_of(folder: Path, **settings: Any) -> dict[str, list[int]]:
    """What five greedy and five seeded requests, together in the engine, are given."""
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": 8, "max_model_len": 64}
    config = EngineConfig(model=str(folder), load_format="dummy", compilation_cache_dir="", **limits, **settings)
    core = InProcessCore(config)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 100, rng.integers(1, 30)).tolist() for _ in range(10)]
    greedy = [core_request(f"greedy {i}", prompt, 12) for i, prompt in enumerate(prompts[:5])]
    drawn = {"temperature": 1.0, "top_p": 0.9, "top_k": 20}
    seeded = [core_request(f"seeded {i}", prompt, 12, prng_key=(i, 3), **drawn) for i, prompt in enumerate(prompts[5:])]
    tokens = run_requests(core, greedy + seeded)
    assert core.stats().loaded_pages_total > 0 or "kv_offloading_size" not in settings
    core.shutdown()
    return tokens


def compile_step(
    hf: dict[str, Any],
    mesh: Mesh | None,
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
        mesh=mesh,
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


def report(folder: str) -> None:
    """Everything that needs eight devices, as JSON on standard output."""
    tokens: dict[str, Any] = {}
    for name, hf in MODELS.items():
        (Path(folder) / name).mkdir()
        (Path(folder) / name / "config.json").write_text(json.dumps(hf))
        tokens[name] = tokens_of(Path(folder) / name)
    for name, size, scan in RUNS:
        tokens[f"{name} {size} {scan}"] = tokens_of(Path(folder) / name, tensor_parallel_size=size, scan_layers=scan)
    # Ten pages of 2 KiB on each of four devices, and a hundred of all four parts in host memory.
    offloading = {"kv_cache_memory_bytes": 10 * 2048, "kv_offloading_size": 100 * 4 * 2048 / 2**30}
    tokens["offloaded"] = tokens_of(
        Path(folder) / "even", tensor_parallel_size=4, kv_offloading_load="always", **offloading
    )
    mesh = make_mesh(STRATEGIES["tensor"].mesh_shape(8), jax.devices())
    counted = {
        f"{layers} {scan}": collectives(
            compile_step(HF | {"num_hidden_layers": layers}, mesh, scan=scan, mode=SamplingMode.GREEDY)
        )
        for layers, scan in ((1, False), (4, False), (4, True))
    }
    sampling = collectives(compile_step(HF, mesh, scan=True, mode=SamplingMode.SAMPLE))
    counted["loop"] = collectives(compile_step(HF, mesh, scan=True, mode=SamplingMode.GREEDY, num_steps=4))
    print(json.dumps({"tokens": tokens, "collectives": counted, "sampling": sampling}))


def run_child(script: str, *arguments: str, **environment: str) -> Any:
    """What a child process prints, as JSON; it finds this module and the tiny engine's."""
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent / "engine")])
    command = [sys.executable, "-c", f"import test_tensor_parallel as tests; {script}", *arguments]
    settings = {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"} | environment
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | settings)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory: pytest.TempPathFactory) -> Any:
    flags = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"}
    return run_child("import sys; tests.report(sys.argv[1])", str(tmp_path_factory.mktemp("models")), **flags)


@pytest.mark.parametrize(("name", "size", "scan"), RUNS)
def test_tokens_are_those_of_one_device(eight_devices, name, size, scan):
    """Greedy and seeded, heads whole and shared, vocabulary split or, where it is uneven, whole on each device."""
    assert eight_devices["tokens"][f"{name} {size} {scan}"] == eight_devices["tokens"][name]


def test_pages_that_were_in_host_memory_are_those_of_each_device(eight_devices):
    assert eight_devices["tokens"]["offloaded"] == eight_devices["tokens"]["even"]


def test_a_layer_sums_over_the_devices_twice(eight_devices):
    """After attention and after the feed-forward; the embedding sums once more, and the likeliest token is gathered:
    on a CPU, where it is found by blocks, the block too.
    """
    counted = eight_devices["collectives"]
    assert counted["1 False"] == {"all-gather": 3, "all-reduce": 2 + 1}
    assert counted["4 False"] == {"all-gather": 3, "all-reduce": 4 * 2 + 1}
    assert counted["4 True"] == counted["1 False"]


def test_a_loop_over_steps_sums_as_a_step_does(eight_devices):
    """What an iteration hands to the next stays where it lies."""
    assert eight_devices["collectives"]["loop"] == eight_devices["collectives"]["4 True"]


def test_sampling_moves_the_logits_once(eight_devices):
    """From a share of the vocabulary of all rows to a share of the rows: the draw's many sums then stay at home.

    Beside these there are three sums of flags, for what any row asks; and on a CPU alone, whose likeliest candidates
    XLA's top-k takes from all rows, one gather.
    """
    counted = eight_devices["sampling"]
    assert counted["all-to-all"] == 1
    assert counted.get("collective-permute", 0) == 0
    assert counted["all-reduce"] + counted.get("all-gather", 0) <= 2 + 1 + 3 + 3 + 1


def tpu_report() -> None:
    """One step of a small model over eight v6e chips that are not here, as JSON on standard output."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x4").devices
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "head_dim": 128}
    hf = HF | sizes | {"num_key_value_heads": 8, "num_hidden_layers": 8, "vocab_size": 4096}
    mesh = make_mesh(STRATEGIES["tensor"].mesh_shape(8), devices)
    compiled = compile_step(hf, mesh, scan=True, mode=SamplingMode.GREEDY, platform="tpu", dtype="bfloat16")
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


def placed(size: int, **changes: Any):
    return place(ModelConfig.from_hf(HF | changes), AbstractMesh((1, 1, 1, size), MESH_AXES))


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (3, {}, r"splits heads over tensor, and 3 devices do not divide the model's heads \(8\); .* are 1, 2, 4, 8$"),
        (
            4,
            {"intermediate_size": 50},
            r"do not divide the model's mlp \(50\); .*8 heads, 2 kv_heads, 50 mlp are 1, 2$",
        ),
        (4, {"num_attention_heads": 12, "num_key_value_heads": 6}, r"do not divide the model's kv_heads \(6\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(size, changes, message):
    with pytest.raises(ValueError, match=message):
        placed(size, **changes)


def test_heads_are_shared_only_by_more_devices_than_there_are_heads():
    assert [placed(size).kv_head_copies for size in (1, 2, 4, 8)] == [1, 1, 2, 4]


def test_an_uneven_vocabulary_stays_whole():
    assert placed(8).weights.mesh_axes("vocab") == ("tensor",)
    assert placed(8, vocab_size=101).weights.mesh_axes("vocab") == ()


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
    assert fitted.kv_head_copies == 2


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
        ("mesh = 3", r"mesh=3 must be a mesh axis, or a list"),
        ("[weights]\nmlp = ['tensor', 'tensor']", "names a mesh axis twice"),
        ("heads = 'tensor'", r"'heads' is no key of a strategy; those are name, mesh, weights"),
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
        ({"enable_expert_parallel": True}, "enable_expert_parallel=True is not supported"),
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
