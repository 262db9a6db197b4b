"""A cache whose pages lie on several devices: what is refused, and pages that are copied as wholes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from tiny_engine import TINY

from jax_engine.execution.page_copies import read_page, write_page
from jax_engine.kv_cache.page_partitions import PagePartitions
from jax_engine.models.config import ModelConfig
from jax_engine.models.kv_pages import KVPages
from jax_engine.models.ops import select_ops
from jax_engine.sharding.sharding import Placement, place
from jax_engine.sharding.strategies import MESH_AXES, STRATEGIES, Strategy


def placed(strategy: str, data: int, tensor: int) -> Placement:
    model = ModelConfig.from_hf(TINY | {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 104})
    return place(model, AbstractMesh((data, 1, 1, tensor), MESH_AXES), STRATEGIES[strategy])


def test_a_strategy_says_where_pages_are_and_whose():
    context, owned = placed("context", 4, 2), placed("data_attention", 4, 2)
    assert context.page_partitions == PagePartitions(4, striped=True)
    assert owned.page_partitions == PagePartitions(4, striped=False)
    assert placed("context", 1, 4).page_partitions.count == 1
    # Heads, and what weights each device reads beside the feed-forward, are divided over `tensor` alone.
    assert [owned.weights.num_parts(axis) for axis in ("mlp", "vocab", "heads", "kv_heads")] == [8, 8, 2, 2]
    assert [context.weights.num_parts(axis) for axis in ("mlp", "vocab", "heads", "kv_heads")] == [2, 2, 2, 2]
    assert "pages owned" in owned.describe(ModelConfig.from_hf(TINY))


@pytest.mark.parametrize("strategy", ["context", "data_attention"])
@pytest.mark.parametrize("backend", ["xla", "pallas_gpu_interpret"])
def test_some_backends_attend_over_divided_pages(strategy, backend):
    ops, _ = select_ops(backend, platform="cpu", partition=placed(strategy, 2, 1).activations)
    assert ops.attention_name == backend


def test_an_unknown_page_rule_is_refused():
    with pytest.raises(ValueError, match="page_rule='shared' must be one of striped, owned"):
        Strategy("mine", weights={}, page_rule="shared")


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        ("context", {"backend": "reference"}, "attention_backend='reference' cannot attend over a part .*; use att"),
        ("context", {"backend": "pallas_tpu_interpret"}, "use attention_backend='xla', or a strategy that keeps"),
        ("context", {"deterministic": True}, "deterministic=True .* divides them between devices; use sharding_str"),
        ("data_attention", {"deterministic": True}, "deterministic=True is for caches that every device has all"),
    ],
)
def test_what_divided_pages_cannot_do_is_refused(strategy, options, message):
    placement = placed(strategy, 2, 1)
    given = {"backend": "xla", "deterministic": False} | options
    with pytest.raises(ValueError, match=message):
        select_ops(
            given["backend"],
            platform="cpu",
            partition=placement.activations,
            deterministic=given["deterministic"],
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_page_of_any_partition_is_read_and_written(dtype):
    """The same as of a cache in one part; NaN in other pages does not get in."""
    rng = np.random.default_rng(0)
    data = jnp.asarray(rng.standard_normal((2, 12, 2, 2, 4, 8)), dtype).at[:, 3].set(jnp.nan)
    read, write = (jax.jit(function, static_argnames="num_partitions") for function in (read_page, write_page))
    for page in (0, 5, 11):
        content = read(KVPages(data), page, num_partitions=3)
        np.testing.assert_array_equal(content[0].astype("float32"), data[:, page].astype("float32"))
        target = (page + 7) % 12
        written = write(KVPages(data), target, content, num_partitions=3)
        expected = data.at[:, target].set(data[:, page])
        np.testing.assert_array_equal(written.data.astype("float32"), expected.astype("float32"))
