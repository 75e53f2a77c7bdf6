"""What the kernels' assembly looks up, run instruction by instruction without a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from kvtune.policies.formats.normal_codes import magnitudes

pytest.importorskip("triton", reason="Triton is not installed; there is no assembly")

from kvtune.runtime.kernels.unpacking import all_levels

KINDS: dict[str, Callable[..., int]] = {
    "mov": lambda a: a, "and": lambda a, b: a & b, "or": lambda a, b: a | b,
    "shl": lambda a, b: a << b & 0xFFFFFFFF, "shr": lambda a, b: a >> b,
}  # fmt: skip


def run(text: str, given: list[int], outputs: int) -> list[int]:
    """The outputs of PTX of a few plain instructions, whose registers have 32 bits."""
    held = {f"${outputs + n}": word for n, word in enumerate(given)}

    def value(name: str) -> int:
        return held[name] if name in held else int(name, 0)

    for line in text.strip("{} ").split(";"):
        found = re.match(r"\s*(\w+)\.b32 ([$\w]+), (.*)", line)
        if found is None:
            assert not line.strip() or ".reg" in line
            continue
        kind, target, rest = found.groups()
        args = [value(name.strip()) for name in rest.split(",")]
        if kind == "prmt":
            some = [(args[k // 4] >> (8 * (k % 4))) & 255 for k in range(8)]
            chosen = [args[2] >> (4 * n) & 15 for n in range(4)]
            assert max(chosen) < 8, "the highest bit would spread a sign"
            held[target] = sum(some[n] << (8 * k) for k, n in enumerate(chosen))
        else:
            held[target] = KINDS[kind](*args)
    return [held[f"${n}"] for n in range(outputs)]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_of_all_codes_of_two_units_are_found(bits: int) -> None:
    drawn, fields = np.random.default_rng(bits), 2 if bits == 4 else 4
    some = [*magnitudes(bits), *(-x for x in magnitudes(bits))]
    for _ in range(40):
        codes = drawn.integers(2**bits, size=(2, 2, fields)).tolist()  # by unit, half and field
        low = [_unit(unit, min(bits, 4) if bits != 3 else 2) for unit in codes]
        given = [low[0] | low[1] << 16]
        if bits == 3:
            third = [
                sum((c >> 2) << (2 * f + h) for h, half in enumerate(u) for f, c in enumerate(half))
                for u in codes
            ]
            given.append(third[0] | third[1] << 16)
        found = run(all_levels(bits), given, 2 * fields)
        for half in range(2):
            for field in range(fields):
                words = np.array([found[half * fields + field]], np.uint32).view(np.float16)
                wanted = [np.float16(some[codes[unit][half][field]]) for unit in range(2)]
                assert words.tolist() == [float(x) for x in wanted]


def _unit(halves: list[list[int]], width: int) -> int:
    """Sixteen bits: the fields of either half, of the codes' lower bits."""
    mask = 2**width - 1
    return sum(
        (code & mask) << (8 * half + width * field)
        for half, codes in enumerate(halves)
        for field, code in enumerate(codes)
    )
