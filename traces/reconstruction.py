"""The repeating pass: which keys the model looks at while it is asked for its prompt once more.

After Kim et al., "KVzip", NeurIPS 2025, arXiv 2505.23416: chunk by chunk, a request to repeat and
the chunk itself are run on the full cache; a key's score is the most attention that any of those
queries pays to it, among the chunk's keys, a few sinks and the pass's own keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.traces.passes import full_cache_handler, run_observed

if TYPE_CHECKING:
    from torch import Tensor

    from kvtune.traces.models import LoadedModel

CHUNK = 2048
SINKS = 4
_LAST_OF_BEFORE = 8
_FIRST = "\n\nRepeat the previous context exactly."
_LATER = "\n\nRepeat the part of the previous context exactly, starting with"
_END = "\n"
_TILE_BYTES = 2**27
_QUERIES = 512  # of a head, over all chunks


@dataclass(frozen=True)
class Repeated:
    """What repeating the prompt shows of one layer.

    Args:
        scores: the most attention that repeating pays to each key, ``[H, P]`` float32.
        queries: a sample of the queries of the chunks themselves, at most 512 of a head,
            ``[Hq, n, D]`` float32.
    """

    scores: Tensor
    queries: Tensor


@dataclass(frozen=True)
class _Repeat:
    """One chunk of the prompt and the tokens that ask for it, the chunk's own included."""

    start: int
    stop: int
    token_ids: list[int]


def reconstruction(
    loaded: LoadedModel,
    token_ids: Sequence[int],
    cache: Sequence[tuple[Tensor, Tensor]],
    chunk: int = CHUNK,
) -> list[Tensor]:
    """The scores of ``repeat``, for each layer [H, P] float32."""
    return [repeated.scores for repeated in repeat(loaded, token_ids, cache, chunk)]


def repeat(
    loaded: LoadedModel,
    token_ids: Sequence[int],
    cache: Sequence[tuple[Tensor, Tensor]],
    chunk: int = CHUNK,
) -> list[Repeated]:
    """Ask for the prompt chunk by chunk, and see what each layer looks at.

    Args:
        loaded: the model.
        token_ids: the prompt [P].
        cache: its keys and values, (k, v) a layer, each [1, H, P, D].
        chunk: tokens repeated at a time.

    Returns:
        For each layer.
    """
    import torch

    full = full_cache_handler(cache)
    scores = [torch.zeros(k.shape[1], k.shape[2], device=k.device) for k, _ in cache]
    queries: list[list[Tensor]] = [[] for _ in cache]
    stride = -(-len(token_ids) // _QUERIES)

    def handler(
        layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        keys = cache[layer][0][0]
        most = _most_attention(q[0], keys, k[0], part, scale)
        scores[layer][:, part.start : part.stop] = most
        first = q.shape[2] - (part.stop - part.start)
        queries[layer].append(q[0, :, first + -part.start % stride :: stride].float())
        return full(layer, q, k, v, scale, window)

    with torch.no_grad():
        for part in _repeats(loaded, token_ids, chunk):
            run_observed(loaded, part.token_ids, len(token_ids), handler)
    pairs = zip(scores, queries, strict=True)
    return [Repeated(paid, torch.cat(asked, 1)) for paid, asked in pairs]


def _repeats(loaded: LoadedModel, token_ids: Sequence[int], chunk: int) -> Iterator[_Repeat]:
    def encode(text: str) -> list[int]:
        return list(loaded.tokenizer(text, add_special_tokens=False).input_ids)

    for start in range(0, len(token_ids), chunk):
        stop = min(start + chunk, len(token_ids))
        ask = encode(_FIRST)
        if start:
            ask = [*encode(_LATER), *token_ids[start - _LAST_OF_BEFORE : start]]
        yield _Repeat(start, stop, [*ask, *encode(_END), *token_ids[start:stop]])


def _most_attention(q: Tensor, keys: Tensor, own: Tensor, repeat: _Repeat, scale: float) -> Tensor:
    """Largest attention over the group and all queries of a pass, [H, chunk] float32.

    Args:
        q: queries of the pass [Hq, R, D].
        keys: of the prompt [H, P, D].
        own: of the pass [H, R, D].
        repeat: which chunk it repeats.
        scale: factor of the scores before the softmax.
    """
    import torch

    sinks, count = min(SINKS, repeat.start), repeat.stop - repeat.start
    seen = torch.cat((keys[:, :sinks], keys[:, repeat.start : repeat.stop], own), 1).float()
    before, passed = sinks + count, own.shape[1]
    place = torch.arange(passed, device=q.device)
    most = torch.zeros(keys.shape[0], count, device=q.device)
    tile = max(1, _TILE_BYTES // (4 * q.shape[0] * seen.shape[1]))
    for start in range(0, passed, tile):
        rows = q[:, start : start + tile].float().unflatten(0, (keys.shape[0], -1))
        logits = rows @ seen[:, None].transpose(-1, -2) * scale
        later = place > place[start : start + tile, None]
        logits[..., before:].masked_fill_(later, -torch.inf)
        attention = logits.softmax(-1)[..., sinks:before]
        most = torch.maximum(most, attention.amax((1, 2)))
    return most
