"""Rotated formats against a straight-line oracle: the matrix written out, one group at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvtune.policies.format import Role, formats
from kvtune.policies.formats.grouped import Int2
from kvtune.policies.formats.hadamard import block_of, hadamard
from kvtune.policies.formats.rotated import Rotated, RotatedInt2, RotatedInt4
from kvtune.policies.testing.cases import uniform

ROTATED = [kind for kind in formats().values() if issubclass(kind, Rotated)]
Numbers = NDArray[np.float64]


def matrix(size: int) -> Numbers:
    """Sylvester's: the sign is the parity of the bits that row and column share."""
    signs = [
        [(-1.0) ** bin(row & column).count("1") for column in range(size)] for row in range(size)
    ]
    whole: Numbers = np.array(signs) / np.sqrt(size)
    return whole


def stored_group(group: Numbers, bits: int, clip: float) -> Numbers:
    middle, half = (group.max() + group.min()) / 2, clip * (group.max() - group.min()) / 2
    low = float(np.float16(middle - half))
    scale = float(np.float16((middle + half - low) / (2**bits - 1))) or 1.0
    codes = np.clip(np.rint((group - low) / scale), 0, 2**bits - 1)
    return codes * scale + low


def oracle(form: Rotated, rows: Numbers, role: Role) -> Numbers:
    turned = rows @ matrix(rows.shape[1])
    by_channel = role == "keys" and form.keys_by == "channel"
    lines = turned.T if by_channel else turned
    stored = np.stack(
        [
            np.concatenate(
                [
                    stored_group(line[at : at + form.group], form.bits, form.clip)
                    for at in range(0, len(line), form.group)
                ]
            )
            for line in lines
        ]
    )
    return (stored.T if by_channel else stored) @ matrix(rows.shape[1])


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_the_fast_transform_is_the_matrix(size: int) -> None:
    rows = uniform(1, 5, size).double()
    np.testing.assert_allclose(hadamard(rows).numpy(), rows.numpy() @ matrix(size), atol=1e-12)


@pytest.mark.parametrize("head_dim", [48, 80, 96, 7])
def test_other_widths_rotate_block_by_block(head_dim: int) -> None:
    block, rows = block_of(head_dim), uniform(2, 3, head_dim).double()
    whole = np.kron(np.eye(head_dim // block), matrix(block))
    np.testing.assert_allclose(hadamard(rows).numpy(), rows.numpy() @ whole, atol=1e-12)
    torch.testing.assert_close(hadamard(hadamard(rows)), rows)


@pytest.mark.parametrize("keys_by", ["token", "channel"])
@pytest.mark.parametrize("role", ["keys", "values"])
@pytest.mark.parametrize("kind", ROTATED)
def test_stored_numbers_are_the_oracles(kind: type[Rotated], role: Role, keys_by: Any) -> None:
    form = kind(exact_first=3, group=16, keys_by=keys_by)
    rows = uniform(4, 45, 32)
    back = form.decode(form.encode(rows.bfloat16(), role), 32, role).double().numpy()
    exact = rows.bfloat16().double().numpy()
    np.testing.assert_array_equal(back[:3], exact[:3])
    theirs = oracle(form, exact[3:], role)
    step = float(np.abs(exact @ matrix(32)).max()) * 2 / (2**form.bits - 1)
    assert np.abs(back[3:] - theirs).max() <= 1e-5 + step  # a tie may round either way
    assert np.abs(back[3:] - theirs).mean() <= 1e-2 * step  # and few do


def test_a_query_and_a_key_may_both_be_rotated_instead() -> None:
    q, k = uniform(5, 2, 64).double()
    torch.testing.assert_close(hadamard(q) @ hadamard(k), q @ k)


def test_an_outlying_channel_costs_a_rotated_token_less() -> None:
    rows = uniform(6, 1, 200, 64)
    rows[..., 11] *= 40
    counts = torch.tensor([200])
    plain = Int2(keys_by="token").roundtrip(rows, counts, "keys")
    turned = RotatedInt2().roundtrip(rows, counts, "keys")
    assert (turned - rows).square().mean() < 0.5 * (plain - rows).square().mean()


def test_a_rotation_takes_no_bytes() -> None:
    for tokens in (0, 1, 64, 200):
        plain = Int2(keys_by="token").bound(tokens, 128, "keys")
        assert RotatedInt2().bound(tokens, 128, "keys") == plain


def test_labels_tell_what_is_stored() -> None:
    assert RotatedInt4().label == "rotated_int4"
    assert RotatedInt4(exact_first=4, keys_by="channel").label == "rotated_int4-channel+4"
