"""Workloads: deterministic, exactly sized, answerable, and disjoint between splits."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtune.common.errors import KvtuneError
from kvtune.traces import texts, workloads
from kvtune.traces.made_up_texts import MAKERS
from kvtune.traces.needles import UNASKED_END, WORDS, number_of, words_of
from kvtune.traces.samples import SPLITS, by_turns, content_hash
from kvtune.traces.workloads import Workload, build

EVERY = {"prose": 2, "code": 2, "retrieval": 2, "recall": 1}


def everywhere(**sizes: Any) -> Workload:
    """Samples of every kind in every split, sized for a tokenizer of one token a byte."""
    return Workload(dict.fromkeys(SPLITS, EVERY), **{"tokens": 1500, "observed": 300, **sizes})


@pytest.fixture(scope="module")
def samples(tokenizer: Any) -> list[Any]:
    return build(everywhere(), tokenizer)


def test_samples_have_exactly_the_asked_sizes(samples: list[Any]) -> None:
    assert len(samples) == 3 * sum(EVERY.values())
    assert len({sample.id for sample in samples}) == len(samples)
    for sample in samples:
        assert len(sample.token_ids) == 1500
        assert sample.observed == len(sample.targets) == len(sample.answer_mask) == 300
        assert sample.token_ids[0] == 0  # this tokenizer begins texts with <s>


def test_any_first_part_of_samples_by_turns_is_balanced(samples: list[Any]) -> None:
    ordered = by_turns(samples)
    assert sorted(sample.id for sample in ordered) == sorted(sample.id for sample in samples)
    for end in range(1, len(ordered)):
        count = Counter((sample.split, sample.kind) for sample in ordered[:end])
        rest = Counter((sample.split, sample.kind) for sample in ordered[end:])
        assert max(count.values()) - min(count[each] for each in rest) <= 1


def test_equal_seeds_make_equal_samples_and_others_do_not(
    samples: list[Any], tokenizer: Any
) -> None:
    assert content_hash(build(everywhere(), tokenizer)) == content_hash(samples)
    assert content_hash(build(everywhere(seed=1), tokenizer)) != content_hash(samples)


def test_more_samples_of_one_split_leave_the_others_as_they_were(tokenizer: Any) -> None:
    few = build(Workload({"search": EVERY}, tokens=1500, observed=300), tokenizer)
    more = {"search": {k: n + 1 for k, n in EVERY.items()}, "evaluate": EVERY}
    many = {s.id: s for s in build(Workload(more, tokens=1500, observed=300), tokenizer)}
    assert all(many[sample.id] == sample for sample in few)


def runs(items: list[Any], length: int) -> set[tuple[Any, ...]]:
    return {tuple(items[i : i + length]) for i in range(len(items) - length + 1)}


@pytest.mark.parametrize(
    "source",
    [
        texts.prose,
        texts.code,
        *(partial(texts.written, kind) for kind in texts.WRITTEN),
        *(partial(texts.made_up, kind) for kind in MAKERS),
    ],
    ids=["prose", "code", *texts.WRITTEN, *MAKERS],
)
def test_no_run_of_words_is_in_two_splits(source: Any) -> None:
    found = {
        split: set().union(*(runs(texts.words(d.text), texts.SHARED_WORDS) for d in documents))
        for split, documents in source().items()
    }
    assert all(len(r) > 5000 for r in found.values())
    for one, other in combinations(SPLITS, 2):
        assert not found[one] & found[other]


@pytest.mark.parametrize("kind", ["prose", "chat"])
def test_what_follows_a_splits_own_texts_shares_nothing_with_another_split(kind: str) -> None:
    own = texts.prose() if kind == "prose" else texts.chat()
    further = texts.further(kind)

    def words_in(documents: Any) -> set[tuple[Any, ...]]:
        return set().union(*(runs(texts.words(d.text), texts.SHARED_WORDS) for d in documents))

    for one, other in permutations(SPLITS, 2):
        assert not words_in(own[one]) & words_in(further[other])


MEASURED = Path(__file__).parents[1] / "benchmarks/results/text-lengths.json"


@pytest.mark.parametrize("kind", ["prose", "chat", "code", *texts.WRITTEN, *MAKERS])
def test_every_split_has_text_for_four_samples_of_8192_tokens(kind: str) -> None:
    """In SmolLM2's tokens, as many a character as ``benchmarks/text_lengths.py`` has measured.

    A quarter of kvtune's own pages, which guides of the split ``select`` are, is enough for two.
    """
    plan, measured = Workload({"search": {}}), json.loads(MEASURED.read_text("utf-8"))["kinds"]
    for split in SPLITS:
        groups = workloads._documents(plan, kind, split)  # type: ignore[arg-type]
        characters = sum(len(d.text) for some in groups for d in some)
        a_token = measured[kind][split]["characters"] / measured[kind][split]["tokens"]
        samples = 2 if (kind, split) == ("guide", "select") else 4
        assert characters / a_token > samples * 8193


def test_what_follows_leaves_shorter_samples_as_they_were(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Workload({"select": {"prose": 2, "retrieval": 1, "chat": 2}}, tokens=1500, observed=300)
    with_further = build(plan, tokenizer)
    monkeypatch.setattr(texts, "further", lambda kind: dict.fromkeys(SPLITS, ()))
    assert build(plan, tokenizer) == with_further


@pytest.mark.parametrize("kind", ["prose", "code"])
def test_no_run_of_tokens_is_in_samples_of_two_splits(samples: list[Any], kind: str) -> None:
    """100 tokens are 100 characters here, some 20 words."""
    found = {
        split: set().union(
            *(runs(s.token_ids, 100) for s in samples if s.split == split and s.kind == kind)
        )
        for split in SPLITS
    }
    for one, other in combinations(SPLITS, 2):
        assert not found[one] & found[other]


def test_samples_of_one_split_do_not_overlap_either(samples: list[Any]) -> None:
    for split in SPLITS:
        first, second = (s for s in samples if s.split == split and s.kind == "prose")
        assert not runs(first.token_ids, 200) & runs(second.token_ids, 200)


def test_needle_words_are_of_one_split_each() -> None:
    assert sorted(w for split in SPLITS for w in words_of(split)) == sorted(set(WORDS))


@given(st.integers(), st.integers(2, 9))
def test_needle_numbers_are_of_one_split_each(seed: int, digits: int) -> None:
    for index, split in enumerate(SPLITS):
        number = number_of(split, digits, random.Random(seed))  # noqa: S311
        assert len(number) == digits
        assert int(number) % len(SPLITS) == index


NEEDLE = re.compile(r"The special magic number for (\w+) is (\d{7})\.\n")
PAIR = re.compile(r"^(\w+ \w+): (\d{4})\n", re.MULTILINE)


@pytest.mark.parametrize(("kind", "pattern"), [("retrieval", NEEDLE), ("recall", PAIR)])
def test_every_question_is_answered_in_the_prompt(
    samples: list[Any], tokenizer: Any, kind: str, pattern: re.Pattern[str]
) -> None:
    for sample in (s for s in samples if s.kind == kind):
        prompt = tokenizer.decode(sample.token_ids[: sample.prompt])
        observed = tokenizer.decode([*sample.token_ids[sample.prompt :], sample.next_token])
        hidden, asked = dict(pattern.findall(prompt)), dict(pattern.findall(observed))
        answers = [""] * sample.needles
        for needle, target in zip(sample.needle_of_row, sample.targets, strict=True):
            if needle >= 0:
                answers[needle] += tokenizer.decode([target])
        assert sample.needles >= 3
        assert set(answers) <= {asked[key] for key in asked if hidden.get(key) == asked[key]}


@pytest.mark.parametrize(("observed", "needles"), [(70, 1), (130, 2), (300, 5), (600, 8)])
def test_as_many_needles_are_asked_for_as_fit(tokenizer: Any, observed: int, needles: int) -> None:
    workload = Workload({"search": {"retrieval": 3}}, tokens=2000, observed=observed)
    found = [sample.needles for sample in build(workload, tokenizer)]
    assert all(abs(count - needles) <= 1 for count in found)


def test_too_small_an_observed_part_for_any_question_is_refused(tokenizer: Any) -> None:
    with pytest.raises(KvtuneError, match="no question fits"):
        build(Workload({"search": {"retrieval": 1}}, tokens=500, observed=20), tokenizer)


def test_needles_lie_at_different_depths(tokenizer: Any) -> None:
    workload = Workload({"search": {"retrieval": 6}}, tokens=2000, observed=600)
    depths = [
        match.start()
        for sample in build(workload, tokenizer)
        for match in NEEDLE.finditer(tokenizer.decode(sample.token_ids[: sample.prompt]))
    ]
    assert min(depths) < 400
    assert max(depths) > 1000


def test_the_last_tokens_of_a_prompt_do_not_show_what_is_asked(tokenizer: Any) -> None:
    """Else methods with an observation window keep the needles, as they do in no other text."""
    workload = Workload({"search": {"retrieval": 12}}, tokens=900, observed=130)
    for sample in build(workload, tokenizer):
        prompt = sample.token_ids[: sample.prompt]
        last = tokenizer.decode(prompt[-UNASKED_END:])
        assert NEEDLE.search(tokenizer.decode(prompt))
        assert "magic" not in last
        assert not re.search(r"\d{5}", last)


def write_texts(folder: Path, count: int) -> Path:
    rng = random.Random(0)  # noqa: S311
    lines = [json.dumps({"text": " ".join(rng.choices(WORDS, k=200))}) for _ in range(count)]
    (folder / "mine.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder / "mine.jsonl"


def user_samples(tokenizer: Any, path: Path, count: int = 2) -> list[Any]:
    counts: Any = {split: {"user": count} for split in SPLITS}
    return build(Workload(counts, tokens=400, observed=50, files=(path,)), tokenizer)


@pytest.mark.parametrize("count", [1, 30])
def test_the_users_jsonl_is_cut_into_disjoint_samples(
    tokenizer: Any, tmp_path: Path, count: int
) -> None:
    path = write_texts(tmp_path, 30)
    if count == 1:  # one long text
        joined = "\n".join(
            json.loads(line)["text"] for line in path.read_text().split("\n") if line
        )
        path = tmp_path / "mine.txt"
        path.write_text(joined)
    found = user_samples(tokenizer, path)
    assert [s.kind for s in found] == ["user"] * 6
    for one, other in combinations(found, 2):
        assert not runs(one.token_ids, 100) & runs(other.token_ids, 100)


def test_pieces_of_a_text_make_up_the_text() -> None:
    text = "".join(f"line {number}\n" for number in range(103)) + "the end"
    pieces = list(texts._pieces(texts.Document("mine", text)))
    assert len(pieces) > 10
    assert "".join(piece.text for piece in pieces) == text


def test_too_little_text_says_how_much_there_is(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(KvtuneError, match=r"enough for \d+ samples of 400 tokens, not 9999"):
        user_samples(tokenizer, write_texts(tmp_path, 30), count=9999)


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("a.jsonl", '{"text": "x"}\n{"txt": "y"}\n', ":2"),
        ("a.jsonl", '{"text": "x"}\n\n{"text": 3}\n', ":3"),
        ("a.jsonl", "no json\n", ":1"),
        ("a.jsonl", "[]\n", ":1"),
        ("a.csv", "x", ""),
    ],
)
def test_a_users_mistake_is_named_with_file_and_line(
    tokenizer: Any, tmp_path: Path, name: str, text: str, where: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(KvtuneError) as caught:
        user_samples(tokenizer, path)
    assert caught.value.where == f"{path}{where}"


def test_unreadable_user_files_are_one_clear_error(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(KvtuneError, match="cannot be read"):
        user_samples(tokenizer, tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    with pytest.raises(KvtuneError, match="UTF-8"):
        user_samples(tokenizer, tmp_path / "latin.txt")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"counts": {"serch": {"prose": 1}}}, "no split"),
        ({"counts": {"search": {"pros": 1}}}, "no kind"),
        ({"counts": {"search": {"prose": -1}}}, "-1 prose"),
        ({"counts": {}, "tokens": 10, "observed": 10}, "10 observed of 10"),
        ({"counts": {"search": {"user": 1}}}, "without a file"),
    ],
)
def test_wrong_workloads_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(KvtuneError, match=message):
        Workload(**fields)


def test_the_ready_made_workloads_hold_what_they_are_for() -> None:
    small, standard = workloads.small(), workloads.standard()
    assert {split: sum(kinds.values()) for split, kinds in small.counts.items()} == {
        "search": 3,
        "select": 3,  # plans are not judged on what they were fitted to
        "evaluate": 3,
    }
    assert sum(standard.counts["search"].values()) == 14
    assert "search: 1 prose, 1 code, 1 retrieval" in small.describe()
    assert json.loads(json.dumps(standard.as_dict()))["tokens"] == 2048


def test_made_up_json_is_json_whose_totals_are_right_and_whose_customers_come_back() -> None:
    records = [json.loads(text) for text in MAKERS["json"](random.Random(3))]  # noqa: S311
    assert all(r["total"] == sum(line["cents"] for line in r["lines"]) for r in records)
    customers = Counter(r["customer"]["id"] for r in records)
    assert len(customers) == 4
    assert sum(customers.values()) == len(records) > 20
    assert len({r["order"] for r in records}) == len(records)


@pytest.mark.parametrize("kind", MAKERS)
def test_what_splits_share_is_a_small_part_of_what_is_made_up(kind: str) -> None:
    sizes = [sum(len(d.text) for d in documents) for documents in texts.made_up(kind).values()]
    assert min(sizes) > 0.9 * max(sizes) > 90_000


def test_made_up_logs_are_in_order_of_time() -> None:
    lines = "\n".join(MAKERS["logs"](random.Random(0))).splitlines()  # noqa: S311
    assert [line[:23] for line in lines] == sorted(line[:23] for line in lines)
    assert {line.split()[1] for line in lines} == {"INFO", "ERROR"}


def test_what_a_made_up_dialogue_is_reminded_of_is_what_was_settled_last() -> None:
    said: dict[tuple[str, str], str] = {}
    reminders = 0
    for turn in MAKERS["dialogue"](random.Random(5)):  # noqa: S311
        if found := re.search(r"(\d+) (\w+)s to (\w+) at", turn):
            said[found[2], found[3]] = found[1]
        elif found := re.search(r"We said (\d+), the (\w+)s for (\w+)\.", turn):
            reminders += 1
            assert said[found[2], found[3]] == found[1]
    assert reminders > 5


def test_made_up_stories_are_each_in_one_of_three_languages() -> None:
    marks = {"German": " nach ", "French": " pour ", "Spanish": " hacia "}
    seen = set()
    for seed in range(20):
        story = " ".join(MAKERS["language"](random.Random(seed)))  # noqa: S311
        mine = [language for language, mark in marks.items() if mark in story]
        assert len(mine) == 1
        seen.update(mine)
    assert seen == set(marks)


def test_the_mixed_workload_has_every_kind_in_every_split(tokenizer: Any) -> None:
    plan = replace(workloads.mixed(), tokens=700, observed=200)
    made = Counter((sample.split, sample.kind) for sample in build(plan, tokenizer))
    kinds = {"prose", "code", "retrieval", "guide", "source", *MAKERS}
    assert made == dict.fromkeys(((split, kind) for split in SPLITS for kind in kinds), 1)
