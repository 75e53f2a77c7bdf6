"""Every method that evicts while decoding against the suite that the package ships."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtune.policies.decode import DecodeMethod
from kvtune.policies.testing import Case, variants
from kvtune.policies.testing import decode as suite
from kvtune.tests.tiers import all_hold

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS = [
    pytest.param(method, id=f"{name}{number}")
    for name, kind in suite.decode_methods().items()
    for number, method in enumerate(dict.fromkeys(variants(kind)))
]
FEW = (Case(1, 1, group=3), Case(33, 6, kv_heads=3, group=3))

cases = st.builds(
    Case,
    prompt_tokens=st.integers(1, 50),
    budget=st.integers(0, 60),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**16),
)


@pytest.mark.parametrize("name", suite.decode_methods())
def test_method_at_a_usual_prompt(name: str) -> None:
    """One that is longer than its budget, with several query heads on a KV head."""
    all_hold(
        (check.__name__, partial(check, suite.decode_methods()[name](), FEW[1]))
        for check in suite.DECODE_CHECKS
    )


@pytest.mark.full
@pytest.mark.parametrize("check", suite.DECODE_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", suite.decode_methods())
def test_method_at_the_corners(name: str, check: suite.DecodeCheck) -> None:
    method = suite.decode_methods()[name]()
    all_hold((case, partial(check, method, case)) for case in suite.DECODE_CASES)


@pytest.mark.full
@pytest.mark.parametrize("check", suite.DECODE_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("method", VARIANTS)
def test_variant(method: DecodeMethod, check: suite.DecodeCheck) -> None:
    all_hold((case, partial(check, method, case)) for case in FEW)


@pytest.mark.full
@pytest.mark.parametrize("check", suite.DECODE_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", suite.decode_methods())
@settings(max_examples=4, deadline=None, derandomize=True)
@given(case=cases)
def test_method_anywhere(name: str, check: suite.DecodeCheck, case: Case) -> None:
    check(suite.decode_methods()[name](), case)


def test_the_seven_decode_methods_are_found() -> None:
    expected = {
        "a2sf", "h2o", "keyformer", "lazy_eviction", "scissorhands", "streaming_llm", "tova",
    }  # fmt: skip
    assert expected <= set(suite.decode_methods())
