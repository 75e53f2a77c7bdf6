"""The report: self-contained, complete, the same twice; opened in Chromium where there is one."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtune.__main__ import main
from kvtune.tests.made_up import write_study
from kvtune.tui.report.drawing import rendered
from kvtune.tui.report.front_chart import front_chart
from kvtune.tui.report.write import write_report
from kvtune.tuner.explore.axes import LOSS, TOKENS
from kvtune.tuner.explore.compare import HeadMap
from kvtune.tuner.explore.reader import StudyReader
from kvtune.tuner.explore.view import View
from kvtune.tuner.explore.what_if import Setting, figures_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with its report, and what the command that made it has printed."""
    run = write_study(tmp_path_factory.mktemp("runs") / "run", live=True, live_kinds=True)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert main(["report", str(run), "--json", "--quiet"]) == 0
    (run / "printed.json").write_text(out.getvalue())
    (run / "printed.err").write_text(err.getvalue())
    return run


@pytest.fixture
def outlines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty pictures in the place of drawn ones, for tests of the page around them."""

    def rendered(draw: Any, width: float, height: float, kinds: Any = ("svg", "png")) -> Any:
        svg = f'<svg width="{width}pt" height="{height}pt"></svg>'.encode()
        return {"svg": svg, "png": b"\x89PNG"}

    monkeypatch.setattr("kvtune.tui.report.drawing.rendered", rendered)


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return (folder / "report" / "report.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Every tag with its attributes, and whether all were closed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "path", "use", "rect", "image"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass


def test_nothing_is_fetched(html: str) -> None:
    parser = Tags()
    parser.feed(html)
    assert parser.open == []
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in parser.seen}
    for _, attributes in parser.seen:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert "url(http" not in html


def test_identifiers_are_one_of_a_kind_and_found(html: str) -> None:
    identifiers = re.findall(r'\bid="([^"]+)"', html)
    assert len(identifiers) == len(set(identifiers))
    used = re.findall(r'href="#([^"]+)"', html) + re.findall(r"url\(#([^)]+)\)", html)
    assert used
    assert set(used) <= set(identifiers)


def test_it_says_whose_quality_and_every_tier(html: str) -> None:
    assert "quality: stand-in (smollm2-135m)" in html
    for tier in ("table", "live", "datasheet", "assumed"):
        assert f" {tier}" in html
    assert "c0ffee" in html


def test_the_verdict_and_its_picture_come_first(html: str) -> None:
    main_part = html.split("<main>")[1]
    first = main_part.split("<section>")[0]
    assert 'class="verdict"' in first
    assert "nats per token" in first
    assert first.count("<svg") == 2  # for wide and for narrow screens
    assert "The plan is not shown to be better than greedy per head" in first


NAME = "<script>alert(1)</script>\x1b]0;owned\x07"


@pytest.fixture
def running(tmp_path: Path, outlines: None) -> str:
    """The page of a study that goes on, whose stand-in has a name with markup and an escape."""
    run = write_study(tmp_path, 6, finished=False, stand_in=NAME)
    (page, *_) = write_report(StudyReader(run).read(), run / "report")
    return page.read_text(encoding="utf-8")


def test_a_study_without_an_end_has_no_verdict(running: str) -> None:
    assert 'class="verdict"' not in running
    assert "<svg" in running.split("<section>")[0]


def test_a_running_study_is_reported_as_such(running: str) -> None:
    assert "running" in running


def test_markup_and_terminal_escapes_in_names_stay_text(running: str) -> None:
    assert "<script>" not in running
    assert "&lt;script&gt;" in running
    assert "\x1b" not in running
    assert "\\x1b]0;owned" in running


def test_the_emblem_shows_what_every_head_keeps(folder: Path, html: str) -> None:
    found = re.search(r'<svg class="emblem" viewBox="0 0 (\d+) (\d+)".*?</svg>', html, re.S)
    assert found
    study = StudyReader(folder).read()
    assert study.chosen is not None
    plan = study.plans[study.chosen]
    heads = HeadMap.of(study.policy(plan), plan.context_tokens)
    drawn = np.zeros_like(heads.share)
    rect = r'x="(\d+)" y="(\d+)" width="(\d+)" height="5" opacity="([\d.]+)"'
    rects = re.findall(rect, found[0])
    for x, y, width, opacity in rects:
        drawn[int(x) // 5 : (int(x) + int(width)) // 5, int(y) // 5] = float(opacity)
    levels = 1 + np.log2(np.maximum(heads.share, 2.0**-7)) / 8  # a halving is an eighth less
    assert np.abs(drawn - levels).max() <= 0.126


def test_the_page_explains_its_own_figures(html: str) -> None:
    assert '<a href="#figures">' in html
    explained = html.split('<section id="figures">')[1]
    for word in ("KL, nats/token", "held out", "stand-in", "datasheet", "retrieval"):
        assert word in explained


def test_the_table_holds_every_plan(folder: Path) -> None:
    with (folder / "report" / "plans.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    study = StudyReader(folder).read()
    assert [int(row["trial"]) for row in rows] == study.plans.trial.tolist()
    assert [int(row["prompt_bytes"]) for row in rows] == study.plans.prompt_bytes.tolist()
    assert [row["chosen"] for row in rows].index("1") == study.chosen
    for row in rows:
        for name in ("loss", "step", "rate"):
            low, value, high = (float(row[f"{name}{end}"]) for end in ("_low", "", "_high"))
            assert low <= value <= high


def test_pictures_come_as_png_and_svg(folder: Path) -> None:
    for name in ("front-tokens", "memory", "heads-budget", "kinds"):
        assert (folder / "report" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert b"<svg" in (folder / "report" / f"{name}.svg").read_bytes()


def test_losses_by_kind_are_drawn_as_measured_where_the_plan_ran_live(
    folder: Path, html: str, tmp_path: Path, outlines: None
) -> None:
    """The second study is an older search's, without them."""
    older = write_study(tmp_path, 6, live=True)
    (page, *_) = write_report(StudyReader(older).read(), older / "report")
    assert "The same, measured" not in page.read_text(encoding="utf-8")
    assert not (older / "report" / "kinds-live.svg").exists()
    assert "The same, measured" in html
    drawn = (folder / "report" / "kinds-live.svg").read_text(encoding="utf-8")
    predicted = (folder / "report" / "kinds.svg").read_text(encoding="utf-8")
    assert "uniform h2o int3+4" in drawn
    assert "greedy per head" not in drawn  # it did not run
    assert "greedy per head" in predicted


@pytest.mark.parametrize(
    ("count", "words"), [(0, "holds no plan"), (None, "there is no such folder")]
)
def test_what_cannot_be_reported_is_said(
    tmp_path: Path, count: int | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    if count is not None:
        write_study(folder, count)
    assert main(["report", str(folder)]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


def test_json_lists_the_files(folder: Path) -> None:
    answer = json.loads((folder / "printed.json").read_text())
    assert (folder / "printed.err").read_text() == ""
    assert answer["state"] == "finished"
    assert {Path(file).name for file in answer["files"]} >= {"report.html", "plans.csv"}
    assert all(Path(file).is_file() for file in answer["files"])


def test_the_same_study_gives_the_same_picture(folder: Path) -> None:
    study = StudyReader(folder).read()
    setting = Setting.asked(study.facts)
    view = View(study, figures_of(study, setting), setting, TOKENS, LOSS)
    drawn = rendered(front_chart(view), 8.5, 4.6)
    assert drawn == {
        kind: (folder / "report" / f"front-tokens.{kind}").read_bytes() for kind in ("svg", "png")
    }


def test_the_same_study_gives_the_same_page(folder: Path, tmp_path: Path, outlines: None) -> None:
    study = StudyReader(folder).read()
    first, again = (write_report(study, tmp_path / name) for name in ("first", "again"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_chromium_opens_it_without_a_word(folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    done = subprocess.run(  # noqa: S603
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,3000",
            f"--screenshot={picture}", (folder / "report" / "report.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    assert picture.stat().st_size > 20_000


def test_points_of_the_front_say_what_they_are(folder: Path, html: str) -> None:
    from kvtune.tui.report.hover import with_titles

    study = StudyReader(folder).read()
    setting = Setting.asked(study.facts)
    front = View(study, figures_of(study, setting), setting).front
    found = re.findall(r"<use [^>]*><title>trial (\d+)", html)
    once = found[: len(front)]
    assert once == [str(study.plans.trial[row]) for row in front.tolist()]
    assert "<script" not in html
    svg = '<g id="a-front-points"><use x="1"/><use x="2"/></g>\n  </g>'
    assert with_titles(svg, "a-front-points", ["1"]) == svg
    both = with_titles(svg, "a-front-points", ["<b>", "2"])
    assert both.count("<title>&lt;b&gt;</title>") == both.count("<title>2</title>") == 1


def test_heads_that_are_all_alike_are_told_in_a_sentence(tmp_path: Path, outlines: None) -> None:
    study = StudyReader(write_study(tmp_path / "run")).read()
    alike = replace(study.facts, options=(study.facts.options[0],) * len(study.facts.options))
    write_report(replace(study, facts=alike), tmp_path / "report")
    html = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    words = f"get the same: {alike.options[0].label}."
    assert words in html
    assert not (tmp_path / "report" / "heads-budget.png").exists()
