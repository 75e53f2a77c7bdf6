"""Made-up tasks: their sizes, and that the prompt holds what is asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from kvtune.common.errors import KvtuneError
from kvtune.traces.needles import words_of
from kvtune.traces.samples import SPLITS, Sample
from kvtune.traces.tasks import COMMON, TASKS
from kvtune.traces.workloads import Workload, build, named_workload

TOKENS, OBSERVED = 4096, 512  # bytes, of the tests' tokenizer
WORKLOAD = Workload(
    dict.fromkeys(SPLITS, dict.fromkeys(TASKS, 1)), tokens=TOKENS, observed=OBSERVED
)


@pytest.fixture(scope="module")
def samples(tokenizer: Any) -> dict[tuple[str, str], Sample]:
    return {(sample.split, sample.kind): sample for sample in build(WORKLOAD, tokenizer)}


def texts(sample: Sample, tokenizer: Any) -> tuple[str, str, list[str]]:
    """The prompt, what is observed, and each question's answer."""
    whole = (*sample.token_ids, sample.next_token)
    answers: dict[int, list[int]] = {}
    for token, needle in zip(sample.targets, sample.needle_of_row, strict=True):
        answers.setdefault(needle, []).append(token)
    answers.pop(-1)
    return (
        tokenizer.decode(whole[: sample.prompt]),
        tokenizer.decode(whole[sample.prompt :]),
        [tokenizer.decode(each) for each in answers.values()],
    )


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", TASKS)
def test_every_answer_stands_in_the_prompt(
    samples: dict[tuple[str, str], Sample], tokenizer: Any, kind: str, split: str
) -> None:
    sample = samples[split, kind]
    assert (len(sample.token_ids), sample.observed) == (TOKENS, OBSERVED)
    prompt, observed, answers = texts(sample, tokenizer)
    assert len(answers) == sample.needles >= 1
    assert observed.replace(" ", "").rstrip("\n.").endswith(answers[-1])
    for answer in answers:
        # One token a byte: the spaces between the words of an answer are no part of it.
        assert answer in prompt.replace(" ", "") or kind in ("tracking", "common", "frequent")


def test_the_tracked_variables_hold_the_value_over_their_chain(
    samples: dict[tuple[str, str], Sample], tokenizer: Any
) -> None:
    prompt, observed, _ = texts(samples["evaluate", "tracking"], tokenizer)
    value, names = observed.split("assigned the value ")[1].split(" are: ")
    holds: dict[str, str] = {}
    for line in prompt.splitlines():
        if line.startswith("VAR ") and " = " in line:
            name, given = line.removeprefix("VAR ").split(" = ")
            holds[name] = holds.get(given.removeprefix("VAR "), given)
    assert sorted(name for name, held in holds.items() if held == value) == sorted(names.split())


def test_the_common_words_are_the_most_common(
    samples: dict[tuple[str, str], Sample], tokenizer: Any
) -> None:
    prompt, observed, _ = texts(samples["evaluate", "common"], tokenizer)
    asked = observed.split("from A to Z, are:")[1].split()
    listed = Counter(prompt.split("\n\n", 1)[1].split())
    assert asked == sorted(asked)
    assert {word for word, _ in listed.most_common(COMMON)} == set(asked)
    assert set(asked) <= set(words_of("evaluate"))


def test_the_frequent_words_stand_in_their_order(
    samples: dict[tuple[str, str], Sample], tokenizer: Any
) -> None:
    prompt, observed, _ = texts(samples["evaluate", "frequent"], tokenizer)
    asked = observed.split("most frequent first:")[1].split()
    listed = Counter(prompt.split("\n\n", 1)[1].split())
    assert [word for word, _ in listed.most_common(len(asked))] == asked


def test_the_secret_is_in_the_system_prompt_alone(
    samples: dict[tuple[str, str], Sample], tokenizer: Any
) -> None:
    prompt, _, (answer,) = texts(samples["evaluate", "leak"], tokenizer)
    system, rest = prompt.split("User:", 1)
    assert answer in system.replace(" ", "")
    assert answer not in rest.replace(" ", "")


def test_answers_that_do_not_fit_are_refused(tokenizer: Any) -> None:
    short = replace(WORKLOAD, counts={"evaluate": {"tracking": 1}}, observed=64)
    with pytest.raises(KvtuneError, match="answer fits into 64"):
        build(short, tokenizer)


def test_the_tasks_workload_has_all_of_them_held_out() -> None:
    plan = named_workload("tasks", seed=0)
    assert set(plan.counts) == {"evaluate"}
    assert set(plan.counts["evaluate"]) == set(TASKS)
