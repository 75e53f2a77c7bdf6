"""What transformers says about who may see whom, checked before an attention of ours ignores it.

kvtune's attention functions know two shapes, causal and sliding, and no N x N matrix. transformers
describes a mask as a function of (batch, head, query, key): it is asked about far positions, so
that chunks and both-directional attention are found however short the prompt is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from kvtune.common.errors import KvtuneError

if TYPE_CHECKING:
    from torch import Tensor

MaskFunction = Callable[[int, int, "Tensor", "Tensor"], "Tensor"]

_FAR = 2**20 + 3
"""A query this far on has other keys in its chunk than all before it, for chunks of any size."""
_BEFORE = 2**18

_LEFT = "pad on the left: tokenizer.padding_side = 'left'."

_watcher: ContextVar[Callable[[MaskFunction], None] | None] = ContextVar(
    "kvtune_masks", default=None
)


@contextmanager
def watching(watcher: Callable[[MaskFunction], None]) -> Iterator[None]:
    """Show ``watcher`` every mask function that a model asks for until the block ends."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def check_described(mask_function: MaskFunction | None, given: dict[str, Any]) -> None:
    """Refuse a mask that this very call overlays with another, such as images or packed texts.

    Args:
        mask_function: what transformers describes the mask by.
        given: the other arguments of a mask function.

    Raises:
        KvtuneError: something lies over the model's own mask.
    """
    if given.get("use_vmap") or not given.get("allow_is_causal_skip", True):
        raise KvtuneError(
            "this input has an attention mask of its own (packed texts, images or blocks)",
            hint="kvtune answers prompts of text, one a row, each token seeing those before it.",
        )
    watcher = _watcher.get()
    if watcher is not None and mask_function is not None:
        watcher(mask_function)


def check_reach(mask_function: MaskFunction, windows: set[int | None], device: Any) -> None:
    """Refuse a mask that is neither causal nor one of the model's sliding windows.

    Args:
        mask_function: what transformers describes the mask by.
        windows: the windows that are known, in tokens; None for all before.
        device: of the model.

    Raises:
        KvtuneError: says how many keys a far query sees.
    """
    import torch

    query = torch.tensor(_FAR, device=device)
    distance = torch.arange(-1, _BEFORE, device=device)
    seen = mask_function(0, 0, query, query - distance).expand(len(distance)).cpu()
    distance = distance.cpu()
    for window in windows | {None}:
        reach = _BEFORE if window is None else window
        if torch.equal(seen, (distance >= 0) & (distance < reach)):
            return
    raise KvtuneError(
        f"this model's attention is neither causal nor a sliding window: of the {_BEFORE} tokens "
        f"up to position {_FAR}, its query sees {int(seen[1:].sum())}"
        + (", and the token after it" if bool(seen[0]) else ""),
        hint="chunked (Llama 4) and both-directional attention are not supported.",
    )


def check_unpadded(mask: Tensor | None) -> None:
    """Refuse a padding mask ``[B, N]`` with any gap."""
    if mask is not None and not bool(mask.all()):
        raise KvtuneError("kvtune runs unpadded sequences; an attention mask with gaps was given")


def left_padding(mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """The padding mask ``[B, N]`` as booleans if it pads on the left; None without padding.

    Args:
        mask: as transformers hands it on; true where a token is real.
        batch: B.
        tokens: N, all tokens that were seen, padding and those of this call included.

    Raises:
        KvtuneError: another shape, a gap, padding on the right, or a row without tokens.
    """
    if mask is None:
        return None
    if tuple(mask.shape) != (batch, tokens):
        raise KvtuneError(
            f"the attention mask has the shape {list(mask.shape)} where {[batch, tokens]} is "
            "needed: one row a sequence, one column for each token seen so far",
            hint="give the mask of prompt and new tokens together, or none without padding.",
        )
    real = mask.bool()
    if bool(real.all()):
        return None
    empty = (~real.any(1)).nonzero().flatten().tolist()
    if empty:
        raise KvtuneError(f"row {empty[0]} of the attention mask holds no token", hint=_LEFT)
    wrong = (real.long().diff(dim=1) < 0).any(1).nonzero().flatten().tolist()
    if wrong:
        where = "after its first token" if not bool(real[wrong[0], -1]) else "inside it"
        raise KvtuneError(
            f"row {wrong[0]} of the attention mask has gaps {where}: prompts of different "
            "lengths must be padded on the left",
            hint=_LEFT,
        )
    return real
