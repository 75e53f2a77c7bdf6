"""A plan inside a serving engine: blocks that are counted, pages that are carved, and answers."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.common.vllm_releases import EXPORTED, LIKE_SERVED, LOGGED, SERVED
from kvtune.policies.allocators.adakv import AdaKV
from kvtune.policies.formats.fitted import Allocated
from kvtune.policies.formats.fp8 import Fp8
from kvtune.policies.formats.gear import Gear
from kvtune.policies.formats.grouped import Int2, Int4, Int8
from kvtune.policies.formats.kivi import Kivi
from kvtune.policies.formats.token_head import Int4TokenHead, Int8TokenHead
from kvtune.policies.formats.turboquant import TurboQuant2, TurboQuant3
from kvtune.policies.methods.cam import CaM
from kvtune.policies.methods.ems import EMSReconstruction
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.kvzip import KVzip
from kvtune.policies.methods.quest import Quest
from kvtune.policies.methods.razor import Razor
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.methods.weighted_keys import WeightedKeys
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.page_formats import BF16_PAGE
from kvtune.policies.pages import PageLayout
from kvtune.policies.placement import pages_of
from kvtune.policies.policy import Policy
from kvtune.policies.servable import check_servable
from kvtune.runtime.cache.plain_backend import PlainBackend
from kvtune.runtime.cache.policy_cache import PolicyCache
from kvtune.runtime.cache.segments import CODED
from kvtune.runtime.serving import asking, compressing, laying, reading, seats, vllm_plugin
from kvtune.runtime.serving.blocks import PlannedBlocks, left_to_answers
from kvtune.runtime.serving.pages import RequestPages
from kvtune.runtime.serving.running import Running
from kvtune.traces.geometry import Geometry

pytestmark = pytest.mark.usefixtures("one_thread")

L, HQ, H, D = 2, 4, 2, 8
SCALE = D**-0.5
GEOMETRY = Geometry(L, HQ, H, D, SCALE, (None,) * L, (), (None,) * L, 100, 4096)
SNAPKV = SnapKV(window=4, kernel=3)
STRIDE = 16
"""Tokens that requests advance by at a time where only blocks are counted."""


def mixed() -> Policy:
    """Another method, budget and format on every head."""
    return Policy(
        "mixed",
        (
            (Option(H2O(), Budget(tokens=5)), Option(SNAPKV, Budget(share=0.5), Int4(), Int2())),
            (
                Option(Full(), ALL, Fp8(), Fp8()),
                Option(StreamingLLM(), Budget(tokens=70), Int8(exact_first=4), Int4(exact_first=4)),
            ),
        ),
    )


def split() -> Policy:
    """Budgets that move between a layer's heads when the prompt is known."""
    rows = ((Option(SNAPKV, Budget(share=0.4), Int4(), Int4()),) * H,) * L
    return Policy("split", rows, AdaKV())


def merging() -> Policy:
    """What is stored is not the kept tokens' own; two budgets and two formats beside each other."""
    rows = ((Option(CaM(), Budget(tokens=9)), Option(CaM(), Budget(tokens=30), Int8(), Int8())),)
    return Policy("merging", rows * L)


def signed() -> Policy:
    """Keys weighted by queries that an engine shows, in rows of signs."""
    formats = Allocated(mean_bits=3.0), Allocated(mean_bits=2.0, directions="hadamard")
    every = Option(WeightedKeys(queries="recent"), ALL, *formats)
    some = Option(WeightedKeys("snapkv", queries="recent"), Budget(tokens=70), *formats)
    return Policy("signed", ((every, some), (some, Option(Full(), ALL, *formats))))


def in_blocks() -> Policy:
    """Formats that their descriptions alone put into pages, with tokens in 16 bits before them."""
    few = Option(Full(), ALL, TurboQuant3(), TurboQuant2())
    some = Option(SNAPKV, Budget(tokens=70), Int8TokenHead(), Int4TokenHead())
    sinks = Option(Full(), ALL, Int4(exact_first=4), Int8TokenHead(exact_first=4))
    return Policy("in blocks", ((few, few), (sinks, some)))


POLICIES = [mixed(), split()]
OF_EVERY_KIND = [*POLICIES, merging(), in_blocks(), signed()]


@dataclass
class Engine:
    """A scheduler as engines have them: blocks of one size, the youngest preempted first."""

    planned: PlannedBlocks
    free: list[int]
    blocks: dict[int, list[int]] = field(default_factory=dict)  # of requests that run, by number
    prompts: dict[int, int] = field(default_factory=dict)

    def give(self, number: int, tokens: int) -> bool:
        """Blocks for so many tokens, or none at all."""
        have = self.blocks.setdefault(number, [])
        prompt = self.prompts.setdefault(number, tokens)
        wanted = self.planned.blocks(prompt, tokens) - len(have)
        if wanted > len(self.free):
            return False
        have.extend(self.free.pop() for _ in range(wanted))
        return True

    def take_back(self, number: int) -> None:
        self.free.extend(self.blocks.pop(number))
        del self.prompts[number]


# Blocks


@pytest.mark.parametrize("policy", [*POLICIES, signed()], ids=lambda policy: policy.name)
def test_nobody_is_lost_and_nothing_leaks_over_many_requests(policy: Policy) -> None:
    """600 requests of mixed lengths, with aborts and preemptions."""
    planned, draw = PlannedBlocks(policy, D), random.Random(0)  # noqa: S311
    total = 3 * planned.blocks(600, 900)
    engine = Engine(planned, list(range(1, total + 1)))
    waiting = [(n, draw.randint(1, 600), draw.randint(1, 12)) for n in range(600)]
    answers = {number: answer for number, _, answer in waiting}
    running: dict[int, tuple[int, int, RequestPages]] = {}  # tokens, strides to come, pages
    ended: Counter[str] = Counter()
    while waiting or running:
        while waiting and len(running) < 8 and engine.give(waiting[0][0], waiting[0][1]):
            number, prompt, answer = waiting.pop(0)
            running[number] = prompt, answer, carved(engine, number, prompt)
        if waiting and waiting[0][0] in engine.blocks and waiting[0][0] not in running:
            engine.take_back(waiting[0][0])  # it was given nothing
        for number in list(running):
            if number not in running:
                continue
            tokens, answer, pages = running[number]
            while not engine.give(number, tokens + STRIDE):
                youngest = list(running)[-1]
                seen, rest, _ = running.pop(youngest)
                engine.take_back(youngest)
                waiting.insert(0, (youngest, seen, rest))
                ended["preempted"] += 1
                if youngest == number:
                    break
            if number not in running:
                continue
            grow(engine, number, tokens + STRIDE, pages)
            running[number] = tokens + STRIDE, answer - 1, pages
            aborted = draw.random() < 0.01
            if aborted or answer == 1:
                del running[number]
                engine.take_back(number)
                ended["aborted" if aborted else "answered"] += 1
        owned = [block for blocks in engine.blocks.values() for block in blocks]
        assert len(set(owned)) == len(owned)
        assert sorted(owned + engine.free) == list(range(1, total + 1))
    assert ended["answered"] + ended["aborted"] == len(answers)
    assert min(ended.values()) > 20, ended


def read_again(planned: PlannedBlocks, total: int, left: Callable[[int], int]) -> tuple[int, int]:
    """Tokens that 120 requests read more than once, and steps, where so many blocks are left."""
    engine, draw = Engine(planned, list(range(1, total + 1))), random.Random(1)  # noqa: S311
    waiting = [(n, draw.randint(100, 600), draw.randint(1, 20)) for n in range(120)]
    running: dict[int, tuple[int, int]] = {}  # tokens, strides to come
    again = steps = 0
    while waiting or running:
        while waiting:
            number, tokens, _ = waiting[0]
            kept = left(total) if running else 0
            if planned.blocks(tokens, tokens) + kept > len(engine.free):
                break
            assert engine.give(number, tokens)
            running[number] = waiting.pop(0)[1:]
        for number in list(running):
            while number in running and not engine.give(number, running[number][0] + STRIDE):
                youngest, (seen, rest) = running.popitem()
                engine.take_back(youngest)
                waiting.insert(0, (youngest, seen, rest))
                again += seen
            if number in running:
                tokens, rest = running.pop(number)
                if rest > 1:
                    running[number] = tokens + STRIDE, rest - 1
                else:
                    engine.take_back(number)
        running = dict(sorted(running.items()))
        steps += 1
    return again, steps


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_new_prompts_leave_blocks_to_the_answers_of_those_that_run(policy: Policy) -> None:
    """Else prompts are read again and again; whoever needs all memory is admitted alone."""
    planned = PlannedBlocks(policy, D)
    total = 12 * planned.blocks(600, 900)
    nothing, _ = read_again(planned, total, lambda _: 0)
    some, _ = read_again(planned, total, left_to_answers)
    assert some < nothing / 2
    least = planned.blocks(600, 600 + 20 * STRIDE)
    assert read_again(planned, least, left_to_answers)[1] > 120


def carved(engine: Engine, number: int, prompt: int) -> RequestPages:
    """The pages of a prompt, as the worker takes them: by head, in no order of sizes."""
    pages = RequestPages(engine.planned.block_cells)
    pages.add(engine.blocks[number])
    sequence = engine.planned.sequence(prompt)
    seen = [pages.take(1, size) for size, count in sequence.fixed.items() for _ in range(count)]
    check_inside(engine, number, [int(cells[0]) for cells in seen])
    grow(engine, number, prompt, pages)
    return pages


def grow(engine: Engine, number: int, tokens: int, pages: RequestPages) -> None:
    """Take the growing pages that a length needs beyond those of the length before."""
    pages.add(engine.blocks[number][len(pages.blocks) :])
    sequence, size = engine.planned.sequence(engine.prompts[number]), PageLayout(D).page_cells
    new = tokens - engine.prompts[number]
    more = sequence.growing(new) - (sequence.growing(new - STRIDE) if new else 0)
    cells = pages.take(more, size).tolist()
    check_inside(engine, number, cells)
    assert pages.opened <= engine.planned.blocks(engine.prompts[number], tokens)


def check_inside(engine: Engine, number: int, cells: list[int]) -> None:
    """Only blocks that are the request's own are written to."""
    blocks = {cell // engine.planned.block_cells for cell in cells}
    assert blocks <= set(engine.blocks[number])


def test_pages_of_a_request_never_overlap() -> None:
    planned = PlannedBlocks(mixed(), D)
    sizes = sorted({pages_of(option, D).page_cells for option in planned.policy.options()})
    pages, draw = RequestPages(planned.block_cells), random.Random(1)  # noqa: S311
    pages.add(draw.sample(range(1, 500), 200))
    taken: set[int] = set()
    while True:
        size = draw.choice(sizes)
        try:
            cells = pages.take(draw.randint(0, 5), size)
        except RuntimeError:
            break
        for first in cells.tolist():
            mine = set(range(first, first + size))
            assert not mine & taken
            assert first // planned.block_cells == (first + size - 1) // planned.block_cells
            taken |= mine
    share = len(taken) / (200 * planned.block_cells)
    assert share > 0.85, "little of a block is left over"


def test_blocks_are_whole_layers_with_little_left_over() -> None:
    for layers in (8, 30, 32, 80):
        policy = Policy.uniform(Option(SNAPKV, Budget(share=0.1), Int4(), Int2()), layers, 3)
        planned = PlannedBlocks(policy, 128)
        assert planned.block_cells % layers == 0
        assert planned.block_cells >= 6 * 64
        pages = planned.sequence(2048)
        needed = PageLayout(128).page_cells * pages.growing(1) + sum(
            size * n for size, n in pages.fixed.items()
        )
        taken = planned.blocks(2048, 2049) * planned.block_cells
        assert needed <= taken < 1.12 * needed


def test_a_plan_of_an_eighth_admits_seven_times_the_tokens() -> None:
    """Of SmolLM2's shape, prompts of 8,192 tokens, pages and their slack counted."""
    policy = Policy.uniform(Option(SNAPKV, Budget(share=0.12)), 30, 3)
    planned = PlannedBlocks(policy, 64)
    uncompressed = 8192 * 30 * 3 * 2 * 64 * 2
    assert uncompressed / (planned.blocks(8191, 8192) * planned.block_bytes) > 7


def test_a_plan_travels_between_processes() -> None:
    planned = PlannedBlocks(mixed(), D)
    expected = planned.blocks(100, 200)
    copy = pickle.loads(pickle.dumps(planned))  # noqa: S301 (our own bytes)
    assert copy == planned
    assert hash(copy) == hash(planned)
    assert copy.blocks(100, 200) == expected


@pytest.mark.parametrize(
    "option",
    [
        Option(KVzip(), Budget(100)),
        Option(Razor(), Budget(100)),
        Option(Quest(block=64), Budget(64)),
        Option(Full(), ALL, Gear(), Gear()),
        Option(Full(), ALL, Kivi(group=64), Kivi(group=64)),
        Option(StreamingLLM(positions="reindexed"), Budget(64)),
        Option(EMSReconstruction(space="pre_rope"), Budget(64)),
    ],
    ids=lambda option: option.method.name,
)
def test_what_is_more_than_pages_is_refused(option: Option) -> None:
    with pytest.raises(KvtuneError, match=r"asks for more|holds more|rotary positions|newest"):
        check_servable(Policy.uniform(option, L, H), D)


# Answers


class Table:
    """The engine's table as a worker sees it: rows filled up with zeros."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = [row + [0] * 400 for row in rows]

    def first(self) -> list[int]:
        return [row[0] for row in self.rows]

    def blocks(self, row: int, start: int, stop: int) -> list[int]:
        return self.rows[row][start:stop]


class Alone:
    """One request in our live cache, for itself."""

    def __init__(self, policy: Policy) -> None:
        self.cache = PolicyCache(policy, GEOMETRY, 128, backend_of=lambda _: PlainBackend())

    def answer(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``[T, Hq, D]`` of a prompt or of one token."""
        batch = [x.transpose(0, 1)[None] for x in (q, k, v)]
        held = self.cache.layers[layer]
        out = held.step(*batch, SCALE) if held.seen else held.prompt(*batch, None, SCALE)
        held.seen += q.shape[0]
        answered: Tensor = out[0].transpose(0, 1)
        return answered


@pytest.mark.parametrize("policy", OF_EVERY_KIND, ids=lambda policy: policy.name)
def test_requests_that_come_and_go_are_answered_as_if_each_were_alone(policy: Policy) -> None:
    """Joining, leaving, a block that changes hands, and a second life after preemption."""
    planned = PlannedBlocks(policy, D)
    check_servable(policy, D)
    engine = Engine(planned, list(range(1, 400)))
    running = Running(planned, torch.device("cpu"), PlainBackend())
    running.attach(torch.zeros(400 * planned.block_bytes, dtype=torch.int8))
    draw = torch.Generator().manual_seed(0)
    alone: dict[int, Alone] = {}
    lengths: dict[int, int] = {}
    steps: list[tuple[list[tuple[int, int]], list[int]]] = [  # prompts that begin, numbers that end
        ([(0, 150), (1, 9)], []), ([(2, 65)], []), ([], []), ([], [1]), ([(3, 130)], []),
        ([], [0]), ([(0, 90), (4, 1)], []), *[([], [])] * 3, ([], [2, 3]), *[([], [])] * 2,
    ]  # fmt: skip
    for begin, end in steps:
        step = dict.fromkeys(lengths, 1) | dict(begin)
        for number, count in step.items():
            lengths[number] = lengths.get(number, 0) + count
            if (number, count) in begin:
                alone[number] = Alone(policy)
            assert engine.give(number, lengths[number])
        one_step(engine, running, step, lengths, alone, draw)
        for number in end:
            engine.take_back(number)
            del lengths[number]
    assert len(running.held) <= 6, "what nobody names any more is forgotten"


def one_step(
    engine: Engine,
    running: Running,
    counts: dict[int, int],
    lengths: dict[int, int],
    alone: dict[int, Alone],
    draw: torch.Generator,
) -> None:
    numbers = sorted(counts, key=lambda number: (counts[number] > 1, number))
    starts = [0]
    for number in numbers:
        starts.append(starts[-1] + counts[number])
    table = Table([engine.blocks[number] for number in numbers] + [[]])  # and a row of padding
    step = running.begin(table, [*starts, starts[-1]], [*(lengths[n] for n in numbers), 1])
    for layer in range(L):
        q, k, v = (
            torch.randn(starts[-1] + 3, heads, D, generator=draw).bfloat16() for heads in (HQ, H, H)
        )
        out = torch.zeros_like(q)
        running.attend(step, layer, (q, k, v), out, SCALE)
        for number, start, stop in zip(numbers, starts, starts[1:], strict=False):
            mine = slice(start, stop)
            expected = alone[number].answer(layer, q[mine], k[mine], v[mine])
            torch.testing.assert_close(out[mine], expected, atol=1e-2, rtol=1e-2)
        assert not out[starts[-1] :].any(), "padding is left alone"


LENGTHS = [40, 130, 40, 9, 40]


def read(policy: Policy, steps: list[list[int]]) -> tuple[Running, list[Tensor]]:
    """Prompts that come together or one by one, and their answers, each layer's in turn."""
    planned = PlannedBlocks(policy, D)
    running = Running(planned, torch.device("cpu"), PlainBackend())
    running.attach(torch.zeros(400 * planned.block_bytes, dtype=torch.int8))
    engine = Engine(planned, list(range(1, 400)))
    assert all(engine.give(number, tokens) for number, tokens in enumerate(LENGTHS))
    draw = torch.Generator().manual_seed(3)
    drawn = [torch.randn(L, n, HQ + 2 * H, D, generator=draw).bfloat16() for n in LENGTHS]
    answers: list[Tensor] = []
    for numbers in steps:
        lengths = [LENGTHS[number] for number in numbers]
        starts = [sum(lengths[:at]) for at in range(len(lengths) + 1)]
        step = running.begin(Table([engine.blocks[n] for n in numbers]), starts, lengths)
        for layer in range(L):
            qkv = torch.cat([drawn[number][layer] for number in numbers]).split((HQ, H, H), 1)
            out = torch.zeros(starts[-1], HQ, D).bfloat16()
            running.attend(step, layer, qkv, out, SCALE)
            answers += [out.split(lengths)[number] for number in range(len(numbers))]
    return running, answers


@pytest.mark.parametrize("most", [2**17, 300, 1])
@pytest.mark.parametrize("policy", OF_EVERY_KIND[:-1], ids=lambda policy: policy.name)
def test_prompts_of_one_step_are_stored_as_if_each_came_in_a_step_of_its_own(
    policy: Policy, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens in the same pages, to the byte, however many methods see at once.

    But for signs: their tables are sums, whose last bits depend on the longest prompt beside them.
    """
    alone, expected = read(policy, [[number] for number in range(len(LENGTHS))])
    monkeypatch.setattr(reading, "_ASKED_AT_ONCE", most)
    monkeypatch.setattr(reading, "_HELD_AT_ONCE", 2 * most)
    monkeypatch.setattr(asking, "_RANKED_AT_ONCE", 2 * most)
    together, found = read(policy, [list(range(len(LENGTHS)))])
    assert alone.memory is not None
    assert alone.memory.any()
    assert together.memory is not None
    assert torch.equal(alone.memory, together.memory)
    in_order = [found[layer * len(LENGTHS) + n] for n in range(len(LENGTHS)) for layer in range(L)]
    for one, other in zip(in_order, expected, strict=True):
        torch.testing.assert_close(one, other)
    pairs = zip(alone.held.values(), together.held.values(), strict=True)
    fp8 = torch.tensor([[pages_of(o, D).keys == "fp8" for o in row] for row in policy.heads])
    for mine, theirs in ((a.settled(), b.settled()) for a, b in pairs):
        assert mine.coded_cells.tolist() == theirs.coded_cells.tolist()
        assert mine.cells.tolist() == theirs.cells.tolist()
        scales = (each.fp8_scales[:, CODED][fp8] for each in (mine, theirs))
        torch.testing.assert_close(*scales)


def test_prompts_of_one_step_share_tables_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt more adds what its own attention and scores take, and nothing to the rest."""
    counts: list[Counter[str]] = []
    for numbers in ([1], [1, 3, 4]):
        told: Counter[str] = Counter()
        counts.append(told)
        for owner, name in ((compressing, "sent"), (PlainBackend, "write"), (laying, "_taken")):
            call = getattr(owner, name)

            def noted(*args: Any, told: Any = told, call: Any = call, name: str = name) -> Any:
                told[name] += 1
                return call(*args)

            monkeypatch.setattr(owner, name, noted)
        read(mixed(), [numbers])
        monkeypatch.undo()
    assert counts[0] == counts[1]
    assert counts[0]["sent"] == 1
    assert counts[0]["write"] == len({pages_of(o, D).code for o in mixed().options()})


def test_who_has_been_read_is_seated_while_the_device_still_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running, _ = read(mixed(), [[0, 3]])
    monkeypatch.setattr(seats.Seats, "_enter", None)  # would be called, and cannot be
    first, other = running.held
    table = Table([list(range(first, first + 100)), list(range(other, other + 100))])
    step = running.begin(table, [0, 1, 2], [LENGTHS[0] + 1, LENGTHS[3] + 1])
    assert step.generating == 2


def test_a_prompt_in_pieces_is_refused() -> None:
    planned = PlannedBlocks(mixed(), D)
    running = Running(planned, torch.device("cpu"), PlainBackend())
    running.attach(torch.zeros(40 * planned.block_bytes, dtype=torch.int8))
    table = Table([list(range(1, 30))])
    running.begin(table, [0, 20], [20])
    with pytest.raises(KvtuneError, match="in one piece"):
        running.begin(table, [0, 20], [40])
    with pytest.raises(KvtuneError, match="in one piece"):
        running.begin(Table([[30]]), [0, 1], [7])


def test_growing_pages_are_those_of_the_pages_size() -> None:
    sequence = PlannedBlocks(mixed(), D).sequence(100)
    assert sequence.growing(BF16_PAGE) - sequence.growing(0) == L * H


# The entry point


def test_without_a_policy_vllm_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVTUNE_POLICY", raising=False)
    monkeypatch.setattr(vllm_plugin, "adapter_for", None)  # and would not be callable
    vllm_plugin.register()


def test_a_policy_that_is_no_file_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTUNE_POLICY", "nowhere.yaml")
    with pytest.raises(KvtuneError, match=r"names no file: nowhere\.yaml"):
        vllm_plugin.register()


@pytest.mark.parametrize("release", ["0.31.2", "0.27.1", "1.0.0", "0.34.0rc1+cpu"])
def test_a_release_that_nobody_knows_is_refused_by_name(release: str) -> None:
    with pytest.raises(KvtuneError, match=re.escape(f"does not know vLLM {release}")):
        vllm_plugin.adapter_for(release)


def test_every_release_that_is_known_has_an_adapter() -> None:
    known = {tuple(map(int, each.split("."))) for each in (*SERVED, *LIKE_SERVED)}
    assert known == set(vllm_plugin.ADAPTERS)
    for module in vllm_plugin.ADAPTERS.values():
        assert importlib.util.find_spec(module), module


def test_the_releases_that_the_page_names_are_those_of_the_code() -> None:
    page = (Path(__file__).parents[1] / "docs" / "faq.md").read_text("utf-8")
    told = re.findall(r"^\| (.*) \| ([0-9., ]+) \|$", page, re.MULTILINE)
    found = [tuple(releases.split(", ")) for _, releases in told]
    assert found == [SERVED, LIKE_SERVED, (EXPORTED,), (LOGGED,)]


def test_the_entry_point_is_the_plugins() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    module, name = "kvtune.runtime.serving.vllm_plugin", "register"
    assert f'kvtune = "{module}:{name}"' in text
    assert callable(getattr(importlib.import_module(module), name))
