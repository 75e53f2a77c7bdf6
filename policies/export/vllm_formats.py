"""The one cache dtype of vLLM that is nearest to a plan's formats, and which layers go without."""

from __future__ import annotations

from kvtune.policies.export.flatten import Flat, flatten, grouping_text
from kvtune.policies.export.lines import Line
from kvtune.policies.export.plan import Plan
from kvtune.policies.export.vllm_config import DTYPES
from kvtune.policies.formats.token_head import Fp8TokenHead, Int4TokenHead, Int8TokenHead

_NEAREST = {
    ("fp8", "fp8"): "fp8", ("int8", "int8"): "int8_per_token_head",
    ("int4", "int4"): "int4_per_token_head",
    **{(f"{kind}_token_head",) * 2: f"{kind}_per_token_head" for kind in ("int8", "fp8", "int4")},
}  # fmt: skip
OWN = Int8TokenHead(), Fp8TokenHead(), Int4TokenHead()
STORED = frozenset({"bf16", *(name for pair in _NEAREST for name in pair)})
_NARROW = 12  # mean bits below which a layer is quantised


def formats(plan: Plan) -> tuple[str, list[int], list[Line]]:
    """The dtype, the layers that stay in 16 bits, and what that loses."""
    layers = [flatten(layer) for layer in plan.policy.heads]
    narrow = [flat for flat in layers if _is_narrow(flat)]
    exempt = [layer for layer, flat in enumerate(layers) if not _is_narrow(flat)]
    if not narrow:
        lost = [flat for flat in layers if flat.key_bits + flat.value_bits < 32]
        return "auto", [], [_format_line(layers, "auto", bool(lost))]
    together = flatten(
        [
            o
            for layer, flat in zip(plan.policy.heads, layers, strict=True)
            if _is_narrow(flat)
            for o in layer
        ]
    )
    dtype = _dtype(together)
    rounded = any(
        len(flat.key_formats) > 1 or len(flat.value_formats) > 1 for flat in (*layers, together)
    )
    lines = [_format_line(narrow, dtype, rounded)]
    if exempt:
        mixed = any(layers[layer].key_bits + layers[layer].value_bits < 32 for layer in exempt)
        status = "not expressible" if mixed else "kept"
        detail = f"{len(exempt)} of {len(layers)} layers stay in 16 bits (skip list)"
        lines.append(Line("formats by layer", status, detail))  # type: ignore[arg-type]
    return dtype, exempt, lines


def _is_narrow(flat: Flat) -> bool:
    return (flat.key_bits + flat.value_bits) / 2 < _NARROW


def _dtype(flat: Flat) -> str:
    if len(flat.key_formats) == len(flat.value_formats) == 1:
        nearest = _NEAREST.get((flat.key_formats[0], flat.value_formats[0]))
        if nearest:
            return nearest
    wide_enough = [
        (keys + values, name)
        for name, (keys, values) in DTYPES.items()
        if keys >= min(flat.key_bits, 8) and values >= min(flat.value_bits, 8)
    ]
    return min(wide_enough, key=lambda pair: pair[0])[1]


def _format_line(layers: list[Flat], dtype: str, rounded: bool) -> Line:
    keys = "/".join(dict.fromkeys(name for flat in layers for name in flat.key_formats))
    values = "/".join(dict.fromkeys(name for flat in layers for name in flat.value_formats))
    label = f"keys {keys}, values {values}"
    if rounded:
        detail = f"one dtype and 16 bits, by layer; used {dtype} instead"
        return Line(label, "not expressible", detail)
    if dtype == "auto":
        return Line(label, "kept", "16 bits")
    if (keys, values) not in _NEAREST:
        return Line(label, "not expressible", f"no such dtype; used {dtype} instead")
    if keys in {form.name for form in OWN}:
        return Line(label, "kept", f"{dtype}: its own arithmetic")
    scales = "scales of the checkpoint, else 1.0" if dtype == "fp8" else "a scale a token and head"
    return Line(label, "approximated", f"{dtype}: {scales}{grouping_text(*layers)}")
