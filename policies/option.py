"""One thing that may be done to one KV head: which tokens stay, and how they are stored."""

from __future__ import annotations

from dataclasses import dataclass

from kvtune.policies.format import Format
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.method import Method
from kvtune.policies.methods.full import Full


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
class Option:
    """A method, its budget, and a format each for keys and values."""

    method: Method = Full()
    budget: Budget = ALL
    keys: Format = Bf16()
    values: Format = Bf16()

    def footprint(self, tokens: int, head_dim: int) -> int:
        """Bytes of one KV head that keeps ``tokens`` tokens; exact, runs without torch."""
        return self.keys.footprint(tokens, head_dim, "keys") + self.values.footprint(
            tokens, head_dim, "values"
        )

    @property
    def label(self) -> str:
        """``snapkv 256 int4``; keys and values apart where they differ, parameters where set."""
        kinds = dict.fromkeys((self.keys.label, self.values.label))
        return f"{self.method.label} {self.budget} {'/'.join(kinds)}"
