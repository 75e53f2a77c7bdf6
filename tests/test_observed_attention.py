"""Attention with gradients for many probes, and the fused one: against plain autograd and loops."""

from __future__ import annotations

import pytest
import torch

from kvtune.policies import attention
from kvtune.policies.attention import attend
from kvtune.traces.observed_attention import attended
from kvtune.traces.seam import causal_attention

HEADS, GROUP, PROMPT, OBSERVED, SIZE = 2, 3, 20, 5, 8


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window", [None, 40, 9, 3])
def test_gradients_of_many_probes_are_those_of_plain_autograd_one_by_one(
    window: int | None,
) -> None:
    q = drawn(1, HEADS * GROUP, OBSERVED, SIZE, seed=0).requires_grad_()
    k, v = (drawn(1, HEADS, OBSERVED, SIZE, seed=s).requires_grad_() for s in (1, 2))
    prompt = drawn(1, HEADS, PROMPT, SIZE, seed=3), drawn(1, HEADS, PROMPT, SIZE, seed=4)
    slopes = drawn(4, 1, HEADS * GROUP, OBSERVED, SIZE, seed=5)

    ours = attended(q, k, v, prompt, 0.3, window)

    def back(slope: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(ours, (q, k, v), slope, retain_graph=True)

    together, alone = torch.func.vmap(back)(slopes), back(slopes[2])

    keys, values = torch.cat([prompt[0], k], 2), torch.cat([prompt[1], v], 2)
    assert torch.equal(ours, causal_attention(q, keys, values, 0.3, window))
    exact = straight_line(q.double(), keys.double(), values.double(), 0.3, window)
    for row, slope in enumerate(slopes):
        expected = torch.autograd.grad(exact, (q, k, v), slope.double(), retain_graph=True)
        for found, one, truth in zip(together, alone, expected, strict=True):
            torch.testing.assert_close(found[row], truth, rtol=1e-5, atol=1e-5)
            if row == 2:
                torch.testing.assert_close(one, truth, rtol=1e-5, atol=1e-5)


def straight_line(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """One softmax a query over the keys that it sees."""
    count, rows = keys.shape[2], []
    for head in range(q.shape[1]):
        for t in range(q.shape[2]):
            at = count - q.shape[2] + t
            seen = slice(0 if window is None else max(0, at - window + 1), at + 1)
            logits = keys[0, head // GROUP, seen] @ q[0, head, t] * scale
            rows.append(logits.softmax(0) @ values[0, head // GROUP, seen])
    return torch.stack(rows).view(q.shape)


@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
def test_fused_attention_is_the_plain_one(
    lead: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = drawn(HEADS, GROUP, OBSERVED, SIZE, seed=0)
    keys, values = (drawn(*lead, HEADS, 1, PROMPT, SIZE, seed=s) for s in (1, 2))
    fused = attend(queries, keys, values, None, 0.3)
    monkeypatch.setattr(attention, "_FUSED", None)
    plain = attend(queries, keys, values, None, 0.3)
    logits = queries.double() @ keys.double().transpose(-1, -2) * 0.3
    exact = logits.softmax(-1) @ values.double(), logits.logsumexp(-1)
    for mine, theirs, truth in zip(fused, plain, exact, strict=True):
        assert mine.shape == theirs.shape == truth.shape
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs.double(), truth, rtol=1e-5, atol=1e-5)
