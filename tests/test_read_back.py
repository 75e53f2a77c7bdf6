"""Packed buffers of several heads read back together: what each alone gives."""

from __future__ import annotations

import pytest
import torch

from kvtune.policies.format import formats
from kvtune.policies.methods.full import Full
from kvtune.policies.option import ALL, Option
from kvtune.policies.parts import HeadPart
from kvtune.runtime.cache.beside import HeldPart, read_back

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
