"""What to say where no plan fits what was asked, and the nearest that would."""

from __future__ import annotations

from kvtune.common.errors import DoesNotFitError
from kvtune.common.units import format_bytes
from kvtune.tuner.question import Question
from kvtune.tuner.request import SearchRequest


def nothing_fits(request: SearchRequest, question: Question) -> DoesNotFitError:
    """The error that says how many sequences would fit."""
    context = request.context_tokens
    narrowest = question.under(list(question.freed)[-1])
    most = narrowest.most_sequences(context)
    if question.read_budget is not None and most:
        most = narrowest.most_within_reads(context)
        if not most:
            return _reads_too_much(request)
    lower = f"--batch {most} is the most that fits, with every head compressed the furthest; "
    return DoesNotFitError(
        f"no plan fits {request.sequences or 1} sequences of {context} tokens in "
        f"{format_bytes(request.memory_bytes)}",
        hint=(lower if most else "")
        + "raise --mem, shorten --context or take narrower --weights for more.",
    )


def _reads_too_much(request: SearchRequest) -> DoesNotFitError:
    """The error where memory would be enough, and no plan brings over or reads so little."""
    does = f"reads {format_bytes(request.read_bytes or 0)}"
    mend = "raise --read-bytes or shorten --context."
    if request.moved_bytes is not None:
        does = f"brings over {format_bytes(request.moved_bytes)}"
        mend = "raise --moved-bytes or --mem, or shorten --context."
    return DoesNotFitError(
        f"no plan of {request.context_tokens} tokens {does} a step or less", hint=mend
    )
