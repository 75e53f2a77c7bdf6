"""Seconds of a serving stack's steps, from its measured kernels on grids that an engine reads."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from kvtune.common.estimate import Tier
from kvtune.simulator.latency.serving_kernels import ServingModel
from kvtune.simulator.serving.step_times import Chunk, Curve, StepTimes

_LENGTHS, _ROWS = 65, 257  # points of the grids, even in the logarithm


class LogCurve:
    """A function of one number from 1 on, straight between points that are even in its logarithm.

    Args:
        last: the largest number.
        values: at :meth:`points`.
    """

    def __init__(self, last: float, values: npt.ArrayLike) -> None:
        self._curve = Curve(0.0, math.log(last), values)

    @staticmethod
    def points(last: float, count: int) -> npt.NDArray[np.float64]:
        """Numbers from 1 to the last."""
        return np.geomspace(1.0, last, count)

    def at(self, x: float) -> float:
        """The value at ``x``; ends hold beyond them."""
        return self._curve.at(math.log(max(x, 1.0)))


class StackGrids:
    """Kernels of a serving stack over everything that an engine may ask for.

    Args:
        model: of the stack on its cards.
        sequences: the most at once.
        longest: tokens of the longest sequence.
        step_tokens: the most new tokens of a step.
    """

    def __init__(self, model: ServingModel, sequences: int, longest: int, step_tokens: int) -> None:
        last, most = max(longest, 2), step_tokens + sequences
        self.rows, lengths = np.arange(1.0, sequences + 1), LogCurve.points(last, _LENGTHS)
        attention = model.decode_attention(*np.meshgrid(self.rows, lengths, indexing="ij"))
        prompts = LogCurve.points(last, _ROWS)
        self.attention = [LogCurve(last, of_batch) for of_batch in attention]
        self.context = LogCurve(last, model.context_attention(np.ones(_ROWS), prompts))
        self.passes = LogCurve(most, model.passes(LogCurve.points(most, _ROWS)))
        self.decode_passes, self.logits = model.passes(self.rows), model.logits(self.rows)


class StackTimes:
    """Steps of an engine by the kernels of a serving stack.

    A step that also reads prompts is one pass over all new tokens, with the attention of each
    chunk to the tokens before it and that of the sequences that decode.

    Args:
        model: of the stack on its cards, with its overheads.
        grids: of the same model.
        tier: of the times.
    """

    def __init__(self, model: ServingModel, grids: StackGrids, tier: Tier) -> None:
        self.tier, self.compressing = tier, Curve(0, 1, [0.0, 0.0])
        self.over, self.grids, self.scale = model.overheads, grids, 1.0
        self.launches_s = model.shape.layers * self.over.launches_s
        beside = self.over.kernels * grids.logits + model.rest(grids.rows)
        self._beside: list[float] = beside.tolist()
        self._decode: list[float] = (self.over.kernels * grids.decode_passes + beside).tolist()

    def scaled(self, factor: float) -> StackTimes:
        """The same with every time so many times as long."""
        other = copy.copy(self)
        other.scale = self.scale * factor
        return other

    def decoding(self, sequences: int, prompt: float, generated: float) -> float:
        """Seconds of one decode step; lengths are means."""
        attention = self.over.kernels * self._attention(sequences, prompt, generated)
        return self.scale * (attention + self._decode[sequences - 1])

    def _attention(self, sequences: int, prompt: float, generated: float) -> float:
        """Seconds of the attention of a decode step, as the tables have it."""
        return self.grids.attention[sequences - 1].at(prompt + generated)

    def mixed(
        self, sequences: int, prompt: float, generated: float, chunks: Iterable[Chunk]
    ) -> float:
        """Seconds of a step that reads chunks of prompts beside decoding."""
        grids, new, asked, kernels = self.grids, sequences, sequences, 0.0
        if sequences:
            kernels += self._attention(sequences, prompt, generated)
        for start, tokens in chunks:
            new, asked = new + tokens, asked + 1
            kernels += grids.context.at(start + tokens)
            kernels -= grids.context.at(start) if start else 0.0
        kernels += grids.passes.at(new)
        beside = self._beside[min(asked, len(self._beside)) - 1]
        return self.scale * max(self.over.reading * kernels + beside, self.launches_s)

    def copying(self, blocks: int) -> float:
        """Nothing: servers that copy to the host are refused, since no table has the time."""
        return 0.0


class PlannedTimes(StackTimes):
    """The same under a policy, as kvtune's plugin runs it in a stack.

    Attention of decode steps and the compressing of prompts are those of kvtune's own kernels.

    Args:
        model: of the stack on its cards, with its overheads.
        grids: of the same model.
        tier: of the times.
        own: times of kvtune's runtime under the policy.
    """

    def __init__(self, model: ServingModel, grids: StackGrids, tier: Tier, own: StepTimes) -> None:
        super().__init__(model, grids, tier)
        self.own, self.compressing = own, own.compressing

    def _attention(self, sequences: int, prompt: float, generated: float) -> float:
        return self.own.decoding(sequences, prompt, generated) - self.own.empty[sequences]
