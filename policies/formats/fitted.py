"""More bits for the channels, or the directions of a rotation fitted to a head, that vary more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvtune.policies.format import Role
from kvtune.policies.formats.coded import Coded
from kvtune.policies.formats.hadamard import hadamard
from kvtune.policies.formats.normal_codes import EVEN
from kvtune.policies.formats.packing import pack, unpack
from kvtune.policies.registry import LONGEST_PROMPT, parameter

if TYPE_CHECKING:
    from torch import Tensor

WIDEST = len(EVEN) - 1
"""Most bits of a direction."""

_LARGEST = 127  # of the basis, in 8 bits
_FITS = 3  # rounds of codes, and of scales
_STEPS, _EVEN = 32, 128  # of a token's scale: 32 to a factor of two, and the one that stands for 1


@dataclass(frozen=True)
class Allocated(Coded):
    """Each channel with as many bits as lower the error most, and a scale a token.

    z = x - m, m = the mean of the head's keys or values, s_c = the step of channel c,
    t = the token's scale, in 8 bits
    of all bits of all channels, the D * ``mean_bits`` that lower the summed error most are given;
    code = the nearest of 2^b_c even steps about nothing: z_c = t s_c (code - (2^b_c - 1) / 2)

    Even steps make every bit a sign: z_c is the sum of t s_c 2^p / 2, added or subtracted as bit p
    says. A token is thus a row of D * ``mean_bits`` signs, whatever bits its channels have, and a
    reader multiplies signs by its query, and weights by signs, channel by channel only at the ends.
    ``directions="hadamard"`` rotates first, which suits values: their outliers are in no channels.

    The first tokens, the sinks, stay exact: their keys would take bits of all others. Where a
    channel's errors matter by how it is read, scale it so first (``weighted_keys``). Mean, step
    and bits of each channel are stored with the prompt and counted; a token's signs fill bytes.

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
    directions: Literal["channels", "hadamard"] = parameter(
        "channels", "what bits are divided among: channels, or those of a Hadamard rotation"
    )

    @property
    def label(self) -> str:
        """``allocated2+4``: mean bits, and four tokens exact; ``allocated2-hadamard+4`` rotated."""
        rotated = "" if self.directions == "channels" else f"-{self.directions}"
        return f"{self.name}{self.mean_bits:g}{rotated}+{self.exact_first}"

    @property
    def code_bits(self) -> float:
        """Mean bits of a code, as asked for."""
        return self.mean_bits

    def signs(self, head_dim: int) -> int:
        """Bits of a token, over all directions: whole bytes, one at least."""
        return 8 * max(round(self.mean_bits * head_dim / 8), 1)

    def code_bytes(self, tokens: int, head_dim: int, role: Role) -> int:
        """Signs, a byte a token; mean, step and bits a channel."""
        return tokens * (self.signs(head_dim) // 8 + 1) + head_dim * (2 + 2 + 1)

    def turned(self, rows: Tensor) -> Tensor:
        """Rows ``[..., D]`` in the directions that have codes, or back: it is its own inverse."""
        return hadamard(rows) if self.directions == "hadamard" else rows

    def codes(self, rows: Tensor, role: Role) -> Mapping[str, Tensor]:
        """The codes of these rows about their mean."""
        rows = self.turned(rows)
        mean = rows.mean(0).half()
        return {"mean": mean, **self._coded_directions(rows - mean.float())}

    def numbers(self, buffers: Mapping[str, Tensor], shape: tuple[int, int], role: Role) -> Tensor:
        """Codes times steps, plus the mean."""
        return self.turned(self._directions(buffers, shape) + buffers["mean"].float())

    def roundtrip(self, tensor: Tensor, counts: Tensor, role: Role) -> Tensor:
        """All heads at once."""
        import torch

        first = self.exact_first
        exact, coded = tensor[..., :first, :], tensor[..., first:, :].float()
        if not coded.numel():
            return tensor.clone()
        mean, found = self.coded_rows(coded, counts - first)
        levels = _levels(found.codes, found.widths)
        stored = self.turned(levels * found.scale + mean.float())
        return torch.cat([exact, stored.to(tensor.dtype)], -2)

    def coded_rows(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Quantised]:
        """Means ``[..., 1, D]`` in 16 bits and codes of many heads' rows ``[..., n, D]`` float32.

        Of each head the first ``counts`` are tokens; what lies beyond has codes of nothing.
        """
        import torch

        at = torch.arange(rows.shape[-2], device=rows.device)
        real = (at < counts[..., None])[..., None]
        turned = self.turned(rows.where(real, 0))
        count = real.sum(-2, keepdim=True).clamp_min(1)
        mean = (turned.sum(-2, keepdim=True) / count).half()
        z = (turned - mean.float()).where(real, 0)
        return mean, _quantised(z, real, self.signs(z.shape[-1]))

    def _coded_directions(self, z: Tensor) -> dict[str, Tensor]:
        """Codes and scales of ``[n, D]`` without a mean."""
        import torch

        real = torch.ones(len(z), 1, dtype=torch.bool, device=z.device)
        found = _quantised(z, real, self.signs(z.shape[1]))
        place = torch.arange(WIDEST, device=z.device)
        flags = (found.codes[..., None] >> place) & 1
        return {
            "codes": pack(flags[:, place < found.widths[0, :, None]], 1),
            "steps": found.steps[0],
            "widths": found.widths[0].to(torch.uint8),
            "tokens": found.tokens[:, 0],
        }

    def _directions(self, buffers: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """What ``_coded_directions`` stored."""
        import torch

        widths = buffers["widths"].long()
        place, signs = torch.arange(WIDEST, device=widths.device), self.signs(shape[1])
        first = (widths.cumsum(0) - widths)[:, None]  # of each direction's signs in a token's row
        rows = unpack(buffers["codes"], 1, signs)[:, (first + place).clamp_max(signs - 1).flatten()]
        flags = rows.unflatten(1, (-1, WIDEST)) * (place < widths[:, None])
        levels = _levels((flags << place).sum(-1), widths[None]) * buffers["steps"].float()
        return levels * scale_of(buffers["tokens"][:, None])


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

        rows = self.turned(rows)
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
        """Codes times steps in the stored basis, plus the mean."""
        basis = buffers["basis"].float() * buffers["columns"].float()
        return self.turned(self._directions(buffers, shape) @ basis.T + buffers["mean"].float())


@dataclass(frozen=True)
class Quantised:
    """Codes and scales as they are stored.

    Args:
        codes: ``[..., n, D]``.
        steps: ``[..., 1, D]`` in 16 bits.
        widths: bits of each direction, ``[..., 1, D]``.
        tokens: ``[..., n, 1]`` in 8 bits.
    """

    codes: Tensor
    steps: Tensor
    widths: Tensor
    tokens: Tensor

    @property
    def scale(self) -> Tensor:
        """What multiplies the levels of the codes."""
        return self.steps.float() * scale_of(self.tokens)


def _quantised(z: Tensor, real: Tensor, bits: int) -> Quantised:
    """Codes of directions without a mean, and scales of tokens and directions fitted to them in
    turns.

    Args:
        z: ``[..., n, D]``, zeros where a token is not real.
        real: ``[..., n, 1]``.
        bits: of a token, over all directions.
    """
    import torch

    count = real.sum(-2, keepdim=True).clamp_min(1)
    variances = z.square().sum(-2, keepdim=True) / count
    widths = _widths(variances, bits)
    best = torch.tensor([step for step, _ in EVEN], device=z.device)[widths]
    steps, tokens = (variances.sqrt() * best).half(), _first_tokens(z, variances, widths)
    for _ in range(_FITS):
        levels = _nearest(z / scale_of(tokens), steps, widths).sub_(_middle(widths))
        tokens = _logarithms(_share(z, levels * steps.float(), -1))
        scaled = levels.mul_(scale_of(tokens) * real)
        steps = _share(z, scaled, -2).clamp_min(0).half()
    return Quantised(_nearest(z / scale_of(tokens), steps, widths).long(), steps, widths, tokens)


def _nearest(unit: Tensor, steps: Tensor, widths: Tensor) -> Tensor:
    """The nearest codes, in float32, of what is in units of its token's scale and overwritten."""
    import torch

    unit.div_(steps.float().where(steps > 0, 1.0)).add_(_middle(widths))
    return unit.round_().clamp_(torch.zeros((), device=unit.device), (1 << widths) - 1.0)


def _share(z: Tensor, levels: Tensor, dim: int) -> Tensor:
    """What multiplies the levels to come nearest to z, in the least of squares."""
    power = levels.square().sum(dim, keepdim=True)
    return (z * levels).sum(dim, keepdim=True) / power.clamp_min(1e-30)


def _first_tokens(z: Tensor, variances: Tensor, widths: Tensor) -> Tensor:
    """How much longer than others each token is, in 8 bits; of what is coded, in units of each
    direction."""
    coded = widths > 0
    spread = (z.square() / variances.clamp_min(1e-30)).where(coded, 0)
    size = spread.sum(-1, keepdim=True) / coded.sum(-1, keepdim=True).clamp_min(1)
    return _logarithms(size.sqrt())


def _logarithms(scales: Tensor) -> Tensor:
    """Of tokens, as they are stored."""
    import torch

    logarithms = scales.clamp_min(1e-30).log2() * _STEPS + _EVEN
    return logarithms.round().clamp(0, 255).to(torch.uint8)


def scale_of(tokens: Tensor) -> Tensor:
    """What multiplies a token's directions, from their logarithms in 8 bits."""
    return ((tokens.float() - _EVEN) / _STEPS).exp2()


def _widths(variances: Tensor, bits: int) -> Tensor:
    """Bits of each direction, ``bits`` in all of ``[..., 1, D]``: the gains of a direction's bits
    fall, so that the largest of all are some first bits of each."""
    import torch

    gains = [EVEN[width][1] - EVEN[width + 1][1] for width in range(WIDEST)]
    gain = variances[..., None] * torch.tensor(gains, device=variances.device)
    order = gain.flatten(-2).argsort(dim=-1, descending=True, stable=True)
    # Of directions without spread every gain is nothing: first bits come first there too.
    given = torch.zeros_like(order)
    given.scatter_(-1, order[..., :bits], 1)
    return given.view(gain.shape).sum(-1)


def _levels(codes: Tensor, widths: Tensor) -> Tensor:
    """What codes stand for, in steps; nothing where a direction has no bits."""
    return codes - _middle(widths)


def _middle(widths: Tensor) -> Tensor:
    """The code, or the half between two, that stands for nothing."""
    middle: Tensor = ((1 << widths) - 1) / 2
    return middle
