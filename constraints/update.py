"""Write ``lock.txt`` beside this file: ``pip install uv``, then ``python constraints/update.py``.

It resolves the newest of everything that pyproject's ranges allow, for every Python from 3.10 on
and every platform, around the torch that ``cpu.txt`` pins. torch and what only comes with it are
left out: a GPU machine takes the torch that fits its driver.
"""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
LOCK = HERE / "lock.txt"
OLDEST_PYTHON = "3.10"
HEADER = """\
# Every package that kvtune, its tests and its checks install, but torch; see README, "Install".
# Made on {day} by: python constraints/update.py
"""


def main() -> None:
    """Resolve, leave torch's own packages out, write."""
    lines = [line for line in resolved(torch_pins()) if not comes_with_torch(line)]
    text = HEADER.format(day=datetime.date.today().isoformat()) + "\n".join(lines) + "\n"
    LOCK.write_text(text, encoding="utf-8")


def torch_pins() -> str:
    """The lines of ``cpu.txt`` that pin a package."""
    lines = (HERE / "cpu.txt").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if "==" in line)


def resolved(pins: str) -> list[str]:
    """One requirement a line, with the markers for which it holds."""
    command = [
        "uv", "pip", "compile", "--universal", "--python-version", OLDEST_PYTHON, "--upgrade",
        "--quiet", "--no-header", "--no-annotate", "--extra", "dev", "--extra", "docs",
        "pyproject.toml", "-",
    ]  # fmt: skip
    done = subprocess.run(  # noqa: S603
        command, cwd=HERE.parent, input=pins, text=True, check=True, stdout=subprocess.PIPE
    )
    return done.stdout.splitlines()


def comes_with_torch(line: str) -> bool:
    """Whether a requirement is torch, its compiler or its CUDA libraries."""
    name = line.partition("==")[0]
    if name == "nvidia-ml-py":  # kvtune's own
        return False
    return name in ("torch", "triton", "setuptools") or name.startswith(("nvidia-", "cuda-"))


if __name__ == "__main__":
    main()
