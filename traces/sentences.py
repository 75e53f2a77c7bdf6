"""Where sentences end, token by token, as a tokenizer writes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from kvtune.traces.workloads import codec_of

if TYPE_CHECKING:
    from torch import Tensor

    from kvtune.traces.models import LoadedModel

_MARKS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")
_CLOSING = "\"')]\u201d\u2019 "


def ends_sentence(text: str) -> bool:
    """Whether a token's text ends with a mark, quotes and brackets aside, or has an empty line."""
    return "\n\n" in text or text.rstrip(_CLOSING).endswith(_MARKS)


def sentence_ends(loaded: LoadedModel, token_ids: Iterable[int]) -> Tensor:
    """Which tokens end a sentence, ``[N]`` bool, on the model's device."""
    import torch

    decode = codec_of(loaded.tokenizer).decode
    flags = [ends_sentence(decode(token)) for token in token_ids]
    return torch.tensor(flags, device=loaded.device)
