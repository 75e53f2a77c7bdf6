"""Requests of ``kvtune serve-sim`` that are drawn, as the command line has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvtune.common.errors import KvtuneError

if TYPE_CHECKING:
    from kvtune.profiles.shape import ModelShape
    from kvtune.simulator.serving.report import Goals
    from kvtune.simulator.serving.requests import Requests


@dataclass(frozen=True)
class Drawn:
    """Options of the command, as they were given.

    Args:
        rate: requests a second.
        concurrency: requests at once, where they do not arrive at a rate.
        count: requests in all.
        prompt, output: tokens, or ranges of them.
        length_cv: spread of both around their means.
        burstiness: of the gaps between arrivals.
        prefix: tokens that all prompts begin with.
        seed: of everything that is drawn.
    """

    rate: float | None
    concurrency: int | None
    count: int
    prompt: str
    output: str
    length_cv: float
    burstiness: float
    prefix: str | None
    seed: int

    def or_from(self, arrivals: Path | None, shape: ModelShape) -> Requests:
        """The requests of a file where one was named, else drawn ones.

        Raises:
            KvtuneError: requests from more than one place or from none, or none that make sense.
        """
        from kvtune.simulator.serving.requests_file import read_requests

        given = [each is not None for each in (arrivals, self.rate, self.concurrency)]
        if sum(given) != 1:
            raise KvtuneError(
                "requests come at a rate, from a number of clients, or from a file",
                hint="give one of --rate 4, --concurrency 32 and --arrivals FILE.",
            )
        return self.requests(shape) if arrivals is None else read_requests(arrivals)

    def requests(self, shape: ModelShape) -> Requests:
        """Draw them for a model.

        Raises:
            KvtuneError: a rate that is not above zero, or lengths that make no sense.
        """
        from kvtune.common.units import parse_tokens
        from kvtune.simulator.serving.requests import Lengths, generate, generate_at_once

        prompt, output = (
            Lengths.parse(each, self.length_cv) for each in (self.prompt, self.output)
        )
        if self.concurrency is not None:
            self._no_arrivals()
            return generate_at_once(
                self.count, self.concurrency, prompt, output,
                longest=shape.max_context, seed=self.seed,
            )  # fmt: skip
        if not self.rate or self.rate <= 0:
            raise KvtuneError(
                f"--rate {self.rate} is not above zero", hint="--rate 4 is 4 a second."
            )
        return generate(
            self.count,
            self.rate,
            prompt,
            output,
            longest=shape.max_context,
            burstiness=self.burstiness,
            prefix_tokens=0 if self.prefix is None else parse_tokens(self.prefix),
            seed=self.seed,
        )

    def _no_arrivals(self) -> None:
        """Refuse what is said of arrivals that there are not."""
        for name, given in (
            ("--prefix", self.prefix is not None),
            ("--burstiness", self.burstiness != 1),
        ):
            if given:
                raise KvtuneError(
                    f"{name} is of requests that arrive at a rate, and --concurrency says that "
                    "they come as others are answered",
                    hint=f"leave out {name}, or give --rate.",
                )


def read_goals(ttft: str | None, tpot: str | None) -> Goals:
    """Objectives of times, as they were typed."""
    from kvtune.common.units import parse_seconds
    from kvtune.simulator.serving.report import Goals

    return Goals(*(None if text is None else parse_seconds(text) for text in (ttft, tpot)))


def sharing_notes(asked: Requests, order: str, prefix: str | None) -> tuple[str, ...]:
    """What was asked of shared beginnings and has no effect, or on some of the prompts alone."""
    from kvtune.common.words import count

    notes = []
    shorter = sum(each is None for each in asked.prefixes)
    if prefix is not None and shorter:
        of_all = f"{count(shorter)} of {count(len(asked))} prompts"
        notes.append(f"{of_all} are shorter than --prefix {prefix}, and share nothing")
    if order == "cached" and not any(asked.prefixes):
        notes.append("--order cached changes nothing: no prompts are known to begin alike")
    return tuple(notes)
