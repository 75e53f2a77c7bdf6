"""Which methods a search tries where nobody said: as many as its device tries without long waits.

On a GPU all methods are tried, which takes it minutes. On a CPU a wider menu is taken where it adds
no more than a minute to a search, or than half of what the search takes without it. What it adds is
estimated from the model's shape and the samples, by processor seconds that were measured on SmolLM2
(``search_stages.py`` and ``menu_times.py`` of ``benchmarks``); nothing is timed here, so that the
same command asks the same question again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from kvtune.common.processors import processors
from kvtune.traces.workloads import named_workload
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.sources import menu_of

WIDER: tuple[Literal["all", "few"], ...] = ("all", "few")
"""Menus beside the three methods, the widest first."""

ADDED_S, ADDED_SHARE = 60.0, 0.5
"""What a wider menu may add on a CPU: so many seconds, or so much of what the search takes."""

_MOST_CORES = 4  # how much more of them shorten a search was not measured
_REPLAYS = 9 * 30  # samples and layers of the small workload on SmolLM2
_REPLAY_S = {"three": 28.9 / _REPLAYS, "few": 58.9 / _REPLAYS, "all": 4.4}
"""Processor seconds of a layer of a sample: "replaying options" of
``search-stages-merged-three-cpu.json`` and ``-few-cpu.json``, one machine; ``menu-times-cpu.json``
for all methods, which ran beside more work."""
_PASSES_S = 112.8 / (134.5e6 * 9 * 1024)
"""A parameter and token, all runs of the model together: processor seconds beside replaying options
in ``search-stages-merged-three-cpu.json``."""
_SIGNALS_S = {"three": 1.0, "few": 132.5 / 112.8, "all": (112.8 + 9 * 10.2) / 112.8}
"""Times the passes: live runs of fitted values take longer (``search-stages-merged-few-cpu.json``),
and a sample 10.2 s more to record what all methods read (``menu-times-cpu.json``)."""
_TRYING_S = 79.0  # all methods on a few layers: screening-cpu.json
_REPLAYED = 9 * 128 * 896  # query heads, observed and prompt tokens of what was measured
_TRIED_LAYERS = 30


@dataclass(frozen=True)
class Seconds:
    """What a search takes a CPU, by menu.

    Args:
        three: seconds by the clock with three methods.
        few: likewise with a few options more.
        all: likewise with all methods.
    """

    three: float
    few: float
    all: float

    def added(self, menu: Literal["all", "few"]) -> float:
        """Seconds that a wider menu adds to those of three methods."""
        return float(getattr(self, menu)) - self.three

    def allows(self, menu: Literal["all", "few"]) -> bool:
        """Whether a wider menu adds so little that nobody has to ask for it."""
        return self.added(menu) <= max(ADDED_S, ADDED_SHARE * self.three)


def with_menu(request: SearchRequest, cores: int | None = None) -> tuple[SearchRequest, str]:
    """The request with a menu that is named, and why it is that one; "" where nobody has to know.

    Args:
        request: where its menu is ``"auto"``, one is chosen.
        cores: processors of this machine; left out, those that this process may use.
    """
    if request.menu != "auto":
        return request, ""
    three = replace(request, menu="three")
    if not request.has_weights:
        return three, ""  # a stand-in's tables know no others
    wider = {name: replace(request, menu=name) for name in WIDER if _has_more(request, name)}
    if not wider:
        return three, ""
    if _device(request).startswith("cuda") and "all" in wider:
        return wider["all"], _said_on_gpu(request)
    seconds = seconds_of(request, cores or processors())
    chosen = next((name for name in wider if seconds.allows(name)), None)
    found = wider[chosen] if chosen else three
    return found, _said_on_cpu(found, seconds)


def seconds_of(request: SearchRequest, cores: int) -> Seconds:
    """Seconds by the clock that a search is estimated to take on so many cores, by menu."""
    workload = named_workload(request.workload, request.seed, request.texts)
    samples = sum(sum(kinds.values()) for kinds in workload.counts.values())
    shape, prompt = request.shape, workload.tokens - workload.observed
    passes = _PASSES_S * shape.active_parameters * samples * workload.tokens
    scale = shape.query_heads * workload.observed * prompt / _REPLAYED
    trying = {"all": _TRYING_S * scale * shape.layers / _TRIED_LAYERS}

    def of(menu: str) -> float:
        replay = _REPLAY_S[menu] * scale * samples * shape.layers
        whole = _SIGNALS_S[menu] * passes + replay + trying.get(menu, 0.0)
        return whole / min(cores, _MOST_CORES)

    return Seconds(of("three"), of("few"), of("all"))


def _has_more(request: SearchRequest, name: Literal["all", "few"]) -> bool:
    """Whether a wider menu has options that three methods have not: a stack may run no others."""
    menus = [menu_of(replace(request, menu=each), calibrated=False) for each in (name, "three")]
    return menus[0].options() != menus[1].options()


def _device(request: SearchRequest) -> str:
    from kvtune.traces.models import best_device

    return request.device or best_device()


def _methods(request: SearchRequest) -> int:
    """How many methods ``--menu all`` tries."""
    pairs = request.shape.layers % 2 == 0
    return len(menu_of(replace(request, menu="all"), calibrated=False, pairs=pairs).methods)


def _said_on_gpu(request: SearchRequest) -> str:
    return (
        f"methods: all {_methods(request)} are tried, since this runs on a GPU; --menu three "
        "takes less time and finds plans that lose more."
    )


def _said_on_cpu(found: SearchRequest, seconds: Seconds) -> str:
    tried = {
        "three": "snapkv, h2o and streaming_llm are tried",
        "few": "snapkv, h2o and streaming_llm are tried, with fitted values and bits by channel",
        "all": f"all {_methods(found)} are tried",
    }[found.menu]
    if found.menu == "all":
        return f"methods: {tried}, which takes about {_minutes(seconds.all)} on this CPU."
    return (
        f"methods: {tried}, which takes about {_minutes(getattr(seconds, found.menu))} on this "
        f"CPU; --menu all tries all {_methods(found)} in about {_minutes(seconds.all)}."
    )


def _minutes(seconds: float) -> str:
    """``2 minutes``; less than one is one."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes} minute{'s' * (minutes != 1)}" if minutes < 120 else f"{minutes // 60} hours"
