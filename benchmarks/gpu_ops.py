"""Operations beside paged attention: sampling, mixtures of experts, products of decode steps, cuDNN's attention."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import sampling
from gpu_jobs import Report, Skipped
from gpu_ops_checks import EXPERTS, checks, draw_in, logits_shape, mixture
from gpu_timing import Ceilings, compiled_as_steps, time_calls
from jax_engine.sampling.sampler import SamplingMode

MAX_PRODUCTS = 64  # in a program
LEAST_BYTES = 2**30  # of weights in a timed program, so that no cache holds them
PRODUCTS = {
    "4096 x 14336": (4096, 14336),  # of Llama-3-8B
    "14336 x 4096": (14336, 4096),
    "4096 x 128256": (4096, 128256),
    "1024 x 3072": (1024, 3072),  # of Qwen3-0.6B
}


def measure(
    report: Report, *, sections: Sequence[str], seed: int, tiny: bool, ceilings: Mapping[str, float | None]
) -> None:
    """The job: the checks, then the timings."""
    if "checks" in sections:
        for name, check in checks(seed=seed, tiny=tiny):
            if report.wants(name):
                with report.case(name, section="checks"):
                    report.add(name, section="checks", **check())
    if "kernels" in sections:
        found = Ceilings.of(ceilings)
        cases = (*products(tiny=tiny), *samplers(tiny=tiny), *mixtures(tiny=tiny), *dense_attention(tiny=tiny))
        for name, run, num_bytes, flops in cases:
            if report.wants(name):
                with report.case(name, section="kernels"):
                    report.add(name, section="kernels", **timed(run(), num_bytes, flops, found))


def timed(run: Callable[[], Any], num_bytes: float | None, flops: float | None, ceilings: Ceilings) -> dict[str, Any]:
    """A record's fields."""
    timing = time_calls(run)
    figures: dict[str, float] = dict(timing.figures)
    if num_bytes is not None:
        figures["bytes_per_second"] = num_bytes / timing.seconds
    if flops is not None:
        figures["flops_per_second"] = flops / timing.seconds
    shares = ceilings.shares(timing.seconds, num_bytes=num_bytes, flops=flops)
    return {"value": 1e6 * timing.seconds, "unit": "us", "figures": figures, **shares}


# A name, what makes the function to time, and the bytes and operations of one call at least.
Timed = tuple[str, Callable[[], Callable[[], Any]], float | None, float | None]


def products(*, tiny: bool) -> Iterator[Timed]:
    """Rows of a decode step with weights of bfloat16, each product with weights and rows of its own."""
    shapes = {"64 x 128": (64, 128)} if tiny else PRODUCTS
    for name, (inner, outer) in shapes.items():
        count = 2 if tiny else min(MAX_PRODUCTS, -(-LEAST_BYTES // (2 * inner * outer)))
        for rows in (4,) if tiny else (1, 256):
            num_bytes = 2 * (inner * outer + rows * (inner + outer))
            run = partial(_products, rows, inner, outer, count)
            yield f"{count} products, {rows} x {name}", run, count * num_bytes, count * 2 * rows * inner * outer


def _products(rows: int, inner: int, outer: int, count: int) -> Callable[[], Any]:
    def normal(seed: int, *shape: int) -> Array:
        return jax.random.normal(jax.random.key(seed, impl="rbg"), shape, jnp.bfloat16)

    # Arrays of their own: products that share a factor would become one.
    left = [normal(seed, rows, inner) for seed in range(count)]
    right = [normal(seed, inner, outer) for seed in range(count)]
    run = compiled_as_steps(lambda left, right: [x @ w for x, w in zip(left, right, strict=True)])
    return partial(run, left, right)


def samplers(*, tiny: bool) -> Iterator[Timed]:
    """Drawing the tokens of a step, in modes and by what rows ask for; logits read once are the least."""
    rows, vocab_size = logits_shape(tiny=tiny)
    settings: dict[str, tuple[SamplingMode, dict[str, Any]]] = {
        "greedy": (SamplingMode.GREEDY, {}),
        "temperature": (SamplingMode.SAMPLE, {}),
        "top-k 50": (SamplingMode.SAMPLE, {"top_k": 50}),
        "top-p 0.9": (SamplingMode.SAMPLE, {"top_p": 0.9}),
        "top-p 0.9, flat": (SamplingMode.SAMPLE, {"top_p": 0.9, "temperature": 1.0}),
    }
    for name, (mode, given) in settings.items():

        def make(mode: SamplingMode = mode, given: dict[str, Any] = given) -> Callable[[], Any]:
            logits = 3 * jax.random.normal(jax.random.key(0, impl="rbg"), (rows, vocab_size))
            asked = sampling.sampling_rows(rows, vocab_size, **given)
            return partial(draw_in(mode), logits, asked)

        yield f"sampling {rows} x {vocab_size}, {name}", make, 4.0 * rows * vocab_size, None


def mixtures(*, tiny: bool) -> Iterator[Timed]:
    """A mixture's experts; the least is to read those that were chosen."""
    for num_rows in (4,) if tiny else (16, 256):
        for name, kernel in EXPERTS.items():

            def make(num_rows: int = num_rows, kernel: Callable[..., Array] = kernel) -> Callable[[], Any]:
                run = compiled_as_steps(partial(kernel, layer=0, activation=jax.nn.silu))
                return partial(run, **mixture(num_rows, tiny=tiny, seed=0))

            given = jax.eval_shape(partial(mixture, num_rows, tiny=tiny, seed=0))
            experts, hidden, inner = given["gate"].shape[1:]
            chosen = given["chosen"].shape[1]
            met = experts * (1 - (1 - chosen / experts) ** num_rows)  # on average
            least = 2 * met * 3 * hidden * inner
            yield f"experts, {name}, {num_rows} rows", make, least, 6.0 * num_rows * chosen * hidden * inner


def dense_attention(*, tiny: bool) -> Iterator[Timed]:
    """cuDNN's attention over prompts without pages: what prefill is to be compared with."""
    heads, kv_heads, head_dim, length = (4, 2, 16, 32) if tiny else (32, 8, 128, 4096)
    on_gpu = jax.default_backend() == "gpu"

    def make() -> Callable[[], Any]:
        if not on_gpu and not tiny:
            raise Skipped("cuDNN is for GPUs")
        dtype = jnp.bfloat16 if on_gpu else jnp.float32
        sizes = ((1, length, heads, head_dim), *[(1, length, kv_heads, head_dim)] * 2)
        arrays = [jax.random.normal(jax.random.key(seed, impl="rbg"), size, dtype) for seed, size in enumerate(sizes)]
        name = "cudnn" if on_gpu else "xla"
        return partial(jax.jit(partial(jax.nn.dot_product_attention, is_causal=True, implementation=name)), *arrays)

    yield f"cuDNN, prefill, 1 x {length} tokens, without pages", make, None, 2.0 * heads * head_dim * length**2
