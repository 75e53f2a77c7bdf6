"""A policy card as Markdown and as SVG; every string from the study is escaped."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from html import escape

from kvtune.cli.policy_card import Card
from kvtune.common.units import MIB, format_bytes, format_tokens
from kvtune.common.words import accuracy, count, figure, percent, printable
from kvtune.tuner.lengths import LossAt
from kvtune.tuner.verdict import limit_words

Row = tuple[str, ...]


def _facts(card: Card) -> list[Row]:
    """Name and value of each single figure."""
    needles = [
        ("needles found", f"{accuracy(card.retrieval)} live"),
        ("by the full cache", accuracy(card.full_cache_retrieval)),
    ]
    prompts = f"{figure(card.at_once, tier=False)} x {format_tokens(card.context_tokens)}"
    full = count(card.full_cache_sequences)
    return [
        ("model", card.model),
        ("GPU", f"{card.gpu}, {limit_words(card.memory_limit_bytes)}"),
        ("loss", f"{figure(card.kl)}, nats per token"),
        *(_loss_at(at) for at in card.other_lengths),
        ("quality", f"{card.quality}, {card.held_out_samples} held-out samples"),
        *(needles if card.retrieval else []),
        ("prompts at once", f"{prompts}; uncompressed {full}"),
        ("one prompt", f"{format_bytes(card.prompt_bytes)}, {percent(card.share)} of bf16"),
        ("peak memory", figure(card.memory)),
        ("time per token", figure(card.time_per_token)),
        ("tokens/s of all", figure(card.tokens_per_second)),
    ]


def _loss_at(at: LossAt) -> Row:
    """The loss at another length: of samples that ran, else where 80 % of plans are expected."""
    known = (
        f"{figure(at.kl)}, {count(at.samples)} samples"
        if at.samples
        else f"{at.kl.low:.2g} to {at.kl.high:.2g} expected"
    )
    return f"loss at {format_tokens(at.prompt_tokens)}", known


def _prompts(sequences: int, tokens: int) -> str:
    return f"{count(sequences)} x {format_tokens(tokens)}"


def _budgets(card: Card) -> list[Row]:
    return [
        (
            "*" if found.chosen else "",
            percent(found.share),
            f"{found.prompt_bytes / MIB:.2f}",
            _prompts(found.sequences, found.context_tokens),
            figure(found.kl, tier=False),
            found.policy,
        )
        for found in card.budgets
    ]


_BUDGET_HEADINGS = ("", "of bf16", "MiB", "at once", "KL on selection samples", "policy")
_POLICY_HEADINGS = ("policy", "MiB", "KL predicted", "KL live", "needles")


def _policies(card: Card) -> list[Row]:
    return [
        (
            found.name,
            f"{found.prompt_bytes / MIB:.2f}",
            figure(found.predicted),
            figure(found.live, tier=False),
            accuracy(found.retrieval),
        )
        for found in card.policies
    ]


def _others_heading(card: Card) -> str:
    """What they are, and where they ran if that is not where the card's own policy did."""
    where = ", in kvtune's own runtime" if card.stack else ""
    return f"Other policies at equal bytes{where}"


_TASK_HEADINGS = ("kind", "what it asks for", "KL predicted", "KL live")


def _tasks(card: Card) -> list[Row]:
    return [
        (found.name, found.about, *(figure(e, tier=False) for e in (found.predicted, found.live)))
        for found in card.tasks
    ]


def _origin(card: Card) -> list[str]:
    """Where the figures come from, a sentence each."""
    what = f"weights of {card.stand_in}" if card.stand_in else "trace"
    counted = f"Prompts at once with other budgets are counted {card.layout}."
    known = f"hash of the {what}: {card.trace_hash}; " if card.trace_hash else ""
    return [
        f"Shape of {card.model}: {card.model_source}.",
        f"Losses were measured on prompts of {format_tokens(card.measured_tokens)}; "
        f"{known}kvtune {card.kvtune}.",
        *([counted] if card.layout else []),
        *([card.rounding] if card.rounding else []),
        "Intervals: 95 % over samples for losses and needles, 10-90 % for memory and time.",
    ]


# --- Markdown ----------------------------------------------------------------------------------


def as_markdown(card: Card) -> str:
    """The card as a section of a page or of a model's description."""
    parts = [
        f"# {_plain(card.model)} on {_plain(card.gpu)}: KV-cache policy card",
        f"**{_plain(card.verdict)}**",
        _plain(card.comparison),
        _table(("", ""), _facts(card)),
        "## Bytes and loss at other budgets",
        _table(_BUDGET_HEADINGS, _budgets(card)),
        "\\* is this card's policy.",
        f"## {_others_heading(card)}",
        _table(_POLICY_HEADINGS, _policies(card)),
        *(["## By kind of text", _table(_TASK_HEADINGS, _tasks(card))] if card.tasks else []),
        "## Reproduce",
        _fenced(card.command),
        "\n".join(f"- {_plain(line)}" for line in _origin(card)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown and HTML leave as it is."""
    whole = escape(" ".join(printable(text).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]#|~])", r"\\\1", whole)


def _table(headings: Row, rows: Sequence[Row]) -> str:
    lines = [headings, ("---",) * len(headings), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return text if text == "---" else _plain(text)


def _fenced(command: str) -> str:
    """A block of code whose fence the command cannot close."""
    text = " ".join(printable(command).split())
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{text}\n{fence}"


# --- SVG ---------------------------------------------------------------------------------------

_WIDTH, _MARGIN, _LINE = 800, 32, 20
_COLUMN = 98  # characters of text across the card
_STYLE = (
    "text{font-family:system-ui,'DejaVu Sans',sans-serif;font-size:13px;fill:#1c2733}"
    ".title{font-size:20px;font-weight:600}.verdict{font-size:16px;font-weight:600;fill:#0d64b2}"
    ".head{font-weight:600}.soft{fill:#5a6a79;font-size:12px}"
    ".code{font-family:ui-monospace,'DejaVu Sans Mono',monospace;font-size:12px}"
)


class _Page:
    """Lines of text below each other, and bars beside them."""

    def __init__(self) -> None:
        self.y, self.parts = _MARGIN + 10, list[str]()

    def text(self, words: str, kind: str = "", x: int = _MARGIN) -> None:
        """Write at the present height."""
        named = f' class="{kind}"' if kind else ""
        self.parts.append(f'<text x="{x}" y="{self.y}"{named}>{escape(printable(words))}</text>')

    def lines(self, words: str, kind: str, width: int = _COLUMN, step: int = _LINE) -> None:
        """Write a paragraph and go below it."""
        for line in textwrap.wrap(words, width):
            self.text(line, kind)
            self.y += step

    def row(self, cells: Row, places: Sequence[int], kind: str = "", most: int = _COLUMN) -> None:
        """Write the cells of a table's row; a first one beyond ``most`` letters goes on below."""
        first, *rest = cells
        head, *more = textwrap.wrap(first, most) or [""]
        for cell, x in zip((head, *rest), places, strict=True):
            self.text(cell, kind, x)
        self.y += _LINE
        for line in more:
            self.text(line, kind, places[0])
            self.y += _LINE

    def bar(self, share: float, x: int, width: int, colour: str) -> None:
        """Draw a share of ``width`` beside the present line."""
        length = max(1.0, width * min(share, 1.0))
        where = f'x="{x}" y="{self.y - 11}" height="12"'
        self.parts.append(f'<rect {where} width="{width}" fill="#e8edf2"/>')
        self.parts.append(f'<rect {where} width="{length:.1f}" fill="{colour}"/>')

    def whole(self, title: str) -> str:
        """The finished picture."""
        height = self.y + _MARGIN // 2
        name = escape(printable(title))
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
            f'width="{_WIDTH}" height="{height}" role="img">\n'
            f"<title>{name}</title>\n<style>{_STYLE}</style>\n"
            '<rect width="100%" height="100%" fill="#ffffff"/>\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


def as_svg(card: Card) -> str:
    """The card as a picture of its own, without scripts, fonts or links."""
    page, title = _Page(), f"{card.model} on {card.gpu}: KV-cache policy card"
    page.lines(title, "title", 66, 28)
    page.lines(card.verdict, "verdict", 84, 22)
    page.lines(card.comparison, "soft", 110, 17)
    page.y += 10
    for name, value in _facts(card):
        page.row((name, value), (_MARGIN, 190))
    _draw_budgets(page, card)
    _draw_policies(page, card)
    _draw_tasks(page, card)
    page.y += 8
    page.lines(card.command, "code", 100, 16)
    for line in _origin(card):
        page.lines(line, "soft", 115, 16)
    return page.whole(title)


def _draw_budgets(page: _Page, card: Card) -> None:
    places = (_MARGIN, 48, 112, 178, 302, 500)
    page.y += 12
    page.row(_BUDGET_HEADINGS, places, "head")
    largest = max(found.kl.value for found in card.budgets) or 1.0
    for found, row in zip(card.budgets, _budgets(card), strict=True):
        colour = "#10804a" if found.chosen else "#0d64b2"
        page.bar(found.kl.value / largest, 420, 66, colour)
        page.row(row, places)


def _draw_policies(page: _Page, card: Card) -> None:
    places = (_MARGIN, 300, 362, 600, 700)
    page.y += 12
    if card.stack:
        page.lines(f"{_others_heading(card)}:", "soft")
    page.row(_POLICY_HEADINGS, places, "head")
    for row in _policies(card):
        page.row(row, places, most=36)


def _draw_tasks(page: _Page, card: Card) -> None:
    if not card.tasks:
        return
    places = (_MARGIN, 120, 480, 600)
    page.y += 12
    page.row(_TASK_HEADINGS, places, "head")
    for row in _tasks(card):
        page.row(row, places, most=12)
