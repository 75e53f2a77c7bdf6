"""Every registered method, format and allocator against the suite that the package ships."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvtune.common.errors import KvtuneError
from kvtune.policies import testing as suite
from kvtune.policies.allocator import allocators
from kvtune.policies.format import Format, Role, formats
from kvtune.policies.method import Method, methods
from kvtune.policies.option import Option
from kvtune.policies.policy_file.document import Pattern, PolicyDocument, read_policy, write_policy
from kvtune.tests.tiers import all_hold

GOLDEN = Path(__file__).parent / "golden" / "policies.json"


# Thousands of tiny operations: a second thread only waits.
pytestmark = pytest.mark.usefixtures("one_thread")


def every_variant(kinds: dict[str, type[Any]]) -> list[Any]:
    return [
        pytest.param(
            thing,
            id=repr(thing).split("(")[0] + str(number),
            marks=[pytest.mark.full] if number else [],  # the default one is tried always
        )
        for kind in kinds.values()
        for number, thing in enumerate(dict.fromkeys(suite.variants(kind)))
    ]


def name_of(check: Any) -> str:
    return str(check.__name__)


def asked(check: Any, thing: Any, given: Any) -> tuple[str, Callable[[], object]]:
    """A check of the suite to be run, and its name with what it is given."""
    return f"{name_of(check)} of {thing} at {given}", partial(check, thing, given)


cases = st.builds(
    suite.Case,
    prompt_tokens=st.integers(1, 90),
    budget=st.integers(0, 100),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 3, 4]),
    seed=st.integers(0, 2**16),
)


@pytest.mark.parametrize("name", methods())
def test_method_at_a_corner(name: str) -> None:
    """A corner for every method and check: the corners go round, so that each check sees all."""
    row, corners = list(methods()).index(name), suite.METHOD_CASES
    all_hold(
        asked(check, methods()[name](), corners[(row + 4 * column) % len(corners)])
        for column, check in enumerate(suite.METHOD_CHECKS)
    )


@pytest.mark.parametrize("name", methods())
def test_method_at_a_usual_prompt(name: str) -> None:
    """Every check at once, at a prompt that is longer than its budget."""
    all_hold(asked(each, methods()[name](), suite.METHOD_CASES[-1]) for each in suite.METHOD_CHECKS)


@pytest.mark.full
@pytest.mark.parametrize("check", suite.METHOD_CHECKS, ids=name_of)
@pytest.mark.parametrize("method", every_variant(methods()))
def test_method_at_the_corners(method: Method, check: suite.MethodCheck) -> None:
    all_hold(asked(check, method, case) for case in suite.METHOD_CASES)


@pytest.mark.full
@pytest.mark.parametrize("check", suite.METHOD_CHECKS, ids=name_of)
@pytest.mark.parametrize("name", methods())
@settings(max_examples=10, deadline=None, derandomize=True)
@given(case=cases)
@example(case=suite.LONG)
def test_method_anywhere(name: str, check: suite.MethodCheck, case: suite.Case) -> None:
    check(methods()[name](), case)


@pytest.mark.parametrize("role", ["keys", "values"])
@pytest.mark.parametrize("form", every_variant(formats()))
def test_format(form: Format, role: Role) -> None:
    all_hold(asked(check, form, role) for check in suite.FORMAT_CHECKS)


@pytest.mark.parametrize("allocator", every_variant(allocators()))
def test_allocator(allocator: Any) -> None:
    all_hold(
        asked(check, allocator, case)
        for check in suite.ALLOCATOR_CHECKS
        for case in suite.METHOD_CASES
    )


@pytest.mark.parametrize("thing", every_variant(methods() | formats() | allocators()))
def test_everything_registered_can_be_written_in_a_policy(thing: Any) -> None:
    field = {**dict.fromkeys(methods(), "method"), **dict.fromkeys(formats(), "keys")}
    if thing.name in allocators():
        pattern = Pattern(Option(methods()["snapkv"]()), allocator=thing)
    else:
        pattern = Pattern(Option(**{field[thing.name]: thing}))
    document = PolicyDocument(pattern)
    assert read_policy(write_policy(document)) == document


def test_everything_registered_names_its_source() -> None:
    every: dict[str, Any] = {**methods(), **formats(), **allocators()}
    assert [name for name, kind in every.items() if not (kind.source and kind.__doc__)] == []


def test_names_are_not_shared_between_registries() -> None:
    names = [*methods(), *formats(), *allocators()]
    assert len(set(names)) == len(names)


@pytest.fixture(scope="module")
def chosen() -> dict[str, Any]:
    """What every method and format chooses here and now."""
    return suite.golden()


def test_choices_are_the_golden_ones(chosen: dict[str, Any]) -> None:
    golden, found = json.loads(GOLDEN.read_text()), chosen
    others = [
        f"{what} of {name}"
        for what in ("kept", "bytes_of_100_tokens_of_64")
        for name, figures in golden[what].items()
        if found[what].get(name) != figures
    ]
    assert others == [], f"if this is meant, remake it: {golden['remake']}"


def test_choices_are_the_same_in_another_process(chosen: dict[str, Any]) -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "kvtune.policies.testing"],
        env={**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    assert json.loads(printed) == chosen


def test_reading_a_policy_and_counting_its_bytes_imports_no_torch() -> None:
    program = (
        "import sys\n"
        "from kvtune.policies.policy_file.document import read_policy\n"
        "text = 'kvtune_policy: 1\\npolicy: {method: h2o, budget: 9, keys: int4}\\n'\n"
        "print(read_policy(text).bind(2, 3).footprint(64, 64))\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)\n"
    )
    ran = subprocess.run(  # noqa: S603
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    from kvtune.policies.method import find_method

    with pytest.raises(KvtuneError, match="unknown method 'snapkw'") as caught:
        find_method("snapkw")
    assert "'snapkv'" in (caught.value.hint or "")
