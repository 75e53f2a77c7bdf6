"""Caches that are used again, against whole passes and straight-line attention in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch

from kvtune.common.errors import KvtuneError
from kvtune.runtime.reuse.blending import blended
from kvtune.runtime.reuse.editing import Edit, asked_edited, edited
from kvtune.runtime.reuse.parallel import ParallelContexts
from kvtune.runtime.reuse.passes import PromptCache, moved, part_of
from kvtune.runtime.reuse.shortening import self_information, shortened
from kvtune.tests.full_cache import observed_logits
from kvtune.traces.passes import full_cache_handler, prompt_cache, run_observed

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = tuple(2 + (7 * n * n + 3 * n) % 250 for n in range(40))
NEW = (90, 91, 92, 93, 94)


def cache_of(model: Any, ids: tuple[int, ...]) -> PromptCache:
    with torch.no_grad():
        return prompt_cache(model, ids)


def same(ours: PromptCache, theirs: PromptCache, layers: int | None = None) -> None:
    for mine, other in list(zip(ours, theirs, strict=True))[:layers]:
        for x, y in zip(mine, other, strict=True):
            torch.testing.assert_close(x.float(), y.float(), atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize(
    "edits",
    [
        [Edit(10, 14, NEW)],
        [Edit(10, 14)],
        [Edit(20, 20, NEW)],
        [Edit(5, 6, NEW), Edit(6, 9), Edit(30, 33, NEW[:2])],
    ],
)
def test_an_edit_is_exact_up_to_its_end_and_in_the_first_layer(
    tiny_model: Any, edits: list[Edit]
) -> None:
    ours = edited(tiny_model, cache_of(tiny_model, IDS), edits)
    after = IDS
    for edit in reversed(edits):
        after = edit.applied(after)
    theirs = cache_of(tiny_model, after)
    same(ours, theirs, layers=1)  # a first layer's keys depend on token and position alone
    end = edits[0].start + len(edits[0].token_ids)
    same(part_of(ours, slice(0, end)), part_of(theirs, slice(0, end)))


def test_an_edit_at_the_end_is_a_whole_pass(tiny_model: Any) -> None:
    ours = edited(tiny_model, cache_of(tiny_model, IDS), [Edit(36, 40, NEW)])
    same(ours, cache_of(tiny_model, (*IDS[:36], *NEW)))
    same(edited(tiny_model, ours, []), ours)


def test_keys_behind_an_edit_are_turned(tiny_model: Any) -> None:
    cache = cache_of(tiny_model, IDS)
    ours = edited(tiny_model, cache, [Edit(10, 14)])
    for layer, (k, v) in enumerate(cache):
        waves = np.array(tiny_model.geometry.rope_at(layer).inverse_frequencies)
        old, half = k[0, :, 14:].double().numpy(), len(waves)
        left, right = old[..., :half], old[..., half : 2 * half]
        cos, sin = np.cos(-4 * waves), np.sin(-4 * waves)
        turned = np.concatenate([left * cos - right * sin, right * cos + left * sin], -1)
        np.testing.assert_allclose(ours[layer][0][0, :, 10:, : 2 * half], turned, atol=1e-5)
        assert torch.equal(ours[layer][1][:, :, 10:], v[:, :, 14:])


@pytest.mark.parametrize(
    "edits", [[Edit(30, 20)], [Edit(0, 2)], [Edit(3, 50)], [Edit(9, 12), Edit(11, 13)]]
)
def test_edits_that_do_not_fit_are_refused(tiny_model: Any, edits: list[Edit]) -> None:
    with pytest.raises(KvtuneError, match="edits must follow one another"):
        edited(tiny_model, cache_of(tiny_model, IDS), edits)


def test_one_context_without_temperature_is_a_whole_pass(tiny_model: Any) -> None:
    contexts = ParallelContexts.of(tiny_model, IDS[:6], [IDS[6:30]], 1.0, 1.0)
    expected = observed_logits(tiny_model, IDS, 10)
    torch.testing.assert_close(contexts.logits(tiny_model, IDS[30:]), expected, atol=1e-4, rtol=0)


def test_the_order_of_contexts_is_no_matter(tiny_model: Any) -> None:
    parts = [IDS[6:16], IDS[16:30], NEW]
    one, other = (
        ParallelContexts.of(tiny_model, IDS[:6], x).logits(tiny_model, IDS[30:])
        for x in (parts, parts[::-1])
    )
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_contexts_are_weighted_by_temperature_and_scale(tiny_model: Any) -> None:
    contexts = ParallelContexts.of(tiny_model, IDS[:6], [IDS[6:16], IDS[16:30]], 0.7, 0.8)
    assert contexts.next_position == 20
    generator = torch.Generator().manual_seed(0)
    (pk, pv), (ck, cv) = contexts.prefix[1], contexts.contexts[1]
    heads, size = pk.shape[1], pk.shape[3]
    q = torch.randn(1, 2 * heads, 3, size, generator=generator)
    k, v = torch.randn(2, 1, heads, 3, size, generator=generator)
    found = contexts.attention(1, q, k, v, 0.3, None)
    for head, row in np.ndindex(2 * heads, 3):
        h, query = head // 2, q[0, head, row].double().numpy()
        mine = [x[0, h].double().numpy() for x in (ck, cv)]
        own = slice(0, row + 1)
        other = [
            np.r_[x[0, h].double().numpy(), y[0, h, own].double().numpy()]
            for x, y in ((pk, k), (pv, v))
        ]
        weight = np.exp(mine[0] @ query * 0.3 / 0.7)
        rest = np.exp(other[0] @ query * 0.3)
        power, mass = weight.sum() ** (0.8 * 0.7), rest.sum()
        expected = power * (weight @ mine[1] / weight.sum()) + rest @ other[1]
        np.testing.assert_allclose(found[0, head, row], expected / (power + mass), atol=1e-5)


@pytest.mark.parametrize("rule", ["cacheblend", "kvshare"])
def test_running_all_tokens_anew_is_a_whole_pass(
    tiny_model: Any, rule: Literal["cacheblend", "kvshare"]
) -> None:
    chunks = [cache_of(tiny_model, IDS[:12]), cache_of(tiny_model, IDS[12:])]
    found = blended(tiny_model, IDS, chunks, share=1.0, rule=rule)
    assert found.recomputed.tolist() == list(range(12, 40))
    same(found.cache, cache_of(tiny_model, IDS))


def drawn_by_the_last_but_one(
    model: Any, token_ids: Sequence[int], keys: torch.Tensor
) -> torch.Tensor:
    """Of layer 1, the attention of the last token but one of a text to these keys ``[H, T, D]``."""
    from kvtune.traces.passes import run_prompt

    q: list[torch.Tensor] = []
    run_prompt(model, token_ids, lambda layer, x, k, v: q.append(x[0].double()))
    group = len(q[1]) // len(keys)
    logits = torch.stack(
        [keys[n // group] @ x[-2] * model.geometry.scale for n, x in enumerate(q[1])]
    )
    return logits.softmax(-1).mean(0)


@pytest.mark.parametrize("rule", ["cacheblend", "kvshare"])
def test_the_tokens_that_differ_most_run_anew(
    tiny_model: Any, rule: Literal["cacheblend", "kvshare"]
) -> None:
    chunks = [cache_of(tiny_model, part) for part in (IDS[:12], IDS[12:25], IDS[25:])]
    found = blended(tiny_model, IDS, chunks, share=0.25, rule=rule)
    whole = cache_of(tiny_model, IDS)
    apart = [moved(tiny_model, chunk, n) for chunk, n in zip(chunks, (0, 12, 25), strict=True)]
    old_keys, old = (torch.cat([x[1][i] for x in apart], 2)[0].double() for i in (0, 1))
    change = whole[1][1][0].double() - old
    worth = change.square().sum((0, 2))
    if rule == "kvshare":
        worth = change.abs().sum((0, 2)) * drawn_by_the_last_but_one(tiny_model, IDS, old_keys)
    worth[:12] = -1
    expected = worth.topk(7).indices.sort().values
    assert found.recomputed.tolist() == expected.tolist()
    same(found.cache, whole, layers=2)
    others = sorted(set(range(40)) - set(expected.tolist()))
    torch.testing.assert_close(
        found.cache[2][1][:, :, others],
        torch.cat([x[2][1] for x in apart], 2)[:, :, others],
    )
    nothing = blended(tiny_model, IDS, chunks, share=0.0, rule=rule)
    errors = [float((x.cache[2][1] - whole[2][1]).square().sum()) for x in (found, nothing)]
    assert errors[0] < errors[1]


def test_kvshare_asks_with_the_last_query_but_one_of_a_question(tiny_model: Any) -> None:
    """The prompt ends with the question; of the keys, only reused ones are looked at."""
    chunks = [cache_of(tiny_model, part) for part in (IDS[:12], IDS[12:30])]
    apart = [moved(tiny_model, chunk, n) for chunk, n in zip(chunks, (0, 12), strict=True)]
    keys, values = (torch.cat([x[1][i] for x in apart], 2)[0].double() for i in (0, 1))
    change = cache_of(tiny_model, IDS[:30])[1][1][0].double() - values
    chosen = []
    for question in (IDS[30:], IDS[30:][::-1], IDS[:0]):
        worth = change.abs().sum((0, 2))
        worth = worth * drawn_by_the_last_but_one(tiny_model, [*IDS[:30], *question], keys)
        expected = (12 + worth[12:].topk(4).indices).sort().values.tolist()
        found = blended(tiny_model, IDS[:30], chunks, share=0.25, rule="kvshare", question=question)
        assert found.recomputed.tolist() == expected
        chosen.append(expected)
    assert chosen[0] != chosen[2], "the question is of no account"


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_question_runs_in_the_pass_of_the_tokens_that_run_anew(
    tiny_model: Any, share: float
) -> None:
    chunks = [cache_of(tiny_model, part) for part in (IDS[:12], IDS[12:30])]
    both = blended(tiny_model, IDS[:30], chunks, share=share, question=IDS[30:])
    before = blended(tiny_model, IDS[:30], chunks, share=share)
    assert both.logits is not None
    assert before.logits is None
    same([(k[:, :, :30], v[:, :, :30]) for k, v in both.cache], before.cache)
    with torch.no_grad():
        expected = run_observed(tiny_model, IDS[30:], 30, full_cache_handler(before.cache))[0]
    torch.testing.assert_close(both.logits, expected, atol=1e-4, rtol=0)


def test_a_question_about_an_edited_prompt_takes_one_pass(tiny_model: Any) -> None:
    cache, edits = cache_of(tiny_model, IDS[:30]), [Edit(10, 14, NEW)]
    found, logits = asked_edited(tiny_model, cache, edits, IDS[30:])
    apart = edited(tiny_model, cache, edits)
    same(part_of(found, slice(0, 31)), apart)
    with torch.no_grad():
        expected = run_observed(tiny_model, IDS[30:], 31, full_cache_handler(apart))[0]
    assert logits is not None
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_chunks_that_do_not_make_the_prompt_are_refused(tiny_model: Any) -> None:
    with pytest.raises(KvtuneError, match="40 tokens, but chunks of 12"):
        blended(tiny_model, IDS, [cache_of(tiny_model, IDS[:12])])


def test_what_a_model_foresees_best_is_left_out(tiny_model: Any) -> None:
    with torch.no_grad():
        logits = tiny_model.model(torch.tensor([IDS])).logits[0].double()
    share = logits.log_softmax(-1)
    nats = [np.inf, *(-float(share[n, token]) for n, token in enumerate(IDS[1:]))]
    found = self_information(tiny_model, IDS).tolist()
    np.testing.assert_allclose(found[1:], nats[1:], atol=1e-4)
    ranked = sorted(range(40), key=lambda place: -nats[place])
    for count in (1, 10, 40):
        kept = sorted(ranked[:count])
        assert shortened(tiny_model, IDS, count / 40) == tuple(IDS[place] for place in kept)
    assert shortened(tiny_model, IDS, 0.1, kept_last=6)[-6:] == IDS[-6:]
    with pytest.raises(KvtuneError, match="a share of 0"):
        shortened(tiny_model, IDS, 0.0)


@pytest.mark.parametrize("held", [0, 2000, 2**28], ids=lambda held: f"{held} bytes of masks")
def test_scattered_rows_attend_as_they_would_among_all(
    held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In tiles that see no key behind their last row, against straight-line float64."""
    from kvtune.traces import seam

    monkeypatch.setattr(seam, "_TILE_QUERIES", 3)
    monkeypatch.setattr(seam, "_HELD_BIASES", held)
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, h, 60, 8, generator=generator) for h in (6, 2, 2))
    places = [0, 3, 4, 17, 18, 40, 59]
    attend = seam.RowAttention(places)
    found, again = (attend(q[:, :, places], k, v, 0.3) for _ in range(2))
    assert torch.equal(found, again)
    assert sum(bias.untyped_storage().nbytes() for bias in attend._biases.values()) <= held
    for head, (row, place) in ((h, x) for h in range(6) for x in enumerate(places)):
        keys, values = (x[0, head // 3, : place + 1].double().numpy() for x in (k, v))
        weight = np.exp(keys @ q[0, head, place].double().numpy() * 0.3)
        expected = weight @ values / weight.sum()
        np.testing.assert_allclose(found[0, head, row], expected, atol=1e-5)


def test_blending_some_tokens_computes_a_part_of_a_prefill(tiny_model: Any) -> None:
    """Matrices of two layers for all tokens, and of all layers for those that run anew."""
    from torch.utils.flop_counter import FlopCounterMode

    ids = tuple(2 + (5 * n) % 250 for n in range(400))
    chunks = [cache_of(tiny_model, ids[at : at + 100]) for at in range(0, 400, 100)]

    def operations(case: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            case()
        return int(counter.get_total_flops())

    whole = operations(lambda: cache_of(tiny_model, ids))
    some, more = (
        operations(lambda s=share: blended(tiny_model, ids, chunks, share=s))
        for share in (0.1, 0.2)
    )
    layers = tiny_model.geometry.layers
    assert 0 < more - some < 0.2 * whole, "a tenth of 300 tokens, through all layers"
    assert some < (2 / layers + 0.2) * whole
