"""Policies in a few words, as papers name them: ``snapkv+adakv 25% int4``."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import TYPE_CHECKING

from kvtune.common.errors import KvtuneError, nearest
from kvtune.policies.allocator import allocators
from kvtune.policies.format import formats
from kvtune.policies.method import methods

if TYPE_CHECKING:
    from kvtune.policies.policy_file.parts import PolicyDocument

_EXACT = re.compile(r"([a-z][a-z0-9_-]*)\+([0-9]+)(?=$|[\s,/])")
"""A format and how many first tokens it leaves in 16 bits, as tables print it: ``int4+4``."""
_BUDGET = re.compile(r"all|[0-9]+|[0-9]+(\.[0-9]+)?%")
_EXAMPLE = "'snapkv+adakv 25% int4'"


def is_named(text: str) -> bool:
    """Whether a text is words of which one is a method, format or allocator, and no path of a file.

    A misspelt word among others that are known is one of them still, so that it is told as that.
    """
    known = known_words()
    return "/" not in _spaced(text) and any(
        word.partition("@")[0] in known for word in words_of(text)
    )


def known_words() -> list[str]:
    """Names of all methods, formats and allocators."""
    return [*methods(), *formats(), *allocators()]


def words_of(text: str) -> list[str]:
    """The words, parted by ``+``, ``,`` or spaces, in lower case; ``int4+4`` becomes ``int4@4``."""
    return [word for word in re.split(r"[+,\s]+", _spaced(text)) if word]


def _spaced(text: str) -> str:
    """In lower case, with formats and their exact tokens as words of their own."""

    def exact(found: re.Match[str]) -> str:
        return "@".join(found.groups()) if found[1] in formats() else found[0]

    def apart(found: re.Match[str]) -> str:
        both = (name.partition("@")[0] for name in found.groups())
        return " ".join(found.groups()) if all(name in formats() for name in both) else found[0]

    return re.sub(r"([\w@-]+)/([\w@-]+)", apart, _EXACT.sub(exact, text.strip().lower()))


def read_named(text: str) -> PolicyDocument:
    """One option for all heads: a method, an allocator, a budget, a format or two, in any order.

    Of two formats the first is of keys; ``int4+4`` leaves the first 4 tokens in 16 bits. What
    tables call an option can be typed. A method that drops tokens needs a budget.

    Raises:
        KvtuneError: a word is unknown, or said twice; a budget is missing.
    """
    from kvtune.policies.policy_file.reader import read_policy  # not to tell a mistake in a word

    found: dict[str, list[str]] = {}
    for word in words_of(text):
        found.setdefault(_kind_of(word, text), []).append(word)
    most = {"method": 1, "allocator": 1, "budget": 1, "format": 2}
    for kind, words in found.items():
        if len(words) > most[kind]:
            raise KvtuneError(
                f"policy {text!r} names {' and '.join(words)}, which are each a {kind}",
                hint="write a policy file where heads have different ones.",
            )
    method, budget = found.get("method", ["full"])[0], found.get("budget", [""])[0]
    if method != "full" and not budget:
        raise KvtuneError(
            f"policy {text!r} does not say how many tokens it keeps",
            hint=f"add a share of the prompt or a number of tokens: '{text} 25%'.",
        )
    keys, *values = found.get("format", ["bf16"])
    if budget.endswith("%") and not 0 < Decimal(budget[:-1]) <= 100:
        raise KvtuneError(
            f"policy {text!r}: {budget} is no share of a prompt",
            hint="write more than 0% and at most 100%, such as 12.5%; tokens (256); or all.",
        )
    return read_policy(
        f"kvtune_policy: 1\nallocator: {found.get('allocator', ['as_given'])[0]}\n"
        f"policy: {{method: {method}, budget: {budget or 'all'}, keys: {_format(keys)}, "
        f"values: {_format((values or [keys])[0])}}}\n"
    )


def _format(word: str) -> str:
    name, _, exact = word.partition("@")
    return f"{{name: {name}, exact_first: {exact}}}" if exact else name


def _kind_of(word: str, text: str) -> str:
    if _BUDGET.fullmatch(word):
        return "budget"
    known: dict[str, list[str]] = {
        "method": [*methods()], "format": [*formats()], "allocator": [*allocators()]
    }  # fmt: skip
    for kind, names in known.items():
        if word.partition("@")[0] in names:
            return kind
    raise KvtuneError(
        f"policy {text!r}: {word!r} is not known. {nearest(word, known_words())}",
        hint=f"a policy is a file, or words such as {_EXAMPLE}; kvtune policies lists them.",
    )
