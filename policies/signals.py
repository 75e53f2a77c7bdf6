"""What a method may look at when the prompt of one layer is complete.

Replay fills it from a trace and the live cache from the running model; a method cannot tell
which, and that is what keeps the two alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Needs:
    """What a method must be given, as plain data that capture can be told.

    Args:
        window: how many of the last prompt queries it looks at; 0 for none.
        column_sums: whether it needs the attention that every key drew over the whole prompt.
    """

    window: int = 0
    column_sums: bool = False

    def __or__(self, other: Needs) -> Needs:
        """What two methods need together."""
        return Needs(max(self.window, other.window), self.column_sums or other.column_sums)


@dataclass
class Signals:
    """One layer of one prompt.

    Args:
        queries: the last prompt queries, after RoPE, ``[Hq, W, D]`` (all of them or a tail).
        keys: ``[H, P, D]`` after RoPE.
        values: ``[H, P, D]``.
        scale: what ``q @ k`` is multiplied with before the softmax.
        recorded_column_sums: ``[Hq, P]`` float32, each key's attention summed over all prompt
            queries, where capture recorded it.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    recorded_column_sums: Tensor | None = None
    _memo: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def prompt_tokens(self) -> int:
        """P, the number of tokens that a choice is made among."""
        return self.keys.shape[-2]

    def once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """Compute a derived signal at the first asking and keep it."""
        if name not in self._memo:
            self._memo[name] = compute()
        return self._memo[name]

    def window_attention(self, window: int) -> Tensor:
        """Attention of the last ``window`` prompt queries over all keys, ``[H, G, W, P]`` float32.

        A prompt shorter than the window gives as many rows as it has tokens.
        """
        window = min(window, self.prompt_tokens)
        return self.once(f"window {window}", lambda: self._attend(window))

    def column_sums(self) -> Tensor:
        """Attention that each key drew, summed over all prompt queries: ``[H, G, P]`` float32."""
        if self.recorded_column_sums is None:
            return self.once("columns", lambda: self._sum_columns())
        return self._by_kv_head(self.recorded_column_sums.float())

    def _by_kv_head(self, tensor: Tensor) -> Tensor:
        split: Tensor = tensor.unflatten(0, (self.keys.shape[0], -1))
        return split

    def _attend(self, window: int, end: int | None = None) -> Tensor:
        """Rows ``end - window`` to ``end`` of the causal attention matrix, ``[H, G, W, P]``."""
        import torch

        end = self.prompt_tokens if end is None else end
        offset = self.queries.shape[-2] - self.prompt_tokens  # of row p in a recorded tail
        if offset + end - window < 0:
            raise ValueError(f"{window} queries are needed, {self.queries.shape[-2]} were recorded")
        rows = self._by_kv_head(self.queries[:, offset + end - window : offset + end].float())
        logits = rows @ self.keys.float().transpose(-1, -2).unsqueeze(1) * self.scale
        row = torch.arange(end - window, end, device=logits.device)
        column = torch.arange(self.prompt_tokens, device=logits.device)
        return logits.masked_fill(column > row[:, None], -torch.inf).softmax(-1)

    def _sum_columns(self, tile: int = 256) -> Tensor:
        """Tile by tile, so that no P x P matrix is ever held."""
        import torch

        sums = torch.zeros(
            (*self._by_kv_head(self.queries).shape[:2], self.prompt_tokens), device=self.keys.device
        )
        for end in range(self.prompt_tokens, 0, -tile):
            sums += self._attend(min(tile, end), end).sum(-2)
        return sums
