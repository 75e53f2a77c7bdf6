"""``import kvtune``: the same answers as the commands, typed, and nothing heavy imported for it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kvtune
from kvtune.__main__ import main
from kvtune.cli.inputs import read_policy_input
from kvtune.common.errors import KvtuneError
from kvtune.simulator.quality.tables import Tables
from kvtune.tests.made_up import Notes
from kvtune.tuner import search_options

ROOT = Path(kvtune.__file__).parent


def test_importing_kvtune_imports_nothing_of_its_own() -> None:
    code = "import kvtune, sys; print(sorted(m for m in sys.modules if m.startswith('kvtune.')))"
    done = subprocess.run(  # noqa: S603 - our own words
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.anchor
    )
    assert done.stdout.strip() == "[]"


def test_every_name_is_there() -> None:
    assert all(getattr(kvtune, name) is not None for name in kvtune.__all__)
    assert set(kvtune.__all__) <= set(dir(kvtune))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="serach"):
        kvtune.serach  # noqa: B018


def test_every_function_is_described_where_the_library_is() -> None:
    page = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    described = set(re.findall(r"`kvtune\.(\w+)", page))
    assert described == set(kvtune.__all__) - {"__version__"}


def test_estimates_are_those_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    from kvtune.__main__ import main

    words = ["estimate", "--model", "llama-8b", "--gpu", "4090,h100", "--context", "8k,32k"]
    main([*words, "--batch", "2", "--format", "json", "--quiet"])
    rows = json.loads(capsys.readouterr().out)["rows"]

    cases = kvtune.estimate("llama-8b", ["4090", "h100"], context=["8k", 32768], batch=2)

    assert len(cases) == len(rows) == 4
    for case, row in zip(cases, rows, strict=True):
        assert (case.card.gpu.slug, case.context_tokens) == (row["gpu"], row["context_tokens"])
        assert case.cost is not None
        assert case.cost.memory.value == row["memory"]["value"]
        assert case.cost.latency.as_dict() == row["latency"]


def test_a_size_may_be_a_number_or_text() -> None:
    asked = [kvtune.estimate("llama-8b", "4090", mem)[0].budget for mem in (16 * 10**9, "16GB")]
    assert asked[0] == asked[1]
    assert asked[0] is not None
    assert asked[0].limit_bytes == 16 * 10**9


def test_a_policy_stands_beside_the_full_cache(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(
        "kvtune_policy: 1\npolicy: {method: snapkv, budget: 25 %, keys: int4, values: int4}\n"
    )
    full, small = kvtune.estimate("llama-8b", "h100", policy=file)
    assert full.cost is not None
    assert small.cost is not None
    assert small.cost.prompt_bytes < full.cost.prompt_bytes / 8


def test_a_search_is_asked_what_the_command_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvtune.__main__ import main
    from kvtune.tuner import search

    asked = []

    def record(request: kvtune.SearchRequest, progress: object) -> None:
        asked.append(request)
        raise kvtune.KvtuneError("that is all")

    monkeypatch.setattr(search, "run_search", record)
    with pytest.raises(kvtune.KvtuneError):
        kvtune.search(
            "llama-8b", "4090", "16GB", context="4k-16k", batch=3, max_kl=0.1, trials=7, seed=5,
            workload="full", menu="all", stand_in=True, device="cpu", run_dir=tmp_path,
        )  # fmt: skip
    words = (
        f"search --model llama-8b --gpu 4090 --mem 16GB --context 4k-16k --batch 3 --max-kl 0.1 "
        f"--trials 7 --seed 5 --workload full --menu all --stand-in --device cpu "
        f"--run-dir {tmp_path}"
    )
    assert main(words.split()) == 2

    assert asked[0] == asked[1]
    assert (asked[0].memory_bytes, asked[0].contexts) == (16 * 10**9, (4096, 8192, 16384))


def test_a_search_without_weights_answers_with_a_band(tmp_path: Path) -> None:
    found = kvtune.search("llama-8b", "4090", "16GB", run_dir=tmp_path)
    assert found.sequences > found.full_cache_sequences
    assert found.quality.source == "stand-in"
    assert found.quality.kl.low < found.quality.kl.high
    assert kvtune.read_policy(tmp_path / "policy.yaml").bind(32, 8) == found.policy


@pytest.mark.parametrize(
    ("option", "value"),
    [("batch", 0), ("trials", 0), ("max_kl", float("nan")), ("max_kl", -1.0), ("batch", 10**7)],
)
def test_numbers_out_of_bounds_are_refused(option: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(kvtune.KvtuneError) as caught:
        kvtune.search("llama-8b", "4090", "16GB", run_dir=tmp_path, **{option: value})  # type: ignore[arg-type]
    assert option.replace("_", "-") in caught.value.message
    assert caught.value.hint
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_here_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(kvtune.KvtuneError, match="not at hand"):
        kvtune.capture("llama-8b", tmp_path / "trace")
    assert not list(tmp_path.iterdir())


def test_options_are_those_of_the_command() -> None:
    """A new option of the command line must be offered here too."""
    import inspect

    from kvtune.cli import search

    # held_bytes has an answer of another kind: tuner.long.search.run_long_search gives it.
    elsewhere = {"model", "gpu", "mem", "run_dir", "as_json", "quiet", "held_bytes"}
    of_command = set(inspect.signature(search.command).parameters) - elsewhere
    assert of_command - {"text"} | {"texts"} == set(search_options.SearchOptions.__annotations__)


def test_a_search_that_takes_anothers_place_says_so(packaged: Tables, tmp_path: Path) -> None:
    """Three questions one after another in one folder; the second and the third differ."""

    said = []
    for batch in (1, 1, 2):
        notes = Notes()
        kvtune.search(
            "llama-8b", "4090", "16GB", run_dir=tmp_path / "run", batch=batch, progress=notes
        )
        said.append(" ".join(notes.said))
    first, again, other = said
    assert "answers another question" not in first + again
    assert "its answer is read from" in again
    assert "answers another question" in other


def test_a_misspelt_word_of_a_policy_is_told_as_that() -> None:
    with pytest.raises(KvtuneError, match=r"'snapk' is not known.*snapkv"):
        read_policy_input(Path("snapk 25% int4"))


def test_folders_of_other_prompt_lengths_are_others() -> None:
    asked = [
        search_options.search_request("llama-8b", "4090", "16GB", context=context)
        for context in (8192, "8k", "64k", "4k-64k")
    ]
    names = [request.run_dir.name for request in asked]
    assert names == [
        "llama-3.1-8b-rtx-4090-16gb",
        "llama-3.1-8b-rtx-4090-16gb",
        "llama-3.1-8b-rtx-4090-16gb-64k",
        "llama-3.1-8b-rtx-4090-16gb-4k-64k",
    ]


def test_a_stand_in_says_which_methods_it_knows(packaged: Tables, tmp_path: Path) -> None:
    notes = Notes()
    kvtune.search("llama-8b", "4090", "16GB", run_dir=tmp_path, menu="all", progress=notes)
    said = next(each for each in notes.said if each.startswith("methods: "))
    assert all(option.method.name in said for option in packaged.options)
    assert "kvzip" in said
    assert "--menu chooses only where the model's own weights are at hand" in said


def test_validate_says_first_that_a_plan_is_of_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "policy.yaml").write_text(
        "kvtune_policy: 1\n"
        "model: {name: llama-3.1-8b, layers: 32, kv_heads: 8, head_dim: 128}\n"
        "policy: {method: snapkv, budget: 25%}\n"
    )

    def load_model(*_: Any, **__: Any) -> None:
        raise KvtuneError("loading")

    monkeypatch.setattr("kvtune.traces.models.load_model", load_model)
    assert main(["validate", str(tmp_path), "--model", "smollm2-135m"]) == 2
    first, _, _ = capsys.readouterr().err.partition("loading")
    assert "planned for llama-3.1-8b" in " ".join(first.split())
