"""Seats of requests that generate: kernels beside plain torch, and rows that are nobody's."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtune.policies.formats.fitted import Allocated
from kvtune.policies.formats.grouped import Int2, Int4
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.methods.weighted_keys import WeightedKeys
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.policy import Policy
from kvtune.runtime.cache.backend import Backend
from kvtune.runtime.cache.plain_backend import PlainBackend
from kvtune.runtime.cache.triton_backend import TritonBackend
from kvtune.runtime.serving.blocks import PlannedBlocks
from kvtune.runtime.serving.running import Running
from kvtune.runtime.serving.seat_planning import most_room

pytestmark = pytest.mark.usefixtures("one_thread", "quick_interpreter")
pytest.importorskip("triton", reason="Triton is not installed; the kernels have no interpreter")
if os.environ["TRITON_INTERPRET"] != "1":
    pytest.skip("Triton's interpreter is switched off", allow_module_level=True)

L, HQ, H, D = 1, 6, 3, 64
LONGEST, MOST = 400, 4
POLICY = Policy(
    "mixed",
    (
        (
            Option(StreamingLLM(), Budget(tokens=70)),
            Option(SnapKV(), Budget(60), Int4(), Int2()),
            Option(WeightedKeys(queries="recent"), ALL, Allocated(), Allocated()),
        ),
    ),
)
PLANNED = PlannedBlocks(POLICY, D)


class Table:
    """Blocks of each request, one after another; block 0 is nobody's, as in vLLM."""

    def __init__(self, numbers: list[int]) -> None:
        each = PLANNED.blocks(LONGEST // 2, LONGEST)
        self.rows = [list(range(1 + each * n, 1 + each * (n + 1))) if n >= 0 else [0]
                     for n in numbers]  # fmt: skip

    def first(self) -> list[int]:
        return [row[0] for row in self.rows]

    def blocks(self, row: int, start: int, stop: int) -> list[int]:
        return self.rows[row][start:stop]


class Served:
    """Requests in one engine's memory, whose steps are padded with rows of nobody."""

    def __init__(self, backend: Backend) -> None:
        blocks = 1 + MOST * PLANNED.blocks(LONGEST // 2, LONGEST)
        self.memory = torch.zeros(blocks * PLANNED.block_bytes, dtype=torch.int8)
        room = most_room(PLANNED, MOST, LONGEST)
        self.running = Running(PLANNED, torch.device("cpu"), backend, room)
        self.running.attach(self.memory)
        self.lengths: dict[int, int] = {}

    def read(self, number: int, tokens: int, draw: torch.Generator) -> None:
        step = self.running.begin(Table([number]), [0, tokens], [tokens])
        self.answer(step, tokens, draw)
        self.lengths[number] = tokens

    def generate(self, numbers: list[int], rows: int, draw: torch.Generator) -> list[Tensor]:
        """As a replayed graph does: seats of this step, launches of a step of nobody."""
        for number in numbers:
            self.lengths[number] += 1
        padding = rows - len(numbers)
        starts = [*range(len(numbers) + 1), *[len(numbers)] * padding]
        lengths = [*(self.lengths[n] for n in numbers), *[0] * padding]
        step = self.running.begin(Table(numbers + [-1] * padding), starts, lengths)
        assert step.generating == len(numbers)
        return self.answer(type(step)(None, rows, slice(0, rows)), rows, draw)

    def answer(self, step: Any, tokens: int, draw: torch.Generator) -> list[Tensor]:
        outputs = []
        for layer in range(L):
            qkv = torch.randn(tokens, HQ + 2 * H, D, generator=draw).bfloat16()
            q, k, v = qkv.split((HQ, H, H), 1)  # strided, as vLLM gives them
            out = torch.full((tokens, HQ, D), 7.0).bfloat16()
            self.running.attend(step, layer, (q, k, v), out, D**-0.5)
            outputs.append(out)
        return outputs


def test_kernels_answer_as_plain_torch_does_whoever_sits_where() -> None:
    """Requests join and leave, a seat changes hands, and steps end in rows of nobody."""
    both = [Served(TritonBackend()), Served(PlainBackend())]
    draws = [torch.Generator().manual_seed(0) for _ in both]
    steps: list[tuple[list[tuple[int, int]], list[int], int]] = [
        ([(0, 130), (1, 40)], [0, 1], 3), ([(2, 100)], [2, 0], 2), ([(0, 77)], [1, 0, 2], 3),
    ]  # fmt: skip
    for prompts, numbers, rows in steps:
        for number, tokens in prompts:
            for served, draw in zip(both, draws, strict=True):
                served.read(number, tokens, draw)
        answers = [s.generate(numbers, rows, d) for s, d in zip(both, draws, strict=True)]
        for found, expected in zip(*answers, strict=True):
            torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
            assert (found[len(numbers) :] == 7).all(), "nobody's output is left as it was"


@pytest.mark.parametrize("backend", [TritonBackend(), PlainBackend()], ids=["kernels", "plain"])
def test_nobody_writes_nowhere(backend: Backend) -> None:
    served, draw = Served(backend), torch.Generator().manual_seed(1)
    served.read(0, 50, draw)
    served.generate([0], 1, draw)
    seats = served.running.seats
    assert seats is not None
    before = served.memory.clone(), seats.lengths.clone(), seats.table.clone()
    addresses = [seats.order.data_ptr(), seats.table.data_ptr(), seats.tiles.data_ptr()]
    served.answer(served.running.nobody(MOST), MOST, draw)
    after = served.memory, seats.lengths, seats.table
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert addresses == [seats.order.data_ptr(), seats.table.data_ptr(), seats.tiles.data_ptr()]


def test_tables_of_a_captured_step_never_move() -> None:
    """Room for the longest is there from the beginning; more than was promised is refused."""
    served, draw = Served(PlainBackend()), torch.Generator().manual_seed(2)
    seats = served.running.seats
    assert seats is not None
    seats.captured = True
    served.read(0, LONGEST - 60, draw)
    for _ in range(60):
        served.generate([0], 1, draw)
    for number in range(1, MOST):
        served.read(number, 5, draw)
    served.generate([3, 0, 1, 2], MOST, draw)
    served.read(2, 5, draw)  # all of them have ended when this one comes
    served.generate([2], MOST, draw)
    with pytest.raises(RuntimeError, match="too small"):
        seats._allocate(seats.size.with_room(seats=MOST + 1))
