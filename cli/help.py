"""``--help`` in groups with examples, in plain text that needs no library to draw it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand, TyperGroup

OTHERS = "Output and help"

COMMANDS = {
    "Plan": ("search", "estimate"),
    "Look at a study": ("tui", "report", "card"),
    "Check": ("validate", "simulate", "bench", "capture"),
    "Serve": ("export", "import-policy"),
    "Machines, models, policies": ("gpus", "models", "policies", "heads", "profile"),
}

OPTIONS = {
    "What is served": ("model", "gpu", "mem", "context", "generated", "batch", "weights", "price"),
    "What is asked of the search": (
        "max_kl",
        "trials",
        "menu",
        "read_bytes",
        "moved_bytes",
        "heads",
        "stack",
        "stand_in",
        "seed",
    ),
    "What it is measured on": ("trace", "split", "workload", "text", "device"),
    "Policy": ("policy", "evicts", "to", "compare", "allow_stand_in", "strict"),
}

EXAMPLES = {
    "search": (
        "kvtune search --model llama-8b --gpu 4090 --mem 16GB --context 32k",
        "kvtune search --model smollm2-135m --gpu 4090 --mem 1GiB --context 2k",
        "kvtune search --model llama-8b --gpu 4090 --mem 16GB --for vllm",
    ),
    "estimate": (
        "kvtune estimate --model llama-8b --gpu 4090 --context 32k",
        "kvtune estimate --model llama-8b --gpu any --context 32k --batch 8",
        "kvtune estimate --model llama-8b --gpu 4090,h100 --context 8k,32k --batch 1,8 "
        "--price-per-hour 0.40,2.50 --format markdown",
    ),
    "card": ("kvtune card kvtune-runs/llama-3.1-8b-rtx-4090-16gb --out card",),
    "report": ("kvtune report kvtune-runs/llama-3.1-8b-rtx-4090-16gb",),
    "tui": ("kvtune tui kvtune-runs/llama-3.1-8b-rtx-4090-16gb",),
    "validate": ("kvtune validate kvtune-runs/smollm2-135m-rtx-4090-1gib",),
    "export": (
        "kvtune export policy.yaml --to transformers --out exported",
        "kvtune export policy.yaml --compare",
    ),
    "import-policy": (
        "kvtune import-policy Meta-Llama-3.1-8B-Instruct_kivi_KVTuner4_0.yaml --from kvtuner "
        "--model llama-8b",
    ),
    "capture": ("kvtune capture --model smollm2-135m --out trace",),
    "simulate": ("kvtune simulate policy.yaml --trace trace",),
    "gpus": ("kvtune gpus 4090",),
    "models": ("kvtune models --json",),
}


def _grouped(
    entries: Iterable[tuple[str, Any]], groups: dict[str, tuple[str, ...]], rest: str
) -> dict[str, list[Any]]:
    """Entries below their group's heading, in the order of the groups; those of none come last."""
    heading = {name: title for title, names in groups.items() for name in names}
    found: dict[str, list[Any]] = {title: [] for title in (*groups, rest)}
    for name, entry in entries:
        found[heading.get(name, rest)].append(entry)
    return {title: inside for title, inside in found.items() if inside}


class Command(TyperCommand):
    """A command whose options are grouped, with examples below them."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options below a heading for each group."""
        found = [(param.name, param.get_help_record(ctx)) for param in self.get_params(ctx)]
        records = [(name, record) for name, record in found if record]
        for title, rows in _grouped(records, OPTIONS, OTHERS).items():
            with formatter.section(title):
                formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, each on one line that can be copied."""
        super().format_epilog(ctx, formatter)
        if examples := EXAMPLES.get(self.name or ""):
            with formatter.section("Examples"):
                formatter.write("".join(f"  {example}\n" for example in examples))


class Group(TyperGroup):
    """All commands, grouped by what they are for."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands below a heading for each group."""
        rows = [(n, (n, self.commands[n].get_short_help_str(60))) for n in self.list_commands(ctx)]
        for title, inside in _grouped(rows, COMMANDS, "Commands").items():
            with formatter.section(title):
                formatter.write_dl(inside)
