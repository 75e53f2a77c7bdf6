"""The kernel over rows of signs in Triton's interpreter, against float64 over what was decoded."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; the kernels have no interpreter")
if os.environ["TRITON_INTERPRET"] != "1":
    pytest.skip("Triton's interpreter is switched off", allow_module_level=True)

from kvtune.policies.formats.fitted import Allocated
from kvtune.policies.methods.full import Full
from kvtune.policies.option import ALL, Option
from kvtune.policies.parts import HeadPart
from kvtune.runtime.cache.beside import Beside, HeldPart
from kvtune.runtime.kernels.reference import attend
from kvtune.tests.tiers import first

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def held_parts(
    head_dim: int, formats: tuple[Allocated, Allocated], tokens: list[int], balanced: bool
) -> list[HeldPart]:
    """Parts of rows 0, 2, 3, ... with channels of different sizes."""
    generator = torch.Generator().manual_seed(head_dim + len(tokens))
    found = []
    for number, count in enumerate(tokens):
        spread = torch.rand(head_dim, generator=generator) * 3
        own = torch.randn(2, count, head_dim, generator=generator) * spread + spread.flip(0)
        weight = (torch.rand(head_dim, generator=generator) + 0.1).bfloat16().float()
        part = HeadPart(torch.arange(count), balance=weight if balanced else None)
        row = number + (number > 0)  # row 1 has no part
        both = own[0].bfloat16(), own[1].bfloat16()
        held = HeldPart.of(row, part, both, Option(Full(), ALL, *formats))
        found.append(held)
    return found


def by_hand(held: list[HeldPart], q: Any, scale: float) -> tuple[Any, Any]:
    """Attention of each row over what its part decodes to, in float64; nothing where none is."""
    output = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
    for part in held:
        keys, values = (x.double() for x in part.read(q.shape[-1]))
        output[part.row], lse[part.row] = attend(q[part.row].double(), keys, values, scale)
    return output, lse


@pytest.mark.parametrize(
    "case",
    first(
        [
            (64, Allocated(mean_bits=2.25), Allocated(directions="hadamard"), [90, 7, 600], True),
            (64, Allocated(0, 1.0), Allocated(0, 4.0), [1, 64, 130], False),
            (64, Allocated(directions="hadamard"), Allocated(mean_bits=2.6), [5, 70], True),
            (128, Allocated(mean_bits=3.0), Allocated(directions="hadamard"), [66], True),
            (256, Allocated(0, 2.0), Allocated(0, 2.0, "hadamard"), [70], False),
        ]
    ),
)
@pytest.mark.parametrize("group", first([3, 1, 9]))
def test_signs_attend_as_what_they_decode_to(
    case: tuple[int, Allocated, Allocated, list[int], bool], group: int
) -> None:
    head_dim, keys, values, tokens, balanced = case
    held, rows = held_parts(head_dim, (keys, values), tokens, balanced), len(tokens) + 1
    q = torch.randn(rows, group, head_dim, generator=torch.Generator().manual_seed(1)).bfloat16()
    beside, scale = Beside(held, head_dim, CPU, kernels=True), head_dim**-0.5
    assert beside.signed
    assert beside.is_dense
    nothing = torch.full((rows, group), -torch.inf)
    found = beside.merged(q.float(), torch.zeros(q.shape), nothing, scale)
    expected, _ = by_hand(held, q, scale)
    there = [part.row for part in held]
    error = float((found - expected)[there].abs().amax() / expected.abs().amax())
    # Sinks of weighted keys are rounded to bf16 once more, as they lie with other 16-bit entries.
    assert error < (5e-3 if balanced and keys.exact_first else 1e-3)


def test_packed_bytes_are_those_that_a_plan_counts() -> None:
    formats = Allocated(mean_bits=2.25), Allocated(directions="hadamard")
    held = held_parts(64, formats, [90, 200], balanced=True)
    packed = Beside(held, 64, CPU, kernels=True)
    assert packed.dense is not None
    exact = packed.dense[1].nbytes + packed.dense[2].nbytes
    planned = sum(
        formats[0].bound(n, 64, "keys") + formats[1].bound(n, 64, "values") for n in (90, 200)
    )
    weights = 2 * 2 * 64
    assert packed.signed[0].nbytes + exact == planned + weights


def test_a_sign_that_is_turned_over_is_noticed() -> None:
    """The comparison above can fail: one bit of one key moves the output."""
    held = held_parts(64, (Allocated(0), Allocated(0)), [20], balanced=False)
    q = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(2))
    packed = Beside(held, 64, CPU, kernels=True).signed[0]
    before = packed.attend(q, 0.125)[0]
    packed.keys.codes[3, 0] ^= 1
    assert not torch.allclose(before, packed.attend(q, 0.125)[0], atol=1e-4)
