"""The golden choices: which tokens every method keeps of one prompt, and every format's bytes."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor

from kvtune.policies.format import formats
from kvtune.policies.method import methods
from kvtune.policies.testing.cases import Case, make_signals


def golden() -> dict[str, Any]:
    """Which tokens each method keeps of a fixed prompt, as hashes, and each format's bytes."""
    case = Case(prompt_tokens=211, budget=0, kv_heads=3, group=3, seed=20)
    budgets = (1, 16, 33, 64, 200)
    return {
        "remake": "python -m kvtune.policies.testing > tests/golden/policies.json",
        "kept": {
            name: {
                str(budget): _digest(kind().keep(make_signals(case), budget)) for budget in budgets
            }
            for name, kind in sorted(methods().items())
        },
        "bytes_of_100_tokens_of_64": {
            name: [kind().bound(100, 64, "keys"), kind().bound(100, 64, "values")]
            for name, kind in sorted(formats().items())
        },
    }


def _digest(indices: Tensor) -> str:
    return hashlib.sha256(indices.numpy().astype("<i8").tobytes()).hexdigest()[:16]
