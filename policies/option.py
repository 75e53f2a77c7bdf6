"""One thing that may be done to one KV head: which tokens stay, and how they are stored."""

from __future__ import annotations

from dataclasses import dataclass

from kvtune.policies.format import Format
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.method import Method
from kvtune.policies.methods.full import Full
from kvtune.policies.parts import entries_of


@dataclass(frozen=True)
class Budget:
    """How much of a prompt stays: a number of tokens, a share of the prompt, or all of it.

    Args:
        tokens: that many, or fewer if the prompt is shorter.
        share: of the prompt's tokens, in (0, 1].
    """

    tokens: int | None = None
    share: float | None = None

    def resolve(self, prompt_tokens: int) -> int:
        """Tokens kept of a prompt; at least one of a prompt that has any."""
        if self.tokens is not None:
            return min(self.tokens, prompt_tokens)
        if self.share is not None:
            return min(max(round(self.share * prompt_tokens), 1), prompt_tokens)
        return prompt_tokens

    def __str__(self) -> str:
        """``256``, ``12.5%`` or ``all``."""
        if self.tokens is not None:
            return str(self.tokens)
        return "all" if self.share is None else f"{100 * self.share:.3g}%"


ALL = Budget()


@dataclass(frozen=True)
class Ledger:
    """Bytes of one KV head's prompt.

    Args:
        resident_bytes: held on the device from the prompt's end on.
        read_bytes: read from there by every decode step.
    """

    resident_bytes: int
    read_bytes: int


@dataclass(frozen=True)
class Option:
    """A method, its budget, and a format each for keys and values."""

    method: Method = Full()
    budget: Budget = ALL
    keys: Format = Bf16()
    values: Format = Bf16()

    def bytes_by_format(self, tokens: int, prompt_tokens: int, head_dim: int) -> dict[Format, int]:
        """Bytes that one KV head holds, by format; an index of keys counts as 16 bits."""
        found: dict[Format, int] = {}
        for part in self.method.plan(tokens, prompt_tokens):
            formats = part.formats or (self.keys, self.values)
            for form, size in zip(formats, part.stored_bytes(formats, head_dim), strict=True):
                found[form] = found.get(form, 0) + size
        if (reader := self.method.reader(tokens)) is not None:
            entries = entries_of(self.method.plan(tokens, prompt_tokens))
            found[Bf16()] = found.get(Bf16(), 0) + reader.index_bytes(entries, head_dim)
        return found

    def read_by_format(self, tokens: int, prompt_tokens: int, head_dim: int) -> dict[Format, int]:
        """Bytes of those that a decode step reads, with what it reads to choose; likewise."""
        reader = self.method.reader(tokens)
        if reader is None:
            return self.bytes_by_format(tokens, prompt_tokens, head_dim)
        plan = self.method.plan(tokens, prompt_tokens)
        entries = max(entries_of(plan), 1)
        share = reader.entries_read(entries), entries
        found: dict[Format, int] = {}
        all_keys = 0
        for part in plan:
            formats = part.formats or (self.keys, self.values)
            sizes = part.stored_bytes(formats, head_dim)
            all_keys += sizes[0]
            for form, size in zip(formats, sizes, strict=True):
                found[form] = found.get(form, 0) + -(-size * share[0] // share[1])
        scanned = reader.scanned_bytes(entries, head_dim, all_keys)
        found[Bf16()] = found.get(Bf16(), 0) + scanned
        return found

    def ledger(self, tokens: int, prompt_tokens: int, head_dim: int) -> Ledger:
        """What one KV head holds of a prompt and what a decode step reads of that.

        Args:
            tokens: its budget.
            prompt_tokens: P.
            head_dim: D.
        """
        shape = tokens, prompt_tokens, head_dim
        held, read = self.bytes_by_format(*shape), self.read_by_format(*shape)
        return Ledger(sum(held.values()), sum(read.values()))

    def footprint(self, tokens: int, prompt_tokens: int, head_dim: int) -> int:
        """Bytes that one KV head holds of a prompt under a budget; exact, runs without torch."""
        return self.ledger(tokens, prompt_tokens, head_dim).resident_bytes

    @property
    def label(self) -> str:
        """``snapkv 256 int4``; keys and values apart where they differ, parameters where set."""
        kinds = dict.fromkeys((self.keys.label, self.values.label))
        return f"{self.method.label} {self.budget} {'/'.join(kinds)}"
