"""What a program costs, counted from its text: small real programs against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from tiny_engine import TINY_MIXTURE, placed_model

from jax_engine.execution.step_batch import BatchLayout, Bucket
from jax_engine.models.config import ModelConfig
from jax_engine.models.experts import EXPERTS_SCOPE
from jax_engine.models.kv_pages import ATTENTION_SCOPE
from jax_engine.plan.hlo_costs import Collective, Costs, group_size, program_costs
from jax_engine.plan.hlo_text import Array, bits, parse_module
from jax_engine.sampling.sampler import SamplingMode
from jax_engine.sharding.placed_model import StateSize


def compiled_text(function, *shapes: tuple[int, ...], dtype: str = "float32") -> str:
    text = jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)).compile().as_text()
    assert text is not None
    return text


def costs_of(function, *shapes: tuple[int, ...], dtype: str = "float32") -> Costs:
    return program_costs(compiled_text(function, *shapes, dtype=dtype))


PRODUCT = 2 * 32 * 64 * 64  # operations of x [32, 64] times a matrix [64, 64]


def test_a_product_is_a_multiplication_and_an_addition_for_each_pair():
    costs = costs_of(lambda x, w: x @ w, (32, 128), (128, 48))
    assert costs.flops == {"f32": 2 * 32 * 128 * 48}
    assert costs.num_bytes == 4 * (32 * 128 + 128 * 48 + 32 * 48)


def test_a_batch_of_products_counts_each():
    costs = costs_of(lambda x, w: jnp.einsum("bij,bjk->bik", x, w), (5, 8, 16), (5, 16, 32))
    assert costs.total_flops == 5 * 2 * 8 * 16 * 32


def scanned(x, weights):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


@pytest.mark.parametrize("layers", [3, 80])
def test_a_loop_counts_as_often_as_it_runs(layers: int):
    """XLA's own analysis counts its body once."""
    assert costs_of(scanned, (32, 64), (layers, 64, 64)).total_flops == layers * PRODUCT


def test_a_loop_reads_of_stacked_weights_a_slice_a_trip():
    """Ten times the layers are ten times the bytes, not a hundred times."""
    few, many = (costs_of(scanned, (32, 64), (layers, 64, 64)).num_bytes for layers in (8, 80))
    assert 8 < many / few < 12
    assert many > 80 * 64 * 64 * 4


def test_loops_in_loops_multiply():
    def nested(x, w):
        return lax.fori_loop(0, 5, lambda _, y: lax.fori_loop(0, 7, lambda _, z: jnp.sin(z @ w), y), x)

    assert costs_of(nested, (32, 64), (64, 64)).total_flops == 5 * 7 * PRODUCT


def test_a_loop_that_ends_by_its_data_counts_once_and_is_named():
    def until_small(x, w):
        search = lax.while_loop(lambda y: jnp.sum(y) > 1, jnp.tanh, x)
        return search @ w

    costs = costs_of(until_small, (32, 64), (64, 64))
    assert costs.total_flops == PRODUCT
    assert len(costs.unknown_loops) == 1 and "while" in costs.unknown_loops[0]


def test_a_loop_over_blocks_of_rows_has_as_many_trips_as_the_step_has_blocks():
    def by_blocks(x, w):
        used = (x[0, 0] > 0).astype("int32") * 5
        return lax.fori_loop(0, used, lambda _, y: scanned(y, w), x)

    text = compiled_text(by_blocks, (32, 64), (3, 64, 64))
    assert program_costs(text, num_blocks=5).total_flops == 5 * 3 * PRODUCT
    assert program_costs(text).total_flops == 3 * PRODUCT


def test_of_two_branches_the_dearer_counts():
    def either(x, w):
        return lax.cond(x[0, 0] > 0, lambda: jnp.sin(x @ w) @ w, lambda: x * 2)

    assert costs_of(either, (32, 64), (64, 64)).total_flops == 2 * PRODUCT


def test_a_fusion_moves_what_it_takes_and_gives_and_nothing_between():
    costs = costs_of(lambda x: jnp.tanh(x * 2 + 1) * jnp.cos(x), (1024, 1024))
    assert costs.num_bytes == 2 * 4 * 1024 * 1024


def test_an_update_in_place_moves_the_update():
    def update(cache, row):
        return lax.dynamic_update_slice(cache, row, (3, 0))

    text = jax.jit(update, donate_argnums=0).lower(jnp.zeros((1000, 64)), jnp.ones((1, 64))).compile().as_text()
    assert program_costs(text).num_bytes < 1000 * 64


@pytest.mark.parametrize("scope", [ATTENTION_SCOPE, EXPERTS_SCOPE])
def test_attention_and_experts_are_left_to_arithmetic(scope: str):
    def layer(x, w):
        with jax.named_scope(scope):
            scores = lax.fori_loop(0, 4, lambda _, y: jnp.tanh(y @ w), x)
        return scores @ w

    assert costs_of(layer, (32, 64), (64, 64)).total_flops == PRODUCT


def test_a_mixtures_program_has_of_its_products_all_but_experts():
    """The router's, of two layers, beside those of a model without experts."""
    placed, model = placed_model(hf=TINY_MIXTURE), ModelConfig.from_hf(TINY_MIXTURE)
    layout, size = BatchLayout(Bucket(4, 4), 8, 4), StateSize(8, 4, 4)
    text = placed.lower(layout, SamplingMode.GREEDY, size).compile().as_text()
    assert text is not None
    attention = 32 * 8 * (4 + 2 + 2) + 4 * 8 * 32
    assert program_costs(text).total_flops == 2 * 4 * (2 * (attention + 32 * 8) + 32 * model.vocab_size)


def test_the_table_before_a_ragged_product_is_no_kernel_of_unknown_work():
    call = '%y = s32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="NAME"}'
    names = ("jit(step)/experts/ragged_dot_general", "ragged-dot-metadata", "jit(step)/mine")
    found = [program_costs(a_program(call.replace("NAME", name))).kernels for name in names]
    assert found == [{}, {}, {"tpu_custom_call": 1.0}]


def a_program(*lines: str, head: str = "HloModule jit_f, num_partitions=8") -> str:
    body = "\n".join(f"  {line}" for line in ("%x = bf16[64,128]{1,0} parameter(0)", *lines))
    return f"{head}\n\nENTRY %main (x: bf16[64,128]) -> bf16[64,128] {{\n{body}\n}}\n"


@pytest.mark.parametrize(
    ("line", "expected", "sent"),
    [
        ("all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%add", Collective("all-reduce", 8, 16384), 2 * 7 / 8),
        ("all-reduce-start(%x), replica_groups={{0,1,2,3},{4,5,6,7}}", Collective("all-reduce", 4, 16384), 2 * 3 / 4),
        ("collective-permute(%x), source_target_pairs={{0,1},{1,2}}", Collective("collective-permute", 2, 16384), 1),
        ("all-to-all(%x), replica_groups={}, dimensions={0}", Collective("all-to-all", 8, 16384), 7 / 8),
        ("all-gather-start(%x), replica_groups=[4,2]<=[8]", Collective("all-gather", 2, 32768), 1),
    ],
)
def test_an_exchange_has_its_group_and_what_a_device_sends(line: str, expected: Collective, sent: float):
    costs = program_costs(a_program(f"ROOT %y = bf16[64,128]{{1,0}} {line}"))
    assert costs.collectives == {expected: 1.0}
    assert costs.sent_bytes == pytest.approx(sent * 64 * 128 * 2)


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ("replica_groups=mesh['axis_0'=1,'axis_1'=8,'axis_2'=1] {'axis_1','axis_2'}, use_global_device_ids=true", 8),
        ("replica_groups=mesh['a'=2,'b'=8] {'b':(2)4}", 4),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups={{0,2,4},{1,3,5}}", 3),
        ("replica_groups={}", 8),
    ],
)
def test_groups_are_read_in_every_form(attributes: str, size: int):
    assert group_size(attributes, 8) == size


def test_a_window_that_slides_over_padding_is_a_plain_product():
    """How a TPU's compiler writes [64, 8192] x [8192, 8, 128]: of eight taps, one is on the input."""
    text = a_program(
        "%a = bf16[64,8192,1]{1,0,2} parameter(1)",
        "%w = bf16[8192,8,128]{2,0,1} parameter(2)",
        "ROOT %y = bf16[64,8,128]{2,0,1} convolution(%a, %w), window={size=8 pad=7_7 rhs_reversal=1}, "
        "dim_labels=bf0_i0o->b0f",
    )
    assert program_costs(text).flops == {"bf16": 2 * 64 * 8192 * 8 * 128}


def test_what_stays_in_a_chips_scratch_memory_moves_nothing():
    text = a_program(
        "%a = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} copy(%x)",
        "ROOT %y = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} add(%a, %a)",
    )
    assert program_costs(text).num_bytes == 64 * 128 * 2


def test_a_slice_on_its_way_to_scratch_memory_is_read_once():
    """Of an asynchronous copy the destination is named first, of any other operation what it is given."""
    copied = "%y = (bf16[64,128]{1,0:S(1)}, bf16[64,128]{1,0}, u32[]{:S(2)}) copy-start(%x)"
    sliced = "%y = ((bf16[64,128]{1,0}), bf16[32,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:32], [0:128]}"
    done = "ROOT %z = bf16[64,128]{1,0:S(1)} copy-done(%y)"
    assert program_costs(a_program(copied, done)).num_bytes == 64 * 128 * 2
    assert program_costs(a_program(sliced, done)).num_bytes == 32 * 128 * 2


@pytest.mark.parametrize("change", ["bitcast", "copy"])
def test_a_weight_seen_in_another_layout_within_a_fusion_is_read_as_far_as_it_is_taken(change: str):
    """A TPU's compiler writes a fusion of its own for that; what is behind it may be a slice, or all of the weight."""
    text = f"""\
HloModule jit_step, is_scheduled=true

%seen (w: s8[4,64,128]) -> s8[4,64,128] {{
  %w = s8[4,64,128]{{2,1,0:T(32,128)(4,1)}} parameter(0)
  ROOT %again = s8[4,64,128]{{2,1,0:T(8,128)(4,1)}} {change}(%w)
}}

%slice (w: s8[4,64,128], i: s32[]) -> s8[1,64,128] {{
  %w = s8[4,64,128]{{2,1,0:T(32,128)(4,1)}} parameter(0)
  %i = s32[] parameter(1)
  %tiled = s8[4,64,128]{{2,1,0:T(8,128)(4,1)}} fusion(%w), kind=kLoop, calls=%seen
  ROOT %part = s8[1,64,128]{{2,1,0}} dynamic-slice(%tiled, %i, %i, %i), dynamic_slice_sizes={{1,64,128}}
}}

%sum (w: s8[4,64,128]) -> s8[4,64,128] {{
  %w = s8[4,64,128]{{2,1,0:T(32,128)(4,1)}} parameter(0)
  %tiled = s8[4,64,128]{{2,1,0:T(8,128)(4,1)}} fusion(%w), kind=kLoop, calls=%seen
  ROOT %twice = s8[4,64,128]{{2,1,0}} add(%tiled, %tiled)
}}

ENTRY %main (w: s8[4,64,128], i: s32[]) -> s8[1,64,128] {{
  %w = s8[4,64,128]{{2,1,0}} parameter(0)
  %i = s32[] parameter(1)
  %all = s8[4,64,128]{{2,1,0:S(1)}} fusion(%w), kind=kLoop, calls=%sum
  ROOT %y = s8[1,64,128]{{2,1,0:S(1)}} fusion(%w, %i), kind=kLoop, calls=%slice
}}
"""
    index = 4  # bytes of the place that the slice begins at
    assert program_costs(text).num_bytes == 4 * 64 * 128 + 64 * 128 + index


TPU_LOOP = """\
HloModule jit_step, is_scheduled=true

%body.1 (arg: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {
  %arg = (s32[]{:T(128)}, /*index=1*/bf16[8,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = bf16[8,8]{1,0} get-tuple-element(%arg), index=1
  %one = s32[] constant(2)
  %next = s32[] add(%i, %one)
  %y = bf16[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], bf16[8,8]{1,0}) tuple(%next, %y)
}

%condition.1 (arg: (s32[], bf16[8,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(80)
  %arg = (s32[]{:T(128)}, bf16[8,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: bf16[8,8]) -> bf16[8,8] {
  %x = bf16[8,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %begin = s32[] copy(%zero)
  %state = (s32[], bf16[8,8]{1,0}) tuple(%begin, %x)
  %loop = (s32[], /*index=1*/bf16[8,8]{1,0}) while(%state), condition=%condition.1, body=%body.1, op_name="a/b"
  ROOT %y = bf16[8,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_tpus_loop_says_its_length_by_its_condition():
    """Its text has no trip count. Unrolled once, the loop over 80 layers has 40 trips."""
    assert program_costs(TPU_LOOP).total_flops == 40 * 2 * 8**3
    assert program_costs(TPU_LOOP.replace("constant(80)", "parameter(1)")).unknown_loops == ("a/b",)


def test_text_in_another_form_is_an_error_and_not_a_figure():
    with pytest.raises(ValueError, match="no entry computation"):
        parse_module("nothing here")
    with pytest.raises(ValueError, match="'mystery'"):
        bits("mystery")
    assert Array("s4", (8,)).num_bytes == 4
