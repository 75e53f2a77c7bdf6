"""Methods and formats that no menu of a search has, each with the reason."""

from __future__ import annotations

_SPAN = "only its user can say which tokens it is about"
_FITTED = "what it reads is fitted to the model first"
_AHEAD = "it sees the tokens to come: a bound for others, no policy"
_EIGHT = "heads of a plan have 16, four and fewer bits; rules that divide tokens also have int8"
_STACK = "it is how a serving stack stores a cache: search --for offers what that stack has"

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
    "retrieval_attention": "a graph of every head's keys would have to be built for each sample",
    "int8": "heads of a plan have 16, four and fewer bits; rules that divide tokens have it",
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
    "mxfp4": "turboquant4 loses less in as many bits",
    "nvfp4": "int4 loses less in as many bits",
    "hqq4": "int4 loses less in as many bits",
    "hqq2": "int2 loses less in as many bits",
    "turboquant1": "it loses 1.7 nats a token with all tokens kept",
    "kivi": "int3 loses less in fewer bits",
    "kitty": "allocated behind weighted_keys loses less in fewer bits",
    "kvquant": "rotated_int4 keys with rotated_int2 values lose less in fewer bits",
    "qaq": "int4 loses less in fewer bits",
    "gear": "turboquant4 loses less in fewer bits",
    "staircase": "int3 loses less in fewer bits",
    "fitted": "allocated behind weighted_keys loses less in as many bits, and has a kernel",
}
"""By name. Losses and bits: ``benchmarks/results/formats-live-h200.json``, three prompts of 1,792
tokens with all tokens kept, SmolLM2-135M (``benchmarks/formats.py --live``)."""
