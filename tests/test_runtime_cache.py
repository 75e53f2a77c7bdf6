"""The paged cache in plain torch: the policy's tokens, its bytes, and its answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.apply import apply, linked
from kvtune.policies.attention import attend
from kvtune.policies.encoded_pages import EncodedPages
from kvtune.policies.format import Format
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.fitted import Allocated
from kvtune.policies.formats.fp8 import Fp8
from kvtune.policies.formats.gear import Gear
from kvtune.policies.formats.grouped import Grouped, Int2, Int3, Int4, Int8
from kvtune.policies.formats.kitty import Kitty
from kvtune.policies.formats.kivi import Kivi
from kvtune.policies.formats.kvquant import KvQuant
from kvtune.policies.formats.qaq import Qaq
from kvtune.policies.formats.rotated import Rotated, RotatedInt2, RotatedInt4, RotatedInt8
from kvtune.policies.formats.token_head import Fp8Unscaled, Int4TokenHead, Int8TokenHead
from kvtune.policies.formats.turboquant import TurboQuant2, TurboQuant3
from kvtune.policies.method import Method, methods
from kvtune.policies.methods.ems import EMSReconstruction
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.mikv import MiKV
from kvtune.policies.methods.minicache import MiniCache
from kvtune.policies.methods.quest import Quest
from kvtune.policies.methods.razor import Razor
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.methods.weighted_keys import WeightedKeys
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.pages import PageLayout
from kvtune.policies.paging import head_pages
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Signals
from kvtune.policies.slabs import SLAB_CELLS
from kvtune.runtime import load_cache
from kvtune.runtime.cache.backend import Backend, Moves
from kvtune.runtime.cache.leaving import free, leave
from kvtune.runtime.cache.plain_backend import PlainBackend
from kvtune.runtime.cache.policy_cache import PolicyCache
from kvtune.runtime.cache.pool import Pool
from kvtune.runtime.cache.segments import Leaving
from kvtune.runtime.cache.triton_backend import TritonBackend
from kvtune.runtime.graph import Sampling, generate
from kvtune.runtime.kernels.launch import Scratch
from kvtune.runtime.kernels.tiles import Segments, kind_of, plan_tiles
from kvtune.tests.padded import ids

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:kvtune's kernels need"),
]

SNAPKV = SnapKV(window=4, kernel=3)
SINKS = 4


def mixed() -> Policy:
    """Another method, budget and format on every head."""
    heads = (
        (Option(H2O(), Budget(tokens=5)), Option(SNAPKV, Budget(tokens=11), Int4(), Int2())),
        (
            Option(Full(), ALL, Int4(exact_first=SINKS), Int2(exact_first=SINKS)),
            Option(StreamingLLM(), Budget(tokens=7)),
        ),
        (Option(Full(), ALL, Fp8(), Int8()), Option(H2O(), Budget(share=0.25), Int8(), Fp8())),
    )
    return Policy("mixed", heads)


@pytest.fixture
def network(make_network: Callable[..., Any], tiny_fields: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return make_network(LlamaConfig(**tiny_fields), tried=True).bfloat16().eval()


def prompt_layers(network: Any, cache: PolicyCache, inputs: dict[str, Tensor]) -> list[Signals]:
    """Run a prompt, and what each layer saw of it."""
    seen: list[Signals] = []
    original = type(cache.layers[0]).prompt

    def spying(layer: Any, q: Tensor, k: Tensor, v: Tensor, padding: Any, scale: float) -> Any:
        seen.append(Signals(q[0], k[0], v[0], scale))
        return original(layer, q, k, v, padding, scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(cache.layers[0]), "prompt", spying)
        network(**inputs, past_key_values=cache)
    return seen


def test_kept_tokens_bytes_and_outputs_are_those_of_compressing(network: Any) -> None:
    policy = mixed()
    cache = load_cache(policy, network)
    seen = prompt_layers(network, cache, ids(150))
    assert cache.prompt_bytes() == policy.footprint(150, 8)
    check_layers(policy, cache, seen)


@pytest.mark.parametrize("values", [Int8(), Bf16(), Int2(exact_first=SINKS, keys_by="token")])
@pytest.mark.parametrize("kind", [Int8, Int4, Int2])
def test_keys_by_token_are_read_as_they_are_stored(
    network: Any, kind: type[Grouped], values: Format
) -> None:
    exact = getattr(values, "exact_first", 0)
    by_token = kind(exact_first=exact, keys_by="token")
    heads = ((Option(Full(), ALL, by_token, values), Option()),) * 3
    policy = Policy("keys by token", heads)
    cache = load_cache(policy, network)
    check_layers(policy, cache, prompt_layers(network, cache, ids(150)))
    assert cache.prompt_bytes() == policy.footprint(150, 8)


@pytest.mark.parametrize("keys_by", ["token", "channel"])
@pytest.mark.parametrize("kind", [RotatedInt8, RotatedInt4, RotatedInt2])
def test_rotated_numbers_are_read_from_pages_beside_others(
    network: Any, kind: type[Rotated], keys_by: Any
) -> None:
    rotated = kind(exact_first=SINKS, keys_by=keys_by)
    mixed_pair = Option(Full(), ALL, Int4(exact_first=SINKS), rotated)
    policy = Policy("rotated", ((Option(Full(), ALL, rotated, rotated), mixed_pair),) * 3)
    cache = load_cache(policy, network)
    seen = prompt_layers(network, cache, ids(150))
    assert {layer.paged.beside for layer in cache.layers} == {None}
    wide = [replace(x, keys=x.keys.float(), values=x.values.float(), _memo={}) for x in seen]
    check_layers(policy, cache, wide)
    assert cache.prompt_bytes() == policy.footprint(150, 8)


def check_layers(policy: Policy, cache: PolicyCache, seen: list[Signals]) -> None:
    """What the cache holds of a prompt of 150 tokens is what compressing it gives."""
    budgets = policy.budgets(150)
    for number, signals in enumerate(seen):
        part = apply(policy, number, budgets[number].tolist(), signals)
        layer = cache.layers[number].paged
        assert layer.kept == part.counts.tolist()
        q = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(number))
        ours = layer.attend(q, Scratch(2, layer.slots, 2, 8, "cpu"), signals.scale)
        visible = torch.arange(part.keys.shape[1]) < part.counts[:, None, None]
        theirs, _ = attend(q, part.keys.float(), part.values.float(), visible, signals.scale)
        torch.testing.assert_close(ours, theirs, atol=4e-3, rtol=4e-3)  # roundtrip ends in bf16


PLAIN = [
    name
    for name, kind in sorted(methods().items())
    if type(kind()).parts is Method.parts
    and not (kind().looks_ahead or kind().needs.reconstruction or kind().needs.calibration)
    and kind().reader(1) is None
]
"""What chooses from reading a prompt once; for the others see test_runtime_whole_prompt.py."""

HADAMARD = Allocated(directions="hadamard")
KIVI4 = Kivi(3, "int4", 64, 10)


@pytest.mark.parametrize("name", PLAIN)
def test_every_method_keeps_what_it_keeps_in_replay(network: Any, name: str) -> None:
    check_against_replay(network, Option(methods()[name](), Budget(tokens=24), Int4(), Int2()))


@pytest.mark.parametrize(
    "option",
    [
        Option(Razor(), Budget(tokens=24)),
        Option(Razor(sinks=0), Budget(tokens=2), Fp8(), Fp8()),
        Option(MiKV(balanced=False), Budget(tokens=24), Int2(keys_by="token"), Int2()),
        Option(MiKV(high="int8"), Budget(tokens=24), Int2(keys_by="token"), Int2()),
        Option(Quest(block=64), Budget(tokens=64)),
        Option(Quest(block=64), Budget(tokens=64), Int8(), Int8()),
        Option(MiniCache(), Budget(tokens=10)),
        Option(MiniCache(), Budget(tokens=0), Int4(), Int4()),
        Option(SnapKV(window=8), Budget(tokens=70), Gear(group=8), Gear(group=8)),
        Option(SnapKV(window=8), Budget(tokens=70), Int3(), Int3()),
        Option(Full(), ALL, Int4(exact_first=4), Int4()),
        Option(SnapKV(window=8), Budget(tokens=90), KIVI4, KIVI4),
        Option(Full(), ALL, Kivi(group=64), Kivi(group=64)),
        Option(Full(), ALL, Kivi(group=8, residual=20), Kivi(group=8, residual=20)),
        Option(Full(), ALL, Int4(group=32), Int4(group=32)),
        Option(WeightedKeys("snapkv"), Budget(tokens=70), Allocated(), TurboQuant2()),
        Option(WeightedKeys("snapkv"), Budget(tokens=70), Allocated(mean_bits=3.0), HADAMARD),
        Option(WeightedKeys(), ALL, Allocated(mean_bits=3.0), HADAMARD),
        Option(Full(), ALL, Allocated(0, 3.0), Allocated(0)),
        Option(SnapKV(window=8), Budget(tokens=70), TurboQuant3(exact_first=4), TurboQuant2(4)),
        Option(Full(), ALL, Int8TokenHead(), Int4TokenHead()),
        Option(Full(), ALL, Fp8Unscaled(), Int4()),
    ],
    ids=lambda option: option.label,
)
def test_parts_of_every_kind_answer_as_in_replay(network: Any, option: Option) -> None:
    check_against_replay(network, option, atol=2e-2)


def check_against_replay(
    network: Any, option: Option, atol: float = 1e-5, exact: bool = True
) -> None:
    """The pages of a prompt of 100 tokens answer as the compressed prompt of replay does."""
    heads = ((option,) * 2,) * 2 + ((Option(),) * 2,)  # links need pairs of layers
    policy = Policy("two layers", heads)
    cache = load_cache(policy, network.float())
    seen = prompt_layers(network, cache, ids(100))
    seen = [
        replace(signals, layer=number, rope=cache.geometry.rope_at(number))
        for number, signals in enumerate(seen)
    ]
    foreseen = policy.footprint(100, 8)
    assert cache.prompt_bytes() == foreseen if exact else cache.prompt_bytes() <= foreseen
    for number, signals in enumerate(seen[:2]):
        whole = linked(signals, policy.heads[number], 3, seen.__getitem__)
        part = apply(policy, number, policy.budgets(100)[number].tolist(), whole)
        q = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(number))
        layer = cache.layers[number].paged
        ours = layer.attend(q, Scratch(2, layer.slots, 2, 8, "cpu"), signals.scale)
        visible, weights = part.visible(q[:, :, None]), part.weights
        theirs, _ = attend(
            q,
            part.keys,
            part.values,
            None if visible is None else visible[..., 0, :],
            signals.scale,
            None if weights is None else weights[..., 0, :],
        )
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=10 * atol)


def test_a_format_without_pages_is_held_encoded_and_said_to_be_slow(network: Any) -> None:
    policy = Policy.uniform(Option(Full(), ALL, Kitty(), Kitty()), 3, 2)
    with pytest.warns(UserWarning, match="kitty"):
        cache = load_cache(policy, network)
    network(**ids(100), past_key_values=cache)
    assert not cache.can_be_captured
    beside = cache.layers[0].paged.beside
    assert beside is not None
    held = sum(each.laid.size for each in beside.laid)
    assert held == cache.layers[0].paged.prompt_bytes() - 2 * 4


READ_BACK: list[Format] = [Kivi(residual=20), Kitty(), KvQuant(), Qaq(), Gear()]


@pytest.mark.parametrize("form", READ_BACK, ids=lambda form: form.name)
@pytest.mark.parametrize("budget", [ALL, Budget(tokens=70)], ids=["all", "some"])
def test_packed_buffers_lie_in_the_pages_that_were_foreseen(
    network: Any, form: Format, budget: Budget
) -> None:
    option = Option(Full() if budget == ALL else SnapKV(window=8), budget, form, form)
    check_against_replay(network, option, atol=1e-3, exact=not form.bytes_vary)
    cache = load_cache(Policy.uniform(option, 3, 2), network, new_tokens=8)
    network(**ids(100, 90), past_key_values=cache)
    layer, memory = cache.layers[0].paged, cache.pool.memory.numel()
    assert layer.beside is not None
    foreseen = Counter[Any]()
    for tokens in (100, 90):
        foreseen += head_pages(
            option, min(budget.tokens or tokens, tokens), tokens, 8, cache.growth
        )
    planned = 2 * sum(x.page_bytes * n for x, n in foreseen.items())
    used, real = layer.page_bytes(), sum(each.laid.size for each in layer.beside.laid)
    assert used <= planned if form.bytes_vary else used == planned
    assert layer.beside.page_bytes - real < 4 * (EncodedPages(8).page_bytes + 64)
    whole = cache.page_bytes()
    assert cache.pool.used_bytes == whole
    assert form.bytes_vary or whole == 3 * used
    assert cache.pool.memory.numel() == memory
    free(layer, 0)
    free(layer, 1)
    assert layer.beside.page_bytes == 0
    assert cache.pool.used_bytes == whole - used
    cache.pool.check_integrity()


@pytest.mark.parametrize(
    "method", [EMSReconstruction(window=4, threshold=0.0), StreamingLLM(positions="reindexed")]
)
def test_what_a_method_merges_is_stored_merged(network: Any, method: Any) -> None:
    policy = Policy.uniform(Option(method, Budget(tokens=24)), 3, 2)
    cache = load_cache(policy, network.float())
    signals = prompt_layers(network, cache, ids(100))[1]
    signals = replace(signals, layer=1, rope=cache.geometry.rope_at(1))
    part = apply(policy, 1, [24, 24], signals)
    kept = method.keep(signals, 24)[..., None].expand(-1, -1, 8)
    assert not torch.equal(part.keys, signals.keys.gather(1, kept))
    q, layer = torch.randn(2, 2, 8), cache.layers[1].paged
    ours = layer.attend(q, Scratch(2, layer.slots, 2, 8, "cpu"), signals.scale)
    theirs, _ = attend(q, part.keys, part.values, None, signals.scale)
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)


def test_an_uncompressed_policy_generates_what_the_model_does(network: Any) -> None:
    inputs = ids(70)
    asked = {"max_new_tokens": 12, "do_sample": False}
    network.float()
    expected = network.generate(**inputs, **asked)
    logits = network(**inputs).logits[0, -1]
    cache = load_cache(Policy.uniform(Option(), 3, 2), network)
    found = network.generate(**inputs, **asked, past_key_values=cache)
    assert torch.equal(found[:, :71], expected[:, :71])
    assert logits.isfinite().all()
    assert cache.layers[0].paged.lengths[1].tolist() == [11, 11]


def test_padded_sequences_answer_as_each_alone(network: Any) -> None:
    inputs, policy = ids(90, 40), mixed()
    cache = load_cache(policy, network)
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)  # as generate does
    together = [network(**inputs, position_ids=places, past_key_values=cache).logits[:, -1]]
    step = {"input_ids": torch.tensor([[5], [6]]), "position_ids": torch.tensor([[90], [40]])}
    together.append(network(**step, past_key_values=cache).logits[:, -1])
    for row, length in enumerate((90, 40)):
        alone = load_cache(policy, network)
        given = inputs["input_ids"][row : row + 1, 90 - length :]
        first = network(given, past_key_values=alone).logits[:, -1]
        then = network(**{k: v[row : row + 1] for k, v in step.items()}, past_key_values=alone)
        torch.testing.assert_close(together[0][row], first[0], atol=0.02, rtol=0.02)
        torch.testing.assert_close(together[1][row], then.logits[0, -1], atol=0.02, rtol=0.02)


def test_a_long_generation_takes_more_pages_as_it_goes(network: Any) -> None:
    cache = load_cache(mixed(), network, new_tokens=8)
    network.generate(**ids(30), max_new_tokens=40, min_new_tokens=40, past_key_values=cache)
    assert cache.layers[2].paged.lengths[1].tolist() == [39, 39]
    assert cache.page_bytes() == sum(layer.paged.page_bytes() for layer in cache.layers)
    cache.pool.check_integrity()


def leaving(layer: Any, moves: list[list[tuple[int, int]]], counts: list[int]) -> Leaving:
    """So many entries leave each row; the moves fill their places."""
    most = max(map(len, moves))
    padded = [row + [(0, 0)] * (most - len(row)) for row in moves]
    sources, targets = torch.tensor(padded).int().unbind(-1)
    rows = np.arange(layer.rows)
    both = Moves(torch.from_numpy(rows).int(), sources, targets)
    return Leaving(rows, both, np.array(counts), torch.tensor(counts).int())


def test_evicting_keeps_the_others_and_frees_pages(network: Any) -> None:
    policy = Policy.uniform(Option(), 3, 2)
    cache = load_cache(policy, network)
    network.generate(**ids(10), max_new_tokens=76, min_new_tokens=76, past_key_values=cache)
    layer = cache.layers[1].paged
    before = layer.page_bytes()
    q, scratch = torch.ones(2, 2, 8), Scratch(2, layer.slots, 2, 8, "cpu")
    everything = layer.attend(q, scratch, 0.3)
    leave(layer, leaving(layer, [[], [(3, 3)]], [0, 0]))
    torch.testing.assert_close(layer.attend(q, scratch, 0.3), everything)
    layer.append(torch.ones(1, 2, 8), torch.full((1, 2, 8), 1e4))  # to go where the third was
    layer.count_appended()
    leave(layer, leaving(layer, [[(75, 2)], [(75, 2)]], [73, 37]))
    gone = 2 * -(-76 // 16) - -(-(3 + 1) // 16) - -(-(39 + 1) // 16)
    assert before - layer.page_bytes() == gone * layer.growing_layout.page_bytes
    assert layer.lengths[1].tolist() == [3, 39]
    assert layer.evicted.tolist() == [73, 37]
    assert (layer.attend(q, scratch, 0.3).abs() > 10).all()
    cache.pool.check_integrity()


def test_a_freed_sequence_leaves_its_pages_to_others(network: Any) -> None:
    cache = load_cache(mixed(), network)
    network(**ids(90, 90), past_key_values=cache)
    for layer in cache.layers:
        free(layer.paged, 0)
    half = cache.page_bytes()
    for layer in cache.layers:
        free(layer.paged, 1)
    assert half > 0
    assert cache.page_bytes() == 0
    cache.pool.check_integrity()


def test_what_the_cache_cannot_do_is_refused(network: Any) -> None:
    with pytest.raises(KvtuneError, match="for 2 layers"):
        load_cache(Policy.uniform(Option(), 2, 2), network)
    cache = load_cache(mixed(), network)
    with pytest.raises(KvtuneError, match="given none"):
        network(**ids(9), use_cache=False)
    network(**ids(40), past_key_values=cache)
    with pytest.raises(KvtuneError, match="cropped"):
        cache.crop(3)


@pytest.mark.parametrize("extra", ["softcap", "s_aux", "position_bias"])
def test_attention_of_another_kind_is_refused(network: Any, extra: str) -> None:
    """Capped or biased logits and sinks change the result: passing them over would be wrong."""
    cache = load_cache(mixed(), network)
    with pytest.raises(KvtuneError, match=extra):
        network(**ids(9), past_key_values=cache, **{extra: torch.ones(1)})


def test_a_number_that_is_none_names_layer_and_head(network: Any) -> None:
    with torch.no_grad():
        network.model.layers[1].self_attn.k_proj.weight[9] = torch.nan  # KV head 1 of heads of 8
    with pytest.raises(KvtuneError, match="layer 1, KV head 1"):
        network(**ids(20), past_key_values=load_cache(mixed(), network))


def test_the_decode_loop_generates_what_transformers_does(network: Any) -> None:
    network.float()
    inputs, policy = ids(60, 31), mixed()
    network.generation_config.eos_token_id = None
    cache = load_cache(policy, network)
    prompts, mask = inputs["input_ids"], inputs["attention_mask"]
    ours = generate(network, cache, prompts, mask, new_tokens=20)
    plain = network.generate(
        **inputs, max_new_tokens=20, do_sample=False, past_key_values=load_cache(policy, network)
    )
    assert ours.shape == (2, 20)
    assert torch.equal(ours, plain[:, 60:])
    with pytest.raises(KvtuneError, match="room for 5"):
        generate(network, load_cache(policy, network, new_tokens=5), prompts, mask, new_tokens=6)


def test_sampling_draws_from_the_likely_in_proportion() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(4000, 1)
    assert (Sampling().draw(logits) == 0).all()
    drawn = Sampling(1.0).draw(logits).bincount(minlength=4) / 4000
    torch.testing.assert_close(drawn, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03, rtol=0)
    assert Sampling(1.0, top_k=2).draw(logits).unique().tolist() == [0, 1]
    assert Sampling(1.0, top_p=0.9).draw(logits).unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_a_pool_never_gives_a_page_twice(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pool = Pool(30 * SLAB_CELLS, 64, "cpu")
    held: list[tuple[Any, int]] = []
    for _ in range(60):
        if held and rng.random() < 0.5:
            pool.give(*held.pop(rng.integers(len(held))))
        else:
            size = int(rng.choice([10, 14, 18, 32, 64]))
            held.append((pool.take(int(rng.integers(1, 12)), size), size))
        pool.check_integrity()
        cells = [c + i for pages, size in held for c in pages for i in range(size)]
        assert len(set(cells)) == len(cells)
        assert pool.used_bytes == 64 * len(cells)


@pytest.mark.parametrize("evicts", [False, True])
@pytest.mark.parametrize("backend", [PlainBackend(), TritonBackend()])
def test_a_graph_needs_kernels_and_heads_that_only_grow(
    network: Any, backend: Backend, evicts: bool
) -> None:
    cache = load_cache(Policy.uniform(Option(), 3, 2), network, evicts=evicts)
    cache.backend = backend
    assert cache.can_be_captured == (isinstance(backend, TritonBackend) and not evicts)


def test_a_full_pool_says_so() -> None:
    pool = Pool(SLAB_CELLS, 64, "cpu")
    pool.take(9, 64)
    with pytest.raises(KvtuneError, match="full"):
        pool.take(1, 10)


def test_no_head_holds_up_the_others() -> None:
    """The lengths of a real plan's most uneven layer, in bf16, eight sequences."""
    pages = np.tile([512, 512, 512, 292, 292, 292, 2048, 2048], 8)
    pairs = np.full(64, PageLayout(64).code)
    segments = Segments(np.arange(64), pairs, pages.cumsum() - pages, pages, pages * 16)
    tiles = plan_tiles(segments, np.arange(pages.sum())).records[:, 4]
    assert tiles.max() <= 1.1 * 16 * pages.sum() / len(tiles)


@pytest.mark.parametrize("form", ["bf16", "int4", "int3"])
@pytest.mark.parametrize("blocks", [90, 122, 124, 1000])
def test_rows_alike_are_cut_into_as_many_tiles_as_run_at_once(form: str, blocks: int) -> None:
    layout = PageLayout(128, form, form)
    pages = np.full(64, blocks * 64 // layout.page_tokens)
    starts, tokens = pages.cumsum() - pages, np.full(64, 64 * blocks)
    segments = Segments(np.arange(64), np.full(64, layout.code), starts, pages, tokens)
    records = plan_tiles(segments, np.arange(pages.sum())).records
    longest = 1792 if blocks == 1000 else 528  # tiles of four bits are of a bounded length
    assert len(records) == {"bf16": 528, "int4": longest, "int3": 1056}[form]
    assert records[:, 4].max() <= 1.15 * 64 * 64 * blocks / len(records) + 64


@pytest.mark.parametrize(("form", "each"), [("bf16", 16), ("int4", 64), ("int2", 64)])
def test_tiles_of_short_heads_are_of_128_tokens(form: str, each: int) -> None:
    pages = np.array([8, 1, 7, 0] * 16) * 64 // each
    pairs = np.full(64, PageLayout(64, form, form).code)
    segments = Segments(np.arange(64), pairs, pages.cumsum() - pages, pages, pages * each)
    records = plan_tiles(segments, np.arange(pages.sum())).records
    tiles = [sorted(records[records[:, 0] == row, 4].tolist()) for row in range(4)]
    assert tiles == [[128] * 4, [64], [128, 128, 192], [0]]


@pytest.mark.parametrize(("form", "longest"), [("int4", 2048), ("bf16", 8192)])
def test_many_rows_are_cut_too_where_that_was_measured(form: str, longest: int) -> None:
    """1,000 rows of 8,192 tokens are more than run at once; pages of floats were not measured."""
    layout = PageLayout(64, form, form)
    pages = np.full(1000, layout.pages_for(8192))
    pairs = np.full(1000, layout.code)
    segments = Segments(np.arange(1000), pairs, pages.cumsum() - pages, pages, np.full(1000, 8192))
    tiles = plan_tiles(segments, np.zeros(pages.sum(), np.int64)).records[:, 4]
    assert set(tiles.tolist()) == {longest}


def test_a_layer_is_cut_into_as_many_tiles_as_its_formats_allow_at_once() -> None:
    bf16, int4, int2 = (PageLayout(64, name, name).code for name in ("bf16", "int4", "int2"))
    kinds = {(bf16,): "floats", (int4, int2): "integers", (bf16, int4): "mixed"}
    assert {pairs: kind_of(pairs) for pairs in kinds} == kinds
    assert kind_of((PageLayout(64, "int4", "bf16").code,)) == "integers"


@pytest.mark.parametrize("seed", range(5))
def test_tiles_cover_every_page_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = 6
    row = np.concatenate([np.arange(rows), rng.integers(0, rows, 5)])
    pages = rng.integers(0, 200, len(row))
    pair = rng.choice([PageLayout(64, x, x).code for x in ("bf16", "int4", "int2")], len(row))
    each = np.where(pair == PageLayout(64).code, 16, 64)
    segments = Segments(row, pair, pages.cumsum() - pages, pages, pages * each)
    records = plan_tiles(segments, np.arange(pages.sum()), programs=40).records
    covered = np.concatenate(
        [np.arange(at, at + n // each[which]) for _, _, at, _, n, which, *_ in records]
    )
    places = np.concatenate([np.arange(r[11], r[11] + r[4]) for r in records])
    np.testing.assert_array_equal(np.sort(places), np.arange((pages * each).sum()))
    np.testing.assert_array_equal(np.sort(covered), np.arange(pages.sum()))
    np.testing.assert_array_equal(np.sort(records[:, 6]), np.arange(len(records)))
    for one in range(rows):
        mine = records[records[:, 0] == one]
        assert (mine[:, 7] % 65536 == len(mine)).all()
        assert len(set(mine[:, 6] - mine[:, 7] // 65536)) == 1
        np.testing.assert_array_equal(np.sort(mine[:, 7] // 65536), np.arange(len(mine)))
