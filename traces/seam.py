"""The one place where kvtune meets a model: transformers' registered attention function.

Post-RoPE q, k, v come in and the attention output before the output projection goes out. Capture
and the live cache both install a handler here; no model's forward is patched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from kvtune.common.errors import KvtuneError
from kvtune.common.transformers_interface import register_attention
from kvtune.traces.masks import MaskFunction, check_described, check_unpadded

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "kvtune"
"""The attention implementation's name in ``model.config._attn_implementation``."""

_TILE_QUERIES = 512
_HELD_BIASES = 2**28  # bytes; masks of long prompts grow with the square of their tokens
_CHANGES_THE_RESULT = ("softcap", "s_aux", "position_bias", "alibi", "head_mask")


class Handler(Protocol):
    """What answers a layer's attention while it is installed by ``attending``."""

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, /
    ) -> Tensor:
        """Attention output of one layer.

        Args:
            layer: the layer's index.
            q: post-RoPE queries [B, Hq, T, D].
            k: post-RoPE keys of the same tokens [B, H, T, D].
            v: values of the same tokens [B, H, T, D].
            scale: factor of the scores before the softmax.
            window: a query at position i sees keys in (i - window, i]; None means all before.

        Returns:
            Output before the output projection [B, Hq, T, D].
        """
        ...


_handler: ContextVar[Handler | None] = ContextVar("kvtune_attention_handler", default=None)


@contextmanager
def attending(handler: Handler) -> Iterator[None]:
    """Let ``handler`` answer every attention of this thread's models until the block ends."""
    token = _handler.set(handler)
    try:
        yield
    finally:
        _handler.reset(token)


def register() -> None:
    """Make ``attn_implementation="kvtune"`` known to transformers. Safe to call again."""
    register_attention(NAME, _attention, _no_mask)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """Causal attention of the last T of N positions, without an N x N tensor.

    Args:
        q: queries of the last T positions [B, Hq, T, D].
        k: keys of all N positions [B, H, N, D], N >= T.
        v: values of all N positions [B, H, N, D].
        scale: factor of the scores before the softmax.
        window: a query at position i sees keys in (i - window, i]; None means all before.

    Returns:
        Output [B, Hq, T, D].
    """
    queries, keys = q.shape[2], k.shape[2]
    if window is not None and window < keys:
        return _windowed(q, k, v, scale, window)
    if queries == keys:
        return _sdpa(q, k, v, scale, causal=queries > 1)
    return _tail(q, k, v, scale, None)


class RowAttention:
    """Causal attention of scattered tokens of a sequence, in the model's own precision.

    Tiles of queries look at the keys up to their last one's place, so that no more is computed, nor
    held, than causal attention needs. What each of them sees is worked out once for all layers, as
    far as that takes little memory, and in every layer beyond it.

    Args:
        places: of the n tokens, ascending.
    """

    def __init__(self, places: list[int]) -> None:
        self._places = places
        self._biases: dict[int, Tensor] = {}
        self._left = _HELD_BIASES

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """One layer's output, ``[1, Hq, n, D]``.

        Args:
            q: queries of the n tokens [1, Hq, n, D].
            k: keys of all tokens [1, H, N, D].
            v: values of all tokens.
            scale: factor of the scores before the softmax.
        """
        import torch
        import torch.nn.functional as F

        group = q.shape[1] // k.shape[1]
        queries = q.unflatten(1, (-1, group))  # the group's queries are rows: keys are not repeated
        tiles = []
        for start in range(0, len(self._places), _TILE_QUERIES):
            bias = self._bias(start, group, q)
            mine = queries[:, :, :, start : start + _TILE_QUERIES].flatten(2, 3)
            last = bias.shape[1]
            found = F.scaled_dot_product_attention(
                mine, k[:, :, :last], v[:, :, :last], attn_mask=bias, scale=scale
            )
            tiles.append(found.unflatten(2, (group, -1)))
        return torch.cat(tiles, 3).flatten(1, 2)

    def _bias(self, start: int, group: int, like: Tensor) -> Tensor:
        """What is added to a tile's logits, ``[group * rows, keys]``: nothing where it sees."""
        import torch

        if start in self._biases:
            return self._biases[start]
        places = self._places[start : start + _TILE_QUERIES]
        rows, last = torch.tensor(places, device=like.device), places[-1] + 1
        # CUDA's kernel wants rows of whole 16s.
        key = torch.arange(-(-last // 16) * 16, device=like.device)
        hidden = (key > rows[:, None]).repeat(group, 1)
        bias = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
        bias = bias.masked_fill_(hidden, -torch.inf)
        if bias.nbytes <= self._left:
            self._left -= bias.nbytes
            self._biases[start] = bias[:, :last]
        return bias[:, :last]


def prompt_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Causal attention of prompts of a length that no others had, ``[B, Hq, P, D]``.

    PyTorch prefers cuDNN's attention on Hopper, which is planned anew for every length: 39 ms on an
    H200 (``benchmarks/results/serving-graphs-h200.json``). Arguments are ``causal_attention``'s.
    """
    from torch.backends import cuda

    # torch.nn.attention.sdpa_kernel does the same in some 20 us of the host, for every layer.
    before = cuda.cudnn_sdp_enabled()
    cuda.enable_cudnn_sdp(False)
    try:
        return causal_attention(q, k, v, scale, window)
    finally:
        cuda.enable_cudnn_sdp(before)


def _windowed(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """Tiles of queries, each with only the keys that its window can reach."""
    import torch

    queries, keys = q.shape[2], k.shape[2]
    tiles = []
    for start in range(0, queries, _TILE_QUERIES):
        stop = min(start + _TILE_QUERIES, queries)
        last = keys - queries + stop
        first = max(0, last - (stop - start) - window + 1)
        reach = slice(first, last)
        tiles.append(_tail(q[:, :, start:stop], k[:, :, reach], v[:, :, reach], scale, window))
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=2)


def _tail(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """Attention of the last T of the given keys' positions, with a T x N mask."""
    import torch

    queries, keys = q.shape[2], k.shape[2]
    if queries == 1 and (window is None or window >= keys):
        return _sdpa(q, k, v, scale)
    at = torch.arange(keys - queries, keys, device=q.device)[:, None]
    key = torch.arange(keys, device=q.device)[None, :]
    seen = key <= at
    if window is not None:
        seen &= key > at - window
    return _sdpa(q, k, v, scale, mask=seen)  # [T, N]


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    import torch.nn.functional as F

    grouped = q.shape[1] != k.shape[1]
    if grouped and mask is not None:
        # CUDA has no fused kernel for grouped heads together with a mask.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **extras: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls: hand over to the handler, return [B, T, Hq, D]."""
    if attention_mask is not None:
        raise KvtuneError("kvtune runs unpadded sequences and builds no attention masks")
    refuse_unknown(extras)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    layer: int = getattr(module, "layer_idx")  # noqa: B009 - nn.Module types attributes loosely
    handler = _handler.get()
    if handler is None:
        output = causal_attention(query, key, value, scale, sliding_window)
    else:
        output = handler(layer, query, key, value, scale, sliding_window)
    return output.transpose(1, 2).contiguous(), None


def refuse_unknown(extras: Mapping[str, Any]) -> None:
    """Refuse what changes attention's result and would be passed over.

    Args:
        extras: what transformers gives an attention function beside the usual.

    Raises:
        KvtuneError: logits are capped, biased, compete with a sink, or see what comes later.
    """
    unknown = [name for name in _CHANGES_THE_RESULT if extras.get(name) is not None]
    if extras.get("is_causal") is False:
        unknown.append("is_causal=False")
    if unknown:
        raise KvtuneError(
            f"this model's attention uses {unknown[0]!r}, which kvtune does not know yet",
            hint="models with plain softmax attention work: Llama, Qwen, Mistral, Gemma-3.",
        )


def _no_mask(
    *_: Any,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | None = None,
    **given: Any,
) -> None:
    """The mask function that transformers calls: the handler alone decides what is seen."""
    if given.get("q_length") == 1:  # one token packs no texts, which a captured step cannot look up
        given = {}
    check_described(mask_function, given)
    check_unpadded(attention_mask)
