"""How tokens lie in a page: the one description that kernels, reference and pool share.

A page holds up to 64 tokens of one KV head, or up to 16 where keys and values are both in 16 bits:
its keys, then its values, each as codes followed by their scales. Pages of 16 bits are what grows,
token by token, and what a few exact tokens take; the others hold whole groups that share scales.

floats    keys token by token [tokens, D]; values too in bf16, and channel by channel [D, 64] in
          fp8, which has one scale a head and tensor, kept beside the lengths
integers  in units of two bytes, the tokens t and t + 32 of a page; a byte holds the channels d,
          d + D/f, d + 2D/f ... (f = 8 / bits fields). Keys [32, D/f] units, values [D/f, 32].
          A mask leaves two lanes of 16 bits with one field each: no element changes its lane.
          Of three bits the lower two lie so; behind them the third ones in bytes, keys [32, D/4],
          values [D/4, 32]: bit 2 f of a byte is that of token t and field f, bit 2 f + 1 that of
          token t + 32
scales    fp16, then offsets likewise: of keys by channel [D/f, f], one a channel; of values and of
          keys by token [g, 32, 2], one a token and group of 64 channels; each in the order in
          which its codes are met

blocks    of ``policies.blocks``: codes in units as those of integers, behind them each block's
          scale [blocks, 32, 2] in its own bytes, and zero points in 16 bits likewise behind those
rotated   integers whose keys or values were multiplied by a Hadamard matrix before; they lie alike
signs     of ``policies.formats.fitted.Allocated``: bytes of eight signs, channel by channel, in
          such units too, keys [32, S/8], values [S/8, 32]; behind each a byte a token, its scale.
          What all of a head's tokens share lies in tables of its own, whole cells of the same
          memory: means, what each of a key's signs counts and in which channel, steps and bits of
          values

Sizes are whole cells of 4 D bytes, so that pages of all formats share one pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from kvtune.common.errors import KvtuneError
from kvtune.policies.format import Format
from kvtune.policies.formats.blocked import BlockFormat, block_forms
from kvtune.policies.option import Option
from kvtune.policies.page_formats import (
    AS_VALUES,
    BF16_PAGE,
    CLIP,
    PAGE,
    PAIR,
    ROTATED,
    SIGNS,
    VALUE_CODES,
    code_bytes,
    field_bits,
    has_head_scales,
    is_by_token,
    is_integer,
    is_rotated,
    is_signs,
    named,
    number_of,
    scale_bytes,
    sign_bytes,
)

KERNEL_HEAD_DIMS = (64, 128, 256)
_MANY = 2**40


@dataclass(frozen=True)
class PageLayout:
    """Where keys and values lie in a page.

    Args:
        head_dim: D.
        keys: a key of ``ALL_KEY_CODES`` or of ``block_forms``; of ``SIGNS`` where values are signs
            too.
        values: a key of ``VALUE_CODES`` or of ``block_forms``; or signs, rotated or not.
    """

    head_dim: int
    keys: str = "bf16"
    values: str = "bf16"

    @staticmethod
    def of(head_dim: int, code: int) -> PageLayout:
        """The layout that has this ``code``."""
        keys, values = divmod(code, PAIR)
        return PageLayout(head_dim, named(keys), named(values))

    @property
    def codes(self) -> tuple[int, int]:
        """What kernels call the keys' and the values' formats."""
        return number_of(self.keys), number_of(self.values)

    @property
    def code(self) -> int:
        """The pair as one number, for kernels."""
        keys, values = self.codes
        return PAIR * keys + values

    @property
    def page_tokens(self) -> int:
        """Tokens that a page holds at most."""
        return BF16_PAGE if self.keys == self.values == "bf16" else PAGE

    @property
    def cell_bytes(self) -> int:
        """What sizes and places in a pool are multiples of."""
        return 4 * self.head_dim

    @cached_property
    def key_scales(self) -> int:
        """Byte offset of the keys' scales."""
        return code_bytes(self.keys, self.head_dim, self.page_tokens)

    @cached_property
    def value_codes(self) -> int:
        """Byte offset of the values."""
        return self.key_scales + scale_bytes(self.keys, self.head_dim, is_by_token(self.keys))

    @cached_property
    def value_scales(self) -> int:
        """Byte offset of the values' scales."""
        return self.value_codes + code_bytes(self.values, self.head_dim, self.page_tokens)

    @cached_property
    def page_bytes(self) -> int:
        """Bytes of a page, whole cells."""
        used = self.value_scales + scale_bytes(self.values, self.head_dim, by_token=True)
        return -(-used // self.cell_bytes) * self.cell_bytes

    @property
    def page_cells(self) -> int:
        """Cells of a page."""
        return self.page_bytes // self.cell_bytes

    @property
    def block_pages(self) -> int:
        """Pages of a block of 64 tokens, which a reader selects and the host keeps together."""
        return PAGE // self.page_tokens

    @property
    def block_bytes(self) -> int:
        """Bytes of such a block."""
        return self.block_pages * self.page_bytes

    @property
    def block_cells(self) -> int:
        """Cells of such a block."""
        return self.block_pages * self.page_cells

    @property
    def has_tables(self) -> bool:
        """Whether a head's pages are read by tables that were fitted to all of its tokens.

        They take no tokens that come later, and stay on the device.
        """
        return is_signs(self.keys)

    @property
    def has_head_scales(self) -> bool:
        """Whether keys or values have a scale that all of a head's tokens share."""
        return has_head_scales(self.keys) or has_head_scales(self.values)

    @property
    def settles(self) -> bool:
        """Whether generated tokens may take this format when they have become old."""
        return not self.has_tables and self != PageLayout(self.head_dim)

    @property
    def stores_apart(self) -> bool:
        """Whether a token of such a page, whose others are coded, can leave without them."""
        keys = self.keys == "bf16" or is_by_token(self.keys)
        values = self.values == "bf16" or is_integer(self.values)
        return keys and values and self.page_tokens == PAGE

    @cached_property
    def tables(self) -> PageTables:
        """Size of the tables that belong to a head's pages of signs."""
        signs = 8 * sign_bytes(self.keys, self.head_dim)
        return PageTables(self.head_dim, 9 * self.head_dim + 3 * signs)

    def pages_for(self, tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-tokens // self.page_tokens)

    def blocks_of(self, pages: int) -> int:
        """Blocks of 64 tokens, the last one maybe in part, that so many pages hold."""
        return -(-pages * self.page_tokens // PAGE)


@dataclass(frozen=True)
class PageTables:
    """Tables of one head's pages of signs, which lie in the same memory.

    Args:
        head_dim: D.
        used_bytes: means of keys and of values, steps and first signs of values, what a key's signs
            count, their channels, and the bits of values.
    """

    head_dim: int
    used_bytes: int

    @property
    def cell_bytes(self) -> int:
        """What sizes and places in a pool are multiples of."""
        return 4 * self.head_dim

    @property
    def page_cells(self) -> int:
        """Cells of the pool that one head's tables take."""
        return -(-self.used_bytes // self.cell_bytes)

    @property
    def page_bytes(self) -> int:
        """Bytes of the cells that one head's tables take."""
        return self.page_cells * self.cell_bytes


def layout_of(option: Option, head_dim: int) -> PageLayout:
    """The pages that an option's coded tokens lie in.

    Raises:
        KvtuneError: a format, a group or a head dimension that the runtime does not store.
    """
    keys, values = (_stored(form.coded, head_dim) for form in (option.keys, option.values))
    if is_signs(keys) != is_signs(values) or (is_signs(keys) and is_rotated(keys)):
        raise KvtuneError(
            f"the runtime stores no {option.keys.label} beside {option.values.label}",
            hint="allocated keys, by channel, go with allocated values.",
        )
    if getattr(option.keys.coded, "keys_by", None) == "token":
        keys += AS_VALUES
    if exact_among(option.keys, _MANY) != exact_among(option.values, _MANY):
        raise KvtuneError(
            f"{option.label!r} leaves a different number of keys and values in 16 bits",
            hint="give keys and values the same exact_first, and of KIVI the same residual.",
        )
    return PageLayout(head_dim, keys, values)


def layout_named(head_dim: int, name: str) -> PageLayout:
    """Pages of keys and values both in the format called so, with its default parameters."""
    return PageLayout(head_dim, name + AS_VALUES if is_rotated(name) else name, name)


def exact_tokens(form: Format) -> int:
    """First kept tokens that a format leaves in 16 bits."""
    return form.exact_tokens


def exact_among(form: Format, tokens: int) -> tuple[int, int]:
    """How many of so many tokens of a head stay in 16 bits: the first ones, and the newest."""
    first = min(form.exact_tokens, tokens)
    return first, min(form.newest(tokens - first, "keys"), tokens - first)


def has_pages(option: Option, head_dim: int) -> bool:
    """Whether the runtime has pages, and a kernel, for an option's formats."""
    try:
        layout_of(option, head_dim)
    except KvtuneError:
        return False
    return True


def _stored(form: Format, head_dim: int) -> str:
    if form.name == "allocated":
        return _stored_signs(form, head_dim)
    if isinstance(form, BlockFormat):
        return _stored_blocks(form, head_dim)
    if form.name not in VALUE_CODES:
        names = [*VALUE_CODES, "allocated", *dict.fromkeys(x.name for x in block_forms().values())]
        raise KvtuneError(
            f"the runtime stores no {form.name}", hint=f"it stores {', '.join(names)}."
        )
    clip = getattr(form, "clip", None)
    if clip is not None and clip != CLIP[form.bits]:
        raise KvtuneError(f"the runtime clips {form.name} to {CLIP[form.bits]}, not to {clip}")
    if is_integer(form.name) and getattr(form, "group", PAGE) != PAGE:
        raise KvtuneError(f"the runtime stores groups of {PAGE} elements, not of {form.group}")  # type: ignore[attr-defined]
    if head_dim % 4:
        raise KvtuneError(f"the runtime does not store heads of {head_dim} channels")
    return form.name


def _stored_signs(form: Format, head_dim: int) -> str:
    rotated = ROTATED if form.directions == "hadamard" else ""  # type: ignore[attr-defined]
    name = f"signs{form.mean_bits:g}"  # type: ignore[attr-defined]
    if name not in SIGNS or (SIGNS[name] - 5) * head_dim % 64:
        raise KvtuneError(
            f"the runtime stores no {form.label} of {head_dim} channels",
            hint="it stores eighths of a bit, from 1.5 to 3.25, where a token's fill whole bytes.",
        )
    return rotated + name


def _stored_blocks(form: BlockFormat, head_dim: int) -> str:
    blocks, fields = form.blocks, 8 // field_bits(form.bits)
    if form.page_name not in block_forms():
        raise KvtuneError(f"the runtime stores no {form.page_name}, blocks of {blocks.width}")
    narrow = head_dim in KERNEL_HEAD_DIMS and head_dim < 16 * fields
    if head_dim % blocks.width_of(head_dim) or head_dim % fields or head_dim % 4 or narrow:
        raise KvtuneError(f"the runtime stores no {form.label} of {head_dim} channels")
    return form.page_name
