"""Figures of the pages are those of the result files."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kvtune.tuner.verdict import SCALE

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("pages")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_every_block_stands_as_the_result_files_have_it(pages: ModuleType) -> None:
    stale = [
        p.name for p in pages.pages() if pages.filled(p.read_text("utf-8")) != p.read_text("utf-8")
    ]
    assert stale == [], "python benchmarks/pages.py writes them"


def test_every_block_has_an_end_and_stands_in_one_page_at_least(pages: ModuleType) -> None:
    text = "".join(page.read_text("utf-8") for page in pages.pages())
    begun = re.findall(r"<!-- figures: ([\w-]+) -->", text)
    assert sorted(set(begun)) == sorted(pages.BLOCKS)
    assert text.count("<!-- end of figures -->") == len(begun)


def test_a_changed_figure_is_written_anew_and_the_text_around_it_stays(pages: ModuleType) -> None:
    whole = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    broken = pages._BLOCK.sub(lambda found: f"{found[1]}old figures\n{found[3]}", whole)
    assert "old figures" in broken
    assert pages.filled(broken) == whole


def test_the_figures_come_from_the_files(
    pages: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"plan": {"kl": 0.125, "variant": "a plan"}, "uniform": {"kl": 0.75}}
    digits = {"policy": "a plan", "digits": 0.5, "points_below_full": 9.87}
    shares = dict.fromkeys(pages.quality_pages.SHARES, row)
    found = {"at_equal_bytes": shares, "retrieval": [digits]}
    monkeypatch.setattr(pages.quality_pages, "quality", lambda: found)
    assert "| 3 % | 0.75 | **0.125** | 50.0 % (9.9) |" in pages.quality_pages.shown_first()


def test_the_first_screen_of_the_readme_is_what_its_command_prints(pages: ModuleType) -> None:
    shown = pages._SCREEN.findall((ROOT / "README.md").read_text("utf-8"))[0]
    assert shown == f"```\n{pages.screen()}\n```", "python benchmarks/pages.py --screen writes it"


def test_the_scale_of_losses_is_that_of_the_measured_settings(pages: ModuleType) -> None:
    curve = {
        round(p["at"], 2): p for p in pages.quality_pages.quality()["baseline_curves"]["uniform"]
    }
    told = [
        (curve[0.5]["name"], "all tokens in 4 bits", curve[0.5]),
        (curve[0.03]["name"], "h2o at 3 %", curve[0.03]),
    ]
    assert [name for name, _, _ in told] == ["uniform full int4+4", "uniform h2o int3+4"]
    for _, words, point in told:
        told_after = SCALE[SCALE.index(words) :].partition(";")[0]
        figures = re.findall(r"(?:lose|loses) ([\d.]+) and (?:get|gets) (\d+) %", told_after)
        assert figures == [(f"{point['kl']:.2g}", f"{100 * point['digits']:.0f}")]
