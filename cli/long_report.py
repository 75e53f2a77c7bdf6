"""What ``kvtune search --held-bytes`` prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvtune.cli.output import table
from kvtune.common.units import format_bytes
from kvtune.common.words import figure
from kvtune.tuner.long.search import PLAN_FILE, LongResult

if TYPE_CHECKING:
    from rich.console import RenderableType


def tables(result: LongResult, run_dir: Path) -> list[RenderableType]:
    """The verdict, the plan beside the best uniform option, and where the plan lies."""
    asked = result.asked
    share = asked.bound_bytes / result.full_mean_bytes
    rows = [["plan", result.plan.name, figure(result.live)]]
    if result.uniform is not None and result.uniform_live is not None:
        rows.append(["uniform", result.uniform, figure(result.uniform_live)])
    caption = (
        f"live on {result.prompts} held-out prompts of {asked.prompt_tokens} tokens, "
        f"{result.generated} generated after each"
    )
    return [
        f"A sequence holds at most {format_bytes(result.plan.most_bytes)} at any moment, within "
        f"{format_bytes(asked.bound_bytes)} ({share:.0%} of the uncompressed cache's mean); in "
        f"these generations it held {format_bytes(result.peak_bytes)}.",
        *_compared(result),
        "",
        table("Loss", ("", "options", "KL, nats a token"), rows, left=(0, 1), caption=caption),
        "",
        f"The policy lies in {run_dir / PLAN_FILE}; the newest {asked.menu.residual} generated "
        "tokens stay in 16 bits where a head stores fewer.",
        *(f"note: {note}" for note in result.notes),
    ]


def _compared(result: LongResult) -> list[str]:
    """Whether the plan is better than the uniform option, as far as its interval says so."""
    if result.times_the_plan is None:
        return []
    value, low, high = result.times_the_plan
    between = f"{value:.2g} times the plan's loss ({low:.2g}-{high:.2g})"
    if low > 1:
        return [f"The best uniform option loses {between}."]
    return [f"The best uniform option is not told apart: it loses {between}."]
