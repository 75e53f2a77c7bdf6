"""CompressKV's layer budgets: more for layers that a tiny cache hurts most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.allocator import Allocator
from kvtune.policies.allocators.pyramid import round_to_sum
from kvtune.policies.method import Method
from kvtune.policies.registry import LONGEST_PROMPT, parameter
from kvtune.policies.signals import Needs, Signals

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class CompressKVLayers(Allocator):
    """Every layer gets ``least`` tokens a head; errors measured once on the model share the rest.

    budget[l] = least + error[l] / sum(error) * what is left, at most ``most`` times the mean

    Source: Lin et al., "CompressKV", arXiv 2508.02401; 32 tokens and three times the mean as
    published. Differs from their code: errors are measured on our own texts, at the attention's
    output before the output projection (``kvtune.runtime.calibrate``), not on the benchmark that
    results are reported on. Budgets of ``least`` or below stay as given.
    Cost: none.
    """

    name = "compresskv_layers"
    source = "Lin et al., arXiv 2508.02401"

    least: int = parameter(
        32, "tokens that every head gets", unit="tokens", low=0, high=LONGEST_PROMPT
    )
    most: float = parameter(3.0, "a layer's budget over the mean, at most", low=1, high=4096)

    @property
    def needs(self) -> Needs:
        """The error of each layer, measured on the model once."""
        return Needs(calibration=True)

    def settle(
        self,
        budgets: NDArray[np.int64],
        methods: Sequence[Sequence[Method]],
        prompt: Callable[[int], Signals],
    ) -> NDArray[np.int64]:
        """The least for everyone, the rest by error."""
        import numpy as np

        total, heads = int(budgets.sum()), budgets.shape[1]
        free = total - self.least * budgets.size
        tokens = prompt(0).prompt_tokens
        if free <= 0:
            return budgets
        error = np.array([prompt(at).given("layer_error") for at in range(len(budgets))])
        error = error / error.sum() if error.sum() > 0 else np.full_like(error, 1 / len(error))
        wanted = np.repeat(self.least + error * free / heads, heads).reshape(budgets.shape)
        ceiling = min(tokens, int(np.ceil(self.most * total / budgets.size)))
        return round_to_sum(wanted, total, ceiling)
