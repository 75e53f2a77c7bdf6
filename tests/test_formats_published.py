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
from kvtune.policies.formats.fp4 import MxFp4, NvFp4
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.formats.hqq import Hqq2, Hqq4
from kvtune.policies.formats.kitty import Kitty
from kvtune.policies.formats.kivi import Kivi
from kvtune.policies.formats.kvquant import KvQuant
from kvtune.policies.formats.llama_cpp import Q4, Q8
from kvtune.policies.formats.openvino import OpenVINO4, OpenVINO8
from kvtune.policies.formats.qaq import Qaq
from kvtune.policies.formats.staircase import Staircase
from kvtune.policies.formats.token_head import Fp8TokenHead, Int4TokenHead, Int8TokenHead
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
    assert loss_of(np.array(expected)) == pytest.approx(error, rel=2e-3)


def loss_of(levels: Numbers) -> float:
    """Mean squared error of the nearest levels of a standard normal number, summed by hand."""
    x = np.linspace(-8, 8, 200_001)
    density = np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
    nearest = np.abs(x[:, None] - levels).min(1)
    return float((nearest**2 * density).sum() * (x[1] - x[0]))


@pytest.mark.parametrize("bits", range(1, 7))
def test_even_steps_are_the_best_there_are(bits: int) -> None:
    step, error = normal_codes.EVEN[bits]
    codes = np.arange(2**bits) - (2**bits - 1) / 2
    assert loss_of(codes * step) == pytest.approx(error, rel=2e-3)
    assert min(loss_of(codes * step * f) for f in (0.98, 1.02)) > loss_of(codes * step)


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


@pytest.mark.parametrize(("form", "quant"), [(Q8(), "Q8_0"), (Q4(), "Q4_0"), (MxFp4(), "MXFP4")])
def test_blocks_are_those_of_ggufs_own_arithmetic(form: Format, quant: str) -> None:
    gguf = pytest.importorskip("gguf")
    kind = getattr(gguf.GGMLQuantizationType, quant)
    rows = torch.randn(50, 96, generator=torch.Generator().manual_seed(5)) * 3
    rows[7] = 0
    theirs = gguf.quants.quantize(rows.numpy(), kind)
    assert form.bound(50, 96, "keys") == theirs.nbytes
    stored = form.encode(rows, "keys")
    if "blocks" in stored.buffers:
        assert np.array_equal(stored.buffers["blocks"].numpy().reshape(50, -1), theirs)
    expected = gguf.quants.dequantize(theirs, kind)
    np.testing.assert_array_equal(form.decode(stored, 96, "keys").numpy(), expected)


def test_llama_cpps_rotation_is_a_hadamard_matrix_before_and_after() -> None:
    rows = rows_of(6, 20, 64)
    x = torch.tensor(rows.double().numpy() @ ROTATION).float()
    expected = read(Q4(), x, "keys") @ ROTATION
    np.testing.assert_allclose(read(Q4(rotation="hadamard"), rows, "keys"), expected, atol=1e-5)


def test_nvfp4_has_an_e4m3_scale_a_block_and_one_a_head() -> None:
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(7)).double().numpy()
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = np.concatenate([-grid[::-1], grid])
    head = np.float32(np.abs(x).max() / (6 * 448))
    found = read(NvFp4(), torch.tensor(x).float(), "values")
    for row, line in zip(x.reshape(-1, 16), found.reshape(-1, 16), strict=True):
        scale = torch.tensor(np.abs(row).max() / 6 / head).float().to(torch.float8_e4m3fn)
        step = float(scale) * head
        nearest = np.abs(row[:, None] - grid * step).min(1)
        np.testing.assert_allclose(np.abs(row - line), nearest, atol=1e-6)


@pytest.mark.parametrize(
    ("form", "half_step"), [(Int8TokenHead(), 0.5 / 127), (Fp8TokenHead(), None)]
)
def test_scales_a_token_and_head_follow_its_largest_number(form: Format, half_step: Any) -> None:
    x = rows_of(8, 30, 64).double().numpy() * np.logspace(-3, 3, 30)[:, None]
    largest = np.abs(x).max(1, keepdims=True)
    error = np.abs(read(form, torch.tensor(x).float(), "keys") - x)
    allowed = half_step * largest if half_step else np.abs(x) * 2**-4 + largest / 448 * 2**-10
    assert (error <= allowed * (1 + 1e-5)).all()
    assert form.bound(30, 64, "keys") == 30 * 68


@pytest.mark.parametrize("head_dim", [64, 128])
def test_vllms_four_bits_are_rotated_with_its_signs_before(head_dim: int) -> None:
    """As its kernel says: H (s x), (max - min) / 15, a zero point of 4 bits, and back."""
    x = rows_of(11, 40, head_dim).double().numpy() * np.logspace(-2, 2, 40)[:, None]
    turn = hadamard(head_dim).astype(float)
    drawn = torch.bernoulli(
        torch.full((head_dim,), 0.5), generator=torch.Generator().manual_seed(0x9E3779B9)
    )
    signs = 2 * drawn.double().numpy() - 1
    turned = (x * signs) @ turn
    low, high = turned.min(1, keepdims=True), turned.max(1, keepdims=True)
    step = (high - low) / 15
    zero = np.clip(np.floor(-low / step + 0.5), 0, 15)
    codes = np.clip(np.floor(turned / step + zero + 0.5), 0, 15)
    expected = ((codes - zero) * step) @ turn / head_dim * signs
    form = Int4TokenHead()
    found = read(form, torch.tensor(x).float(), "keys")
    off = np.abs(found - expected).max(1) / np.abs(x).max(1)
    assert np.median(off) < 1e-5  # a number at the middle between two codes may take either
    assert off.max() < 0.2
    assert form.bound(40, head_dim, "keys") == 40 * (head_dim // 2 + 4)


@pytest.mark.parametrize("form", [OpenVINO8(), OpenVINO4()])
@pytest.mark.parametrize("role", ["keys", "values"])
@pytest.mark.parametrize("tokens", [1, 32, 75])
def test_openvino_codes_pages_of_a_channel_and_values_of_a_token(
    form: Format, role: Role, tokens: int
) -> None:
    """By hand, of a page's channel or a token's head: zero points are floats, and not rounded."""
    rows = rows_of(3, tokens, 64)
    rows[:, 5] = 0.375
    line = rows.double().numpy()
    expected = np.empty_like(line)
    groups: list[Any] = [np.s_[at : at + 32, c] for at in range(0, tokens, 32) for c in range(64)]
    if role == "values":
        groups = [np.s_[at, :] for at in range(tokens)]
    for group in groups:
        part = line[group]
        scale = (part.max() - part.min()) / (2**form.bits - 1) or 1e-4
        zero = -part.min() / scale
        expected[group] = (
            np.clip(np.rint(part / scale + zero), 0, 2**form.bits - 1) - zero
        ) * scale
    wrong = np.abs(read(form, rows, role) - expected)
    assert (wrong > 1e-5).mean() < 0.005, "but for codes on the edge between two"
    stored = form.encode(rows, role)
    assert stored.nbytes == tokens * 64 * form.bits // 8 + 8 * len(groups)
    assert stored.nbytes == form.bound(tokens, 64, role)


@pytest.mark.parametrize("role", ["keys", "values"])
def test_a_staircase_codes_each_age_in_its_own_bits(role: Role) -> None:
    form, rows = Staircase(sixteen=10, eight=20, four=40, exact_first=2), rows_of(9, 150, 64)
    x = rows.double().numpy()
    parts = [x[:2]]
    for start, stop, bits in ((2, 80, 2), (80, 120, 4), (120, 140, 8)):
        lines = x[start:stop].T if role == "keys" else x[start:stop]
        band = np.stack([affine(line, bits, 64) for line in lines])
        parts.append(band.T if role == "keys" else band)
    expected = np.concatenate([*parts, x[140:]])
    np.testing.assert_allclose(read(form, rows, role), expected, atol=1e-5)


@pytest.mark.parametrize("role", ["keys", "values"])
def test_kvquant_keeps_outliers_and_takes_the_nearest_level(role: Role) -> None:
    form, rows = KvQuant(exact_first=0, outliers=0.05), rows_of(10, 80, 64)
    rows[3, 9] = 77.0
    stored = form.encode(rows, role)
    x = rows.double().numpy().T if role == "keys" else rows.double().numpy()
    back = form.decode(stored, 64, role).double().numpy()
    back = back.T if role == "keys" else back
    count = int(0.05 * x.shape[1] / 2)
    levels = stored.buffers["levels"].double().numpy()
    assert len(levels) == 8
    assert (np.diff(levels) > 0).all()
    for row, line in zip(x, back, strict=True):
        order = np.argsort(row, kind="stable")
        exact, rest = np.r_[order[:count], order[-count:]], order[count:-count]
        np.testing.assert_allclose(line[exact], row[exact], rtol=2**-10)  # 16 bits of the rest
        low, high = row[rest].min(), row[rest].max()
        middle, half = float(np.float16((low + high) / 2)), float(np.float16((high - low) / 2))
        nearest = np.abs(row[rest][:, None] - (levels * half + middle)).min(1)
        np.testing.assert_allclose(np.abs(line[rest] - row[rest]), nearest, atol=1e-4)


def test_fitted_levels_lose_less_than_even_ones() -> None:
    rows = torch.randn(600, 64, generator=torch.Generator().manual_seed(11)) ** 3
    even = np.stack([affine(line, 3, 600) for line in rows.double().numpy().T], 1)
    errors = [
        ((x - rows.double().numpy()) ** 2).mean() for x in (read(KvQuant(), rows, "keys"), even)
    ]
    assert errors[0] < 0.3 * errors[1]


def test_quanto_stores_as_integers_by_token_do() -> None:
    """Its formula: scale = (max - min) / (2^b - 1), code = round((x - min) / scale)."""
    rows = rows_of(12, 30, 128)
    groups = rows.double().numpy().reshape(-1, 64)
    low = np.float16(groups.min(1, keepdims=True)).astype(float)
    scale = np.float16((groups.max(1, keepdims=True) - low) / 15).astype(float)
    expected = np.clip(np.rint((groups - low) / scale), 0, 15) * scale + low
    found = read(Int4(keys_by="token"), rows, "keys").reshape(-1, 64)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("kind", [Hqq4, Hqq2])
def test_hqq_fits_the_offset_by_half_quadratic_splitting(kind: Any) -> None:
    form, rows = kind(), torch.randn(20, 64, generator=torch.Generator().manual_seed(13)) ** 3
    x = rows.double().numpy()
    most = 2**form.bits - 1
    scale = np.minimum(most / (x.max(1, keepdims=True) - x.min(1, keepdims=True)), 2e4)
    zero, kept = -x.min(1, keepdims=True) * scale, np.zeros((20, 1))
    for row, best in enumerate([np.inf] * 20):  # each stops by itself
        line, step, at = x[row], scale[row], zero[row]
        for _ in range(20):
            q = np.clip(np.rint(line * step + at), 0, most)
            rest = line - (q - at) / step
            if np.abs(rest).mean() >= best:
                break
            best, kept[row] = np.abs(rest).mean(), at
            size = np.abs(rest)
            shrunk = np.sign(rest) * np.maximum(size - np.maximum(size, 1e-8) ** -0.3 / 10, 0)
            at = (q - (line - shrunk) * step).mean()
    q = np.clip(np.rint(x * scale + kept), 0, most)
    expected = (q - np.float16(kept).astype(float)) * np.float16(1 / scale).astype(float)
    close = np.abs(read(form, rows, "keys") - expected) < 2e-3 * (1 + np.abs(expected))
    assert close.mean() > 0.99  # a code on the edge may go either way
    plain = np.clip(np.rint((x - x.min(1, keepdims=True)) * scale), 0, most) / scale
    plain = plain + x.min(1, keepdims=True)
    assert np.abs(expected - x).mean() < np.abs(plain - x).mean()


@pytest.mark.parametrize("kind", [Hqq4, Hqq2])
@pytest.mark.parametrize("constant", [0.0, 10.0, -300.0, 6e4])
def test_hqq_reads_a_constant_back_as_a_number_that_is_near(kind: Any, constant: float) -> None:
    rows = constant + 1e-4 * torch.arange(2.0)[:, None] * torch.arange(64.0)
    found = read(kind(), rows, "keys")
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, rows.numpy(), atol=1e-2 + 2e-3 * abs(constant))


@pytest.mark.parametrize("role", ["keys", "values"])
def test_qaq_gives_a_token_the_bits_that_its_range_needs(role: Role) -> None:
    form = Qaq(tau=0.3, fewest=2, most=6)
    x = rows_of(14, 60, 64).double().numpy() * np.logspace(-2, 1, 60)[:, None]
    rows = torch.tensor(x).bfloat16()
    stored = form.encode(rows, role)
    x, back = rows.double().numpy(), form.decode(stored, 64, role).double().numpy()
    keys = np.sqrt(12 / 300 * np.log(0.09 * 60**3 / 59 + 1))
    allowed = keys if role == "keys" else np.sqrt(12 / 60) * 0.3
    for token, row in enumerate(x):
        spread = float(np.float16(row.max() - row.min()))
        width = int(np.clip(np.ceil(np.log2(spread / (2 * allowed) + 1)), 2, 6))
        assert stored.buffers["widths"][token] == width
        step, mean = spread / 2**width, float(np.float16(row.mean()))
        low, high = -(2 ** (width - 1)), 2 ** (width - 1) - 1
        expected = np.clip(np.rint((row - mean) / step), low, high) * step + mean
        assert np.abs(back[token] - expected).max() <= step * 1.01
        assert np.abs(back[token] - expected).mean() <= 0.1 * step
    assert stored.nbytes < form.bound(60, 64, role)


def correlated(tokens: int, head_dim: int) -> Any:
    """Normal numbers most of whose variance lies in a few directions."""
    generator = torch.Generator().manual_seed(4)
    mix = torch.randn(head_dim, head_dim, generator=generator) * 0.8 ** torch.arange(head_dim)
    return torch.randn(tokens, head_dim, generator=generator) @ mix.T + 3


def test_a_fitted_rotation_comes_near_what_theory_allows() -> None:
    rows = correlated(4000, 32)
    form = Fitted(exact_first=0, mean_bits=2.0)
    x = rows.double().numpy()
    spread = np.linalg.eigvalsh(np.cov(x.T))
    # Reverse water-filling of 64 bits by hand: always to where one more lowers the error most.
    error = np.array([1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.00104])  # even steps
    width = np.zeros(32, int)
    for _ in range(64):
        gain = np.where(width < 6, spread * (error[width] - error[np.minimum(width + 1, 6)]), -1)
        width[gain.argmax()] += 1
    expected = float((spread * error[width]).sum() / 32)
    found = float(((read(form, rows, "keys") - x) ** 2).mean())
    assert 0.75 * expected < found < 1.1 * expected  # scales of tokens are fitted besides


def test_a_fitted_rotation_loses_less_than_a_fixed_one_at_fewer_bytes() -> None:
    rows = correlated(4000, 64)
    fitted, fixed = Fitted(mean_bits=1.875), TurboQuant2()
    assert fitted.bound(4000, 64, "keys") < fixed.bound(4000, 64, "keys")
    errors = [
        float(((read(form, rows, "keys") - rows.numpy()) ** 2).mean()) for form in (fitted, fixed)
    ]
    assert errors[0] < 0.3 * errors[1]
