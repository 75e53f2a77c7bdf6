"""More bits for the channels, or the directions of a rotation fitted to a head, that vary more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.format import Role
from kvtune.policies.formats.coded import Coded
from kvtune.policies.formats.normal_codes import WIDEST, distortion, nearest_codes, numbers_of
from kvtune.policies.formats.packing import pack, unpack
from kvtune.policies.registry import LONGEST_PROMPT, parameter

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST = 127  # of the basis, in 8 bits
_FITS = 3  # rounds of codes and scales
_STEPS, _EVEN = 32, 128  # of a token's scale: 32 to a factor of two, and the one that stands for 1


@dataclass(frozen=True)
class Allocated(Coded):
    """Each channel with as many bits as lower the error most, and a scale a token.

    z = x - m, m = the mean of the head's keys or values, s_c = the scale of channel c,
    t = the token's, in 8 bits
    of all bits of all channels, the D * ``mean_bits`` that lower the summed error most are given;
    codes = nearest of Lloyd and Max's levels of z_c / (s_c t) with b_c bits, maybe none

    The first tokens, the sinks, stay exact: their keys would take bits of all others. Where a
    channel's errors matter by how it is read, scale it so first (``weighted_keys``). Mean, scale
    and bits of each channel are stored with the prompt and counted.

    Source: the allocation is Huang and Schultheiss, "Block Quantization of Correlated Gaussian
    Random Variables", IEEE Trans. Communications, 1963.
    """

    name = "allocated"
    source = "Huang and Schultheiss, IEEE Trans. Communications 1963"
    bits = 1  # at least; ``mean_bits`` in the mean
    projects = False
    keeps_constants = False

    exact_first: int = parameter(
        4, "first kept tokens left in 16 bits", unit="tokens", low=0, high=LONGEST_PROMPT
    )
    mean_bits: float = parameter(2.0, "of codes, over all channels", unit="bits", low=1, high=4)

    @property
    def label(self) -> str:
        """``allocated2+4``: mean bits, and four tokens exact."""
        return f"{self.name}{self.mean_bits:g}+{self.exact_first}"

    def _code_bits(self, head_dim: int) -> int:
        return int(self.mean_bits * head_dim)

    def code_bytes(self, tokens: int, head_dim: int, role: Role) -> int:
        """Codes, a byte a token; mean, scale and bits a channel."""
        codes = -(-tokens * self._code_bits(head_dim) // 8)
        return codes + tokens + head_dim * (2 + 2 + 1)

    def codes(self, rows: Tensor, role: Role) -> Mapping[str, Tensor]:
        """The codes of these rows about their mean."""
        mean = rows.mean(0).half()
        return {"mean": mean, **self._coded_directions(rows - mean.float())}

    def numbers(self, buffers: Mapping[str, Tensor], shape: tuple[int, int], role: Role) -> Tensor:
        """Levels times scales, plus the mean."""
        return self._directions(buffers, shape) + buffers["mean"].float()

    def roundtrip(self, tensor: Tensor, counts: Tensor, role: Role) -> Tensor:
        """All heads at once."""
        import torch

        first = self.exact_first
        exact, coded = tensor[..., :first, :], tensor[..., first:, :].float()
        if not coded.numel():
            return tensor.clone()
        at = torch.arange(coded.shape[-2], device=tensor.device)
        real = (at < counts[..., None] - first)[..., None]
        coded = coded.where(real, 0)
        count = real.sum(-2, keepdim=True).clamp_min(1)
        mean = (coded.sum(-2, keepdim=True) / count).half().float()
        stored = self._read_back((coded - mean).where(real, 0), real) + mean
        return torch.cat([exact, stored.to(tensor.dtype)], -2)

    def _read_back(self, z: Tensor, real: Tensor) -> Tensor:
        """What ``_directions`` gives of ``_coded_directions`` of many heads, ``[..., n, D]``."""
        codes, scales, widths, tokens = _quantised(z, real, self._code_bits(z.shape[-1]))
        return _levels(codes, widths) * scales.float() * _scale_of(tokens)

    def _coded_directions(self, z: Tensor) -> dict[str, Tensor]:
        """Codes and scales of ``[n, D]`` without a mean."""
        import torch

        real = torch.ones(len(z), 1, dtype=torch.bool, device=z.device)
        codes, scales, widths, tokens = _quantised(z, real, self._code_bits(z.shape[1]))
        place = torch.arange(WIDEST, device=z.device)
        flags = ((codes[..., None] >> place) & 1)[:, place < widths[0, :, None]]
        return {
            "codes": pack(flags.flatten(), 1), "scales": scales[0],
            "widths": widths[0].to(torch.uint8), "tokens": tokens[:, 0],
        }  # fmt: skip

    def _directions(self, buffers: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """What ``_coded_directions`` stored."""
        import torch

        tokens, head_dim = shape
        widths = buffers["widths"].long()
        place = torch.arange(WIDEST, device=widths.device)
        flags = torch.zeros(*shape, WIDEST, dtype=torch.long, device=widths.device)
        count = tokens * self._code_bits(head_dim)
        flags[:, place < widths[:, None]] = unpack(buffers["codes"], 1, count).view(tokens, -1)
        levels = _levels((flags << place).sum(-1), widths[None]) * buffers["scales"].float()
        return levels * _scale_of(buffers["tokens"][:, None])


@dataclass(frozen=True)
class Fitted(Allocated):
    """As ``allocated``, along the head's own principal directions instead of its channels.

    B = eigenvectors of the covariance of the head's keys or values; z = (x - m) in the basis B

    Keys and values have a basis each, stored in 8 bits and counted, which costs 8 D / n bits an
    element; for short prompts other formats are smaller.

    Source: as ``allocated``. Systems with a rotation fitted to each head and about 2.3 bits
    (OSCAR, arXiv 2605.17757) fit it beforehand, to other text.
    """

    name = "fitted"

    mean_bits: float = parameter(1.8, "of codes, over all directions", unit="bits", low=1, high=4)

    def code_bytes(self, tokens: int, head_dim: int, role: Role) -> int:
        """As without the basis, and the basis with its scales."""
        return super().code_bytes(tokens, head_dim, role) + head_dim * (head_dim + 2)

    def roundtrip(self, tensor: Tensor, counts: Tensor, role: Role) -> Tensor:
        """Head by head: each has a basis of its own."""
        return Coded.roundtrip(self, tensor, counts, role)

    def codes(self, rows: Tensor, role: Role) -> Mapping[str, Tensor]:
        """The rotation fitted to these rows, and their codes."""
        import torch

        mean = rows.mean(0).half()
        centred = rows - mean.float()
        covariance = centred.double().T @ centred.double()
        basis = torch.linalg.eigh(covariance).eigenvectors.flip(-1).float()
        column = (basis.abs().amax(0) / _LARGEST).half()
        whole = (basis / column.float()).round().clamp(-_LARGEST, _LARGEST)
        z = torch.linalg.solve(whole * column.float(), centred.T).T  # in the basis as it is stored
        beside = {"mean": mean, "basis": whole.to(torch.int8), "columns": column}
        return beside | self._coded_directions(z)

    def numbers(self, buffers: Mapping[str, Tensor], shape: tuple[int, int], role: Role) -> Tensor:
        """Levels times scales in the stored basis, plus the mean."""
        basis = buffers["basis"].float() * buffers["columns"].float()
        return self._directions(buffers, shape) @ basis.T + buffers["mean"].float()


def _quantised(z: Tensor, real: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, and scales, widths and token scales as they are stored, of directions without a mean.

    Args:
        z: ``[..., n, D]``, zeros where a token is not real.
        real: ``[..., n, 1]``.
        bits: of a token, over all directions.

    Returns:
        ``[..., n, D]``, ``[..., 1, D]`` in 16 bits, ``[..., 1, D]``, ``[..., n, 1]`` in 8 bits.
    """
    count = real.sum(-2, keepdim=True).clamp_min(1)
    variances = z.square().sum(-2, keepdim=True) / count
    widths = _widths(variances, bits)
    tokens = _token_scales(z, variances, widths)
    codes, scales = _fitted((z / _scale_of(tokens)).where(real, 0), real, widths)
    return codes, scales, widths, tokens


def _token_scales(z: Tensor, variances: Tensor, widths: Tensor) -> Tensor:
    """How much longer than others each token is, as logarithms in 8 bits; of what is coded, in
    units of each direction."""
    import torch

    coded = widths > 0
    spread = (z.square() / variances.clamp_min(1e-30)).where(coded, 0)
    size = spread.sum(-1, keepdim=True) / coded.sum(-1, keepdim=True).clamp_min(1)
    return (size.clamp_min(1e-30).log2() * _STEPS / 2 + _EVEN).round().clamp(0, 255).to(torch.uint8)


def _scale_of(tokens: Tensor) -> Tensor:
    """What multiplies a token's directions, from their logarithms."""
    return ((tokens.float() - _EVEN) / _STEPS).exp2()


def _widths(variances: Tensor, bits: int) -> Tensor:
    """Bits of each direction, ``bits`` in all of ``[..., 1, D]``: the gains of a direction's bits
    fall, so that the largest of all are some first bits of each."""
    import torch

    gains = [distortion(width) - distortion(width + 1) for width in range(WIDEST)]
    gain = variances[..., None] * torch.tensor(gains, device=variances.device)
    order = gain.flatten(-2).argsort(dim=-1, descending=True, stable=True)
    # Of directions without spread every gain is nothing: first bits come first there too.
    given = torch.zeros_like(order)
    given.scatter_(-1, order[..., :bits], 1)
    return given.view(gain.shape).sum(-1)


def _fitted(z: Tensor, real: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, and scales ``[..., 1, D]`` in 16 bits, fitted to each other in turns."""
    import torch

    count = real.sum(-2, keepdim=True).clamp_min(1)
    scales = (z.square().sum(-2, keepdim=True) / count).sqrt()
    codes = torch.zeros_like(z, dtype=torch.long)
    for _ in range(_FITS):
        scales = scales.half().float()
        unit = z / torch.where(scales > 0, scales, 1.0)
        codes = torch.zeros_like(codes)
        for width in range(1, WIDEST + 1):
            codes = torch.where(widths == width, nearest_codes(unit, width), codes)
        level = _levels(codes, widths).where(real, 0)
        power = level.square().sum(-2, keepdim=True)
        best = (z * level).sum(-2, keepdim=True) / power.clamp_min(1e-30)
        before, scales = scales, torch.where(power > 0, best.clamp_min(0), scales)
    return codes, before.half()


def _levels(codes: Tensor, widths: Tensor) -> Tensor:
    import torch

    found = torch.zeros(codes.shape, device=codes.device)
    for width in range(1, WIDEST + 1):
        mine = widths == width
        found = torch.where(mine, numbers_of(codes.where(mine, 0), width), found)
    return found
