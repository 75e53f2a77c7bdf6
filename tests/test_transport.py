"""Prompt caches on their way: the codec, the file and the controller."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from kvtune.common.errors import KvtuneError
from kvtune.runtime.transport import saved
from kvtune.runtime.transport.codec import LEVELS, Level, decode, encode, joined
from kvtune.runtime.transport.saved import load_cache_file, save_cache
from kvtune.runtime.transport.symbols import decode_symbols, encode_symbols, least_bytes
from kvtune.simulator.latency.transport import TEXT, Chunk, as_published, as_released, deliver

pytest.importorskip("constriction")

SHAPE = (6, 2, 57, 4)
MINE = "a" * 64
digest = saved._digest


def cache(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    loud = rng.exponential(size=(2, 6, 2, 1, 4))
    both = (rng.standard_normal((2, *SHAPE)) * loud).astype(np.float32)
    both[0, 1, :, 5] = 0  # a token of zeros has no scale
    return both[0], both[1]


def straight(tensor: np.ndarray, bins: list[int]) -> np.ndarray:
    """The released code's quantiser in float64, token by token."""
    found = np.zeros(tensor.shape)
    for layer, token in np.ndindex(tensor.shape[0], tensor.shape[2]):
        x = tensor[layer, :, token].astype(np.float64)
        half, most = bins[layer] // 2 - 1, float(np.float16(np.abs(x).max()))
        if most:
            found[layer, :, token] = np.clip(np.round(x / most * half), -half, half) / half * most
    return found


def test_what_is_read_back_is_what_the_quantiser_leaves() -> None:
    keys, values = cache()
    read = decode(encode(keys, values, LEVELS[2]))
    np.testing.assert_allclose(read[0], straight(keys, [16, 16, 16, 16, 12, 12]), atol=2e-6)
    np.testing.assert_allclose(read[1], straight(values, [16, 16, 12, 12, 12, 12]), atol=2e-6)


@pytest.mark.parametrize("anchors", [1, 10, 100])
def test_differences_are_from_the_anchor_as_it_is_read_back(anchors: int) -> None:
    keys, values = cache(1)
    level = replace(LEVELS[0], anchors=anchors)
    read, _ = decode(encode(keys, values, level))
    at = np.arange(57) // anchors * anchors
    coarse = straight(keys[:, :, ::anchors], [256] * 6)[:, :, at // anchors]
    step = np.abs(keys - coarse).max((1, 3), keepdims=True) / 15
    others = np.arange(57) % anchors != 0
    assert (np.abs(read - keys)[:, :, others] <= (0.51 * step)[:, :, others] + 1e-6).all()
    np.testing.assert_allclose(read[:, :, ~others], coarse[:, :, ~others], atol=2e-6)


def test_bytes_are_near_the_entropy_of_the_symbols() -> None:
    rng = np.random.default_rng(2)
    keys, values = rng.standard_normal((2, 1, 1, 4000, 8)).astype(np.float32)
    encoded = encode(keys, values, Level("plain", (32, 32, 32), (32, 32)))
    bits = 0.0
    for x in (keys[0, 0], values[0, 0]):
        most = np.abs(x).max(1, keepdims=True).astype(np.float16).astype(np.float32)
        symbols = np.rint(x / most * 15).astype(int)
        for channel in symbols.T:
            share = np.unique(channel, return_counts=True)[1] / 4000
            bits -= 4000 * float((share * np.log2(share)).sum())
    words = sum(x.nbytes for name, x in encoded.buffers.items() if name.endswith("words"))
    assert bits < 8 * words < 1.02 * bits
    assert encoded.nbytes == sum(x.nbytes for x in encoded.buffers.values()) > words
    assert encoded.bits_an_element == pytest.approx(8 * encoded.nbytes / 64000)


def test_coarser_levels_take_fewer_bytes_and_chunks_join() -> None:
    keys, values = cache(3)
    sizes = [encode(keys, values, level).nbytes for level in LEVELS]
    assert sizes == sorted(sizes, reverse=True)
    parts = [(x[:, :, :20], y[:, :, :20]) for x, y in [(keys, values)]]
    parts.append((keys[:, :, 20:], values[:, :, 20:]))
    assert np.array_equal(joined(parts)[0], keys)


def test_an_ideal_coder_is_a_bound_for_the_real_one() -> None:
    drawn = np.random.default_rng(4).normal(15, 2, (4000, 8))
    symbols = np.rint(drawn).clip(0, 30).astype(np.int32)
    coded = encode_symbols(symbols, 31)
    least, real = least_bytes(symbols, 31), sum(x.nbytes for x in coded.values())
    assert least <= real < 1.02 * least
    assert np.array_equal(decode_symbols(coded, 4000, 8, 31), symbols)


def test_a_saved_cache_is_read_by_its_own_model_only(tmp_path: Path) -> None:
    path, encoded = tmp_path / "prompt.safetensors", encode(*cache(), LEVELS[1])
    save_cache(path, encoded, token_ids=range(57), model_fingerprint=MINE)
    read, ids = load_cache_file(path, model_fingerprint=MINE)
    assert ids == tuple(range(57))
    assert (read.level, read.shape) == (LEVELS[1], SHAPE)
    assert np.array_equal(decode(read)[0], decode(encoded)[0])
    with pytest.raises(KvtuneError, match="not of bbbb"):
        load_cache_file(path, model_fingerprint="b" * 64)


def test_damage_is_told(tmp_path: Path) -> None:
    path, encoded = tmp_path / "prompt.safetensors", encode(*cache(), LEVELS[1])
    save_cache(path, encoded, token_ids=range(57), model_fingerprint=MINE)
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.raises(KvtuneError, match="its hash differs"):
        load_cache_file(path, model_fingerprint=MINE)
    path.write_bytes(data[:100])
    with pytest.raises(KvtuneError, match="cannot be read"):
        load_cache_file(path, model_fingerprint=MINE)
    save_file(dict(encoded.buffers), path)
    with pytest.raises(KvtuneError, match=r"Field required|format"):
        load_cache_file(path, model_fingerprint=MINE)


def test_a_file_of_the_first_format_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, encoded = tmp_path / "prompt.safetensors", encode(*cache(), LEVELS[1])
    monkeypatch.setattr(saved, "FORMAT", 1)
    save_cache(path, encoded, token_ids=range(57), model_fingerprint=MINE)
    with pytest.raises(KvtuneError, match="format"):
        load_cache_file(path, model_fingerprint=MINE)


def test_a_changed_shape_or_level_is_damage(tmp_path: Path) -> None:
    path, encoded = tmp_path / "prompt.safetensors", encode(*cache(), LEVELS[1])
    for changed in (
        replace(encoded, shape=(6, 2, 57, 8)),
        replace(encoded, level=replace(LEVELS[1], key_bins=(32, 16, 32))),
    ):
        with pytest.MonkeyPatch.context() as patch:  # the file says so, its hash is of the truth
            patch.setattr(saved, "_digest", lambda _, ids: digest(encoded, ids))
            save_cache(path, changed, token_ids=range(57), model_fingerprint=MINE)
        with pytest.raises(KvtuneError, match="its hash differs"):
            load_cache_file(path, model_fingerprint=MINE)


def test_what_cannot_be_saved_or_found_is_refused(tmp_path: Path) -> None:
    encoded = encode(*cache(), LEVELS[1])
    with pytest.raises(KvtuneError, match="56 tokens, but a cache of 57"):
        save_cache(tmp_path / "a", encoded, token_ids=range(56), model_fingerprint=MINE)
    with pytest.raises(KvtuneError, match="no such file"):
        load_cache_file(tmp_path / "a", model_fingerprint=MINE)
    with pytest.raises(KvtuneError, match="a level of 2 bins"):
        Level("none", (2, 4, 4), (4, 4))


CHUNKS = [Chunk({"fine": 400, "coarse": 100}, 4, recompute_s=2.0, decode_s=0.1)] * 3


def test_the_published_rule_adapts_to_the_bandwidth_last_seen() -> None:
    quick = deliver(CHUNKS, [400.0] * 3, 4.0, as_published)
    assert quick.choices == ("fine", "fine", TEXT)  # what is left can then be recomputed in time
    slow = deliver(CHUNKS, [400.0, 100.0, 100.0], 4.0, as_published)
    assert slow.choices == ("fine", "fine", "coarse")  # the drop is seen one chunk late
    assert slow.ready_s == pytest.approx(1 + 4 + 1 + 0.1)
    assert not slow.within
    hopeless = deliver(CHUNKS, [10.0] * 3, 1.0, as_published)
    assert hopeless.choices == ("coarse",) * 3
    assert hopeless.sent_bytes == 300


def test_the_released_rule_gives_every_chunk_its_share() -> None:
    found = deliver(CHUNKS, [400.0, 90.0, 50.0], 3.6, as_released)
    assert found.choices == ("fine", "coarse", TEXT)
    assert found.sent_bytes == 504
    arrived = 400 / 400 + 100 / 90 + 4 / 50
    assert found.ready_s == pytest.approx(max(arrived, 1 + 100 / 90 + 0.1) + 2.0)


def test_decoding_overlaps_the_next_transfer() -> None:
    chunks = [Chunk({"only": 100}, 1, recompute_s=9.0, decode_s=0.9)] * 4
    assert deliver(chunks, [100.0] * 4, 8.0, as_released).ready_s == pytest.approx(4.9)
