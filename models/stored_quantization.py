"""What a checkpoint says of the 8-bit weights that it stores: `quantization_config` of its `config.json`.

Two ways are read: "fp8", as AutoFP8, DeepSeek, Qwen and `transformers` write it, and "compressed-tensors" of 8 bits, as
LLM Compressor does.
"""

import re
from dataclasses import dataclass

from jax_engine.models.fields import Fields, boolean, group, integer, listing, text

STORED_METHODS = ("fp8", "compressed-tensors")
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized")
_KINDS = {"float": "fp8", "int": "int8"}


@dataclass(frozen=True)
class StoredQuantization:
    """How the projections of a checkpoint are stored: numbers of 8 bits, `weight`, and what they are to be multiplied
    by, in a tensor of the name `scale`: one number, one for each output, or one for each block of outputs and inputs.
    """

    method: str  # of `STORED_METHODS`
    name: str  # fp8 (e4m3) or int8
    scale: str = "weight_scale"
    block: tuple[int, int] | None = None  # outputs and inputs that share a scale
    ignored: tuple[str, ...] = ()  # modules that are stored as they were: names, ends of names, or re:patterns

    @classmethod
    def from_hf(cls, hf: Fields) -> "StoredQuantization | None":
        """Read a parsed `config.json`; None where it speaks of no quantization.

        Raises:
            ValueError: the weights are stored in another way; the message says which, and what is supported.
        """
        given = group(hf, "quantization_config")
        if not given:
            return None
        method = text(given, "quant_method", default="quantized")
        if _is_of_cache_alone(given):
            return None
        if method not in STORED_METHODS:
            raise ValueError(
                f"quantization_config asks for {method!r} weights, which are not supported; supported are "
                f"{' and '.join(STORED_METHODS)} of 8 bits: use such a checkpoint, or the float16 or bfloat16 one of "
                'this model with quantization="fp8" or "int8"'
            )
        return _fp8(given) if method == "fp8" else _compressed_tensors(given)

    def is_ignored(self, module: str) -> bool:
        """Whether a module, by its name in the checkpoint, is stored as it was."""
        return any(
            re.match(entry.removeprefix("re:"), module) is not None
            if entry.startswith("re:")
            else f".{module}".endswith(f".{entry}") or module.startswith(f"{entry}.")
            for entry in self.ignored
        )


def _fp8(given: Fields) -> StoredQuantization:
    _expect(given, "fmt", text(given, "fmt", default="e4m3"), ("e4m3", "float8_e4m3fn"))
    _expect(given, "activation_scheme", text(given, "activation_scheme", default="dynamic"), ("dynamic", "static"))
    ignored = *listing(given, "modules_to_not_convert", str), *listing(given, "ignored_layers", str)
    if given.get("weight_block_size") is None:
        return StoredQuantization("fp8", "fp8", ignored=ignored)
    block = _block(given, "weight_block_size")
    return StoredQuantization("fp8", "fp8", scale="weight_scale_inv", block=block, ignored=ignored)


def _compressed_tensors(given: Fields) -> StoredQuantization:
    _expect(given, "format", text(given, "format", default="naive-quantized"), _FORMATS)
    groups = group(given, "config_groups")
    if len(groups) != 1:
        raise _refused(f"config_groups has {len(groups)} groups", "one for all projections")
    (name,) = groups
    of_all = group(groups, name)
    _expect(of_all, "targets", listing(of_all, "targets", str), (("Linear",),))
    weights = group(of_all, "weights")
    _expect(weights, "num_bits", integer(weights, "num_bits"), (8,))
    _expect(weights, "type", text(weights, "type", default="int"), tuple(_KINDS))
    if not boolean(weights, "symmetric", default=True):
        raise _refused("weights.symmetric is False", "symmetric ones, without zero points")
    kind, strategy = _KINDS[text(weights, "type", default="int")], text(weights, "strategy", default="tensor")
    _expect(weights, "strategy", strategy, ("tensor", "channel", "block"))
    block = _block(weights, "block_structure") if strategy == "block" else None
    return StoredQuantization("compressed-tensors", kind, block=block, ignored=listing(given, "ignore", str))


def _block(given: Fields, name: str) -> tuple[int, int]:
    sizes = listing(given, name, int)
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"quantization_config: {name} is {list(sizes)}; it must be two sizes, of outputs and inputs")
    return sizes[0], sizes[1]


def _is_of_cache_alone(given: Fields) -> bool:
    """Whether it is the cache that is to have 8 bits, and no weights do: as compressed-tensors and ModelOpt say it."""
    has_cache = given.get("kv_cache_scheme") or given.get("kv_cache_quant_algo")
    has_weights = given.get("config_groups") or given.get("quant_algo")
    return bool(has_cache) and not has_weights and given.get("quant_method") != "fp8"


def _expect(given: Fields, name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise _refused(f"{name} is {given.get(name)!r}", ", ".join(map(str, allowed)))


def _refused(what: str, supported: str) -> ValueError:
    return ValueError(
        f"quantization_config: {what}, which is not supported; supported: {supported}. Use another checkpoint of this "
        'model, such as the bfloat16 one with quantization="fp8" or "int8"'
    )
