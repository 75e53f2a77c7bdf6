"""Searches that know nothing but live runs: NSGA-II over one option a layer, and random draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvtune.tuner.compare.ledger import Ledger
from kvtune.tuner.compare.setting import Setting
from kvtune.tuner.exchange import Choice
from kvtune.tuner.quality import mean_over_kinds

if TYPE_CHECKING:
    import optuna

POPULATION = 24
BATCH = 12
_FULLEST = 0.97  # of the budget that random draws take on average
_STEEPEST = 1e4  # price of all bytes of the largest option: only the smallest are then drawn
_WORST = 1e6  # nats/token of a plan that does not fit; feasible ones come before it anyway


def random_search(setting: Setting, ledger: Ledger) -> Iterator[Choice]:
    """Draws that fit, run live; the best by selection samples so far."""
    rng = np.random.default_rng(setting.request.seed)
    best = Best(setting, ledger)
    yield from best.of(uniform_plans(setting))
    while True:
        yield from best.of([draw(setting, rng) for _ in range(BATCH)])


def nsga2(setting: Setting, ledger: Ledger) -> Iterator[Choice]:
    """Optuna's NSGA-II over one option a layer, loss and bytes as objectives, bytes limited.

    As KVTuner (Li et al. 2025) searches layer by layer. It is helped: it begins with the options
    that fit when all layers have them and with draws near the limit, and a plan that does not fit
    is refused before it would run.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seed = setting.request.seed
    sampler = optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    space = _space(setting)
    best = Best(setting, ledger)
    rng = np.random.default_rng(seed)
    first = uniform_plans(setting)[: POPULATION // 2]
    first += [draw(setting, rng) for _ in range(POPULATION - len(first))]
    yield from best.of(first)
    for choice in first:
        _seed(study, setting, space, choice, best.losses[choice.tobytes()])
    while True:
        trials = [study.ask(space) for _ in range(POPULATION)]
        asked = [setting.per_head(_layers_of(trial.params, space)) for trial in trials]
        yield from best.of([choice for choice in asked if best.fits(choice)])
        for trial, choice in zip(trials, asked, strict=True):
            loss = best.losses.get(choice.tobytes(), _WORST)
            trial.set_constraint("bytes", float(best.spent(choice) - setting.budget))
            study.tell(trial, [loss, float(best.spent(choice))])


def _space(setting: Setting) -> dict[str, optuna.distributions.BaseDistribution]:
    from optuna.distributions import CategoricalDistribution

    options = range(len(setting.tables.options))
    return {f"layer {n}": CategoricalDistribution(options) for n in range(setting.tables.layers)}


def _layers_of(parameters: dict[str, Any], space: dict[str, Any]) -> Choice:
    return np.array([parameters[name] for name in space], np.int64)


def _seed(
    study: optuna.Study, setting: Setting, space: dict[str, Any], choice: Choice, loss: float
) -> None:
    """Add a parent. The mark makes it one: NSGA-II overlooks finished trials that lack it."""
    import optuna

    by_layer = choice[:: setting.tables.kv_heads].tolist()
    spent = float(setting.footprints[choice].sum())
    study.add_trial(
        optuna.trial.create_trial(
            params=dict(zip(space, by_layer, strict=True)),
            distributions=space,
            values=[loss, spent],
            constraints={"bytes": spent - setting.budget},
            system_attrs={"NSGAIISampler:generation": 0},
        )
    )


class Best:
    """The plan with the least live loss on selection samples, among those that were run.

    Args:
        setting: the bytes that a plan may take.
        ledger: runs configurations.
    """

    def __init__(self, setting: Setting, ledger: Ledger) -> None:
        self.setting, self.ledger = setting, ledger
        self.kinds = setting.kinds("select")
        self.losses: dict[bytes, float] = {}
        self.least = float("inf")

    def spent(self, choice: Choice) -> int:
        """Bytes of a configuration."""
        return int(self.setting.footprints[choice].sum())

    def fits(self, choice: Choice) -> bool:
        """Whether it keeps to the budget."""
        return self.spent(choice) <= self.setting.budget

    def of(self, choices: Sequence[Choice]) -> Iterator[Choice]:
        """Run those that did not run yet, a few at a time; whatever is better than all before.

        The last one is yielded again after every batch, so that whoever watches the clock can stop.
        """
        new = list({c.tobytes(): c for c in choices if c.tobytes() not in self.losses}.values())
        for at in range(0, len(new), BATCH):
            batch = new[at : at + BATCH]
            for choice, losses in zip(batch, self.ledger.losses(batch), strict=True):
                loss = mean_over_kinds(losses, self.kinds)
                self.losses[choice.tobytes()] = loss
                if loss < self.least:
                    self.least, self.best = loss, choice
            yield self.best
        if not new and self.losses:
            yield self.best


def uniform_plans(setting: Setting) -> list[Choice]:
    """One option for all heads, of those that fit; the largest first."""
    heads = setting.tables.heads
    fitting = np.flatnonzero(setting.footprints * heads <= setting.budget)
    order = fitting[np.argsort(-setting.footprints[fitting], kind="stable")]
    return [np.full(heads, option, np.int64) for option in order]


def draw(setting: Setting, rng: np.random.Generator) -> Choice:
    """One option a layer at random: of all draws with so many bytes on average the most varied."""
    odds = _odds(setting.footprints, _FULLEST * setting.budget / setting.tables.heads)
    while True:
        by_layer = rng.choice(len(odds), setting.tables.layers, p=odds)
        choice = setting.per_head(by_layer)
        if int(setting.footprints[choice].sum()) <= setting.budget:
            return choice


def _odds(footprints: NDArray[np.int64], mean: float) -> NDArray[np.float64]:
    """Chances that fall exponentially with bytes so that the mean is as asked, ``[O]``."""
    scaled = footprints / footprints.max()
    low, high = -_STEEPEST, _STEEPEST

    def chances(price: float) -> NDArray[np.float64]:
        logits = -price * scaled
        weights = np.exp(logits - logits.max())
        found: NDArray[np.float64] = weights / weights.sum()
        return found

    for _ in range(60):
        price = (low + high) / 2
        dearer = chances(price) @ footprints > mean
        low, high = (price, high) if dearer else (low, price)
    return chances(high)
