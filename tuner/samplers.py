"""Which of Optuna's samplers proposes the trials, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import optuna

Sampler = Literal["tpe", "nsga2", "random"]

MANY = 1000
"""Trials from which on a genetic search is chosen: what TPE takes to propose grows with each."""

POPULATION = 50


@dataclass(frozen=True)
class Choice:
    """A sampler and the reason for it."""

    name: Sampler
    reason: str


def choose(asked: Sampler | None, trials: int) -> Choice:
    """The sampler that was asked for, else the one for so many trials."""
    if asked is not None:
        return Choice(asked, "asked for")
    if trials > MANY:
        return Choice("nsga2", f"{trials} trials are many, and TPE slows down with each")
    return Choice("tpe", f"most of what is chosen is categorical, and {trials} trials are few")


def sampler_of(name: Sampler, seed: int, number: int) -> optuna.samplers.BaseSampler:
    """A trial's own: its draws must not depend on how many were drawn since the last start."""
    import numpy as np
    from optuna import samplers

    stream = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    if (
        name == "tpe"
    ):  # a constant liar: what others are at counts as bad, so that nobody repeats it
        return samplers.TPESampler(seed=stream, n_startup_trials=16, constant_liar=True)
    if name == "nsga2":
        return samplers.NSGAIISampler(seed=stream, population_size=POPULATION)
    return samplers.RandomSampler(seed=stream)
