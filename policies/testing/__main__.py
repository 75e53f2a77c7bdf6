"""``python -m kvtune.policies.testing NAME`` judges one method, format or allocator.

Without a name it prints the golden choices as JSON.
"""

from __future__ import annotations

import json
import sys

from kvtune.common.errors import KvtuneError
from kvtune.policies.testing.golden import golden
from kvtune.policies.testing.judge import judge


def main(arguments: list[str]) -> int:
    """Print the checks of each name and return 1 where any failed."""
    if not arguments:
        print(json.dumps(golden(), indent=2))
        return 0
    failed = 0
    for name in arguments:
        for verdict in judge(name):
            print(verdict, file=sys.stderr if verdict.reason else sys.stdout)
            failed += bool(verdict.reason)
    return int(failed > 0)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KvtuneError as error:
        print(f"error: {error}\n\nhint: {error.hint}", file=sys.stderr)
        sys.exit(2)
