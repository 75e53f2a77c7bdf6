"""Parts whose keys and values are rows of signs, packed as they are stored and attended to so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvtune.policies.format import Format
from kvtune.policies.formats.fitted import Allocated
from kvtune.policies.pages import KERNEL_HEAD_DIMS

_SPLIT = 512  # tokens of a program
_OF_TOKENS, _OF_DIRECTIONS = ("codes", "tokens"), ("steps", "mean", "widths")


def has_signs(formats: tuple[Format, Format], head_dim: int) -> bool:
    """Whether a kernel attends to keys and values in these formats as they are stored."""
    return head_dim in KERNEL_HEAD_DIMS and all(type(form) is Allocated for form in formats)


@dataclass(frozen=True)
class Rows:
    """Keys or values of several parts in one format.

    Args:
        form: their format.
        codes: ``[tokens, bytes]`` uint8, of all parts one after another.
        tokens: logarithms of the tokens' scales, ``[tokens]`` uint8.
        steps: ``[parts, D]`` fp16.
        mean: likewise.
        widths: ``[parts, D]`` uint8.
    """

    form: Allocated
    codes: Tensor
    tokens: Tensor
    steps: Tensor
    mean: Tensor
    widths: Tensor

    @staticmethod
    def of(form: Allocated, buffers: Sequence[dict[str, Tensor]]) -> Rows:
        """The buffers of ``form.codes`` of several parts."""
        tokens = {name: torch.cat([each[name] for each in buffers]) for name in _OF_TOKENS}
        directions = {
            name: torch.stack([each[name] for each in buffers]) for name in _OF_DIRECTIONS
        }
        return Rows(form, **tokens, **directions)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of the kernel."""
        return self.codes, self.tokens, self.steps, self.mean, self.widths


@dataclass(frozen=True)
class SignedParts:
    """Parts of one layer in one pair of formats.

    Args:
        rows: of the layer, ``[parts]`` int64.
        keys: of all parts.
        values: likewise.
        starts: the first token of each part, and where the last one ends, ``[parts + 1]`` int32.
        most: tokens of the longest.
        balance: ``[parts, D]``, or None: keys are read divided by it.
    """

    rows: Tensor
    keys: Rows
    values: Rows
    starts: Tensor
    most: int
    balance: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and tables, as the formats count them."""
        held = [*self.keys.tensors, *self.values.tensors]
        held += [] if self.balance is None else [self.balance]
        return sum(each.numel() * each.element_size() for each in held)

    @cached_property
    def splits(self) -> int:
        """Programs a part."""
        return max(-(-self.most // _SPLIT), 1)

    def attend(self, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Output ``[parts, G, D]`` and log-sum-exp ``[parts, G]``, float32, of ``[rows, G, D]``."""
        from kvtune.runtime.kernels.signs import attend_signs

        parts, (_, group, head_dim) = len(self.rows), q.shape
        out = q.new_empty(parts, self.splits, group, head_dim, dtype=torch.float32)
        lse = q.new_empty(parts, self.splits, group, dtype=torch.float32)
        turned = [rows.form.directions == "hadamard" for rows in (self.keys, self.values)]
        attend_signs[(parts, self.splits)](
            q.contiguous(), self.rows, self.starts,
            self.keys.steps if self.balance is None else self.balance,
            *self.keys.tensors, *self.values.tensors, out, lse, scale,
            head_dim, group, max(8, 1 << (group - 1).bit_length()),
            self.keys.codes.shape[1], self.values.codes.shape[1],
            self.balance is not None, *turned, _SPLIT,
        )  # fmt: skip
        whole = lse.logsumexp(1)
        shares = (lse - whole[:, None]).exp().nan_to_num()  # of a part without tokens, nothing
        return (out * shares[..., None]).sum(1), whole
