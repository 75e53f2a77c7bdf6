"""The report as one HTML file: pictures inside, nothing fetched, readable in light and dark."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from importlib import resources

from kvtune.common.units import format_bytes
from kvtune.common.words import printable
from kvtune.tui.report.tables import Table
from kvtune.tuner.explore.study import Study

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(study: Study, first: str, sections: Iterable[tuple[str, str]]) -> str:
    """The whole page.

    Args:
        study: for the title.
        first: inner HTML of what is seen first: the verdict and its picture.
        sections: heading and inner HTML of each.
    """
    facts = study.facts
    title = f"{facts.shape.name} on {facts.card.name}, {format_bytes(facts.memory_bytes)}"
    state = "" if study.state == "finished" else f" · {study.state}"
    body = "\n".join(f"<section><h2>{escape(h)}</h2>\n{inner}</section>" for h, inner in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>kvtune: {escape(title)}</title>
<style>
{_style()}</style>
</head>
<body>
<header>
<p>kvtune {escape(facts.kvtune)}</p>
<h1>{escape(title)}</h1>
<p>quality: {escape(facts.quality)} · {len(study.plans)} plans{escape(state)}</p>
</header>
<main>
{first}{body}
</main>
</body>
</html>
"""


def _style() -> str:
    return (resources.files("kvtune.tui.report") / "page.css").read_text(encoding="utf-8")


def table(content: Table) -> str:
    """A table; the first column are row headings. Cells name their column, for narrow screens."""
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in content.headings)
    top = f"<thead><tr>{head}</tr></thead>" if any(content.headings) else ""
    rows = "".join(f"<tr>{_cells(row, content.headings)}</tr>\n" for row in content.rows)
    return f'<div class="wide"><table>{top}<tbody>\n{rows}</tbody></table></div>\n'


def _cells(row: tuple[str, ...], headings: tuple[str, ...]) -> str:
    first, *rest = map(_text, row)
    names = map(_text, headings[1:])
    cells = (f'<td data-of="{n}">{c}</td>' for n, c in zip(names, rest, strict=True))
    return f'<th scope="row">{first}</th>' + "".join(cells)


def _text(words: str) -> str:
    return escape(printable(words))


def verdict(sentence: str, comparison: str) -> str:
    """The answer in one sentence, and whether other policies are as good."""
    return f'<p class="verdict">{_text(sentence)}</p>\n<p>{_text(comparison)}</p>\n'


def picture(wide: str, narrow: str, words: str) -> str:
    """An inline SVG with its caption, and another that takes its place on narrow screens."""
    both = f'<div class="on-wide">{wide}</div><div class="on-narrow">{narrow}</div>'
    return f"<figure>{both}<figcaption>{_text(words)}</figcaption></figure>\n"


def listed(lines: Iterable[str]) -> str:
    """Sentences, one a bullet."""
    return "<ul>" + "".join(f"<li>{_text(line)}</li>" for line in lines) + "</ul>\n"


def pairs(values: dict[str, object]) -> str:
    """Names and values."""
    rows = "".join(f"<dt>{_text(k)}</dt><dd>{_text(str(v))}</dd>" for k, v in values.items())
    return f"<dl>{rows}</dl>\n"
