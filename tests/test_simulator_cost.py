"""What a policy costs: its footprint to the byte, and more of everything for more tokens."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate, exact
from kvtune.policies.allocator import Allocator
from kvtune.policies.allocators.as_given import AsGiven
from kvtune.policies.allocators.model_wide import ModelWide
from kvtune.policies.allocators.pyramid import Pyramid
from kvtune.policies.format import Format
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.fitted import Fitted
from kvtune.policies.formats.gear import Gear
from kvtune.policies.formats.grouped import Int2, Int4
from kvtune.policies.formats.kitty import Kitty
from kvtune.policies.formats.kivi import Kivi
from kvtune.policies.formats.qaq import Qaq
from kvtune.policies.formats.rotated import RotatedInt4
from kvtune.policies.method import Method
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.kvzip import KVzip
from kvtune.policies.methods.lazy_eviction import LazyEviction
from kvtune.policies.methods.quest import Quest
from kvtune.policies.methods.retrieval_attention import RetrievalAttention
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.methods.tova import Tova
from kvtune.policies.option import Budget, Option
from kvtune.policies.paging import TABLE_BYTES
from kvtune.policies.policy import Policy, footprint_of_lengths
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.kernel_table import KernelRow, Point
from kvtune.profiles.measured import find_measured
from kvtune.profiles.models import find_model
from kvtune.simulator.cost import Cost, full_cost, policy_cost
from kvtune.simulator.latency.compression import compression
from kvtune.simulator.latency.host import JOIN_S, host_step
from kvtune.simulator.latency.kernels import Kernels
from kvtune.simulator.latency.read_back import READ_BACK, read_back_step
from kvtune.simulator.memory.plan import memory_plan
from kvtune.simulator.memory.policy_bytes import cache_bytes_by_format


def test_a_prompt_on_the_host_leaves_the_device_and_is_paid_for_over_the_link() -> None:
    shape, tokens = find_model("llama-8b"), 32768
    reader = Option(Quest(block=64), Budget(tokens=2048))
    costs = {}
    for card in ("4090", "h200"):
        budget = memory_plan(
            shape, find_gpu(card), 16 * 10**9, context_tokens=tokens, weights="int4"
        )
        for option in (reader, replace(reader, tier="host")):
            policy = Policy.uniform(option, shape.layers, shape.kv_heads)
            costs[card, option.tier] = policy_cost(policy, replace(budget, generated_tokens=64))
    for card in ("4090", "h200"):
        here, there = costs[card, "device"], costs[card, "host"]
        assert (here.host_bytes, here.moved_bytes) == (0, 0)
        assert there.host_bytes == shape.kv_bytes(tokens)
        assert there.moved_bytes == shape.kv_bytes(2048)
        assert here.prompt_bytes - there.prompt_bytes == shape.kv_bytes(tokens)
        assert there.sequence_bytes < here.sequence_bytes / 10
        assert there.memory.value < here.memory.value
        link = there.moved_bytes / find_gpu(card).pcie_bytes_per_s
        added = there.latency.value - here.latency.value
        assert link < added < 2.5 * link  # beside it choosing, and joining two attentions
    slower = [costs[card, "host"].latency.value for card in ("4090", "h200")]
    assert slower[0] > slower[1]


def test_what_the_link_brings_hides_behind_attention_on_the_device() -> None:
    shape, gpu, tokens = find_model("llama-8b"), find_gpu("4090"), 65536
    there = Option(Quest(block=64), Budget(tokens=64), tier="host")
    alone = Policy.uniform(there, shape.layers, shape.kv_heads)
    mixed = Policy("mixed", ((there,) * 2 + (Option(),) * 6,) * shape.layers)
    joining = shape.layers * JOIN_S.value
    assert joining < host_step(mixed, shape, gpu, 1, tokens).value < 1.1 * joining
    assert host_step(alone, shape, gpu, 1, tokens).value > 2 * joining
    on_device = Policy.uniform(Option(), shape.layers, shape.kv_heads)
    assert host_step(on_device, shape, gpu, 1, tokens).value == 0


def measured_part(op: str, microseconds: float, **sizes: int) -> KernelRow:
    heads = {} if op == "host_fetch" else {"query_heads": 32, "kv_heads": 8, "head_dim": 128}
    point = Point(op, "kvtune", **heads, **sizes)  # type: ignore[arg-type]
    return KernelRow(point, "", 1, 0, microseconds, microseconds, microseconds, 15)


def test_measured_parts_of_heads_on_the_host_add_up_to_their_step() -> None:
    """Choosing grows with what is held, fetching with what comes over; nothing lies beside it."""
    shape, gpu = find_model("llama-8b"), find_gpu("h200")
    known = find_measured("h200")
    assert known is not None
    page = 8 * 2 * 64 * 128 * 2  # bytes of a block of all heads
    parts = [
        measured_part("host_choose", 20, length=8192),
        measured_part("host_choose", 40, length=65536),
        measured_part("host_fetch", 30, width_in=page),
        measured_part("host_fetch", 330, width_in=31 * page),
        measured_part("host_join", 15, length=64),
        measured_part("host_join", 25, length=2048),
    ]  # fmt: skip
    kernels = Kernels([*(row for row in known.rows if row.point.op[:5] != "host_"), *parts])
    for held, read, wanted in ((8192, 64, 20 + 30 + 15), (65536, 31 * 64, 40 + 330 + 24.68)):
        option = Option(Quest(block=64), Budget(tokens=read), tier="host")
        policy = Policy.uniform(option, shape.layers, shape.kv_heads)
        found = host_step(policy, shape, gpu, 1, held, kernels)
        assert found.value == pytest.approx(shape.layers * wanted * 1e-6, rel=1e-3)
        assert found.tier == "fitted"
        assert found.low < found.value < found.high


def test_formats_that_no_kernel_reads_are_paid_for_head_by_head() -> None:
    shape, gpu, tokens = find_model("llama-8b"), find_gpu("h200"), 4096
    heads = shape.layers * shape.kv_heads

    def cost(form: Format, batch: int = 1) -> Cost:
        option = Option(SnapKV(), Budget(share=0.5), form, form)
        policy = Policy.uniform(option, shape.layers, shape.kv_heads)
        budget = memory_plan(shape, gpu, context_tokens=tokens, generated_tokens=64, batch=batch)
        return policy_cost(policy, budget)

    read, kernel = cost(Fitted()), cost(Int2())
    assert read.latency.value - kernel.latency.value > heads * READ_BACK.head_s.value
    assert read.latency.tier == "assumed" != kernel.latency.tier
    twice = cost(Fitted(), 2).latency.value - cost(Int2(), 2).latency.value
    assert twice > 1.9 * heads * READ_BACK.head_s.value
    assert cost(Kivi(group=64)).latency.tier == kernel.latency.tier
    in_place = [cost(form).latency.value for form in (Int2(), Kitty(), Kivi(), Qaq(), Gear())]
    assert sorted(in_place) == in_place  # as they were measured
    assert in_place[-1] < 0.1 * read.latency.value
    wide = Policy("half", ((Option(values=Fitted()),) * 4 + (Option(),) * 4,) * shape.layers)
    alone = read_back_step(wide, shape, gpu, 1, tokens).value
    assert heads / 2 * READ_BACK.head_s.value < alone


def test_heads_that_evict_in_few_bits_hold_few_bits_at_the_end() -> None:
    shape, gpu = find_model("smollm2-135m"), find_gpu("4090")
    budget = memory_plan(shape, gpu, context_tokens=1024, generated_tokens=4096)
    sizes = {}
    for form in (Bf16(), RotatedInt4()):
        option = Option(Tova(unit="kv_head"), Budget(tokens=1024), form, form)
        policy = Policy.uniform(option, shape.layers, shape.kv_heads)
        sizes[form.name] = policy_cost(policy, budget, evicts=True).sequence_bytes
    assert sizes["rotated_int4"] < 0.33 * sizes["bf16"]


def test_a_search_on_the_host_takes_longer_the_more_keys_it_compares() -> None:
    shape, gpu = find_model("llama-8b"), find_gpu("4090")
    added = []
    for beam in (50, 100, 200):
        option = Option(RetrievalAttention(beam=beam), Budget(tokens=740), tier="host")
        policy = Policy.uniform(option, shape.layers, shape.kv_heads)
        assert policy.footprint(131072, shape.head_dim) == 4 * shape.layers * shape.kv_heads
        added.append(host_step(policy, shape, gpu, 1, 131072))
    assert added[0].value < added[1].value < added[2].value
    assert added[1].low < 0.188 < added[1].high  # published, for all of a step


def test_a_policys_cost_grows_with_what_it_keeps_and_is_its_footprint() -> None:
    shape, gpu = find_model("llama-8b"), find_gpu("4090")
    rows = []
    for context, share in product((2048, 8192), (1 / 16, 1 / 4, 1.0)):
        budget = memory_plan(shape, gpu, 16 * 10**9, context_tokens=context)
        option = Option(H2O(), Budget(share=share), Int4(), Int2())
        policy = Policy.uniform(option, shape.layers, shape.kv_heads)
        cost = policy_cost(policy, replace(budget, generated_tokens=256))
        assert cost.prompt_bytes == policy.footprint(context, shape.head_dim)
        generated = shape.kv_bytes(context + 256) - shape.kv_bytes(context)
        assert 1 < cost.sequence_bytes / (cost.prompt_bytes + generated) < 1.05
        assert cost.sequences_that_fit == budget.cache_bytes // cost.sequence_bytes
        by_format = cache_bytes_by_format(policy, shape, context)
        assert set(by_format) == {"int4", "int2"}
        lengths = footprint_of_lengths(shape.layers, shape.kv_heads)
        assert sum(by_format.values()) + lengths == cost.prompt_bytes
        assert cost.tokens_per_second.value == pytest.approx(1 / cost.latency.value)
        assert cost.tokens_per_second.low < cost.tokens_per_second.high
        rows.append((context, share, cost))
        full = full_cost(replace(budget, generated_tokens=256))
        assert full.share == 1
        assert cost.share < 0.3 < full.share
        assert cost.memory.value < full.memory.value
        assert cost.latency.value < full.latency.value
    for (c1, s1, one), (c2, s2, other) in product(rows, rows):
        if c1 <= c2 and s1 <= s2 and (c1, s1) != (c2, s2):
            assert one.prompt_bytes < other.prompt_bytes
            assert one.latency.value < other.latency.value
            assert one.memory.value < other.memory.value
            assert one.sequences_that_fit >= other.sequences_that_fit


def test_an_uncompressed_policy_costs_the_full_cache_and_its_lengths() -> None:
    shape, gpu = find_model("llama-8b"), find_gpu("4090")
    budget = memory_plan(shape, gpu, 16 * 10**9, context_tokens=4096, batch=2)
    policy = Policy.uniform(Option(), shape.layers, shape.kv_heads)
    ours, full = (
        policy_cost(policy, replace(budget, generated_tokens=64)),
        full_cost(replace(budget, generated_tokens=64)),
    )
    lengths = footprint_of_lengths(shape.layers, shape.kv_heads)
    assert ours.prompt_bytes == full.prompt_bytes + lengths
    assert ours.prefill == full.prefill
    with pytest.raises(KvtuneError, match="31 layers"):
        policy_cost(Policy.uniform(Option(), 31, 8), replace(budget, generated_tokens=64))


def test_compressing_takes_longer_the_more_a_method_looks_at() -> None:
    """Places alone are cheapest, then a window; column sums and a second pass cost most."""
    shape, gpu = find_model("llama-8b"), find_gpu("4090")
    budget = memory_plan(shape, gpu, 20 * 10**9, context_tokens=16384)

    def seconds(option: Option) -> Estimate:
        policy = Policy.uniform(option, shape.layers, shape.kv_heads)
        return policy_cost(policy, replace(budget, generated_tokens=0)).compression

    quarter = Budget(share=0.25)
    methods = (StreamingLLM(), SnapKV(), H2O(), KVzip())
    found = [seconds(Option(method, quarter)) for method in methods]
    assert [f.value for f in found] == sorted(f.value for f in found)
    assert (
        found[-1].value
        > policy_cost(
            Policy.uniform(Option(), shape.layers, shape.kv_heads),
            replace(budget, generated_tokens=0),
        ).prefill.value
    )
    assert all(f.low < f.value < f.high for f in found)
    assert seconds(Option(H2O(), quarter, Int4(), Int4())).value > found[2].value
    whole = seconds(Option())
    assert (whole.value, whole.tier) == (0, "exact")
    assert seconds(Option(keys=Int4(), values=Int4())).value > 0


def test_heads_that_go_on_evicting_hold_their_budget_and_statistics() -> None:
    """4 B an entry for H2O, none for TOVA; TOVA holds one entry more than may stay, no growth."""
    shape, gpu = find_model("llama-8b"), find_gpu("4090")
    budget = memory_plan(shape, gpu, 20 * 10**9, context_tokens=4096)
    heads = shape.layers * shape.kv_heads

    def cost(method: Method, generated: int, evicts: bool = True) -> Cost:
        option = Option(method, Budget(tokens=500))
        policy = Policy.uniform(option, shape.layers, shape.kv_heads)
        return policy_cost(policy, replace(budget, generated_tokens=generated), evicts=evicts)

    entry = Option().footprint(1, 1, shape.head_dim)
    tova, h2o = cost(Tova(), 2000), cost(H2O(), 2000)
    assert tova.statistics_bytes == 0
    assert h2o.statistics_bytes == heads * 501 * 4
    tables = heads * TABLE_BYTES
    assert tova.sequence_bytes == heads * 512 * entry + tables, "eight pages of 64"
    assert h2o.sequence_bytes == tova.sequence_bytes + h2o.statistics_bytes
    assert h2o.memory.value == tova.memory.value + h2o.statistics_bytes
    assert cost(Tova(), 9000).sequence_bytes == tova.sequence_bytes
    assert cost(H2O(), 2000, evicts=False).sequence_bytes > h2o.sequence_bytes
    snap = cost(SnapKV(), 2000), cost(SnapKV(), 2000, evicts=False)
    assert snap[0] == snap[1], "what cannot evict while decoding does not"


def test_an_authors_untrimmed_prompt_is_held_whole() -> None:
    shape, gpu = find_model("llama-8b"), find_gpu("4090")
    budget = memory_plan(shape, gpu, 20 * 10**9, context_tokens=4096)
    option = Option(LazyEviction(prompt="kept"), Budget(tokens=500))
    policy = Policy.uniform(option, shape.layers, shape.kv_heads)
    evicting = policy_cost(policy, replace(budget, generated_tokens=64), evicts=True)
    assert evicting.prompt_bytes == shape.kv_bytes(4096) + footprint_of_lengths(shape.layers, 8)


@pytest.mark.parametrize(
    ("method", "allocator"), [(KVzip(), AsGiven()), (SnapKV(), ModelWide()), (SnapKV(), Pyramid())]
)
def test_a_policy_that_waits_holds_one_prompt_uncompressed(
    method: Method, allocator: Allocator
) -> None:
    shape, gpu = find_model("llama-8b"), find_gpu("4090")
    budget = memory_plan(shape, gpu, 20 * 10**9, context_tokens=8192)
    option = Option(method, Budget(share=0.25))
    shapes = shape.layers, shape.kv_heads
    policy = Policy.uniform(option, *shapes, allocator=allocator)
    plain = Policy.uniform(Option(SnapKV(), Budget(share=0.25)), *shapes)
    ours, theirs = (policy_cost(p, replace(budget, generated_tokens=0)) for p in (policy, plain))
    waiting = shape.kv_bytes(8192) * 31 // 32 if policy.waits else 0
    assert policy.waits == (not isinstance(allocator, Pyramid))
    a_page = 16 * 4 * shape.head_dim
    extra = shape.layers * shape.kv_heads * a_page * (allocator.name != "as_given")
    assert ours.sequence_bytes == pytest.approx(theirs.sequence_bytes + extra, rel=0.02)
    assert ours.memory.value - ours.sequence_bytes == pytest.approx(
        theirs.memory.value - theirs.sequence_bytes + waiting
    )
    assert ours.sequences_that_fit == (budget.cache_bytes - waiting) // ours.sequence_bytes


def test_a_batch_is_compressed_prompt_by_prompt_and_a_pass_is_paid_once_each() -> None:
    shape, gpu = find_model("llama-8b"), find_gpu("4090")
    for method in (H2O(), KVzip()):
        option = Option(method, Budget(share=0.25), Int4(), Int4())
        policy = Policy.uniform(option, shape.layers, shape.kv_heads)
        one = compression(policy, shape, gpu, 4096, exact(0.5, "s"))
        four = compression(policy, shape, gpu, 4096, exact(2.0, "s"), batch=4)
        assert four.value == pytest.approx(4 * one.value)
        assert four.high == pytest.approx(4 * one.high)
        assert (one.value > 0.5) == isinstance(method, KVzip)


def test_windows_longer_than_a_sequence_are_no_hindrance() -> None:
    """Gemma-3's local layers see 1 024 tokens: until then its cache is a plain one."""
    shape, gpu = find_model("gemma-3-4b"), find_gpu("4090")
    policy = Policy.uniform(Option(H2O(), Budget(share=0.5)), shape.layers, shape.kv_heads)
    budget = memory_plan(shape, gpu, 20 * 10**9, context_tokens=768)
    cost = policy_cost(policy, replace(budget, generated_tokens=256))
    in_pages = (384 + 256) * shape.kv_bytes_per_token()
    assert cost.sequence_bytes == in_pages + TABLE_BYTES * shape.layers * shape.kv_heads
    with pytest.raises(KvtuneError, match="sliding-window"):
        policy_cost(policy, replace(budget, generated_tokens=257))
