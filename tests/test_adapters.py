"""Adapters beside the weights give what they give merged into them: alone and mixed in a batch. Over several
devices: `test_sharded_answers.py`.

The reference is `transformers` on a checkpoint whose weights the test has added the adapter's product to.
"""

from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from adapters import ADAPTABLE, write_adapter, write_base, write_merged
from slow_adapters import slow_adapter
from tiny_engine import core_request, run_requests

from jax_engine.adapters.adapter_store import AdapterStore
from jax_engine.config import EngineConfig
from jax_engine.core.core_client import InProcessCore
from jax_engine.core.messages import Add, CoreRequest
from jax_engine.execution.step_batch import BatchLayout, Bucket
from jax_engine.execution.step_program import run_model
from jax_engine.loading.loader import load_config, load_leaves
from jax_engine.lora_request import LoRARequest
from jax_engine.models.adapters import NO_ADAPTER, AdapterShape
from jax_engine.models.kv_pages import KVPages, SequenceTable
from jax_engine.sampling.sampler import SamplingMode
from jax_engine.sharding.placed_model import PlacedModel, StateSize

PROMPTS = [[5, 17, 80, 3, 3, 41, 9], [60, 2, 77], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]
NUM_TOKENS = 10
SETTINGS: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "block_size": 8,
    "max_model_len": 64,
    "compilation_cache_dir": "",
    "enable_lora": True,
    "max_loras": 2,  # and there are three
    "max_lora_rank": 16,
}


class Family:
    """A base model, adapters of it of several kinds, and the model with each of them merged."""

    def __init__(self, folder: Path) -> None:
        self.base = write_base(folder / "base")
        paths = [
            write_adapter(folder / "all", rank=4, seed=1, alpha=8),
            write_adapter(folder / "attention", rank=16, seed=2, targets=("q_proj", "v_proj"), use_rslora=True),
            write_adapter(folder / "feed forward", rank=9, seed=3, targets=("down_proj", "up_proj"), layers=(1,)),
        ]
        self.adapters = [LoRARequest(Path(path).name, 1 + index, path) for index, path in enumerate(paths)]
        self.merged = [self.base, *(write_merged(folder / f"merged {path[-5:]}", self.base, path) for path in paths)]

    def requests(self) -> list[CoreRequest]:
        """Each prompt with no adapter and with each of them, named `ADAPTER PROMPT`."""
        return [
            core_request(f"{number} {index}", prompt, NUM_TOKENS, lora=lora)
            for index, prompt in enumerate(PROMPTS)
            for number, lora in enumerate([None, *self.adapters])
        ]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def references(family: Family) -> list[transformers.PreTrainedModel]:
    return [
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in family.merged
    ]


@pytest.fixture(scope="module")
def expected(references: list[transformers.PreTrainedModel]) -> dict[str, list[int]]:
    """The greedy tokens of `Family.requests`."""
    tokens = {}
    for number, model in enumerate(references):
        for index, prompt in enumerate(PROMPTS):
            ids = list(prompt)
            for _ in range(NUM_TOKENS):
                with torch.no_grad():
                    ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            tokens[f"{number} {index}"] = ids[len(prompt) :]
    answers = [[tokens[f"{number} {index}"] for index in range(len(PROMPTS))] for number in range(4)]
    assert all(one != other for one, other in combinations(answers, 2)), "adapters that change nothing show nothing"
    return tokens


def tokens_of(base: Path, requests: list[CoreRequest], **changes: Any) -> dict[str, list[int]]:
    core = InProcessCore(EngineConfig(model=str(base), **(SETTINGS | changes)))
    tokens = run_requests(core, requests)
    core.shutdown()
    return tokens


@pytest.mark.parametrize(
    "changes",
    [{}, {"scan_layers": True, "num_scheduler_steps": 4, "max_loras": 1}],
    ids=str,
)
def test_a_mixed_batch_gives_each_request_the_tokens_of_its_merged_model(family, expected, changes):
    """More adapters than slots and host places, of several ranks, scales and targets, some without one beside them."""
    assert tokens_of(family.base, family.requests(), **changes) == expected


def place(base: Path, adapters: AdapterShape | None, *, scan_layers: bool = False) -> PlacedModel:
    config, model_class = load_config(base)
    sizes: dict[str, Any] = {"dtype": jnp.float32, "page_size": 8, "scan_layers": scan_layers, "adapters": adapters}
    return PlacedModel.of(model_class, config, platform="cpu", mesh=None, attention_backend="xla", **sizes)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_logits_are_those_of_the_merged_model(family, references, scan):
    placed = place(family.base, AdapterShape(3, 16), scan_layers=scan)
    leaves = load_leaves(placed.structure, family.base)
    store = AdapterStore(placed, max_rank=16, max_adapters=3)
    for slot, lora in enumerate(family.adapters):
        leaves = store.write(leaves, 2 - slot, store.values(lora))
    tokens = jnp.asarray([token for prompt in PROMPTS for token in prompt] + [0] * 2, jnp.int32)
    starts = np.cumsum([0, *map(len, PROMPTS)]).astype(np.int32)
    tables = jnp.arange(6, dtype=jnp.int32).reshape(1, 3, 2)

    @jax.jit
    def logits_with(slots: jax.Array) -> jax.Array:
        model = placed.structure.merge(leaves)
        lengths = jnp.diff(jnp.asarray(starts))
        table = SequenceTable.build(tables, jnp.asarray(starts), lengths, jnp.int32(0), num_tokens=len(tokens))
        cache = KVPages.zeros(placed.geometry.shape(6), jnp.float32)
        return model.compute_logits(run_model(model, tokens, cache, table.with_adapters(slots, 3), None)[1])

    for slots in ([2, 0, 1], [NO_ADAPTER, 2, NO_ADAPTER], [1, 1, 0]):
        logits = np.asarray(logits_with(jnp.asarray(slots, jnp.int32)))
        for index, (prompt, slot) in enumerate(zip(PROMPTS, slots, strict=True)):
            with torch.no_grad():
                reference = references[3 - slot if slot >= 0 else 0](torch.tensor([prompt])).logits[0].numpy()
            np.testing.assert_allclose(logits[starts[index] : starts[index + 1]], reference, atol=1e-4)


def test_nothing_compiles_when_adapters_come_and_go(family, expected, caplog):
    """The first ones have their programs, as those have that take their slots from others. With rows in blocks, there
    is one step program.
    """
    core = InProcessCore(EngineConfig(model=str(family.base), **(SETTINGS | {"deterministic": True})))
    run_requests(core, [core_request("warm", PROMPTS[0], 2)])
    core.wait_until_compiled()
    with jax.log_compiles():
        assert run_requests(core, family.requests()) == expected
    assert [record.getMessage() for record in caplog.records if "ompil" in record.getMessage()] == []
    core.shutdown()


def test_a_slow_disk_holds_up_the_requests_of_its_adapter_alone(family, expected, tmp_path):
    go_on = slow_adapter(family.adapters[0].lora_path, tmp_path / "slow")
    core = InProcessCore(EngineConfig(model=str(family.base), **(SETTINGS | {"deterministic": True})))
    plain, slow = "0 0", "1 0"  # of `expected`
    adapters = {plain: None, slow: LoRARequest("slow", 9, str(tmp_path / "slow")), "2 0": family.adapters[1]}
    core.send(Add([core_request(name, PROMPTS[0], NUM_TOKENS, lora=lora) for name, lora in adapters.items()]))
    tokens: dict[str, list[int]] = {name: [] for name in adapters}

    def run_until_all_of(names: set[str]) -> None:
        while names:
            for output in core.step().outputs:
                tokens[output.request_id] += output.new_token_ids
                names -= {output.request_id} if output.finish_reason is not None else set()

    run_until_all_of({plain, "2 0"})
    assert tokens[slow] == []
    go_on()
    run_until_all_of({slow})
    assert tokens == {name: expected[name] for name in adapters}
    core.shutdown()


def test_the_memory_of_the_slots_is_in_the_program_that_memory_is_planned_by(family):
    sizes = []
    for adapters in (None, AdapterShape(3, 4)):
        placed = place(family.base, adapters)
        layout = BatchLayout(Bucket(4, 4), 8, 4, num_adapters=adapters.num_slots if adapters else 0)
        step = placed.lower(layout, SamplingMode.GREEDY, StateSize(8, 4, 2)).compile()
        sizes.append(step.memory_analysis().argument_size_in_bytes)
    # A factor has rank 4 for each input and for each output of seven projections of two layers.
    inputs_and_outputs = 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert placed.structure.adapter_bytes == 3 * 4 * 4 * inputs_and_outputs
    assert sizes[1] - sizes[0] == placed.structure.adapter_bytes + 4 * 4  # and a slot for each sequence


def test_an_adapter_of_another_model_is_refused(family, tmp_path):
    store = AdapterStore(place(family.base, AdapterShape(1, 16)), max_rank=16, max_adapters=1)
    other = write_adapter(tmp_path / "wide", rank=2, seed=0, hf=ADAPTABLE | {"intermediate_size": 64})
    with pytest.raises(ValueError, match=r"wide: .*mlp.* is made for 64 values, the model has 48 there"):
        store.load(LoRARequest("wide", 1, other))
    deep = write_adapter(tmp_path / "deep", rank=2, seed=0, hf=ADAPTABLE | {"num_hidden_layers": 5}, layers=(4,))
    with pytest.raises(ValueError, match=r"adapters of model.layers.4.* are not supported, or the model has none"):
        store.load(LoRARequest("deep", 1, deep))
