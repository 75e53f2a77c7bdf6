"""Bytes of a compressed prompt by format, without the heads' lengths: held, read, remembered."""

from __future__ import annotations

from collections import Counter

from kvtune.policies.decode import DecodeMethod
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.policies.room import Room
from kvtune.profiles.shape import ModelShape


def cache_bytes_by_format(policy: Policy, shape: ModelShape, prompt_tokens: int) -> Counter[str]:
    """Bytes of one compressed prompt by the name of their format, without the heads' lengths."""
    found = Counter[str]()
    for (option, tokens), heads in _alike(policy, prompt_tokens).items():
        for form, size in bytes_of(option, tokens, prompt_tokens, shape.head_dim).items():
            found[form] += heads * size
    return +found


def bytes_read_by_format(policy: Policy, shape: ModelShape, prompt_tokens: int) -> Counter[str]:
    """Bytes of those that a decode step reads, as far as the prompt goes.

    Of heads on the device; what a step reads of others is ``latency.host``'s to say.
    """
    found = Counter[str](bf16=0)
    for (option, tokens), heads in _alike(policy, prompt_tokens).items():
        if option.on_host:
            continue
        read = option.read_by_format(tokens, prompt_tokens, shape.head_dim)
        for form, size in read.items():
            found[form.name] += heads * size
    return found


def statistics_bytes(policy: Policy, prompt_tokens: int, generated: int) -> int:
    """Bytes that methods remember of one sequence's entries while they go on evicting."""
    bits = 0
    for option, planned in zip(policy.options(), policy.budgets(prompt_tokens).flat, strict=True):
        room = Room.of(option, int(planned), prompt_tokens)
        if room and isinstance(option.method, DecodeMethod):
            bits += min(room.prompt + generated, room.most) * option.method.entry_bits
    return -(-bits // 8)


def _alike(policy: Policy, prompt_tokens: int) -> Counter[tuple[Option, int]]:
    """How many heads have the same option and tokens: few differ, and each is counted once."""
    budgets = policy.budgets(prompt_tokens).ravel().tolist()
    return Counter(zip(policy.options(), budgets, strict=True))


def bytes_of(option: Option, tokens: int, prompt_tokens: int, head_dim: int) -> Counter[str]:
    """Of one head's tokens, by the name of their format."""
    found = Counter[str]()
    for form, size in option.bytes_by_format(tokens, prompt_tokens, head_dim).items():
        found[form.name] += size
    return found
