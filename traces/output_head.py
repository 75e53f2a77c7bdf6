"""Where probes enter a model: before its output head where that is one matrix, else at the logits.

A direction of the logits has as many numbers as the vocabulary, and every probe has its own. Before
a linear head they are a thousand numbers, and most of the product that leads there is the same for
all probes (``Drawn.before``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvtune.traces.probes import Drawn

if TYPE_CHECKING:
    from torch import Tensor

Slopes = Callable[[int, int], "Tensor"]
"""Called as (first, count): directions of so many probes, ``[count, C, ...]``."""


@dataclass
class OutputHead:
    """Watches a model's output head for one pass; the watching ends with the block.

    Args:
        module: the head; None where the model has none that is a plain linear layer.
        seen: its input and output in this pass.
    """

    module: Any
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @staticmethod
    def of(model: Any) -> OutputHead:
        """The head of a transformers model."""
        from torch import nn

        head = model.get_output_embeddings()
        return OutputHead(head if type(head) is nn.Linear else None)

    def __enter__(self) -> OutputHead:
        """Begin to watch the output head."""

        def keep(_: Any, given: tuple[Tensor, ...], output: Tensor) -> None:
            self.seen.append((given[0], output))

        self._hook = None if self.module is None else self.module.register_forward_hook(keep)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching the output head."""
        if self._hook is not None:
            self._hook.remove()

    def directions(self, logits: Tensor, drawn: Drawn) -> tuple[Tensor, Slopes]:
        """The tensor that probes enter at, and their directions there.

        A head whose output is changed further (capped, scaled) is not passed over.
        """
        if len(self.seen) == 1 and self.seen[0][1] is logits:
            weight = self.module.weight
            return self.seen[0][0], lambda first, count: drawn.before(weight, first, count)
        return logits, drawn.slopes
