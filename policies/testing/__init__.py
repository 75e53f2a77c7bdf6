"""What every method, format and allocator must hold to: a suite that new ones get for free.

The checks of methods, formats and allocators are here, those of methods that go on evicting in
``kvtune.policies.testing.decode``. Each is a function of one thing and one case; it raises
AssertionError with the reason. With pytest, for a class of your own::

    @pytest.mark.parametrize("case", METHOD_CASES, ids=str)
    @pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__)
    def test_mine(check, case):
        check(Mine(), case)

``python -m kvtune.policies.testing`` prints the golden choices as JSON.
"""

from __future__ import annotations

from kvtune.policies.testing.allocators import ALLOCATOR_CHECKS, AllocatorCheck
from kvtune.policies.testing.cases import Case, PlainRope, make_signals, uniform, variants
from kvtune.policies.testing.formats import FORMAT_CHECKS, FormatCheck
from kvtune.policies.testing.golden import golden
from kvtune.policies.testing.methods import LONG, METHOD_CASES, METHOD_CHECKS, MethodCheck

__all__ = [
    "ALLOCATOR_CHECKS",
    "FORMAT_CHECKS",
    "LONG",
    "METHOD_CASES",
    "METHOD_CHECKS",
    "AllocatorCheck",
    "Case",
    "FormatCheck",
    "MethodCheck",
    "PlainRope",
    "golden",
    "make_signals",
    "uniform",
    "variants",
]
