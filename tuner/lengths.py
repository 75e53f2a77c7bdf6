"""What a plan loses on prompts of another length than its loss was measured on."""

from __future__ import annotations

from kvtune.common.estimate import Estimate
from kvtune.common.units import format_tokens

LONGER = (0.43, 1.36)
SHORTER = (1.2, 36.0)
"""Live loss at another length over that where a plan was found: the least and the greatest seen.

SmolLM2, plans at 3, 6, 12 and 25 % of the bytes from 1,024, 2,048, 4,096 and 8,192 tokens, each at
all four lengths (``benchmarks/lengths.py``, ``benchmarks/results/lengths-h200.json``).
"""


def length_note(kl: Estimate, measured: int, context: int) -> str:
    """One line on a loss that was measured on prompts of other tokens than the plan is for."""
    low, high = LONGER if context > measured else SHORTER
    many = "longer" if context > measured else "shorter"
    there, here = format_tokens(measured), format_tokens(context)
    return (
        f"context: quality was measured on prompts of {there}; budgets are shares of the prompt "
        f"and are carried over to {here}. On {many} prompts plans lost {low:g} to "
        f"{high:g} times as much (smollm2-135m, 1k to 8k tokens): {kl.low * low:.2g} to "
        f"{kl.high * high:.2g} nats a token."
    )
