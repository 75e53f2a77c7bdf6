"""No parameter of a method, format or allocator can ask for more than a prompt could need."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from functools import partial
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvtune.common.errors import KvtuneError
from kvtune.policies.allocator import Allocator, allocators
from kvtune.policies.format import Format, formats
from kvtune.policies.method import Method, methods
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.parts import entries_of
from kvtune.policies.policy_file.document import read_policy
from kvtune.policies.testing import Case, make_signals
from kvtune.tests.tiers import all_hold

CASE = Case(23, 9, kv_heads=2, group=2)
LARGEST_TENSOR = 16 * 2**20  # bytes of one tensor, for a prompt of 23 tokens
KINDS = {**methods(), **formats(), **allocators()}


def numeric(kind: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    kinds = (int, float, int | None, float | None)
    return {f.name: f.metadata for f in fields(kind) if hints[f.name] in kinds}


HAVE_NUMBERS = [name for name, kind in KINDS.items() if numeric(kind)]


def test_every_number_is_bounded_on_both_sides() -> None:
    assert len(HAVE_NUMBERS) > 60
    unbounded = [
        f"{number} of {name}"
        for name in HAVE_NUMBERS
        for number, bounds in numeric(KINDS[name]).items()
        if not -math.inf < bounds.get("low", math.nan) <= bounds.get("high", math.nan) <= 2**32
    ]
    assert unbounded == []


@pytest.mark.parametrize("name", HAVE_NUMBERS)
def test_a_small_prompt_takes_little_memory_at_every_bound(name: str) -> None:
    all_hold(
        (f"{number} as {end} as may be", partial(check_memory, KINDS[name], number, end))
        for number in numeric(KINDS[name])
        for end in ("low", "high")
    )


def check_memory(kind: type[Any], number: str, end: str) -> None:
    watching = Watching()  # type: ignore[no-untyped-call]
    with watching:
        use(at_bound(kind, number, end))
    assert watching.largest <= LARGEST_TENSOR


class Watching(TorchDispatchMode):
    """Notes the bytes of the largest tensor that a torch operation gives."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, torch.Tensor):
                self.largest = max(self.largest, each.untyped_storage().nbytes())
        return out


def at_bound(kind: type[Any], name: str, end: str) -> Any:
    bound = numeric(kind)[name][end]
    return kind(**{name: float(bound) if get_type_hints(kind)[name] is float else int(bound)})


def use(thing: Any) -> None:
    signals = make_signals(CASE)
    if isinstance(thing, Method):
        kept = thing.keep(signals, CASE.budget)
        if type(thing).parts is Method.parts:
            assert kept.shape == (2, entries_of(thing.plan(CASE.budget, CASE.prompt_tokens)))
        thing.merge(signals, kept)
    elif isinstance(thing, Format):
        counts = torch.full((2,), CASE.prompt_tokens)
        assert thing.roundtrip(signals.keys, counts, "keys").isfinite().all()
        assert thing.bound(CASE.prompt_tokens, 16, "keys") > 0
    else:
        share(thing, signals)


def share(allocator: Allocator, signals: Any) -> None:
    given = np.full((3, 2), CASE.budget)
    assert allocator.plan(given.copy(), CASE.prompt_tokens).sum() == given.sum()
    rows = [[SnapKV(window=4)] * 2] * 3
    settled = allocator.settle(given.copy(), rows, lambda at: replace(signals, layer=at, _memo={}))
    assert settled.sum() == given.sum()
    assert sum(allocator.split([9, 9], rows[0], signals)) == 18


@pytest.mark.parametrize(
    ("policy", "problem"),
    [
        ("{method: h2o, budget: 25%, keys: {name: int4, group: 18446744073709551616}}", "4096"),
        ("{method: h2o, budget: 25%, keys: {name: int4, group: 1000000}}", "at most 4096"),
        ("{method: {name: probe_greedy, block: 18446744073709551616}, budget: 25%}", "at most"),
        ("{method: {name: expected_attention, ahead: 4294967296}, budget: 25%}", "at most 65536"),
    ],
)
def test_a_policy_file_beyond_the_bounds_is_refused(policy: str, problem: str) -> None:
    with pytest.raises(KvtuneError, match=problem):
        read_policy(f"kvtune_policy: 1\npolicy: {policy}\n")


@pytest.mark.parametrize("escape", ["\\e[31mRED\\e]0;owned\\a", "a\\nb", "\\u202egnp.exe"])
def test_a_name_that_could_steer_a_terminal_is_refused(escape: str) -> None:
    with pytest.raises(KvtuneError, match="cannot be shown") as caught:
        read_policy(f'kvtune_policy: 1\nname: "{escape}"\npolicy: {{method: h2o}}\n')
    assert str(caught.value).isprintable()
