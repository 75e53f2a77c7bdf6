"""QAQ: as many bits a token as attention's error allows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.format import Role
from kvtune.policies.formats.coded import Coded
from kvtune.policies.formats.packing import pack, unpack
from kvtune.policies.packed import STEP, Reading, Section, Sections
from kvtune.policies.registry import parameter

if TYPE_CHECKING:
    from torch import Tensor

_TOKEN_BYTES = 5  # range and mean in 16 bits, and the width
_START_BYTES = 4  # of 32 tokens: where their codes begin


@dataclass(frozen=True)
class Qaq(Coded):
    """Each token has a width of its own, by its range and the error that is allowed.

    allowed = sqrt(12 / q_norm * ln(tau^2 T^3 / (T - 1) + 1)) of keys, sqrt(12 / T) tau of values
    width = ceil(log2(range / (2 * allowed) + 1)), from ``fewest`` to ``most`` bits
    code = round((x - mean) / (range / 2^width)), from -2^(width - 1) to 2^(width - 1) - 1

    Source: Dong et al., "QAQ: Quality Adaptive Quantization for LLM KV Cache", arXiv 2403.04643.
    Differs: a value's allowance is that of a token which draws all attention, since a format sees
    none; no outliers; widths are stored. The bytes depend on the data.
    """

    name = "qaq"
    source = "Dong et al., arXiv 2403.04643"
    bits = 2
    bytes_vary = True
    projects = False

    tau: float = parameter(1.0, "error of attention that is allowed", low=0.001, high=1000)
    q_norm: float = parameter(300.0, "of queries, which scales keys' allowance", low=1, high=1e6)
    fewest: int = parameter(2, "of a token's codes", unit="bits", low=2, high=8)
    most: int = parameter(4, "of a token's codes", unit="bits", low=2, high=8)

    def code_bytes(self, tokens: int, head_dim: int, role: Role) -> int:
        """Every token at its widest."""
        widest = max(self.most, self.fewest)
        starts: int = _START_BYTES * -(-tokens // STEP)
        return starts + tokens * (-(-head_dim * widest // 8) + _TOKEN_BYTES)

    def packed_codes(self, tokens: int, head_dim: int, role: Role) -> Sections | None:
        """Tokens in their order, each as wide as it says."""
        reading = Reading(max(self.most, self.fewest), widths="tokens")
        names = ("codes", "scales", "widths", "starts")
        return (Section(0, tokens, reading, {name: name for name in names}, head_dim),)

    def _allowed(self, tokens: int, role: Role) -> float:
        if role == "values":
            return math.sqrt(12 / tokens) * self.tau
        count = max(tokens, 2)
        return math.sqrt(12 / self.q_norm * math.log(self.tau**2 * count**3 / (count - 1) + 1))

    def codes(self, rows: Tensor, role: Role) -> Mapping[str, Tensor]:
        """Tokens one behind the other, each from a whole byte on."""
        import torch

        spread = (rows.amax(1) - rows.amin(1)).half()
        mean = rows.mean(1).half()
        wanted = (spread.float() / (2 * self._allowed(len(rows), role)) + 1).log2().ceil()
        widths = wanted.clamp(self.fewest, max(self.most, self.fewest)).to(torch.uint8)
        first = _first_bytes(widths, rows.shape[1])
        packed = torch.zeros(int(first[-1]), dtype=torch.uint8, device=rows.device)
        for width in widths.unique().tolist():
            mine = widths == width
            step = (spread[mine].float() / 2**width)[:, None]
            codes = (rows[mine] - mean[mine].float()[:, None]) / torch.where(step > 0, step, 1.0)
            whole = codes.round().clamp(-(2 ** (width - 1)), 2 ** (width - 1) - 1)
            laid = pack(whole + 2 ** (width - 1), width)
            own = torch.arange(laid.shape[1], device=rows.device)
            packed[first[:-1][mine][:, None] + own] = laid
        return {
            "codes": packed, "scales": torch.stack([spread, mean], 1), "widths": widths,
            "starts": first[:-1:STEP].int(),
        }  # fmt: skip

    def numbers(self, buffers: Mapping[str, Tensor], shape: tuple[int, int], role: Role) -> Tensor:
        """Codes of each width times their steps, plus the mean."""
        import torch

        widths, laid = buffers["widths"], buffers["codes"]
        back, first = torch.zeros(shape, device=widths.device), _first_bytes(widths, shape[1])
        spread, mean = buffers["scales"].float().split(1, 1)
        for width in widths.unique().tolist():
            mine = widths == width
            own = torch.arange(-(-shape[1] * width // 8), device=widths.device)
            codes = unpack(laid[first[:-1][mine][:, None] + own], width, shape[1])
            back[mine] = (codes - 2 ** (width - 1)) * (spread[mine] / 2**width) + mean[mine]
        return back


def _first_bytes(widths: Tensor, head_dim: int) -> Tensor:
    """Where each token's codes begin, and where the last one's end, ``[n + 1]`` int64."""
    import torch.nn.functional as F

    sizes = (head_dim * widths.long() + 7) // 8
    first: Tensor = F.pad(sizes.cumsum(0), (1, 0))
    return first
