"""The requests of a run: when each arrives and how long its prompt and its answer are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtune.common.errors import KvtuneError
from kvtune.common.units import format_tokens, parse_tokens
from kvtune.simulator.serving.sequence import Prefix


@dataclass(frozen=True)
class Requests:
    """Requests in the order of their arrival.

    Args:
        arrival_s: seconds since the start of the run, ascending.
        prompt_tokens: at least 1 each.
        output_tokens: tokens that each answer has, at least 1.
        prefixes: shared beginnings of prompts, one a request; empty where none is known.
        source: one phrase on where the requests come from.
        at_once: requests that are there at every time, each of the others arriving when one has
            been answered; 0 where they arrive by ``arrival_s``.
    """

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    prefixes: Sequence[Prefix | None] = ()
    source: str = ""
    at_once: int = 0

    def __len__(self) -> int:
        return len(self.arrival_s)


@dataclass(frozen=True)
class Lengths:
    """Token counts that are drawn: all alike, uniform over a range, or lognormal around a mean.

    Args:
        low: the shortest of a range, or the mean.
        high: the longest of a range; equal to ``low`` for a mean.
        variation: coefficient of variation of the lognormal distribution; 0 for all alike.
    """

    low: int
    high: int
    variation: float = 0.0

    @staticmethod
    def parse(text: str, variation: float) -> Lengths:
        """Read ``2k`` or the range ``1k-4k``.

        Raises:
            KvtuneError: not a number of tokens, a range that falls, or a range with a variation.
        """
        low, dash, high = text.partition("-")
        ends = parse_tokens(low), parse_tokens(high if dash else low)
        if ends[0] > ends[1]:
            raise KvtuneError(f"the range {text} ends below its start", hint=f"write {high}-{low}.")
        if dash and variation:
            raise KvtuneError(
                f"{text} is a range, and --length-cv spreads lengths around a mean",
                hint="give either a range or --length-cv.",
            )
        return Lengths(*ends, variation)

    def draw(self, count: int, rng: np.random.Generator, longest: int) -> NDArray[np.int64]:
        """So many lengths between 1 and ``longest``."""
        if self.variation:
            sigma = np.sqrt(np.log1p(self.variation**2))
            drawn = rng.lognormal(np.log(self.low) - sigma**2 / 2, sigma, count)
            return np.clip(np.rint(drawn), 1, longest).astype(np.int64)
        return rng.integers(self.low, self.high, count, endpoint=True)

    def __str__(self) -> str:
        if self.low != self.high:
            return f"{self.low} to {format_tokens(self.high)}"
        spread = f" (lognormal, cv {self.variation:g})" if self.variation else ""
        return format_tokens(self.low) + spread


def generate(
    count: int,
    rate_per_s: float,
    prompt: Lengths,
    output: Lengths,
    *,
    longest: int,
    burstiness: float = 1.0,
    prefix_tokens: int = 0,
    seed: int = 0,
) -> Requests:
    """Draw requests that arrive at random, with random lengths.

    Args:
        count: how many.
        rate_per_s: mean arrivals a second.
        prompt: lengths of prompts.
        output: lengths of answers.
        longest: the most tokens that a drawn length may have.
        burstiness: coefficient of variation of the gaps between arrivals: 0 for an even spacing, 1
            for a Poisson process, else gaps are gamma distributed.
        prefix_tokens: beginning that all prompts share, 0 for none.
        seed: of everything that is drawn.

    Raises:
        KvtuneError: a rate that is not above zero, no request, a negative burstiness, or a shared
            beginning that is longer than every prompt.
    """
    if not 0 < rate_per_s < np.inf or count < 1 or not 0 <= burstiness < np.inf:
        raise KvtuneError(
            "requests need a rate above zero, a count of at least 1 and a burstiness from 0 on"
        )
    rng = np.random.default_rng(seed)
    arrival = np.cumsum(_gaps(count, burstiness, rng)) / rate_per_s
    prompts = prompt.draw(count, rng, longest)
    outputs = output.draw(count, rng, longest)
    if prefix_tokens > prompts.max():
        raise KvtuneError(
            f"a beginning of {format_tokens(prefix_tokens)} is longer than every prompt, so that "
            "none would share it",
            hint=f"shorten --prefix to {prompts.max()} or less, or lengthen --prompt.",
        )
    shared = [_prefix(prefix_tokens, tokens) for tokens in prompts.tolist()]
    kind = {0.0: "evenly spaced", 1.0: "Poisson"}.get(burstiness, f"gamma, cv {burstiness:g}")
    source = f"{rate_per_s:g} requests a second ({kind}), prompts of {prompt}, outputs of {output}"
    return Requests(arrival, prompts, outputs, shared if prefix_tokens else (), source)


def generate_at_once(
    count: int, at_once: int, prompt: Lengths, output: Lengths, *, longest: int, seed: int = 0
) -> Requests:
    """Draw requests of a number of clients; each sends its next one when the last is answered.

    Args:
        count: requests in all.
        at_once: clients.
        prompt: lengths of prompts.
        output: lengths of answers.
        longest: the most tokens that a drawn length may have.
        seed: of everything that is drawn.
    """
    rng = np.random.default_rng(seed)
    prompts, outputs = prompt.draw(count, rng, longest), output.draw(count, rng, longest)
    source = f"{at_once} requests at once, prompts of {prompt}, outputs of {output}"
    return Requests(np.zeros(count), prompts, outputs, (), source, at_once)


def _gaps(count: int, burstiness: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Gaps between arrivals with a mean of 1."""
    if burstiness == 0:
        return np.ones(count)
    shape = burstiness**-2
    return rng.gamma(shape, 1 / shape, count)


def _prefix(shared_tokens: int, prompt_tokens: int) -> Prefix | None:
    return Prefix(("all",), shared_tokens) if shared_tokens <= prompt_tokens else None


def possible_prompts(requests: Requests, longest: int) -> NDArray[np.int64]:
    """Prompts that the model takes at all; the others are refused when they arrive."""
    fitting = requests.prompt_tokens[requests.prompt_tokens < longest]
    if not len(fitting):
        raise KvtuneError(
            f"no prompt is shorter than the {longest} tokens that the model takes",
            hint="shorten them with --prompt, or in the file of --arrivals.",
        )
    return fitting
