"""Which plans are shown."""

from __future__ import annotations

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.validation import Number
from textual.widgets import Button, Input, Label, Select, Switch

from kvtune.tuner.explore.axes import Filter, option_bits
from kvtune.tuner.explore.study import Study

_ANY = "any"


class FilterScreen(ModalScreen[Filter | None]):
    """Asks for a filter; None leaves all as it is.

    Args:
        filter: the one in force.
        study: says which methods and precisions there are.
    """

    BINDINGS = [("escape", "dismiss", "Back")]  # noqa: RUF012

    def __init__(self, filter: Filter, study: Study) -> None:  # noqa: A002 - what it is
        super().__init__(classes="dialog")
        self.filter = filter
        options = study.facts.options
        self.methods = sorted({o.method.name for o in options} - {"full"})
        self.bits = sorted({int(option_bits(o)[0]) for o in options})

    def compose(self) -> ComposeResult:
        """One row a question."""
        filter_ = self.filter
        with Vertical(id="box") as box:
            box.border_title = "Show which plans"
            with Horizontal(classes="row"):
                yield Label("Largest KL")
                yield Input(
                    "" if filter_.largest_kl is None else f"{filter_.largest_kl:g}",
                    placeholder="any, nats/token",
                    validators=[Number(minimum=0)],
                    valid_empty=True,
                    id="largest-kl",
                )
            splits = ["heads", "layers", "pairs"]
            yield from self._choice("Options by", "split", splits, filter_.split)
            yield from self._choice("Using", "method", self.methods, filter_.method)
            bits = [str(b) for b in self.bits]
            yield from self._choice("Fewest bits", "bits", bits, filter_.least_bits)
            with Horizontal(classes="row"):
                yield Label("Only that fit")
                yield Switch(filter_.fits, id="fits")
            with Horizontal(classes="buttons"):
                yield Button("All plans", id="all")
                yield Button("Show", variant="primary", id="show")

    @staticmethod
    def _choice(label: str, name: str, values: list[str], now: object) -> ComposeResult:
        with Horizontal(classes="row"):
            yield Label(label)
            choices = [(value, value) for value in (_ANY, *values)]
            yield Select(choices, value=str(now or _ANY), allow_blank=False, id=name)

    @on(Button.Pressed, "#all")
    def take_away(self) -> None:
        """Take all filters away."""
        self.dismiss(Filter())

    @on(Button.Pressed, "#show")
    @on(Input.Submitted)
    def apply(self) -> None:
        """What was asked for."""
        entry = self.query_one("#largest-kl", Input)
        if not entry.is_valid:
            self.notify("Write a number of nats a token, such as 0.02.", severity="error")
            return
        bits = self._chosen("bits")
        self.dismiss(
            Filter(
                largest_kl=float(entry.value) if entry.value.strip() else None,
                split=self._chosen("split"),
                method=self._chosen("method"),
                least_bits=int(bits) if bits else None,
                fits=self.query_one("#fits", Switch).value,
            )
        )

    def _chosen(self, name: str) -> str | None:
        value = str(self.query_one(f"#{name}", Select).value)
        return None if value == _ANY else value

    async def action_dismiss(self, result: Filter | None = None) -> None:
        """Leave all as it is."""
        self.dismiss(None)
