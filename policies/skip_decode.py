"""SkipDecode's schedule: which layers a generated token runs, fewer the later it comes.

It is no cache policy, as it leaves out layers and not tokens, and so stands beside the methods.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvtune.common.errors import KvtuneError


@dataclass(frozen=True)
class SkipDecode:
    """How many layers run at each generated token, falling in a straight line.

    count(p)  = most - (most - least) * min(p / longest, 1), rounded
    runs      = the first ``warm`` layers, and the last count(p) - warm ones
    skipped   = the hidden state passes unchanged, and the layer caches nothing of the token

    The prompt runs as its first generated token does. A later token runs a subset of an earlier
    one's layers, so that a layer that runs has cached every token before.

    Source: Del Corro et al., "SkipDecode: Autoregressive Skip Decoding with Batching and Caching
    for Efficient LLM Inference", arXiv 2307.02628, known from its abstract and from notes on it;
    how the prompt runs and how many layers warm up are ours. UNTRAINED: the authors fine-tune a
    model to the schedule, and nothing that they publish of quality holds without that.

    Args:
        layers: of the model.
        most: layers at the first generated token.
        least: layers from the token ``longest`` on.
        longest: generated tokens over which the number falls.
        warm: first layers that always run, at least 1.

    Raises:
        KvtuneError: numbers that no schedule has.
    """

    layers: int
    most: int
    least: int
    longest: int
    warm: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.warm <= self.least <= self.most <= self.layers:
            raise KvtuneError(
                f"a schedule of {self.most} to {self.least} of {self.layers} layers, {self.warm} "
                "of them warm, cannot be",
                hint="1 <= warm <= least <= most <= layers.",
            )
        if self.longest < 1:
            raise KvtuneError(
                f"the number of layers falls over at least 1 token, not {self.longest}"
            )

    def count(self, position: int) -> int:
        """Layers that run at a generated token, the first at position 0."""
        fallen = (self.most - self.least) * min(position / self.longest, 1.0)
        return round(self.most - fallen)

    def runs(self, position: int) -> frozenset[int]:
        """The numbers of those layers."""
        later = self.count(position) - self.warm
        return frozenset(range(self.warm)) | frozenset(range(self.layers - later, self.layers))

    def cached_tokens(self, prompt_tokens: int, generated: int) -> int:
        """Tokens that are cached, summed over layers, when so many were generated and read."""
        later = sum(self.count(position) for position in range(generated))
        return prompt_tokens * self.count(0) + later
