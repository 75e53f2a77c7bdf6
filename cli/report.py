"""``kvtune report``: a study as one HTML page, with its pictures and tables beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvtune.cli import options
from kvtune.cli.output import one_line, speaking
from kvtune.cli.studies import Study, find_study


def command(
    study: Study = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Left out: report, in the run directory."),
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """A study as one page that opens anywhere: plots and tables."""
    folder = find_study(study)
    from kvtune.cli.inputs import check_writable
    from kvtune.tuner.explore.reader import StudyReader

    found = StudyReader(folder).read()
    target = out or folder / "report"
    check_writable(target, "--out")
    with speaking(as_json, quiet) as output:
        from kvtune.tui.report.write import write_report

        files = write_report(found, target, output.progress)
        output.show(one_line(f"wrote {files[0]}, and {len(files) - 1} files of what it shows"))
        output.finish("report", {"study": folder, "state": found.state, "files": files})
