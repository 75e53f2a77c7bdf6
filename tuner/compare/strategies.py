"""The ways to search that are compared; each yields the configurations it would stop with.

A strategy yields whenever what it would hand over changes, so that its quality can be drawn against
the time it has used. It sees search and selection samples; held-out samples take no part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kvtune.tuner.allocate import solve
from kvtune.tuner.answer import Found
from kvtune.tuner.candidate import Candidate, pick
from kvtune.tuner.compare.additive import integer_program
from kvtune.tuner.compare.ledger import Ledger
from kvtune.tuner.compare.live_only import nsga2, random_search
from kvtune.tuner.compare.setting import Setting
from kvtune.tuner.cross_fit import cross_fitted_front
from kvtune.tuner.exchange import Choice
from kvtune.tuner.question import Question
from kvtune.tuner.refine import Lives, recalibrated, refine
from kvtune.tuner.simple_points import simple_points
from kvtune.tuner.solver import Solver
from kvtune.tuner.study import run_study

Search = Callable[[Setting, Ledger], Iterator[Choice]]


@dataclass(frozen=True)
class Strategy:
    """One way to search.

    Args:
        words: what it does, for tables.
        search: yields configurations.
        reads_tables: whether its clock begins with what trace and tables took.
    """

    words: str
    search: Search
    reads_tables: bool


def tuner(setting: Setting, ledger: Ledger) -> Iterator[Choice]:
    """``kvtune search`` at a fixed size: the study over tables, then live rounds."""
    tables = setting.tables
    prompt = tables.prompt_tokens
    question = Question(
        tables=tables,
        head_dim=tables.head_dim,
        rooms={prompt: setting.budget},
        held={prompt: setting.footprints},
        generated_bytes=0,
        working=lambda *_: 0,
        sequences=1,
    )
    solver = Solver.of(question)
    trials = run_study(solver, trials=setting.request.trials, seed=setting.request.seed)
    candidates = [*trials, *simple_points(solver, first=len(trials))]
    source = setting.source
    found = Found(setting.request, {}, source, solver, "", candidates, ())
    studied = recalibrated(found, source.calibration)
    points = cross_fitted_front(studied.source, studied.expected)
    yield pick(points, setting.request.largest_kl).choice

    def run(wanted: Sequence[Candidate]) -> list[Lives]:
        return [list(each) for each in ledger.losses([one.choice for one in wanted])]

    yield refine(studied, run)[1].choice


def greedy(setting: Setting, ledger: Ledger) -> Iterator[Choice]:
    """Each head for itself under one byte price, from the tables, without terms between heads."""
    yield solve(setting.problem.shrunk(0.0), setting.budget)


def layers(setting: Setting, ledger: Ledger) -> Iterator[Choice]:
    """One option a layer by the layers' sensitivities and an integer program.

    As NVIDIA's Model Optimizer chooses formats: what the model loses when one layer alone has an
    option, summed over layers. It is given the whole menu, and its sensitivities are read from the
    tables, which is quicker than a run for each of them.
    """
    tied = setting.problem.shrunk(1.0).tied(setting.tables.kv_heads)
    yield setting.per_head(integer_program(tied.loss, tied.footprint, setting.budget))


STRATEGIES: dict[str, Strategy] = {
    "tuner": Strategy("kvtune search", tuner, reads_tables=True),
    "nsga2": Strategy("NSGA-II, live runs only", nsga2, reads_tables=False),
    "random": Strategy("random, live runs only", random_search, reads_tables=False),
    "greedy": Strategy("greedy per head", greedy, reads_tables=True),
    "layers": Strategy("integer program per layer", layers, reads_tables=True),
}
