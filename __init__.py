"""kvtune: a hardware-aware memory simulator and auto-tuner for KV-cache policies.

As a library: ``search``, ``estimate``, ``capture``, ``read_policy``, ``load_model`` and
``load_cache`` do what the commands do and answer with typed results. Each is imported when it is
first used, so that ``import kvtune`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtune.common.errors import DoesNotFitError, KvtuneError
    from kvtune.common.estimate import Estimate
    from kvtune.policies.policy import Policy
    from kvtune.policies.policy_file.document import PolicyDocument, read_policy
    from kvtune.runtime.cache.loading import load_cache
    from kvtune.traces.models import load_model
    from kvtune.traces.trace import Trace
    from kvtune.tuner.cases import Case
    from kvtune.tuner.library import capture, estimate, search
    from kvtune.tuner.request import SearchRequest
    from kvtune.tuner.result import SearchResult

__version__ = "0.1.0"

_HOMES = {
    "Case": "kvtune.tuner.cases",
    "DoesNotFitError": "kvtune.common.errors",
    "Estimate": "kvtune.common.estimate",
    "KvtuneError": "kvtune.common.errors",
    "Policy": "kvtune.policies.policy",
    "PolicyDocument": "kvtune.policies.policy_file.document",
    "SearchRequest": "kvtune.tuner.request",
    "SearchResult": "kvtune.tuner.result",
    "Trace": "kvtune.traces.trace",
    "capture": "kvtune.tuner.library",
    "estimate": "kvtune.tuner.library",
    "load_cache": "kvtune.runtime.cache.loading",
    "load_model": "kvtune.traces.models",
    "read_policy": "kvtune.policies.policy_file.document",
    "search": "kvtune.tuner.library",
}

__all__ = [
    "Case",
    "DoesNotFitError",
    "Estimate",
    "KvtuneError",
    "Policy",
    "PolicyDocument",
    "SearchRequest",
    "SearchResult",
    "Trace",
    "__version__",
    "capture",
    "estimate",
    "load_cache",
    "load_model",
    "read_policy",
    "search",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
