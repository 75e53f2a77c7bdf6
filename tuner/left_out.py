"""Methods and formats that no menu of a search has, each with the reason."""

from __future__ import annotations

_SPAN = "only its user can say which tokens it is about"
_FITTED = "what it reads is fitted to the model first"
_AHEAD = "it sees the tokens to come: a bound for others, no policy"
_EIGHT = "menus have 16, four and fewer bits, and a search has no time for a precision between"
_STACK = "it is how a serving stack stores a cache: search --for offers what that stack has"
_WORSE = "others lose less in as many bits, and no kernel reads it"

LEFT_OUT: dict[str, str] = {
    "full": "under a budget it is StreamingLLM without sinks; all tokens in every format are there",
    "random": "a floor to hold others against",
    "future_attention": _AHEAD,
    "probe_greedy": _AHEAD,
    "protected": _SPAN,
    "mustdrop": _SPAN,
    "lococo": _FITTED,
    "oscar": _FITTED,
    "weighted_keys": "it goes with allocated alone, and is there around all tokens, snapkv and h2o",
    "retrieval_attention": "its graphs take minutes a sample to build",
    "int8": _EIGHT,
    "rotated_int8": _EIGHT,
    "fp8": _EIGHT,
    "mxfp8": _EIGHT,
    "q8_0": _STACK,
    "q4_0": _STACK,
    "int8_token_head": _STACK,
    "fp8_token_head": _STACK,
    "fp8_unscaled": _STACK,
    "int4_token_head": _STACK,
    "openvino_u8": _STACK,
    "openvino_u4": _STACK,
    "mxfp4": "int4 and turboquant4 lose less in as many bits",
    "nvfp4": "int4 loses less in as many bits",
    "hqq4": "int4 loses less in as many bits",
    "hqq2": "int2 loses less in as many bits",
    "turboquant1": "turboquant2 behind fewer tokens loses less",
    "kivi": _WORSE,
    "kitty": _WORSE,
    "kvquant": _WORSE,
    "qaq": _WORSE,
    "gear": _WORSE,
    "staircase": _WORSE,
    "fitted": "allocated loses as little, and has a kernel",
}
"""By name. What formats lose stands in docs/policies.md: ``benchmarks/formats.py --live``."""
