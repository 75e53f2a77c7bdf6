"""Explanations of what commands print, one line each: below tables, and in ``--help``."""

from __future__ import annotations

BRACKETS = "[a, b]: an interval that should hold the true value"
LABELS = (
    "int3+4: stored in three bits, the first 4 tokens in 16; int4/int2: keys in four bits, values "
    "in two"
)
PROOF = (
    "proof: how far such files were tried: ran on the stack, parsed by the stack's own code, or "
    "held against a mirror of its schema"
)

EXPLAINED = {
    "search": (BRACKETS, LABELS),
    "estimate": (BRACKETS,),
    "validate": (BRACKETS,),
    "export": (PROOF,),
}
"""What ``--help`` of a command explains of its answer."""
