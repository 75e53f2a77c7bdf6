"""``python -m kvtune`` and the ``kvtune`` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a mistake, 130 when interrupted.

    Args:
        arguments: what follows ``kvtune``; None reads them from the process.
    """
    from kvtune.cli.app import build
    from kvtune.cli.failures import exit_code

    words = sys.argv[1:] if arguments is None else list(arguments)
    return exit_code(lambda: build().main(args=words, prog_name="kvtune", standalone_mode=False))


if __name__ == "__main__":
    sys.exit(main())
