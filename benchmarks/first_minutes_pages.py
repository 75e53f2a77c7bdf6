"""Figures of the first minutes for the pages: install, first answer, mistakes, the explorer."""

from __future__ import annotations

from page_tables import Figures, result, table

OPEN_S, STEP_S, MISTAKE_S, SEARCH_S = 0.5, 0.03, 0.5, 90.0  # goals
SEARCHES = {
    "`--menu few`, the default there": "search-stages-merged-few-cpu.json",
    "`--menu three`": "search-stages-merged-three-cpu.json",
}
_STAGES = ("capturing attention", "replaying options", "replaying policies", "running live")


def _goal(seconds: float, most: float) -> str:
    shown = f"{seconds:.2f} s" if seconds >= 0.1 else f"{1e3 * seconds:.0f} ms"
    return f"**{shown}**" if seconds <= most else shown


def _on(found: Figures) -> str:
    """What the machine did beside, as the file says."""
    return f"{found['cores']} cores at a load of {found['load']:.1f}, Python {found['python']}"


def first_answer() -> str:
    """From nothing to the first answer, and on to a plan that the model has run."""
    found = result("first-answer-cpu.json")
    steps = [
        (f"`{step['command']}`", f"{step['wall_s']:.0f} s", f"{step['cpu_s']:.0f} s")
        for step in found["steps"]
    ]
    first, real = found["first_answer_s"], found["real_plan_s"]
    sums = [
        (
            "to the first answer, 90 s asked",
            _within(first, 90),
            f"{found['first_answer_cpu_s']:.0f} s",
        ),
        (
            "to a plan that ran live, 180 s more",
            _within(real, 180),
            f"{found['real_plan_cpu_s']:.0f} s",
        ),
    ]
    loads = [load for step in found["steps"] for load in step["load"]]
    said = f"{found['cores']} cores, load {min(loads)} to {max(loads)} with these commands in it."
    return f"{table(('', 'by the clock', 'processor'), [*steps, *sums])}\n\n{said}"


def _within(seconds: float, most: float) -> str:
    return f"**{seconds:.0f} s**" if seconds <= most else f"{seconds:.0f} s: missed"


def searches_on_cpu() -> str:
    """A search of SmolLM2's weights on two cores, by menu, from the files of the latest runs."""

    def row(name: str, file: str) -> tuple[str, ...]:
        (found,) = result(file)["searches"]
        each = [found["stages"].get(stage, {}).get("seconds", 0.0) for stage in _STAGES]
        rest = found["seconds"] - sum(each)
        stages = [f"{seconds:.0f} s" for seconds in (*each, rest)]
        return (
            name, f"`{file}`", _within(found["seconds"], SEARCH_S), f"{found['processor']:.0f} s",
            *stages, f"{found['loss']:.4f} in {100 * found['share']:.1f} %",
        )  # fmt: skip

    head = (
        "methods", "file", "by the clock, 90 s asked", "processor", *_STAGES, "all else",
        "nats/token in bytes",
    )  # fmt: skip
    return table(head, (row(*each) for each in SEARCHES.items()))


def search_on_cpu_said() -> str:
    """The same in a sentence, beside what it took an older processor."""
    few, three = (result(file)["searches"][0]["seconds"] for file in SEARCHES.values())
    (older,) = result("search-stages-cpu.json")["searches"]
    verdict = "reached" if few <= SEARCH_S else "missed"
    return (
        "**The first command takes minutes on a CPU**: without `--context 2k` it took two cores of "
        f"a newer processor,\nwith nothing else to do, {few:.0f} s with the methods that a CPU "
        f"tries by itself ({SEARCH_S:.0f} s asked: {verdict}) and {three:.0f} s with\n"
        f"`--menu three`, which took an older one {older['seconds']:.0f} s "
        "([benchmarks](benchmarks.md#where-a-search-spends-its-time-on-an-h200))."
    )


def mistakes() -> str:
    """Processor seconds until a mistake is refused."""
    found = result("mistakes-cpu.json")
    rows = [
        (f"`{name}`", _goal(seconds, MISTAKE_S)) for name, seconds in found["processor_s"].items()
    ]
    alone = found["python_with_numpy_s"]
    rows.append(("a Python that imports NumPy, for scale", f"{alone:.2f} s"))
    within, every = found["within_half_a_second"], len(found["processor_s"])
    said = f"{within} of {every} within half a second; {_on(found)}."
    return f"{table(('mistake in', 'refused after'), rows)}\n\n{said}"


def explorer() -> str:
    """Opening a study of 10 000 plans, and a step of its cursor."""
    before, found = result("explorer-before-cpu.json"), result("explorer.json")
    rows = [("read the plans", "", *(f"{each['read']['cpu_s']:.2f} s" for each in (before, found)))]
    for name in found["screens"]:
        each = [file["screens"][name] for file in (before, found)]
        opened = [screen["open"]["cpu_s"] for screen in each]
        steps = [screen["step"]["cpu_median_s"] for screen in each]
        rows.append(
            (f"open, to the first picture, {name}", "0.5 s", *(_goal(s, OPEN_S) for s in opened))
        )
        rows.append(
            (f"a step of the cursor, {name}, median", "30 ms", *(_goal(s, STEP_S) for s in steps))
        )
    said = (
        f"Processor time. Before: {_on(before)}, where opening took "
        f"{before['screens']['120x40']['open']['wall_s']:.2f} s by the clock at 120x40; "
        f"now: {_on(found)}."
    )
    return f"{table(('', 'goal', 'from lines', 'from columns'), rows)}\n\n{said}"


def plain_step() -> str:
    """A token without a GPU: our pages, the exported file, the uncompressed cache."""
    now = result("plain-step.json")
    rows = [
        (name, f"{1e3 * seconds:.0f} ms") for name, seconds in now["cpu_seconds_a_token"].items()
    ]
    said = f"SmolLM2-135M in bf16, one thread, a prompt of {now['prompt']} tokens, {now['policy']}."
    return f"{table(('', 'processor time a token'), rows)}\n\n{said}"
