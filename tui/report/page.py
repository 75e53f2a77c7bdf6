"""The report as one HTML file: pictures inside, nothing fetched, readable in light and dark."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from importlib import resources

from kvtune.common.words import printable
from kvtune.tui.report.meaning import ANCHOR, meaning
from kvtune.tui.report.tables import Table
from kvtune.tuner.explore.study import Study
from kvtune.tuner.verdict import limit_words

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(study: Study, emblem: str, first: str, sections: Iterable[tuple[str, str]]) -> str:
    """The whole page.

    Args:
        study: for the title.
        emblem: an SVG beside it.
        first: inner HTML of what is seen first: the verdict and its picture.
        sections: heading and inner HTML of each.
    """
    facts = study.facts
    title = f"{facts.shape.name} on {facts.card.name}, {limit_words(facts.memory_bytes)}"
    state = "" if study.state == "finished" else f" · {study.state}"
    body = "\n".join(f"<section><h2>{escape(h)}</h2>\n{inner}</section>" for h, inner in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>kvtune: {_text(title)}</title>
<style>
{_style()}</style>
</head>
<body>
<header>
{emblem}
<p>kvtune {_text(facts.kvtune)}</p>
<h1>{_text(title)}</h1>
<p>quality: {_text(facts.quality)} · {len(study.plans)} plans{escape(state)}
· <a href="#{ANCHOR}">what the figures mean</a></p>
</header>
<main>
{first}{body}
<section id="{ANCHOR}"><h2>What the figures mean</h2>
{pairs(meaning(study))}</section>
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
