"""The selected plan as a policy file or a serving stack's configuration."""

from __future__ import annotations

from pathlib import Path

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Label, Select, Static, Switch

from kvtune.common.errors import KvtuneError
from kvtune.common.files import write_text
from kvtune.policies.export.contract import exporters, find_exporter, write_export
from kvtune.policies.policy_file.document import PolicyDocument, write_policy
from kvtune.tui.selected import Selected

_POLICY = "policy file"


class ExportScreen(ModalScreen[None]):
    """Asks for stack and folder, writes, and says what became of every field.

    Args:
        selected: the plan.
    """

    BINDINGS = [("escape", "app.pop_screen", "Back")]  # noqa: RUF012

    def __init__(self, selected: Selected) -> None:
        super().__init__(classes="dialog")
        self.selected = selected

    def compose(self) -> ComposeResult:
        """Stack, folder, consent, answer."""
        stand_in = self.selected.study.facts.stand_in
        with Vertical(id="box") as box:
            box.border_title = f"Export the plan of trial {self.selected.plan.trial}"
            with Horizontal(classes="row"):
                yield Label("For")
                choices = [(name, name) for name in (_POLICY, *sorted(exporters()))]
                yield Select(choices, value=_POLICY, allow_blank=False, id="stack")
            with Horizontal(classes="row"):
                yield Label("Folder")
                yield Input(str(self._folder(_POLICY)), id="folder")
            if stand_in:
                with Horizontal(classes="row"):
                    yield Label("Stand-in")
                    yield Switch(False, id="stand-in")
                    yield Label(f"export, though the quality is {stand_in}'s", classes="note")
            with VerticalScroll(id="answer"):
                yield Static(id="words", markup=False)
            with Horizontal(classes="buttons"):
                yield Button("Back", id="back")
                yield Button("Write", variant="primary", id="write")

    def _folder(self, stack: str) -> Path:
        name = f"trial-{self.selected.plan.trial}"
        kind = "plans" if stack == _POLICY else f"export-{stack}"
        return self.selected.study.folder / kind / name

    @on(Select.Changed, "#stack")
    def suggest_folder(self, event: Select.Changed) -> None:
        """One a stack and plan."""
        self.query_one("#folder", Input).value = str(self._folder(str(event.value)))

    @on(Button.Pressed, "#back")
    def go_back(self) -> None:
        """Leave the screen without writing anything."""
        self.app.pop_screen()

    @on(Button.Pressed, "#write")
    @on(Input.Submitted)
    def write(self) -> None:
        """Write, and tell."""
        stack = str(self.query_one("#stack", Select).value)
        folder = Path(self.query_one("#folder", Input).value).expanduser()
        switches = self.query("#stand-in").results(Switch)
        try:
            words = written(self.selected, stack, folder, any(s.value for s in switches))
        except KvtuneError as error:
            words = f"Not written: {error}." + (f"\n{error.hint}" if error.hint else "")
        self.query_one("#words", Static).update(words)


def document_of(selected: Selected) -> PolicyDocument:
    """The plan as a policy file, for the weights that it was planned with."""
    return selected.study.document(selected.plan, selected.study.facts.weights)


def written(selected: Selected, stack: str, folder: Path, allow_stand_in: bool) -> str:
    """Write the plan; what was written and what was lost, in words.

    Raises:
        KvtuneError: a stand-in is not allowed, or the folder cannot be written.
    """
    from kvtune.tuner.flattened import loss_on_stack  # tables, which the explorer opens without

    document = document_of(selected)
    if stack == _POLICY:
        path = folder / "policy.yaml"
        write_text(path, write_policy(document))
        return f"wrote {path}"
    made = find_exporter(stack)().export(
        document, allow_stand_in=allow_stand_in, predict=loss_on_stack
    )
    paths = write_export(made, folder)
    lines = [f"wrote {path}" for path in paths]
    return "\n".join([*lines, "", *(str(line) for line in made.report), *made.notes])
