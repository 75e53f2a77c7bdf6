"""One thing that may be done to one KV head: which tokens stay, how they are stored, and where."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from kvtune.policies.format import Format
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.method import Method
from kvtune.policies.methods.full import Full
from kvtune.policies.parts import entries_of


@dataclass(frozen=True)
class Budget:
    """How much of a prompt stays: a number of tokens, a share of the prompt, or all of it.

    What a head needs, sinks and a window of the newest tokens above all, is a number of tokens
    whatever the prompt. A share alone drops them from short prompts; a share with a floor keeps of
    a short prompt as many tokens as of the prompts that the share was chosen on.

    Args:
        tokens: that many, or fewer if the prompt is shorter.
        share: of the prompt's tokens, in (0, 1].
        floor: tokens that a share keeps at least, or all of a prompt that has fewer.
    """

    tokens: int | None = None
    share: float | None = None
    floor: int = 0

    def resolve(self, prompt_tokens: int) -> int:
        """Tokens kept of a prompt; at least one of a prompt that has any."""
        if self.tokens is not None:
            return min(self.tokens, prompt_tokens)
        if self.share is not None:
            return min(max(round(self.share * prompt_tokens), self.floor, 1), prompt_tokens)
        return prompt_tokens

    def with_floor(self, prompt_tokens: int) -> Budget:
        """A share that keeps of shorter prompts as many tokens as of one of ``prompt_tokens``.

        A higher floor that is there stays. Budgets in tokens, and all of a prompt, need none.
        """
        if self.share is None:
            return self
        return replace(self, floor=max(self.floor, Budget(share=self.share).resolve(prompt_tokens)))

    def __str__(self) -> str:
        """``256``, ``12.5%`` or ``all``; a floor, which long prompts do not meet, is left out."""
        if self.tokens is not None:
            return str(self.tokens)
        return "all" if self.share is None else f"{100 * self.share:.3g}%"


ALL = Budget()

MemoryTier = Literal["device", "host"]
"""Where a head's prompt lies: in the GPU's memory, or in pinned memory of the host."""


@dataclass(frozen=True)
class Ledger:
    """Bytes of one KV head's prompt.

    Args:
        resident_bytes: held on the device from the prompt's end on.
        read_bytes: read from there by every decode step.
        host_bytes: held in pinned memory of the host.
        moved_bytes: copied from there to the device by every decode step.
    """

    resident_bytes: int
    read_bytes: int
    host_bytes: int = 0
    moved_bytes: int = 0


@dataclass(frozen=True)
class Option:
    """A method, its budget, a format each for keys and values, and where they lie.

    On the host lies what a method stores; a reader's index, what a step has selected and generated
    tokens are on the device.
    """

    method: Method = Full()
    budget: Budget = ALL
    keys: Format = Bf16()
    values: Format = Bf16()
    tier: MemoryTier = "device"

    def __hash__(self) -> int:
        """That of the fields, counted once: heads are told apart by it thousands of times."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.method, self.budget, self.keys, self.values, self.tier))

    def __getstate__(self) -> dict[str, Any]:
        """Without the hash, which is another one in another process."""
        return {name: value for name, value in vars(self).items() if name != "_hash"}

    def with_floor(self, prompt_tokens: int) -> Option:
        """Its budget with a floor (``Budget.with_floor``), unless short prompts took more bytes so.

        Of a prompt no longer than its floor a head keeps all. Methods that store that otherwise
        than a part of a prompt could need more pages for it than for a longer prompt.
        """
        if not self.method.stores_whole_prompts_alike:
            return self
        return replace(self, budget=self.budget.with_floor(prompt_tokens))

    @property
    def on_host(self) -> bool:
        """Whether the stored prompt lies in the host's memory."""
        return self.tier == "host"

    def bytes_by_format(self, tokens: int, prompt_tokens: int, head_dim: int) -> dict[Format, int]:
        """Bytes that one KV head holds on the device, by format.

        An index of keys counts as 16 bits.
        """
        found = {} if self.on_host else self._stored(tokens, prompt_tokens, head_dim)
        reader = self.method.reader(tokens)
        if reader is not None and not self.compared_on_host(tokens, prompt_tokens):
            entries = entries_of(self.method.plan(tokens, prompt_tokens))
            found[Bf16()] = found.get(Bf16(), 0) + reader.index_bytes(entries, head_dim)
        return found

    def read_by_format(self, tokens: int, prompt_tokens: int, head_dim: int) -> dict[Format, int]:
        """Bytes that a decode step reads on the device, with what it reads to choose; likewise.

        What comes over from the host is read there once it has come.
        """
        found = self._selected(tokens, prompt_tokens, head_dim)
        reader = self.method.reader(tokens)
        if reader is not None and not self.compared_on_host(tokens, prompt_tokens):
            plan = self.method.plan(tokens, prompt_tokens)
            default = self.keys, self.values
            all_keys = sum(part.stored_bytes(default, head_dim)[0] for part in plan)
            scanned = reader.scanned_bytes(max(entries_of(plan), 1), head_dim, all_keys)
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
        resident, taken = sum(held.values()), sum(read.values())
        if not self.on_host:
            return Ledger(resident, taken)
        stored, moved = sum(self._stored(*shape).values()), sum(self._selected(*shape).values())
        if self.compared_on_host(tokens, prompt_tokens):
            entries = entries_of(self.method.plan(tokens, prompt_tokens))
            stored += self.method.reader(tokens).index_bytes(entries, head_dim)  # type: ignore[union-attr]
        return Ledger(resident, taken, stored, moved)

    def compared_on_host(self, tokens: int, prompt_tokens: int) -> int:
        """Keys that the host compares at a step for one query head; 0 where the device chooses."""
        reader = self.method.reader(tokens)
        if reader is None or not self.on_host:
            return 0
        return reader.compared_on_host(entries_of(self.method.plan(tokens, prompt_tokens)))

    def footprint(self, tokens: int, prompt_tokens: int, head_dim: int) -> int:
        """Bytes that one KV head holds of a prompt on the device; exact, runs without torch."""
        return sum(self.bytes_by_format(tokens, prompt_tokens, head_dim).values())

    def _stored(self, tokens: int, prompt_tokens: int, head_dim: int) -> dict[Format, int]:
        """Bytes of all entries, wherever they lie, by format."""
        found: dict[Format, int] = {}
        for part in self.method.plan(tokens, prompt_tokens):
            formats = part.formats or (self.keys, self.values)
            for form, size in zip(formats, part.stored_bytes(formats, head_dim), strict=True):
                found[form] = found.get(form, 0) + size
        return found

    def _selected(self, tokens: int, prompt_tokens: int, head_dim: int) -> dict[Format, int]:
        """Bytes of the entries that a step attends to, by format: all, where there is no reader."""
        stored = self._stored(tokens, prompt_tokens, head_dim)
        reader = self.method.reader(tokens)
        if reader is None:
            return stored
        entries = max(entries_of(self.method.plan(tokens, prompt_tokens)), 1)
        read = reader.entries_read(entries)
        return {form: -(-size * read // entries) for form, size in stored.items()}

    @property
    def label(self) -> str:
        """``snapkv 256 int4``; keys and values apart where they differ, parameters where set."""
        kinds = dict.fromkeys((self.keys.label, self.values.label))
        where = " on the host" if self.on_host else ""
        return f"{self.method.label} {self.budget} {'/'.join(kinds)}{where}"
