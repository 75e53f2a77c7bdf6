"""Times of a plan beside those of the uncompressed cache, as they are printed."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import kvtune
from kvtune.cli.output import Output, plain
from kvtune.cli.timed import times_table
from kvtune.common.estimate import Estimate
from kvtune.tests import made_up

ROOT = Path(kvtune.__file__).parent


def shown(times: Any) -> list[str]:
    out = io.StringIO()
    with patch.dict(os.environ, COLUMNS="140"):  # at 100, intervals go to a line of their own
        Output(out, as_json=False, quiet=False).show(times_table(times))
    return out.getvalue().splitlines()


def narrow(times: Any) -> list[str]:
    """The lines with one space between words."""
    return [" ".join(line.split()) for line in shown(times)]


def test_times_are_shown_with_ratios_and_coverage() -> None:
    lines = narrow(made_up.times())
    assert lines[0] == "8 x 4 096 tokens on h100-sxm"
    half = lines.index("uncompressed")
    plan, full = lines[lines.index("the plan") : half], lines[half:]
    assert "decode step 4.1 ms [3.69 ms, 4.51 ms] fitted 4 ms [3 ms, 5 ms]" in plan
    assert "decode step - 8 ms [6 ms, 10 ms]" in full
    assert "peak memory, NVML 2.10 GiB [1.89 GiB, 2.31 GiB] fitted 2.00 GiB" in plan
    assert "largest batch 40 [36, 44] fitted 44" in plan
    assert "largest batch - 10 or more" in full
    below = " ".join(lines[-5:])
    assert "step 0.50, tokens a second 2.00, cache pages 0.50" in below
    assert "lower by 200 % of the cache bytes saved" in below
    assert "4.40 times the sequences, 2.00 times the tokens a second" in below
    assert "5 of 7 measured figures lie inside" in below  # not the prefill, nor torch's peak
    without = " ".join(narrow(made_up.times(largest=False, nvml=False)))
    assert "NVML 2.10 GiB [1.89 GiB, 2.31 GiB] fitted unknown: no NVML" in without
    assert "2 of 4 measured figures" in without
    assert "largest batch" not in without


def test_the_widest_times_are_not_wrapped_where_there_is_room() -> None:
    times = made_up.times()
    wide = Estimate(14.9e9, 14.38e9, 15.83e9, "B", "transferred")
    times = replace(times, plan=replace(times.plan, device_bytes=wide), full_cache=times.plan)
    lines = shown(times)
    (below,) = (i for i, line in enumerate(lines) if line.startswith("plan to uncompressed"))
    assert below - lines.index("the plan") == 2 * (1 + 9)
    assert max(map(len, lines)) <= 140
    assert not any("…" in line for line in lines)


def test_times_in_json_are_as_documented() -> None:
    found = plain(made_up.times())
    page = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| `times` |"))
    for key in (*found, *found["plan"], *found["largest"], *found["largest"]["plan"]):
        assert f"`{key}`" in row, key
    assert found["coverage"] == {"inside": 5, "of": 7}
    assert found["largest"]["ratios"] == {"batch": 4.4, "tokens_per_second": 2.0}
    assert found["largest"]["predicted"]["plan"]["batch"]["interval"] == [36.0, 44.0]
    assert found["plan"]["device_bytes"] == 2 << 30
