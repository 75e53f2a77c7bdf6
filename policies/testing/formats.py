"""What every format must hold to: bytes, shapes, errors, and nothing read from padding."""

# ruff: noqa: S101
from __future__ import annotations

from collections.abc import Callable

import torch

from kvtune.policies.format import Format, Role
from kvtune.policies.packed import BUFFERS
from kvtune.policies.testing.cases import uniform

TOKENS = (0, 1, 2, 7, 31, 64, 65, 130)


def footprint_grows_with_tokens(form: Format, role: Role) -> None:
    """Nothing for nothing, never less for more."""
    sizes = [form.bound(tokens, 64, role) for tokens in range(140)]
    assert sizes[0] == 0
    assert all(isinstance(size, int) for size in sizes)
    assert sizes == sorted(sizes)


def codes_take_the_bits_that_it_states(form: Format, role: Role) -> None:
    """So many bits an element at least; scales come on top."""
    assert 8 * form.bound(4096, 64, role) >= form.bits * 4096 * 64
    assert type(form.bits) is int


def roundtrip_keeps_shape_and_stays_close(form: Format, role: Role) -> None:
    """Same shape and dtype, finite; no token's error above a quarter of the range, in the mean.

    In the mean over channels, since a rotation spreads one channel's error over all of them.
    """
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in TOKENS:
            tensor = uniform(tokens, 3, tokens, 64).to(dtype)
            stored = form.roundtrip(tensor, torch.full((3,), tokens), role)
            assert stored.shape == tensor.shape
            assert stored.dtype == dtype
            assert stored.isfinite().all()
            assert ((stored - tensor).square().mean(-1).sqrt() <= 1.0).all()


def padding_never_matters(form: Format, role: Role) -> None:
    """What lies beyond the counts changes nothing, whatever it holds."""
    counts = torch.tensor([0, 1, 33, 70])
    tensor = uniform(5, 4, 70, 32)
    real = torch.arange(70) < counts[:, None]
    clean = form.roundtrip(tensor, counts, role)[real]
    for junk in (float("nan"), float("inf"), 1e30):
        spoilt = tensor.masked_fill(~real[..., None], junk)
        assert torch.equal(form.roundtrip(spoilt, counts, role)[real], clean)
    for row, count in enumerate(counts.tolist()):
        alone = form.roundtrip(tensor[row : row + 1, :count], counts[row : row + 1], role)
        assert torch.equal(alone, form.roundtrip(tensor, counts, role)[row : row + 1, :count])


def constant_tensors_come_back(form: Format, role: Role) -> None:
    """Zeros stay zeros; what is constant comes back where the format says so."""
    for value in (0.0, 1.5, -(2.0**-20)) if form.keeps_constants else ():
        tensor = torch.full((2, 37, 48), value)
        stored = form.roundtrip(tensor, torch.tensor([37, 20]), role)[1, :20]
        torch.testing.assert_close(stored, tensor[1, :20], rtol=2**-4, atol=1e-7)
    assert (form.roundtrip(torch.zeros(1, 8, 32), torch.tensor([8]), role) == 0).all()


def storing_twice_changes_little(form: Format, role: Role) -> None:
    """Storing what was read back adds only rounding of scales."""
    if not form.projects:
        return
    tensor, counts = uniform(3, 2, 50, 32), torch.tensor([50, 41])
    once = form.roundtrip(tensor, counts, role)
    twice = form.roundtrip(once, counts, role)
    real = torch.arange(50) < counts[:, None]
    torch.testing.assert_close(twice[real], once[real], rtol=2**-6, atol=2**-6)


def packed_buffers_are_what_was_planned(form: Format, role: Role) -> None:
    """``encode`` takes the bytes of ``bound``, and ``decode`` gives what ``roundtrip`` does."""
    for tokens in TOKENS:
        tensor = uniform(tokens + 9, tokens, 48).to(torch.bfloat16)
        stored = form.encode(tensor, role)
        bound = form.bound(tokens, 48, role)
        assert stored.nbytes <= bound if form.bytes_vary else stored.nbytes == bound
        back = form.decode(stored, 48, role)
        again = form.roundtrip(tensor[None].float(), torch.tensor([tokens]), role)[0]
        torch.testing.assert_close(back, again.float(), rtol=2**-7, atol=2**-7)


def sections_are_whole_and_of_its_own_buffers(form: Format, role: Role) -> None:
    """What a kernel reads in place: every token once, in order, out of buffers that there are."""
    for tokens in TOKENS:
        sections = form.packed(tokens, 64, role)
        if sections is None:
            continue
        buffers = form.encode(uniform(tokens, tokens, 64).to(torch.bfloat16), role).buffers
        assert [each.start for each in sections] == [0, *(each.stop for each in sections)][:-1]
        assert [each.stop for each in sections][-1:] == ([tokens] if tokens else [])
        for each in sections:
            assert {*each.buffers} <= {*BUFFERS}
            assert {*each.buffers.values()} <= {*buffers}
            assert each.start < each.stop


FormatCheck = Callable[[Format, Role], None]
FORMAT_CHECKS: tuple[FormatCheck, ...] = (
    footprint_grows_with_tokens,
    codes_take_the_bits_that_it_states,
    roundtrip_keeps_shape_and_stays_close,
    padding_never_matters,
    constant_tensors_come_back,
    storing_twice_changes_little,
    packed_buffers_are_what_was_planned,
    sections_are_whole_and_of_its_own_buffers,
)
