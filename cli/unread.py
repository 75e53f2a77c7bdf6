"""Options that exclude each other: what was typed wins over files, or is refused, never lost."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from kvtune.common.errors import KvtuneError

UNREAD = {
    "held_bytes": (
        "batch", "max_kl", "trials", "menu", "stack", "read_bytes", "tpot", "ttft", "sequences",
        "sampler", "jobs", "storage", "engine", "start", "moved_bytes", "heads", "stand_in",
    ),
    "arrivals": (
        "rate", "concurrency", "requests", "prompt", "output", "length_cv", "burstiness", "prefix",
    ),
    "stack": ("moved_bytes",),
}  # fmt: skip
"""By the option that asks another question: those that only the command's usual one reads."""

_INSTEAD = {
    "held_bytes": "a long generation is planned for one sequence, for kvtune's own runtime, by the "
    "bytes that it may hold at any moment: to plan it, leave out the other options; to search with "
    "them, leave out --held-bytes.",
    "arrivals": "the file says when requests come, how long they are and, in prefix_ids, what they "
    "share (docs/serve-sim.md): leave out what is of requests that are drawn, or --arrivals.",
    "stack": "no other stack keeps some heads' caches on the host: leave one of the two out.",
}


ONE_OF = (("rate", "concurrency", "arrivals"),)
"""Options that answer one question: one that was typed wins over others that a file gives."""


def let_typed_win(context: Any) -> None:
    """Take back what files give where another answer to the same question was typed.

    Args:
        context: of a command that is about to run.
    """
    for names in ONE_OF:
        if any(_was_typed(context, name) for name in names):
            for name in names:
                if name in context.params and not _was_typed(context, name):
                    context.params[name] = None


def refuse_unread(context: Any) -> None:
    """Refuse options on this command line that the question it asks does not read.

    What a file of defaults gives is not refused: it is meant for all commands.

    Args:
        context: of a command that is about to run.

    Raises:
        KvtuneError: names them.
    """
    options = _options(context)
    for question, unread in UNREAD.items():
        if _was_typed(context, question):
            refuse_typed(context, unread, options[question], _INSTEAD[question])


def refuse_typed(context: Any, names: Collection[str], question: str, hint: str) -> None:
    """Refuse some options on this command line, which a question does not read.

    Args:
        context: of a command that is about to run.
        names: of the options' parameters.
        question: as it is typed.
        hint: what to do instead.

    Raises:
        KvtuneError: names those that were typed.
    """
    options = _options(context)
    given = [options[name] for name in names if _was_typed(context, name)]
    if given:
        raise KvtuneError(f"{question} cannot be combined with {' or '.join(given)}", hint=hint)


def _options(context: Any) -> dict[str, str]:
    return {param.name: param.opts[0] for param in context.command.params}


def _was_typed(context: Any, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
