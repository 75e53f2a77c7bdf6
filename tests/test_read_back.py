"""Packed buffers of several heads read back together: what each alone gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvtune.policies.format import Stored, formats
from kvtune.policies.methods.full import Full
from kvtune.policies.option import ALL, Option
from kvtune.policies.parts import HeadPart
from kvtune.runtime.cache.beside import Encoded, HeldPart, read_back

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", sorted(formats()))
def test_heads_are_read_back_together_as_each_alone(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    form = formats()[name]()
    option = Option(Full(), ALL, form, form)
    held = [
        HeldPart.of(row, HeadPart(torch.arange(count)), tuple(pair), option)
        for row, count in enumerate((200, 200, 150, 200))
        for pair in [torch.randn(2, count, 64, generator=generator).bfloat16()]
    ]
    together = read_back(held, 64)
    for part, ours in zip(held, together, strict=True):
        (alone,) = read_back([part], 64)
        for x, y in zip(ours, alone, strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


class Counted:
    """A format whose buffers are of one size, however many tokens they hold."""

    bytes_vary = False

    def decode(self, stored: Stored, head_dim: int, role: str) -> torch.Tensor:
        return torch.zeros(stored.tokens, head_dim)


def test_heads_of_other_counts_are_read_back_apart_though_their_buffers_are_alike() -> None:
    form: Any = Counted()
    both = [Stored({"codes": torch.zeros(2)}, tokens) for tokens in (5, 6)]
    held = [HeldPart(0, Encoded(each, each), (form, form)) for each in both]
    assert [(len(keys), len(values)) for keys, values in read_back(held, 8)] == [(5, 5), (6, 6)]
