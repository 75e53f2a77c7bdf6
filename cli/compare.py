"""``kvtune compare``: ways to search beside each other, with the same bytes, samples and time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvtune.cli import options
from kvtune.cli.output import one_line, speaking, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvtune.tuner.compare.result import Comparison, Outcome, Times

OutOption = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Folder of the runs; continued if begun.")
]
SecondsOption = Annotated[
    float,
    typer.Option(
        "--seconds",
        metavar="S",
        min=1,
        max=10**6,
        help="That every strategy has at every size; trace and tables count where they are read.",
    ),
]
StrategiesOption = Annotated[
    str,
    typer.Option(
        "--strategies",
        metavar="NAMES",
        help="Some of tuner, nsga2, random, greedy, layers; left out: all.",
    ),
]


def command(
    model: options.Model = "smollm2-135m",
    out: OutOption = Path("kvtune-compare"),
    shares: options.Shares = "6%,12%",
    seconds: SecondsOption = 600,
    strategies: StrategiesOption = "",
    trials: options.Trials = 60,
    workload: options.Workload = "small",
    menu: options.Menu = "three",
    text: options.Texts = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Ways to search beside each other, at equal bytes and time."""
    from kvtune.cli.inputs import check_writable, read_shares
    from kvtune.tuner.search_options import weights_request

    check_writable(out, "--out")
    wanted = tuple(read_shares(shares))
    names = _strategies(strategies)
    search = weights_request(
        model, out, trials=trials, workload=workload, menu=menu, texts=text or (), seed=seed,
        device=device,
    )  # fmt: skip
    with speaking(as_json, quiet) as output:
        from kvtune.tuner.compare.run import CompareRequest, run_comparison

        found = run_comparison(CompareRequest(search, wanted, seconds, names), output.progress)
        pictures = _pictures(found, out)
        for share in found.shares:
            output.show(_table(found, share), "")
        output.show(*_words(found), *(one_line(f"picture: {path}") for path in pictures))
        from kvtune.tuner.compare.written import as_plain

        output.finish("compare", as_plain(found) | {"out": out, "pictures": pictures})


def _strategies(text: str) -> tuple[str, ...]:
    """Names of strategies, in the order in which they are compared.

    Raises:
        KvtuneError: one is unknown.
    """
    from kvtune.common.errors import KvtuneError, nearest
    from kvtune.tuner.compare.strategies import STRATEGIES

    wanted = [each.strip() for each in text.split(",") if each.strip()] or list(STRATEGIES)
    for name in wanted:
        if name not in STRATEGIES:
            hint = nearest(name, STRATEGIES)
            raise KvtuneError(f"{name!r} is no strategy", where="--strategies", hint=hint)
    return tuple(name for name in STRATEGIES if name in wanted)


def _pictures(found: Comparison, out: Path) -> list[Path]:
    from kvtune.common.files import atomic
    from kvtune.tui.report.comparison import comparison_chart
    from kvtune.tui.report.drawing import rendered

    made = []
    for share in found.shares:
        for kind, content in rendered(comparison_chart(found, share), 8.5, 4.6).items():
            path = out / f"compare-{100 * share:g}%.{kind}"
            with atomic(path) as temporary:
                temporary.write_bytes(content)
            made.append(path)
    return made


def _table(found: Comparison, share: float) -> RenderableType:
    rows = [_row(outcome, found.seconds) for outcome in found.at(share)]
    columns = ("strategy", "of bf16", "plans run", "found after", "KL, live", "times the tuner's")
    return table(
        f"At {100 * share:g} % of the bf16 bytes, {found.seconds:g} s each",
        columns,
        rows,
        caption=f"{found.held_out_samples} held-out samples of {found.model}, live on "
        f"{found.device}; nats/token with 95 % intervals, ratios on the same samples",
    )


def _row(outcome: Outcome, seconds: float) -> tuple[str, ...]:
    from kvtune.common.words import count, figure, percent

    if outcome.share is None:
        return (outcome.words, "-", count(outcome.plans_run), f"> {seconds:g} s", "-", "-")
    return (
        outcome.words,
        percent(outcome.share),
        count(outcome.plans_run),
        f"{outcome.points[-1].seconds:.1f} s",
        figure(outcome.kl, tier=False),
        "-" if outcome.strategy == "tuner" else _times(outcome.times_the_tuner),
    )


def _times(times: Times | None) -> str:
    return "-" if times is None else f"{times.value:.2g} [{times.low:.2g}, {times.high:.2g}]"


def _words(found: Comparison) -> list[str]:
    prepared = found.prepared
    return [
        *found.sentences(),
        f"Trace {prepared.capture_s:.1f} s and tables {prepared.tables_s:.1f} s are on the clocks "
        "of those that read them.",
    ]
