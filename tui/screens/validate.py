"""Run the model with the selected plan, in a process of its own: predicted beside measured."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from contextlib import suppress

from textual import on, work
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widgets import Button, Label, LoadingIndicator, Static

from kvtune.common.errors import KvtuneError
from kvtune.common.files import write_text
from kvtune.common.words import accuracy, figure
from kvtune.policies.policy_file.document import write_policy
from kvtune.tui.screens.export import document_of
from kvtune.tui.selected import Selected
from kvtune.tuner.config_file import read_config
from kvtune.tuner.explore.measured import Measured, keep_answer

Command = Callable[[str, str], Sequence[str]]


def validate_command(policy: str, model: str) -> list[str]:
    """What is run; its stdout is one JSON object, its stderr says how far it is."""
    return [sys.executable, "-m", "kvtune", "validate", policy, "--model", model, "--json"]


class ValidateScreen(ModalScreen[None]):
    """Starts at once; escape or Cancel ends the process.

    Args:
        selected: the plan.
        command: what to run with a policy file and a model.
    """

    BINDINGS = [("escape", "stop", "Cancel")]  # noqa: RUF012

    def __init__(self, selected: Selected, command: Command = validate_command) -> None:
        super().__init__(classes="dialog")
        self.selected, self.command = selected, command
        self.process: Process | None = None

    def compose(self) -> ComposeResult:
        """What runs, how far it is, what it found."""
        with Vertical(id="box") as box:
            box.border_title = f"Validate the plan of trial {self.selected.plan.trial}"
            yield Label("The model runs with this plan on held-out samples.")
            yield LoadingIndicator(id="running")
            yield Static("starting ...", id="progress", markup=False)
            yield Static(id="words", markup=False)
            with Horizontal(classes="buttons"):
                yield Button("Cancel", id="stop")

    def on_mount(self) -> None:
        """Begin the live run when the screen is shown."""
        self.run_live()

    @work(exclusive=True)
    async def run_live(self) -> None:
        """The process, line by line."""
        try:
            answer = await self._answer()
        except KvtuneError as error:
            self._end(f"{error}." + (f"\n{error.hint}" if error.hint else ""))
        else:
            self._end(words_of(self.selected, answer))

    async def _answer(self) -> Measured:
        study, plan = self.selected.study, self.selected.plan
        path = study.folder / "plans" / f"trial-{plan.trial}" / "policy.yaml"
        write_text(path, write_policy(document_of(self.selected)))
        command = self.command(str(path), model_of(self.selected))
        environment = {**os.environ, "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
        self.process = await asyncio.create_subprocess_exec(
            *command, stdout=PIPE, stderr=PIPE, env=environment
        )
        out, talk = await asyncio.gather(self._stdout(), self._follow())
        if await self.process.wait() != 0:
            raise _failure(talk)
        try:
            return keep_answer(study.folder, study.facts.study, plan.trial, out)
        except KvtuneError as error:
            raise KvtuneError("the validation gave no answer that can be read") from error

    async def _stdout(self) -> str:
        assert self.process is not None  # noqa: S101 - just started
        assert self.process.stdout is not None  # noqa: S101
        return (await self.process.stdout.read()).decode(errors="replace")

    async def _follow(self) -> list[str]:
        """What it says of its progress; the newest line is shown."""
        assert self.process is not None  # noqa: S101 - just started
        assert self.process.stderr is not None  # noqa: S101
        talk = []
        async for raw in self.process.stderr:
            if line := raw.decode(errors="replace").strip():
                talk.append(line)
                self.query_one("#progress", Static).update(line)
        return talk

    def _end(self, words: str) -> None:
        """No process any more."""
        self.process = None
        self.query_one("#running").display = False
        self.query_one("#progress").display = False
        self.query_one("#words", Static).update(words)
        self.query_one("#stop", Button).label = "Back"

    @on(Button.Pressed, "#stop")
    def action_stop(self) -> None:
        """End the process, if it runs, and go back; what it still says is not shown."""
        self.workers.cancel_node(self)
        if self.process is not None and self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.terminate()
        self.app.pop_screen()


def model_of(selected: Selected) -> str:
    """What the search was asked to load: a path where it was one."""
    return read_config(selected.study.folder).model or selected.study.facts.shape.name


def words_of(selected: Selected, found: Measured) -> str:
    """Predicted beside measured, in a few lines."""
    plan = selected.plan
    lines = [
        f"predicted KL  {figure(plan.kl)}",
        f"measured KL   {figure(found.kl)}",
        f"retrieval     {accuracy(found.retrieval_accuracy)}, "
        f"full cache {accuracy(found.full_cache_accuracy)}",
        f"bytes         {plan.prompt_bytes:,} planned for the search's context; "
        f"{found.prompt_bytes:,} counted on these samples",
    ]
    if selected.study.facts.stand_in:
        lines.append(f"predicted on a stand-in ({selected.study.facts.stand_in})")
    return "\n".join(lines)


def _failure(talk: Sequence[str]) -> KvtuneError:
    """What went wrong, and its hint, as the command has said them."""

    def after(word: str) -> str:
        return " ".join(line.removeprefix(word) for line in talk if line.startswith(word))

    last = talk[-1] if talk else "the validation ended without a word"
    return KvtuneError(after("error: ").rstrip(".") or last, hint=after("hint: ") or None)
