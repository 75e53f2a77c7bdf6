"""The one cache dtype of vLLM that is nearest to a plan's formats, for all layers.

vLLM can leave layers in 16 bits beside a narrower dtype. Layers of several dtypes then share its
memory, which is not sound beside scales a token and head: with one layer left out, 0.26 answered
some requests with what is no number, others in another run, and none with all layers in 4 bits
(``benchmarks/results/started-loss-h200.json``, ``started-loss-mixed-h200.json``); open there as
pull request 51091 and issues 49716 and 50749. So no layer is left out.
"""

from __future__ import annotations

from kvtune.policies.export.flatten import Flat, flatten, grouping_text
from kvtune.policies.export.lines import Line
from kvtune.policies.export.plan import Plan
from kvtune.policies.export.vllm_config import DTYPES
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.token_head import Fp8TokenHead, Int4TokenHead, Int8TokenHead
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy

_NEAREST = {
    ("fp8", "fp8"): "fp8", ("int8", "int8"): "int8_per_token_head",
    ("int4", "int4"): "int4_per_token_head",
    **{(f"{kind}_token_head",) * 2: f"{kind}_per_token_head" for kind in ("int8", "fp8", "int4")},
}  # fmt: skip
OWN = Int8TokenHead(), Fp8TokenHead(), Int4TokenHead()
STORED = frozenset({"bf16", *(name for pair in _NEAREST for name in pair)})
_UNSCALED = "fp8"  # its scales are the checkpoint's, else 1


def formats(plan: Plan) -> tuple[str, Line]:
    """The dtype, and what that loses."""
    flat = flatten(list(plan.policy.options()))
    dtype = _dtype(flat)
    return dtype, _format_line(flat, dtype)


def running(plan: Plan, dtype: str) -> Policy | None:
    """All tokens in a dtype; None where its arithmetic is not known."""
    names = {f"{form.name.removesuffix('_token_head')}_per_token_head": form for form in OWN}
    form = names.get(dtype, Bf16() if dtype == "auto" else None)
    if form is None:
        return None
    option = Option(keys=form, values=form)
    return Policy.uniform(option, plan.facts.layers, plan.facts.kv_heads, name=f"vLLM, {dtype}")


def _dtype(flat: Flat) -> str:
    """The nearest, else the narrowest with enough bits in the mean; 16 bits beyond 8."""
    if len(flat.key_formats) == len(flat.value_formats) == 1:
        nearest = _NEAREST.get((flat.key_formats[0], flat.value_formats[0]))
        if nearest:
            return nearest
    wide_enough = [
        (keys + values, name)
        for name, (keys, values) in DTYPES.items()
        if keys >= flat.key_bits and values >= flat.value_bits and name != _UNSCALED
    ]
    return min(wide_enough, key=lambda pair: pair[0])[1] if wide_enough else "auto"


def _format_line(flat: Flat, dtype: str) -> Line:
    keys, values = "/".join(flat.key_formats), "/".join(flat.value_formats)
    label = f"keys {keys}, values {values}"
    if keys == values == "bf16":
        return Line(label, "kept", "16 bits")
    if dtype == "auto":
        return Line(label, "not expressible", "one dtype for all layers; 16 bits instead", True)
    if (keys, values) not in _NEAREST:
        several = len(flat.key_formats) > 1 or len(flat.value_formats) > 1
        why = "one dtype for all layers" if several else "no such dtype"
        return Line(label, "not expressible", f"{why}; used {dtype} instead")
    if keys in {form.name for form in OWN}:
        return Line(label, "kept", f"{dtype}: its own arithmetic")
    scales = "scales of the checkpoint, else 1.0" if dtype == "fp8" else "a scale a token and head"
    return Line(label, "approximated", f"{dtype}: {scales}{grouping_text(flat)}")
