"""What most formats share: codes for most of what stays, 16 bits for the tokens at its ends."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.format import Format, Role, Stored
from kvtune.policies.packed import Sections, joined, numbers
from kvtune.policies.registry import LONGEST_PROMPT, parameter

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Coded(Format):
    """Codes of its own for all tokens but the first ``exact_first``, and the newest where it says.

    A class says what its codes take (``code_bytes``), makes them (``codes``) and reads them back
    (``numbers``); it never sees the tokens that stay in 16 bits.
    """

    exact_first: int = parameter(
        0, "first kept tokens left in 16 bits", unit="tokens", low=0, high=LONGEST_PROMPT
    )

    @abstractmethod
    def code_bytes(self, tokens: int, head_dim: int, role: Role) -> int:
        """Bytes that ``tokens`` coded tokens take at most, scales and all."""

    @abstractmethod
    def codes(self, rows: Tensor, role: Role) -> Mapping[str, Tensor]:
        """Buffers of ``[n, D]`` float32, of which there is at least one token."""

    @abstractmethod
    def numbers(self, buffers: Mapping[str, Tensor], shape: tuple[int, int], role: Role) -> Tensor:
        """``[n, D]`` float32 of these buffers; ``shape`` is n and D."""

    def packed_codes(self, tokens: int, head_dim: int, role: Role) -> Sections | None:
        """``packed`` of what ``codes`` makes of so many tokens, of which there is at least one."""
        return None

    @property
    def exact_tokens(self) -> int:
        """The first ``exact_first`` tokens stay in 16 bits."""
        exact: int = self.exact_first
        return exact

    @property
    def label(self) -> str:
        """The name, ``+4`` behind it where four tokens are exact."""
        return self.name + (f"+{self.exact_first}" if self.exact_first else "")

    def _coded(self, tokens: int, role: Role) -> slice:
        """Which of the kept tokens have codes."""
        first = min(self.exact_first, tokens)
        return slice(first, tokens - min(self.newest(tokens - first, role), tokens - first))

    def bound(self, tokens: int, head_dim: int, role: Role) -> int:
        """The codes, and two bytes an element of tokens left exact."""
        coded = self._coded(tokens, role)
        count = coded.stop - coded.start
        codes = self.code_bytes(count, head_dim, role) if count else 0
        exact: int = 2 * (tokens - count) * head_dim
        return exact + codes

    def packed(self, tokens: int, head_dim: int, role: Role) -> Sections | None:
        """Codes between the tokens left exact."""
        coded = self._coded(tokens, role)
        count = coded.stop - coded.start
        inner = self.packed_codes(count, head_dim, role) if count else ()
        middle = None if inner is None else tuple(each.moved(coded.start) for each in inner)
        first, last = (0, coded.start), (coded.stop, tokens)
        return joined(
            [numbers(*first, "exact"), middle, numbers(*last, "exact", first=coded.start)]
        )

    def encode(self, tensor: Tensor, role: Role) -> Stored:
        """The buffers of ``codes``, and the tokens left exact."""
        import torch

        coded = self._coded(len(tensor), role)
        exact = torch.cat([tensor[: coded.start], tensor[coded.stop :]])
        narrow = exact if exact.element_size() == 2 else exact.to(torch.bfloat16)
        middle = tensor[coded].float()
        return Stored(
            {"exact": narrow, **(self.codes(middle, role) if len(middle) else {})}, len(tensor)
        )

    def decode(self, stored: Stored, head_dim: int, role: Role) -> Tensor:
        """What ``numbers`` gives, between the exact tokens."""
        import torch

        coded = self._coded(stored.tokens, role)
        exact, count = stored.buffers["exact"].float(), coded.stop - coded.start
        if not count:
            return exact
        middle = self.numbers(stored.buffers, (count, head_dim), role)
        return torch.cat([exact[: coded.start], middle, exact[coded.start :]])

    def roundtrip(self, tensor: Tensor, counts: Tensor, role: Role) -> Tensor:
        """Head by head; exact tokens come back as they are, what lies beyond a row as zeros."""
        import torch

        flat = tensor.reshape(counts.numel(), *tensor.shape[-2:])
        back = torch.zeros_like(flat)
        for row, count in enumerate(counts.flatten().tolist()):
            coded = self._coded(count, role)
            middle = flat[row, coded]
            back[row, :count] = flat[row, :count]
            if len(middle):
                buffers = self.codes(middle.float(), role)
                numbers = self.numbers(buffers, (len(middle), tensor.shape[-1]), role)
                back[row, coded] = numbers.to(tensor.dtype)
        return back.view_as(tensor)


def inner_codes(form: Format, rows: Tensor, role: Role, prefix: str = "") -> dict[str, Tensor]:
    """Buffers of a format that leaves no token exact, by names that begin with ``prefix``."""
    buffers = form.encode(rows, role).buffers
    return {prefix + name: buffer for name, buffer in buffers.items() if name != "exact"}


def inner_packed(
    form: Format, tokens: int, head_dim: int, role: Role, prefix: str = ""
) -> Sections | None:
    """How a kernel reads what ``inner_codes`` stored."""
    found = form.packed(tokens, head_dim, role)
    return None if found is None else tuple(each.under(prefix) for each in found)


def inner_numbers(
    form: Format,
    buffers: Mapping[str, Tensor],
    shape: tuple[int, int],
    role: Role,
    prefix: str = "",
) -> Tensor:
    """What ``inner_codes`` stored, ``[n, D]``."""
    own = {
        name.removeprefix(prefix): buffer
        for name, buffer in buffers.items()
        if name.startswith(prefix)
    }
    own["exact"] = next(iter(buffers.values())).new_zeros(0, shape[1])
    return form.decode(Stored(own, shape[0]), shape[1], role)
