"""A rotation fitted to each head, and more bits for the directions that vary more."""

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
class Fitted(Coded):
    """The head's own principal directions, each with as many bits as lower the error most.

    B = eigenvectors of the covariance of the head's keys or values, m = their mean
    z = (x - m) in the basis B, s_c = the scale of direction c, t = the token's, in 8 bits
    of all bits of all directions, the D * ``mean_bits`` that lower the summed error most are
    given; codes = nearest of Lloyd and Max's levels of z_c / (s_c t) with b_c bits, maybe none

    The first tokens, the sinks, stay exact: their keys would take a direction each. Keys and
    values have a basis each. All of it is stored with the prompt and counted: the basis in
    8 bits, which costs 8 D / n bits an element; for short prompts other formats are smaller.

    Source: the allocation is Huang and Schultheiss, "Block Quantization of Correlated Gaussian
    Random Variables", IEEE Trans. Communications, 1963. Systems with a rotation fitted to each head
    and about 2.3 bits (OSCAR, arXiv 2605.17757) fit it beforehand, to other text.
    """

    name = "fitted"
    source = "Huang and Schultheiss, IEEE Trans. Communications 1963"
    bits = 1  # at least; ``mean_bits`` in the mean
    projects = False
    keeps_constants = False

    exact_first: int = parameter(
        4, "first kept tokens left in 16 bits", unit="tokens", low=0, high=LONGEST_PROMPT
    )
    mean_bits: float = parameter(1.8, "of codes, over all directions", unit="bits", low=1, high=4)

    def _code_bits(self, head_dim: int) -> int:
        return int(self.mean_bits * head_dim)

    def code_bytes(self, tokens: int, head_dim: int, role: Role) -> int:
        """Codes, a byte a token, the basis with its scales; mean, scale and bits a direction."""
        codes = -(-tokens * self._code_bits(head_dim) // 8)
        return codes + tokens + head_dim * (head_dim + 2 + 2 + 2 + 1)

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
        widths = _widths(z.square().mean(0), self._code_bits(rows.shape[1]))
        tokens = _token_scales(z, widths)
        codes, scales = _fitted(z / _scale_of(tokens), widths)
        place = torch.arange(WIDEST, device=rows.device)
        flags = ((codes[..., None] >> place) & 1)[:, place < widths[:, None]]
        return {
            "codes": pack(flags.flatten(), 1), "mean": mean, "basis": whole.to(torch.int8),
            "columns": column, "scales": scales, "widths": widths.to(torch.uint8),
            "tokens": tokens,
        }  # fmt: skip

    def numbers(self, buffers: Mapping[str, Tensor], shape: tuple[int, int], role: Role) -> Tensor:
        """Levels times scales in the stored basis, plus the mean."""
        import torch

        tokens, head_dim = shape
        widths = buffers["widths"].long()
        place = torch.arange(WIDEST, device=widths.device)
        flags = torch.zeros(*shape, WIDEST, dtype=torch.long, device=widths.device)
        count = tokens * self._code_bits(head_dim)
        flags[:, place < widths[:, None]] = unpack(buffers["codes"], 1, count).view(tokens, -1)
        z = _levels((flags << place).sum(-1), widths) * buffers["scales"].float()
        z = z * _scale_of(buffers["tokens"])
        basis = buffers["basis"].float() * buffers["columns"].float()
        return z @ basis.T + buffers["mean"].float()


def _token_scales(z: Tensor, widths: Tensor) -> Tensor:
    """How much longer than others each token is ``[n]``, as logarithms in 8 bits; of what is coded,
    in units of each direction."""
    import torch

    coded = z[:, widths > 0]
    spread = coded.square().mean(0).clamp_min(1e-30)
    size = (coded.square() / spread).mean(1).sqrt().clamp_min(1e-30)
    return (size.log2() * _STEPS + _EVEN).round().clamp(0, 255).to(torch.uint8)


def _scale_of(tokens: Tensor) -> Tensor:
    """``[n, 1]`` from their logarithms."""
    return ((tokens.float() - _EVEN) / _STEPS).exp2()[:, None]


def _widths(variances: Tensor, bits: int) -> Tensor:
    """Bits of each direction, ``bits`` in all: the gains of a direction's bits fall, so that the
    largest of all are some first bits of each."""
    import torch

    gains = [distortion(width) - distortion(width + 1) for width in range(WIDEST)]
    gain = variances[:, None] * torch.tensor(gains, device=variances.device)
    order = gain.flatten().argsort(descending=True, stable=True)
    # Of directions without spread every gain is nothing: first bits come first there too.
    given = torch.zeros_like(gain.flatten(), dtype=torch.long)
    given[order[:bits]] = 1
    return given.view_as(gain).sum(-1)


def _fitted(z: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[n, D]`` and scales ``[D]`` in 16 bits, fitted to each other in turns."""
    import torch

    scales = z.square().mean(0).sqrt()
    codes = torch.zeros_like(z, dtype=torch.long)
    for _ in range(_FITS):
        scales = scales.half().float()
        unit = z / torch.where(scales > 0, scales, 1.0)
        for width in widths.unique().tolist():
            mine = widths == width
            codes[:, mine] = nearest_codes(unit[:, mine], width)
        level = _levels(codes, widths)
        power = level.square().sum(0)
        best = (z * level).sum(0) / power.clamp_min(1e-30)
        before, scales = scales, torch.where(power > 0, best.clamp_min(0), scales)
    return codes, before.half()


def _levels(codes: Tensor, widths: Tensor) -> Tensor:
    import torch

    found = torch.zeros(codes.shape, device=codes.device)
    for width in widths.unique().tolist():
        mine = widths == width
        found[:, mine] = numbers_of(codes[:, mine], width)
    return found
