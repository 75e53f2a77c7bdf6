"""A rotary embedding that waits for whoever needs it first.

While a model decodes, rotated keys go into pages at once: the launch that writes them can rotate
them, and the queries with them. So ``fuse`` hands on queries and keys that are yet to be rotated.
They have no memory of their own: whatever is asked of them but their shape is answered by the
rotated ones, which are made then, so that nobody can read what was not rotated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


@dataclass(eq=False)
class Rotation:
    """Of one new token a sequence, in one layer.

    Args:
        q: ``[B, Hq, 1, D]``, not rotated; channels side by side, other strides any.
        k: ``[B, H, 1, D]``, likewise.
        cos: ``[B or 1, 1, D]``.
        sin: ``[B or 1, 1, D]``.
    """

    q: Tensor
    k: Tensor
    cos: Tensor
    sin: Tensor

    @cached_property
    def done(self) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys; one launch, the first time."""
        from kvtune.runtime.kernels.elementwise import rotate

        return rotate(self.q, self.k, self.cos, self.sin)


class Unrotated(Tensor):
    """Queries (part 0) or keys (part 1) that their rotation has not yet made."""

    rotation: Rotation
    part: int

    @staticmethod
    def of(rotation: Rotation, part: int) -> Tensor:
        """In place of ``rotation.done[part]``."""
        shape = (rotation.q, rotation.k)[part].shape
        found = torch.empty(shape, device="meta").as_subclass(Unrotated)
        found.rotation, found.part = rotation, part
        return found

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Anything but the shape is asked of the rotated tensor."""
        if func == Tensor.shape.__get__:  # type: ignore[attr-defined]
            return super().__torch_function__(func, types, args)  # type: ignore[no-untyped-call]
        args, kwargs = tree_map_only(
            Unrotated, lambda each: each.rotation.done[each.part], (args, kwargs or {})
        )
        return func(*args, **kwargs)


def rotate_later(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """What ``kernels.elementwise.rotate`` gives, made when it is needed."""
    rotation = Rotation(q, k, cos, sin)
    return Unrotated.of(rotation, 0), Unrotated.of(rotation, 1)


def owed(q: Tensor, k: Tensor) -> Rotation | None:
    """The rotation that these queries and keys both still wait for, if there is one."""
    if not (isinstance(q, Unrotated) and isinstance(k, Unrotated) and q.rotation is k.rotation):
        return None
    return None if "done" in vars(k.rotation) else k.rotation
