"""Published formats against straight-line oracles in float64, written from their papers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.linalg import hadamard

from kvtune.policies.format import Format, Role
from kvtune.policies.formats import normal_codes
from kvtune.policies.formats.fitted import Fitted
from kvtune.policies.formats.kitty import Kitty
from kvtune.policies.formats.kivi import Kivi
from kvtune.policies.formats.turboquant import TurboQuant2, TurboQuant3, TurboQuant4
from kvtune.policies.testing.cases import uniform

Numbers = NDArray[np.float64]
ROTATION = hadamard(64) / 8.0

# Positive halves of the tables for a standard normal number, and their squared errors: Max 1960.
MAX_1960 = {
    1: ([0.7980], 0.3634),
    2: ([0.4528, 1.510], 0.1175),
    3: ([0.2451, 0.7560, 1.344, 2.152], 0.03454),
    4: ([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
}


def rows_of(seed: int, tokens: int, head_dim: int) -> Any:
    """Numbers that 16 bits hold."""
    return uniform(seed, tokens, head_dim).bfloat16()


def read(form: Format, rows: Any, role: Role) -> Numbers:
    found: Numbers = form.decode(form.encode(rows, role), rows.shape[1], role).double().numpy()
    return found


def affine(line: Numbers, bits: int, group: int) -> Numbers:
    """Min-max codes of each run of ``group`` numbers, scale and offset in 16 bits."""
    out = []
    for at in range(0, len(line), group):
        part = line[at : at + group]
        low = float(np.float16(part.min()))
        scale = float(np.float16((part.max() - low) / (2**bits - 1))) or 1.0
        out.append(np.clip(np.rint((part - low) / scale), 0, 2**bits - 1) * scale + low)
    return np.concatenate(out)


@pytest.mark.parametrize("bits", MAX_1960)
def test_levels_are_those_of_the_published_tables(bits: int) -> None:
    positive, error = MAX_1960[bits]
    expected = [-x for x in reversed(positive)] + positive
    np.testing.assert_allclose(normal_codes.levels(bits), expected, rtol=6e-4)
    assert normal_codes.distortion(bits) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("kind", [TurboQuant2, TurboQuant3, TurboQuant4])
def test_turboquant_stores_a_length_and_the_nearest_levels(kind: Any) -> None:
    form, rows = kind(), rows_of(1, 40, 64)
    positive = np.array(MAX_1960[form.bits][0])
    table = np.concatenate([-positive[::-1], positive])
    x = rows.double().numpy()
    size = np.sqrt((x**2).mean(1, keepdims=True))
    unit = x @ ROTATION / size
    level = table[np.abs(unit[..., None] - table).argmin(-1)]
    level = level / np.sqrt((level**2).mean(1, keepdims=True))
    expected = (level * np.float16(size).astype(float)) @ ROTATION
    found = read(form, rows, "keys")
    assert (
        np.abs(found - expected).max(1) < 2e-3
    ).mean() > 0.9  # the others lie between two levels
    np.testing.assert_allclose((found**2).sum(1), (x**2).sum(1), rtol=2e-3)
    assert form.bound(40, 64, "keys") == 40 * (8 * form.bits + 2)


@pytest.mark.parametrize("role", ["keys", "values"])
def test_kivi_leaves_the_newest_tokens_and_codes_the_others(role: Role) -> None:
    rows, form = rows_of(2, 200, 64), Kivi(exact_first=3, residual=100)
    x = rows.double().numpy()
    older = x[3:100]
    lines = older.T if role == "keys" else older
    stored = np.stack([affine(line, 2, 32) for line in lines])
    expected = np.concatenate([x[:3], stored.T if role == "keys" else stored, x[100:]])
    np.testing.assert_allclose(read(form, rows, role), expected, atol=1e-5)


def test_kitty_codes_channels_of_wide_range_in_four_bits() -> None:
    rows = rows_of(3, 100, 64)
    rows[:, [5, 40]] *= 9
    x, form = rows.double().numpy(), Kitty(boosted=1 / 32)
    expected = np.stack([affine(x[:, c], 4 if c in (5, 40) else 2, 64) for c in range(64)], 1)
    np.testing.assert_allclose(read(form, rows, "keys"), expected, atol=1e-5)
    values = np.stack([affine(row, 2, 64) for row in x])
    np.testing.assert_allclose(read(form, rows, "values"), values, atol=1e-5)
    extra = 2 * (100 * 2 // 8) + 2 * 2  # two bits more a number, and a place
    plain = Kitty(boosted=0).bound(100, 64, "keys")
    assert form.bound(100, 64, "keys") == plain + extra


def correlated(tokens: int, head_dim: int) -> Any:
    """Normal numbers most of whose variance lies in a few directions."""
    generator = torch.Generator().manual_seed(4)
    mix = torch.randn(head_dim, head_dim, generator=generator) * 0.8 ** torch.arange(head_dim)
    return torch.randn(tokens, head_dim, generator=generator) @ mix.T + 3


def test_a_fitted_rotation_comes_near_what_theory_allows() -> None:
    rows = correlated(4000, 32)
    form = Fitted(mean_bits=2.0)
    x = rows.double().numpy()
    spread = np.linalg.eigvalsh(np.cov(x.T))
    # Reverse water-filling of 64 bits by hand: always to where one more lowers the error most.
    error, width = np.array([1.0, *(MAX_1960[b][1] for b in MAX_1960), 0.002499]), np.zeros(32, int)
    for _ in range(64):
        gain = np.where(width < 5, spread * (error[width] - error[np.minimum(width + 1, 5)]), -1)
        width[gain.argmax()] += 1
    expected = float((spread * error[width]).sum() / 32)
    found = float(((read(form, rows, "keys") - x) ** 2).mean())
    assert 0.9 * expected < found < 1.15 * expected


def test_a_fitted_rotation_loses_less_than_a_fixed_one_at_fewer_bytes() -> None:
    rows = correlated(4000, 64)
    fitted, fixed = Fitted(mean_bits=1.94), TurboQuant2()
    assert fitted.bound(4000, 64, "keys") < fixed.bound(4000, 64, "keys")
    errors = [
        float(((read(form, rows, "keys") - rows.numpy()) ** 2).mean()) for form in (fitted, fixed)
    ]
    assert errors[0] < 0.3 * errors[1]
