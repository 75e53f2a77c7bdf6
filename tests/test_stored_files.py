"""What is stored is read by schema: nonsense and damage are refused in words, with their place."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.common.stored import DEEPEST, checked, parse_json, read_bytes, whole_lines
from kvtune.common.units import MOST_BYTES, MOST_TOKENS, parse_bytes, parse_tokens
from kvtune.profiles.kernel_table import COLUMNS, parse_rows
from kvtune.profiles.strict import parse
from kvtune.simulator.quality.tables import Tables
from kvtune.simulator.quality.tables_file import load_tables, save_tables
from kvtune.tests.made_up import write_study
from kvtune.traces.manifest import read_manifest
from kvtune.traces.samples import Sample
from kvtune.traces.texts import user
from kvtune.tuner.bench_runs import read_runs
from kvtune.tuner.explore.measured import keep_answer
from kvtune.tuner.explore.reader import StudyReader
from kvtune.tuner.stored_result import read_result

LOSS = {"value": 0.02, "interval": [0.01, 0.03], "unit": "nats/token", "tier": "live"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "a": 2}', "f: the key 'a' stands twice"),
        ("[NaN]", "NaN is no finite number"),
        ("[-Infinity]", "no finite number"),
        ("1e999", "no finite number"),
        ("9" * 5000, "more than 18 digits"),
        ("[" * 100_000, "nests deeper than 24"),
        ('{"k":' * 30 + "1" + "}" * 30, "nests deeper than 24"),
        ('"\\ud800"', "half a surrogate pair"),
        ('{"a":\n1,\n2}', "f:3: is no JSON"),
        (b'"\xff"', "f:1: is not UTF-8"),
        ("", "is no JSON"),
    ],
)
def test_json_that_no_writer_of_ours_makes_is_refused(text: str | bytes, says: str) -> None:
    with pytest.raises(KvtuneError, match=says):
        parse_json(text, "f")


def test_json_within_the_limits_is_read_as_it_is() -> None:
    value = {"a": [1, -2.5, True, None, 'quote " and [ bracket', "\U0001f600"], "b": {"c": {}}}
    assert parse_json(json.dumps(value), "f") == value
    nested = "[" * DEEPEST + "]" * DEEPEST
    assert json.dumps(parse_json(nested, "f")) == nested


def test_a_file_beyond_its_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"123456")
    assert read_bytes(tmp_path / "f", most=6) == b"123456"
    with pytest.raises(KvtuneError, match="more than 5 bytes"):
        read_bytes(tmp_path / "f", most=5)


def test_whole_lines_and_the_half_one_behind_them() -> None:
    assert whole_lines(b"a\n\nb\nhalf") == ([b"a", b"", b"b"], b"half")
    assert whole_lines(b"") == ([], b"")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"value": 0.04}, "outside its own interval"),
        ({"value": 0.001}, "outside its own interval"),
        ({"value": -0.02, "interval": [-0.03, 0.0]}, "is negative"),
        ({"interval": [0.03, 0.01]}, "outside its own interval"),
        ({"value": "0.02"}, "valid number"),
        ({"value": True}, "valid number"),
        ({"interval": [0.01]}, "interval"),
        ({"tier": "guessed"}, "tier"),
        ({"more": 1}, "more"),
        ({"value": 1e30, "interval": [0, 1e31]}, "no finite figure"),
    ],
)
def test_a_figure_must_lie_in_its_interval(change: dict[str, Any], says: str) -> None:
    assert checked(Estimate, LOSS, "f").value == 0.02
    with pytest.raises(KvtuneError, match=says):
        checked(Estimate, LOSS | change, "f")


def test_a_ratio_may_fall() -> None:
    fell = {"value": -0.1, "interval": [-0.2, 0.0], "unit": "ratio - 1", "tier": "live"}
    assert checked(Estimate, fell, "f").low == -0.2


@pytest.mark.parametrize("text", [".5", "0", "0k", "0.0001k", "1e3", "9" * 400, "", "-1", "1/2"])
def test_no_number_of_tokens(text: str) -> None:
    with pytest.raises(KvtuneError, match="is no number of tokens"):
        parse_tokens(text)


@pytest.mark.parametrize(
    "text",
    ["inf", ".1B", "0GB", "9" * 400 + "GB", "9999999999999GB", "16", "1" + " " * 30_000 + "!"],
)
def test_no_amount_of_memory(text: str) -> None:
    with pytest.raises(KvtuneError, match="is no amount of memory"):
        parse_bytes(text)


def test_amounts_are_exact_to_the_byte() -> None:
    assert parse_bytes("0.3GB") == 300_000_000
    assert parse_bytes(f"{MOST_BYTES}B") == MOST_BYTES
    assert parse_tokens("0.5k") == 512
    assert parse_tokens(str(MOST_TOKENS)) == MOST_TOKENS


ROW = dict.fromkeys(COLUMNS, "1") | {
    "op": "linear", "kernel": "k", "execution": "graph", "number_format": "bf16",
    "spread": "uniform", "l2": "cold", "version": "v", "throttle": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"p10_us": "2"}, "must not fall"),
        ({"p90_us": "0.5"}, "must not fall"),
        ({"bytes": "9" * 5000}, "'bytes' must be"),
        ({"watts": "1e300"}, "at most"),
        ({"median_us": "nan"}, "above zero"),
        ({"throttle": "a,b"}, "more cells"),
        ({"op": "x" * 200_000}, "is no CSV"),
    ],
)
def test_kernel_rows_that_no_run_measures(change: dict[str, str], says: str) -> None:
    def table(row: dict[str, str]) -> list[str]:
        return [",".join(COLUMNS), ",".join(row[name] for name in COLUMNS)]

    assert len(parse_rows(table(ROW), "k.csv")) == 1
    with pytest.raises(KvtuneError, match=says):
        parse_rows(table(ROW | change), "k.csv")


@pytest.mark.parametrize(
    "text",
    ["a: !!timestamp x", "- " * 200 + "1", "a: &a [*a]", "a: {[x]: 1}", "a: 1\n---\nb: 2", "\x00"],
)
def test_yaml_that_is_no_plain_tree_is_refused(text: str) -> None:
    with pytest.raises(KvtuneError):
        parse(text, "x.yaml")


def test_aliases_do_not_multiply_without_end() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(KvtuneError, match="aliases written out"):
        parse("\n".join(lines), "x.yaml")


def _changed(path: Path, change: Any) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["baselines"][0]["predicted"].update(value=99.0),
        lambda r: r["baselines"][0].update(prompt_bytes=-1),
        lambda r: r["baselines"][0]["by_kind"]["code"].update(value=-0.1),
        lambda r: r["quality"].update(interval=[0.0, 0.0]),
        lambda r: r["predicted_quality"].update(kl_nats_per_token=-1.0),
        lambda r: r["front"][0].update(chosen=False),
        lambda r: r["front"][0]["parameters"].update(deep={"a": 1}),
        lambda r: r.update(unknown=1),
        lambda r: r.pop("provenance"),
    ],
)
def test_results_that_no_search_writes(tmp_path: Path, change: Any) -> None:
    path = write_study(tmp_path, 4, live=True) / "result.json"
    assert read_result(path).baselines
    _changed(path, change)
    with pytest.raises(KvtuneError, match="damaged, or of another version"):
        read_result(path)


@pytest.mark.parametrize(
    ("line", "change"),
    [
        (0, lambda r: r["shape"].update(layers=2**40)),
        (0, lambda r: r["shape"].update(windows=[True] * 32)),
        (0, lambda r: r.update(memory_bytes=[0])),
        (0, lambda r: r.update(study="../x")),
        (0, lambda r: r.update(options="/etc/passwd")),
        (0, lambda r: r.update(kvtune_plans="1")),
        (1, lambda r: r.update(kl=[0.5, 0.1, 0.2])),
        (1, lambda r: r.update(kl=[-0.1, -0.2, 0.2])),
        (1, lambda r: r.update(sequences=2**70)),
        (1, lambda r: r.update(heads="////")),
        (1, lambda r: r.update(parameters=[])),
    ],
)
def test_plans_that_no_search_writes(tmp_path: Path, line: int, change: Any) -> None:
    path = write_study(tmp_path, 3, finished=False) / "plans.jsonl"
    records = [json.loads(text) for text in path.read_text().splitlines()]
    change(records[line])
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(KvtuneError):
        StudyReader(tmp_path).read()


def test_a_validation_that_is_none_is_not_kept(tmp_path: Path) -> None:
    figure = {"kl_nats_per_token": 0.02, "interval": [0.01, 0.03], "tier": "live"}
    plain = {"quality": figure, "perplexity_change": None, "retrieval_accuracy": None,
             "full_cache_accuracy": None, "counted_bytes": 5}  # fmt: skip
    assert keep_answer(tmp_path, "s", 1, json.dumps(plain)).kl.value == 0.02
    for bad in ({"quality": figure | {"interval": [0.03, 0.04]}}, {"by_kind": "x"}, {"x": 1}):
        with pytest.raises(KvtuneError):
            keep_answer(tmp_path, "s", 2, json.dumps(plain | bad))
    assert not (tmp_path / "validated" / "s" / "trial-2.json").exists()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("loss_root", lambda a: a[:, :-1]),
        ("loss_root", lambda a: a * np.float16("nan")),
        ("loss_root", lambda a: -a - np.float16(1)),
        ("loss_root", lambda a: a.astype(np.float32)),
        ("factor_codes", lambda a: a[..., 0]),
        ("factor_scale", lambda a: a[:1]),
        ("group", lambda a: a + 1000),
    ],
)
def test_tables_whose_arrays_do_not_fit_their_header(
    make_tables: Any, tmp_path: Path, name: str, change: Any
) -> None:
    from safetensors import safe_open

    tables: Tables = make_tables()
    path = tmp_path / "t.safetensors"
    save_tables(tables, path, {})
    assert load_tables(path)[0].samples == tables.samples
    with safe_open(path, framework="numpy") as file:
        about = file.metadata()
    arrays = load_file(path)
    arrays[name] = np.ascontiguousarray(change(arrays[name]))
    path.write_bytes(save(arrays, metadata=about))
    with pytest.raises(KvtuneError):
        load_tables(path)


@pytest.mark.parametrize("value", [None, [], "x", {"format": 2}, {"format": 1}, {"format": "1"}])
def test_what_is_no_trace_manifest(value: Any) -> None:
    with pytest.raises(KvtuneError):
        read_manifest(value, "m")


def test_a_samples_numbers_are_checked() -> None:
    plain = {"id": "a", "split": "search", "kind": "code", "token_ids": [1, 2, 3], "next_token": 4,
             "observed": 1, "needle_of_row": [-1]}  # fmt: skip
    assert checked(Sample, plain, "f").prompt == 2
    for bad in ({"token_ids": [1, "2", 3]}, {"observed": 3}, {"next_token": -1}, {"kind": "x"}):
        with pytest.raises(KvtuneError):
            checked(Sample, plain | bad, "f")


def test_bench_runs_are_checked_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text('{"policy": 1}\n')
    with pytest.raises(KvtuneError, match=r"runs\.jsonl:1"):
        read_runs(tmp_path)


def test_texts_of_another_encoding_or_depth_are_refused(tmp_path: Path) -> None:
    for name, data in (("a.txt", b"\xff"), ("b.jsonl", b"[" * 2000), ("c.jsonl", b'{"text": 1}')):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(KvtuneError, match=name):
            user([tmp_path / name])


def test_damaged_studies_end_in_words(tmp_path: Path) -> None:
    """A hundred seeded mutations of a study's two files; whatever else is raised is a fault."""
    write_study(tmp_path, 2, live=True)
    whole = {n: (tmp_path / n).read_bytes() for n in ("plans.jsonl", "result.json")}
    rng, refused = random.Random(0), 0  # noqa: S311
    for _ in range(100):
        name = rng.choice(list(whole))
        data = bytearray(whole[name])
        at = rng.randrange(len(data))
        if name == "plans.jsonl":
            at = rng.randrange(data.index(b"\n"), len(data))  # behind the options: they take longer
        data[at] ^= 1 << rng.randrange(8)
        (tmp_path / name).write_bytes(bytes(data[: rng.choice((len(data), at + 1))]))
        try:
            StudyReader(tmp_path).read()
        except KvtuneError:
            refused += 1
        (tmp_path / name).write_bytes(whole[name])
    assert refused > 30
