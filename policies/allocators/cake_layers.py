"""CAKE's layer budgets: more for layers whose attention is spread out and shifts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.allocator import Allocator
from kvtune.policies.allocators.pyramid import round_to_sum
from kvtune.policies.method import Method
from kvtune.policies.methods.cake import variance
from kvtune.policies.registry import LONGEST_PROMPT, parameter
from kvtune.policies.signals import Needs, Signals

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True)
class CakeLayers(Allocator):
    """Layers share what the windows leave over by preference, measured on the prompt itself.

    H, V          = entropy, and variance over rows, of the attention that the last ``window``
                    queries pay to the tokens before them, summed over heads
    preference[l] = H^(1 / spread) * V^(1 / shift)
    budget[l]     = window + the layer's share by preference, at most the prompt

    Source: Qin et al., "CAKE", ICLR 2025, arXiv 2503.12491, 4.1 and 4.2. Both temperatures are 1,
    as their code has it for models it does not know. One split after the last layer, which is what
    the paper's cascade is to end at. Differs from their code: its cascade trims layers while later
    ones are still read and never gives back what it took too much, so that it holds a lower peak
    and may end a few per cent below the total; here exactly the total of tokens is handed out.
    Bytes of quantised layers can still differ from those of an even split, since a group of
    codes that is not full has its scales all the same. Budgets below the window stay as given.
    Cost: O(L Hq W P) once a prompt beside the window's attention.
    """

    name = "cake_layers"
    source = "Qin et al., ICLR 2025, arXiv 2503.12491"

    window: int = parameter(32, "observation window", unit="tokens", low=1, high=LONGEST_PROMPT)
    spread: float = parameter(1.0, "temperature of the entropy", low=0.05, high=100)
    shift: float = parameter(1.0, "temperature of the variance", low=0.05, high=100)

    @property
    def needs(self) -> Needs:
        """The observation window."""
        return Needs(window=self.window)

    def settle(
        self,
        budgets: NDArray[np.int64],
        methods: Sequence[Sequence[Method]],
        prompt: Callable[[int], Signals],
    ) -> NDArray[np.int64]:
        """The window for everyone, the rest by preference."""
        import numpy as np

        tokens = prompt(0).prompt_tokens
        free = int(budgets.sum()) - self.window * budgets.size
        if free <= 0 or tokens <= self.window:
            return budgets
        preference = np.array(self._preferences([prompt(at) for at in range(len(budgets))]))
        share = preference / preference.sum() if preference.sum() > 0 else 1 / len(budgets)
        wanted = np.broadcast_to(share, len(budgets))[:, None] * free / budgets.shape[1]
        return round_to_sum(
            wanted.repeat(budgets.shape[1], 1) + self.window, int(budgets.sum()), tokens
        )

    def preference(self, signals: Signals) -> float:
        """How much a layer wants, on any scale that all layers share."""
        return self._preferences([signals])[0]

    def _preferences(self, layers: Sequence[Signals]) -> list[float]:
        """The same of several layers, for which the device is waited for once."""
        import torch

        parts = torch.stack([self._known(signals) for signals in layers]).tolist()
        return [self._scaled(entropy, shift) for entropy, shift in parts]

    def _known(self, signals: Signals) -> Tensor:
        """Entropy and shift, computed once a prompt: they are the same whatever the budgets are."""
        return signals.once(f"preference {self}", lambda: self._entropy_and_shift(signals))

    def _entropy_and_shift(self, signals: Signals) -> Tensor:
        """``[2]`` float32 on the signals' device."""
        import torch

        drawn = signals.window_attention(self.window)[..., : signals.prompt_tokens - self.window]
        entropy = -(drawn * (drawn + 1e-10).log()).sum()
        return torch.stack([entropy, variance(drawn).sum()])

    def _scaled(self, entropy: float, shift: float) -> float:
        scaled: float = max(entropy, 0.0) ** (1 / self.spread) * shift ** (1 / self.shift)
        return scaled
