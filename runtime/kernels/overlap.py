"""Programmatic dependent launch: a decode step's kernel starts while the one before it ends.

A kernel so launched may run beside the one before, and so first waits until all that earlier ones
wrote is there; then it lets the next one start, which does likewise. Needs sm_90 and Triton 3.4.
"""

from __future__ import annotations

import triton
import triton.language as tl

ENABLED = False
"""Whether launches overlap from now on; a captured graph keeps what it was captured with."""


def overlapping() -> dict[str, bool]:
    """Options of a launch whose kernel begins with ``await_inputs``."""
    return {"OVERLAPS": True, "launch_pdl": True} if ENABLED else {}


@triton.jit
def await_inputs(OVERLAPS: tl.constexpr):
    """The first thing that a kernel does: it has read and written nothing yet."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
