"""Whether a search reads the model's own trace, or what stands in for it and why."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvtune.common.errors import KvtuneError
from kvtune.common.progress import Progress
from kvtune.tuner.idle import notes_on_idle
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.sources import QualitySource, own_trace, stand_in
from kvtune.tuner.stack_formats import with_formats_of
from kvtune.tuner.within import limits_of

if TYPE_CHECKING:
    from kvtune.tuner.beside import Beside


def quality_source(
    request: SearchRequest, progress: Progress, beside: Beside | None = None
) -> tuple[QualitySource, tuple[str, ...]]:
    """The model's own trace where its weights are at hand, else the packaged stand-in.

    What is wrong with texts of the user's own is told: a stand-in reads none. Shares have floors:
    of prompts shorter than the samples' a head keeps no fewer tokens than of those.
    """
    source, notes = _source(request, progress, beside)
    return replace(source, tables=source.tables.with_floors()), notes


def _source(
    request: SearchRequest, progress: Progress, beside: Beside | None
) -> tuple[QualitySource, tuple[str, ...]]:
    """Likewise, with shares of the prompt alone, as tables are kept."""
    if not request.has_weights:
        reason = "asked for" if request.stand_in else f"no weights of {request.shape.name} at hand"
        return _stand_in(request, reason)
    try:
        return own_trace(request, progress, beside), ()
    except KvtuneError as error:
        from kvtune.traces.models import KNOWN

        if request.model not in KNOWN or request.texts:
            raise
        return _stand_in(request, str(error))


def _stand_in(request: SearchRequest, reason: str) -> tuple[QualitySource, tuple[str, ...]]:
    source = stand_in(request.shape)
    source = replace(source, tables=with_formats_of(source.tables, limits_of(request.stack)))
    notes = [f"quality: stand-in ({source.stand_in}), because {reason}."]
    if request.menu != "three":
        notes.append("methods: the stand-in's tables know those of --menu three alone.")
    return source, (*notes, *notes_on_idle(request))
