"""Exported files read by the stacks' own parsers, where these can be imported without a GPU.

    pip install lmdeploy sglang mlx-lm lmcache      # what is missing is passed over
    python benchmarks/parsed_targets.py --out FILE

Plans of 16, 8 and 4 bits are exported for a model of an 8B's shape, and each file is given to what
the stack itself reads its settings with: every setting has to come back as it was written.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shlex
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from kvtune.common.files import write_json
from kvtune.policies.export.contract import Export, find_exporter
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.grouped import Int4, Int8
from kvtune.policies.methods.full import Full
from kvtune.policies.option import ALL, Option
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.document import ModelFacts, PolicyDocument, Serving

FACTS = ModelFacts("an 8B's shape", 32, 8, 128, 8192)
FORMATS = {"16 bits": Bf16, "8 bits": Int8, "4 bits": Int4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=sorted(PARSERS), help="the others' answers stay")
    arguments = parser.parse_args()
    known = arguments.only and arguments.out.exists()
    found: dict[str, Any] = json.loads(arguments.out.read_text("utf-8")) if known else {}
    for stack, (package, read) in PARSERS.items():
        if arguments.only not in (None, stack):
            continue
        for plan in FORMATS:
            print(f"{stack}, {plan}...", file=sys.stderr, flush=True)
            found.setdefault(stack, {})[plan] = told = parsed(stack, package, read, plan)
            print(told, file=sys.stderr, flush=True)
        write_json(arguments.out, found)


def parsed(
    stack: str, package: str, read: Callable[[Export, Path], dict[str, Any]], plan: str
) -> dict[str, Any]:
    """What the stack's parser made of a file, beside what was written."""
    form = FORMATS[plan]()
    policy = Policy.uniform(Option(Full(), ALL, form, form), FACTS.layers, FACTS.kv_heads)
    document = PolicyDocument(policy, FACTS, serving=Serving(context_tokens=4096, batch=4))
    made = find_exporter(stack)().export(document, model="models/8b")
    try:
        release = importlib.metadata.version(package) if package else "the shell"
        with tempfile.TemporaryDirectory() as folder:
            for name, text in made.files.items():
                Path(folder, name).write_text(text, "utf-8")
            settings = read(made, Path(folder))
    except importlib.metadata.PackageNotFoundError:
        return {"passed over": f"{package} is not installed"}
    except (Exception, SystemExit) as fault:  # parsers leave by the latter
        traceback.print_exc()
        return {"fault": repr(fault)[:400]}
    wrong = {name: both for name, both in settings.items() if both[0] != both[1]}
    return {"release": release, "settings": len(settings), "read otherwise": wrong}


def flags(made: Export, name: str) -> dict[str, str]:
    """The flags of a one-line file."""
    words = shlex.split(made.files[name].splitlines()[-1])
    return dict(zip(words[::2], words[1::2], strict=True))


def compared(asked: dict[str, str], read: Any) -> dict[str, Any]:
    """Each setting as it was written, and as it was read."""
    return {
        name: (value, str(getattr(read, name.lstrip("-").replace("-", "_"))))
        for name, value in asked.items()
    }


def lmdeploy(made: Export, folder: Path) -> dict[str, Any]:
    """The flags of ``lmdeploy serve api_server``, and the configuration that they become."""
    from lmdeploy.cli.cli import CLI
    from lmdeploy.cli.serve import SubCliServe
    from lmdeploy.messages import TurbomindEngineConfig

    if not SubCliServe.subparsers.choices:
        CLI.add_parsers()
        SubCliServe.add_parsers()
    asked = flags(made, "lmdeploy.txt")
    words = ["serve", "api_server", "models/8b", *(word for pair in asked.items() for word in pair)]
    read = CLI.parser.parse_args(words)
    names = "quant_policy", "session_len", "max_batch_size", "cache_block_seq_len"
    TurbomindEngineConfig(**{name: getattr(read, name) for name in names})
    return compared(asked, read)


def sglang(made: Export, folder: Path) -> dict[str, Any]:
    """The flags of ``sglang serve``, its configuration file merged in by SGLang itself."""
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    merger = ConfigArgumentMerger(parser)
    words = merger.merge_config_with_args(["--config", str(folder / "sglang.yaml")])
    read = parser.parse_args(words)
    asked = yaml.safe_load(made.files["sglang.yaml"])
    return compared({name: str(value) for name, value in asked.items()}, read)


def mlx(made: Export, folder: Path) -> dict[str, Any]:
    """The flags of ``mlx_lm.generate``."""
    from mlx_lm.generate import setup_arg_parser

    asked = flags(made, "mlx.txt")
    read = setup_arg_parser().parse_args([word for pair in asked.items() for word in pair])
    return compared(asked, read)


def lmcache(made: Export, folder: Path) -> dict[str, Any]:
    """The configuration that LMCache makes of its file; what it does not know it passes over."""
    from lmcache.v1.config import LMCacheEngineConfig

    read = LMCacheEngineConfig.from_file(str(folder / "lmcache.yaml"))
    asked = yaml.safe_load(made.files["lmcache.yaml"])
    return compared({name: str(value) for name, value in asked.items()}, read)


def ollama(made: Export, folder: Path) -> dict[str, Any]:
    """The variables that a shell hands to ``ollama serve``, as the file's note says to start it."""
    words = ["sh", "-c", "set -a; . ./ollama.env; env"]
    told = subprocess.run(words, cwd=folder, env={}, capture_output=True, text=True, check=True)  # noqa: S603
    read = dict(line.split("=", 1) for line in told.stdout.splitlines())
    lines = (x for x in made.files["ollama.env"].splitlines() if x and x[0] != "#")
    asked = dict(line.split("=", 1) for line in lines)
    return {name: (shlex.split(value)[0], read.get(name)) for name, value in asked.items()}


PARSERS: dict[str, tuple[str, Callable[[Export, Path], dict[str, Any]]]] = {
    "lmdeploy": ("lmdeploy", lmdeploy),
    "sglang": ("sglang", sglang),
    "mlx": ("mlx-lm", mlx),
    "lmcache": ("lmcache", lmcache),
    "ollama": ("", ollama),
}

if __name__ == "__main__":
    main()
