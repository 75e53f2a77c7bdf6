"""How packed buffers say a head's numbers, so that one kernel reads all of them where they lie.

Formats that have no page layout of their own keep their buffers end to end in pages of the pool
(``encoded_pages``). A format says of which sections its tokens are made, and how each is read:

    number = levels[code] * scale + offset + left . right + outlier

Without levels a code counts itself; low-rank factors and outliers are added where there are any.
Codes lie row by row: a row is one channel's tokens, or one token's channels, cut into groups that
share a scale and an offset and begin with a whole byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

Rows = Literal["tokens", "channels"]
Widths = Literal["alike", "channels", "tokens"]

STEP = 32
"""Tokens that a kernel looks at together; a channel's group of tokens is some of these."""

BUFFERS = (
    "codes", "scales", "levels", "widths", "wide codes", "wide scales", "left", "right",
    "starts", "places", "outliers",
)  # fmt: skip
"""What kernels call the buffers of a section.

codes, scales     of every row; scale and offset of a group, 16 bits each
levels            16 bits for each code
widths            bits of each token's codes, whose rows are as long as these need; then the scale
                  is a token's range and its mean, over as many codes as there are; or the places in
                  16 bits of the channels that lie among ``wide codes``, ascending
left, right       16 bits: ``[tokens, rank]``, ``[D, rank]``
starts            int32: of each 32 tokens, the first of their outliers, and the end of all; or the
                  first byte of their codes, where tokens have widths
places, outliers  16 bits each: token among its 32 * 1024 + channel; what is added there
"""

NUMBERS = 16
"""Bits of what is no code: 16-bit floats as they are."""

MOST_RANK = 16

_IN_WORDS = (2, 4, 8)  # bits of codes of which none begins in one word and ends in another


@dataclass(frozen=True)
class Reading:
    """How a kernel is compiled for a section.

    Args:
        bits: of a code; ``NUMBERS`` for floats.
        rows: what a row of codes is of.
        widths: whether all rows have so many bits, some channels twice as many, or each token its
            own.
        levels: whether codes are looked up.
        patched: whether outliers are added.
        rank: columns of the low-rank factors.
        groups: of a token's channels, where rows are tokens.
        words: whether the codes of 32 elements of a row are whole words, of 32 bits.
    """

    bits: int
    rows: Rows = "tokens"
    widths: Widths = "alike"
    levels: bool = False
    patched: bool = False
    rank: int = 0
    groups: int = 1
    words: bool = False

    @property
    def shares(self) -> bool:
        """Whether some 32 tokens share scales or lists."""
        return self.rows == "channels" or self.widths == "tokens" or self.patched


@dataclass(frozen=True)
class Section:
    """Some of a head's tokens in a row that are stored alike.

    Args:
        start: the first of them among the head's tokens.
        stop: behind the last of them.
        reading: how they are read.
        buffers: by ``BUFFERS``, their names.
        group: elements of a row that share a scale.
        first: which of the buffers' tokens the first one is.
        turned: whether a Hadamard matrix rotates what is read.
    """

    start: int
    stop: int
    reading: Reading
    buffers: Mapping[str, str]
    group: int = 1
    first: int = 0
    turned: bool = False

    @property
    def row_groups(self) -> int:
        """Groups of a row."""
        along_tokens = self.reading.rows == "channels"
        return -(-(self.stop - self.start) // self.group) if along_tokens else self.reading.groups

    def moved(self, tokens: int) -> Section:
        """The same behind so many other tokens of the head."""
        return replace(self, start=self.start + tokens, stop=self.stop + tokens)

    def under(self, prefix: str) -> Section:
        """The same of buffers whose names begin so."""
        return replace(self, buffers={key: prefix + name for key, name in self.buffers.items()})

    def group_bytes(self, bits: int) -> int:
        """Bytes of a group's codes."""
        return -(-self.group * bits // 8)


Sections = tuple[Section, ...]


def numbers(start: int, stop: int, name: str, first: int = 0) -> Sections:
    """Tokens in 16 bits; none where there are none."""
    reading = Reading(NUMBERS)
    return (Section(start, stop, reading, {"codes": name}, first=first),) if stop > start else ()


def grouped(
    tokens: int, head_dim: int, bits: int, group: int, along_tokens: bool
) -> Sections | None:
    """Integers in groups, of which a last shorter one lies apart; None where no kernel reads them.

    Args:
        tokens: how many have codes.
        head_dim: D.
        bits: of a code.
        group: elements that share a scale and an offset.
        along_tokens: whether these are of one channel.
    """
    if not along_tokens:
        if group < head_dim and (head_dim % group or group < 8):
            return None
        name, width = ("last", head_dim) if group > head_dim else ("whole", group)
        words = head_dim * bits % 32 == 0 and bits in _IN_WORDS and width * bits % 8 == 0
        reading = Reading(bits, groups=head_dim // width, words=words)
        return (Section(0, tokens, reading, _of(name), width),) if tokens else ()
    whole = tokens // group * group
    if whole and group % STEP:
        return None
    ends = ((0, whole, "whole", group), (whole, tokens, "last", tokens - whole))
    return tuple(
        Section(start, stop, _by_channel(bits, width), _of(name), width, first=start)
        for start, stop, name, width in ends
        if stop > start
    )


def _by_channel(bits: int, group: int) -> Reading:
    words = bits in _IN_WORDS and group % STEP == 0
    return Reading(bits, "channels", words=words)


def _of(name: str) -> dict[str, str]:
    return {"codes": f"{name} codes", "scales": f"{name} scales"}


def joined(parts: Iterable[Sections | None]) -> Sections | None:
    """All of them, or None where a kernel does not read one."""
    found: list[Section] = []
    for sections in parts:
        if sections is None:
            return None
        found += sections
    return tuple(found)


@dataclass(frozen=True)
class Piece:
    """Tokens of one section of keys and one of values, from one of the head's to before another."""

    start: int
    stop: int
    keys: Section
    values: Section


def pieces_of(keys: Sections | None, values: Sections | None) -> tuple[Piece, ...] | None:
    """A head's tokens in order; None where no kernel reads them.

    What 32 tokens share must be read with all of them: sections of keys and values that begin at
    different tokens are read only where they share nothing.
    """
    if keys is None or values is None:
        return None
    ends = sorted({end for each in (*keys, *values) for end in (each.start, each.stop)})
    found = tuple(
        Piece(start, stop, _holding(keys, start), _holding(values, start))
        for start, stop in pairwise(ends)
    )
    return found if all(map(_is_whole, found)) else None


def _holding(sections: Sections, token: int) -> Section:
    return next(each for each in sections if each.start <= token < each.stop)


def _is_whole(piece: Piece) -> bool:
    return all(
        (piece.start - each.start) % STEP == 0 or not each.reading.shares
        for each in (piece.keys, piece.values)
    )
