"""Which heads do what: echo, induction, retrieval, semantic retrieval and sink heads of a model.

Nothing of size tokens x tokens is held: a pass over repeated random tokens needs a log-sum-exp and
a few gathered logits a row, and needles need the rows of their answers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from kvtune.common.progress import Progress, Silent
from kvtune.policies.head_scores import About, Floats, HeadScores
from kvtune.policies.signals import Needs
from kvtune.runtime.calibrate import needle_columns, watched
from kvtune.runtime.prompts import Prompt, fresh_prompt
from kvtune.traces.models import LoadedModel
from kvtune.traces.passes import run_observed, run_prompt
from kvtune.traces.samples import Sample

BLOCK, REPEATS = 2500, 4
_TILE = 256


def detect(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    *,
    block: int = BLOCK,
    repeats: int = REPEATS,
    seed: int = 0,
    progress: Progress | None = None,
) -> HeadScores:
    """All detectors on one model.

    Args:
        loaded: the model.
        samples: with needles, of the search split, so that nothing evaluated is looked at.
        block: random tokens that are repeated.
        repeats: how often they stand there.
        seed: of the tokens.
        progress: told of every sample.
    """
    progress = progress or Silent()
    drawn = repeated_tokens(loaded.geometry.vocab_size, block, repeats, seed)
    scores = dict(zip(("echo", "induction"), repetition(loaded, drawn, block), strict=True))
    repeated = f"{repeats} x {block} random tokens"
    about = {
        name: About("query heads", "RazorAttention, arXiv 2407.15891", repeated, seed)
        for name in scores
    }
    found = [needles(loaded, s) for s in progress.track(samples, "reading needles", len(samples))]
    kept = [each for each in found if each is not None]
    on = f"{len(kept)} of {len(samples)} needle samples, answers read, not generated"
    wide = np.stack(kept) if kept else np.zeros((1, 3, *scores["echo"].shape), np.float32)
    scores |= dict(zip(("retrieval", "semantic", "sink"), wide.mean(0), strict=True))
    about |= {
        "retrieval": About("query heads", "Wu et al., arXiv 2404.15574", on),
        "semantic": About("query heads", "CompressKV, arXiv 2508.02401", on),
        "sink": About("query heads", "mass on the first token", on),
    }
    return HeadScores(loaded.name, loaded.fingerprint, scores, about)


def repeated_tokens(vocabulary: int, block: int, repeats: int, seed: int) -> list[int]:
    """Random ids of the vocabulary's middle, each once a block; no start token before them."""
    low, high = vocabulary // 10, vocabulary - vocabulary // 10
    drawn = np.random.default_rng(seed).choice(high - low, min(block, high - low), replace=False)
    ids: list[int] = (drawn + low).tolist()
    return ids * repeats


@torch.no_grad()
def repetition(loaded: LoadedModel, token_ids: Sequence[int], block: int) -> tuple[Floats, Floats]:
    """Echo and induction scores ``[L, Hq]`` on tokens that repeat every ``block``.

    echo: mean attention to all earlier places of the same token; induction: to the tokens after
    those. Over the queries after the first block.
    """
    block = min(block, len(token_ids) // 2)
    found: list[tuple[Tensor, Tensor]] = []

    def see(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        found.append(repeated_mass(q[0], k[0], block, loaded.geometry.scale))

    run_prompt(loaded, token_ids, see)
    echo, induction = (torch.stack(each).cpu().numpy() for each in zip(*found, strict=True))
    return echo, induction


def repeated_mass(q: Tensor, k: Tensor, block: int, scale: float) -> tuple[Tensor, Tensor]:
    """One layer's echo and induction mass, ``[Hq]`` each.

    Args:
        q: ``[Hq, N, D]`` after RoPE.
        k: ``[H, N, D]``.
        block: after which tokens repeat.
        scale: of the logits.
    """
    heads, tokens = len(k), k.shape[1]
    echo, induction = (torch.zeros(heads, len(q) // heads, device=k.device) for _ in range(2))
    for start in range(block, tokens, _TILE):
        row = torch.arange(start, min(start + _TILE, tokens), device=k.device)
        rows = q[:, row].float().unflatten(0, (heads, -1)) * scale
        logits = rows @ k.float()[:, None].transpose(-1, -2)
        later = torch.arange(tokens, device=k.device) > row[:, None]
        lse = logits.masked_fill_(later, -torch.inf).logsumexp(-1)
        for back in range(block, int(row[-1]) + 1, block):
            there = row >= back
            for total, shift in ((echo, 0), (induction, 1)):
                at = (row - back + shift).clamp_min(0)
                picked = logits.gather(-1, at[:, None].expand(*logits.shape[:2], -1, 1))[..., 0]
                total += ((picked - lse).exp() * there).sum(-1)
    number = tokens - block
    return echo.flatten() / number, induction.flatten() / number


def needles(loaded: LoadedModel, sample: Sample) -> Floats | None:
    """Retrieval, semantic and sink scores of one sample, ``[3, L, Hq]``.

    retrieval: at each answer token that the model gets right, a head scores 1 / answer length where
               the key it looks at most lies in the needle and is that very token
    semantic:  mass on the whole needle, mean over those tokens
    sink:      mass on the first token, mean over observed tokens

    Returns:
        None where the model gets no more than half of the answers' tokens right.
    """
    prompt = fresh_prompt(loaded, sample, Needs())
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    needle = needle_columns(sample).to(loaded.device)
    ids = torch.tensor(sample.token_ids[: sample.prompt], device=loaded.device)
    wanted = torch.tensor(sample.targets, device=loaded.device)
    copied = needle.bool() & (ids == wanted[:, None])  # [C, P]

    def see(attention: Tensor) -> None:
        """One layer's ``[Hq, C, N]``."""
        best = attention.argmax(-1)
        inside = best < sample.prompt
        hit = copied[torch.arange(len(copied), device=best.device), best.clamp_max(len(ids) - 1)]
        mass = (attention[..., : sample.prompt] * needle).sum(-1)
        rows.append(((hit & inside).float(), mass, attention[..., 0]))

    logits = answered(loaded, sample, prompt, see)
    answer = torch.tensor(sample.answer_mask)
    right = (logits.argmax(-1).cpu() == torch.tensor(sample.targets)) & answer
    if 2 * int(right.sum()) <= int(answer.sum()):
        return None
    hits, mass, first = (torch.stack(each).cpu() for each in zip(*rows, strict=True))
    copies, semantic = hits[..., right].sum(-1) / answer.sum(), mass[..., right].mean(-1)
    return torch.stack([copies, semantic, first.mean(-1)]).numpy()


def answered(
    loaded: LoadedModel, sample: Sample, prompt: Prompt, see: Callable[[Tensor], None]
) -> Tensor:
    """Logits of the observed tokens ``[C, vocabulary]``, every layer's attention shown."""
    observed = sample.token_ids[sample.prompt :]
    with torch.no_grad():
        logits = run_observed(loaded, observed, sample.prompt, watched(prompt, see))
    return logits[0]


def overlaps(heads: HeadScores, kv_heads: int, share: float) -> Iterator[tuple[str, str, float]]:
    """How many of the top ``share`` KV heads two scores have in common, of as many as there are."""
    from kvtune.policies.head_plans import most

    top = {name: most(heads.of_kv_heads(name, kv_heads), share) for name in sorted(heads.scores)}
    names = list(top)
    for at, one in enumerate(names):
        for other in names[at + 1 :]:
            yield one, other, float((top[one] & top[other]).sum() / top[one].sum())
