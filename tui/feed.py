"""Where snapshots come from: the explorer asks, and draws whatever it is given."""

from __future__ import annotations

from typing import Protocol

from kvtune.tuner.explore.study import Study


class Feed(Protocol):
    """Gives a study as it is now; called in a thread, about once a second."""

    def read(self) -> Study:
        """The newest snapshot.

        Raises:
            KvtuneError: there is none, in words for people.
        """
        ...
