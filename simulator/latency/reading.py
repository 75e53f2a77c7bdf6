"""How prompts are read: whole, in chunks, or behind a prefix that is held already."""

from __future__ import annotations

from dataclasses import dataclass

from kvtune.common.errors import KvtuneError
from kvtune.common.units import Amount, parse_tokens


@dataclass(frozen=True)
class Reading:
    """How prompts are read.

    Args:
        prefix_tokens: first tokens of a prompt whose keys and values are held already.
        chunk_tokens: of the others that are read at once; all of them unless given.
    """

    prefix_tokens: int = 0
    chunk_tokens: int | None = None

    @classmethod
    def of(cls, prefix: Amount, chunk: Amount | None) -> Reading:
        """As people write it: ``24k``, or 0 for no prefix.

        Raises:
            KvtuneError: one is no number of tokens.
        """
        held = 0 if str(prefix).strip() == "0" else parse_tokens(prefix)
        return cls(held, None if chunk is None else parse_tokens(chunk))

    def new_tokens(self, context_tokens: int) -> int:
        """Tokens of a prompt that are read.

        Raises:
            KvtuneError: the prefix leaves none.
        """
        if not 0 <= self.prefix_tokens < context_tokens:
            raise KvtuneError(
                f"a prefix of {self.prefix_tokens} tokens in a prompt of {context_tokens}",
                hint="a prefix has 0 tokens or more, and leaves at least one to be read.",
            )
        return context_tokens - self.prefix_tokens


WHOLE = Reading()
