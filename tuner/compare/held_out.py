"""Losses on the held-out samples, which no strategy sees; nobody's clock is charged for them."""

from __future__ import annotations

from collections.abc import Sequence

from kvtune.tuner.compare.ledger import append_entries, read_entries
from kvtune.tuner.compare.setting import Setting, live_runs
from kvtune.tuner.exchange import Choice


class HeldOut:
    """Losses of configurations on the held-out samples; what ran before is read from its file."""

    def __init__(self, setting: Setting) -> None:
        self.path = setting.folder / "held-out.jsonl"
        self.run = live_runs(setting.source, "evaluate")
        self.known = {entry.choice: entry.losses for entry in read_entries(self.path)}

    def losses(self, choices: Sequence[Choice]) -> list[Sequence[float]]:
        """Each configuration's loss on every held-out sample, nats/token."""
        keys = [tuple(choice.tolist()) for choice in choices]
        new = [c for c, key in zip(choices, keys, strict=True) if key not in self.known]
        if new:
            made = append_entries(self.path, new, self.run(new), 0.0)
            self.known |= {entry.choice: entry.losses for entry in made}
        return [self.known[key] for key in keys]
