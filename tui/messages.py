"""What workers tell the screens: frozen snapshots, never widgets."""

from __future__ import annotations

from dataclasses import dataclass

from textual.message import Message

from kvtune.common.errors import KvtuneError
from kvtune.tuner.explore.study import Study


@dataclass
class Arrived(Message):
    """A newer snapshot is here."""

    study: Study


@dataclass
class Lost(Message):
    """The study cannot be read; the last snapshot stays on screen."""

    error: KvtuneError
