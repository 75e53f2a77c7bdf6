"""A matrix in four bits that is really stored so: for a model of random weights that must be small.

Groups of 128 weights share a scale in 16 bits. One token is multiplied by a kernel that unpacks as
it reads; many tokens by a matrix that is unpacked first and thrown away.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

GROUP = 128


class Int4Linear(nn.Module):
    """``nn.Linear`` without a bias, of random weights; two weights a byte.

    The byte at column c holds the weights at c and c + inputs / 2, each less 8 and times its
    group's scale.
    """

    def __init__(self, inputs: int, outputs: int, device: Any, deviation: float = 0.02) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        packed = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=device)
        scale = deviation / 4.6  # of whole numbers from -8 to 7
        scales = torch.full((outputs, inputs // GROUP), scale, device=device)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales.half())

    def forward(self, x: Tensor) -> Tensor:
        """``x`` times the matrix, like ``x``."""
        flat = x.reshape(-1, self.in_features)
        if len(flat) == 1 and x.is_cuda:
            return self._one(flat).view(*x.shape[:-1], -1)
        return nn.functional.linear(x, self.dense(x.dtype))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix, ``[outputs, inputs]``."""
        if self.packed.is_cuda and dtype == torch.bfloat16:
            from int4_kernels import GROUP_BYTES, unpack

            weight = self.packed.new_empty(self.out_features, self.in_features, dtype=dtype)
            unpack[(self.out_features, self.in_features // 2 // GROUP_BYTES)](
                self.packed, self.scales, weight, self.in_features // 2, GROUP_BYTES
            )
            return weight
        codes = torch.cat([self.packed & 15, self.packed >> 4], 1).to(dtype) - 8
        return codes * self.scales.to(dtype).repeat_interleave(GROUP, 1)

    def _one(self, x: Tensor) -> Tensor:
        from int4_kernels import GROUP_BYTES, product

        out = x.new_empty(1, self.out_features)
        product[lambda shape: (-(-self.out_features // shape["ROWS"]),)](
            x.contiguous(), self.packed, self.scales, out, self.in_features // 2,
            self.out_features, GROUP_BYTES,
        )  # fmt: skip
        return out


def in_four_bits(config: Any, device: Any) -> Any:
    """A Llama of random weights: its layers' matrices in four bits, the rest in bf16."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16().eval()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                narrow = Int4Linear(child.in_features, child.out_features, device)
                setattr(module, name, narrow)
    _fill(model, device)
    return model


def _fill(model: nn.Module, device: Any) -> None:
    """Give every tensor that has no memory yet its own: norms of ones, else random numbers."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                real = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                real.fill_(1.0) if real.dim() == 1 else real.normal_(0, 0.02)
                setattr(module, name, nn.Parameter(real, requires_grad=False))
    for module in model.modules():
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RotaryEmbedding"):
                with torch.device(device):
                    setattr(module, name, type(child)(model.config))  # type: ignore[arg-type]
