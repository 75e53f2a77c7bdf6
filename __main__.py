"""``python -m kvtune`` and the ``kvtune`` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""torch's allocator gives whole pages back from anywhere, so that what it holds is what is used."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a mistake, 130 when interrupted.

    Args:
        arguments: what follows ``kvtune``; None reads them from the process.
    """
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")  # none is used, all would be looked for
    from kvtune.cli.app import run
    from kvtune.cli.failures import exit_code

    if "PYTORCH_ALLOC_CONF" not in os.environ:
        for name, setting in ALLOCATOR.items():
            os.environ.setdefault(name, setting)
    words = sys.argv[1:] if arguments is None else list(arguments)
    return exit_code(lambda: run(words))


if __name__ == "__main__":
    sys.exit(main())
