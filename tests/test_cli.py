"""The command line: light help, one line for every mistake, JSON alone on stdout."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import kvtune
from kvtune.__main__ import main
from kvtune.cli.app import build
from kvtune.common.files import write_text
from kvtune.policies.policy_file.document import read_policy

ROOT = Path(kvtune.__file__).parent
COMMANDS = sorted(build().commands)
UNIFORM = "kvtune_policy: 1\npolicy: {method: snapkv, budget: 25%, keys: int4, values: int4}\n"
CARD = ("--gpu", "4090")
SMOL = ("--model", "smollm2-135m", *CARD)
NO_GPU = "no GPU here, so that nothing was timed"


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(self.out, parse_constant=_no_constant)
        return parsed


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs kvtune in an empty folder of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*words: object) -> Ran:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(UNIFORM)
    return path


def python(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Another Python process; text on both streams unless said otherwise."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.run([sys.executable, *words], check=False, **options)  # noqa: S603


def documented(command: str) -> set[str]:
    """The keys that docs/json.md lists for a command, and those that all have."""
    page = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    section = page.split(f"## kvtune {command}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {"command", "kvtune"} | {key for row in rows for key in re.findall(r"`(\w+)`", row)}


# --- help and version --------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import json, sys
from kvtune.__main__ import main
codes = [main(words) for words in [[], ["--help"], ["--version"]]]
codes += [main([name, "--help"]) for name in {COMMANDS!r}] + [main(["policies", "show", "--help"])]
heavy = {{"torch", "transformers", "optuna", "textual", "numpy", "scipy", "gguf"}}
print(json.dumps([codes, sorted(heavy & set(sys.modules))]), file=sys.stderr)
"""
    done = python("-c", code)
    codes, heavy = json.loads(done.stderr)
    assert heavy == []
    assert set(codes) == {0}
    assert all(name in done.stdout for name in COMMANDS)


def test_lists_and_estimates_need_no_torch() -> None:
    commands = [["models"], ["policies"], ["gpus"], ["estimate", *SMOL]]
    code = f"""
import sys
from kvtune.__main__ import main
assert [main(words) for words in {commands!r}] == [0] * 4
print(*({{"torch", "transformers", "optuna", "textual"}} & set(sys.modules)), file=sys.stderr)
"""
    done = python("-c", code)
    assert (done.returncode, done.stderr.split()) == (0, [])


def test_python_m_runs_the_same_command() -> None:
    done = python("-m", "kvtune", "--version", cwd=ROOT.anchor)
    assert done.stdout == f"kvtune {kvtune.__version__}\n"


@pytest.mark.parametrize("name", ["search", "estimate", "serve-sim", "bench", "compare"])
def test_below_output_and_help_stands_nothing_else(name: str, run: Run) -> None:
    shown = run(name, "--help").out
    section = shown.split("Output and help:\n")[1].split("\n\n")[0]
    found = set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", section, re.MULTILINE))
    assert found <= {"--out", "--run-dir", "--format", "--json", "--quiet", "--help"}
    assert ("What is asked of the search:" in shown) == (name in ("search", "compare"))


def test_the_summary_of_every_command_is_whole_at_80_columns(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = run("--help").out
    assert "..." not in shown.replace("[ARGS]...", "")
    assert all(re.search(rf"^  {name} +[A-Z].*\.$", shown, re.MULTILINE) for name in COMMANDS)


def test_one_command_alone_is_what_it_is_among_all() -> None:
    for name, command in build().commands.items():
        alone = build(name).commands
        assert list(alone) == [name]
        assert [each.opts for each in alone[name].params] == [e.opts for e in command.params]


def test_groups_of_help_name_options_that_there_are() -> None:
    from kvtune.cli.help import OPTIONS, OWN_OPTIONS

    named = {name: {p.name for p in each.params} for name, each in build().commands.items()}
    for groups, known in [
        (OPTIONS, set().union(*named.values())),
        *((groups, named[name]) for name, groups in OWN_OPTIONS.items()),
    ]:
        assert {option for options in groups.values() for option in options} <= known


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_json_and_is_documented(name: str, run: Run) -> None:
    assert "--json" in run(name, "--help").out
    headings = (ROOT / "docs" / "json.md").read_text(encoding="utf-8").splitlines()
    assert f"## kvtune {name}" in headings


# --- mistakes ----------------------------------------------------------------------------------

MISTAKES = {
    "no command of that name": (("serch",), "No such command 'serch'", "kvtune --help"),
    "no such option": (("gpus", "--jsn"), "No such option: --jsn", "kvtune gpus --help"),
    "an option is missing": (("estimate",), "--model", "kvtune estimate --help"),
    "no number": (("estimate", *SMOL, "--batch", "x"), "--batch", "kvtune estimate --help"),
    "unknown model": (("search", "--model", "lama-8b", *CARD), "'llama-8b'", "kvtune models"),
    "no such folder": (("search", "--model", "./nowhere", *CARD), "no such model", "config.json"),
    "no such GGUF": (("search", "--model", "a.gguf", *CARD), "no such file", None),
    "unknown GPU": (("search", "--model", "llama-8b", "--gpu", "h1000"), "'h100'", "kvtune gpus"),
    "memory without a unit": (("search", *SMOL, "--mem", "16"), "unit", "16GB"),
    "less memory than the weights": (
        ("search", "--model", "llama-8b", *CARD, "--mem", "2GB"), "does not fit", "smallest limit",
    ),
    "chosen weights do not fit": (
        ("search", "--model", "llama-8b", *CARD, "--mem", "16GB", "--weights", "bf16"),
        "does not fit", "fp8 weights fit",
    ),
    "more memory than the card": (("search", *SMOL, "--mem", "40GB"), "23.52 GiB", "at most"),
    "unknown weight format": (("search", *SMOL, "--weights", "int5"), "'int4'", None),
    "more context than the model": (("search", *SMOL, "--context", "32k"), "8 192", "8192"),
    "no context": (("estimate", *SMOL, "--context", "long"), "number of tokens", "32k"),
    "unknown policy": (("policies", "show", "snapkx"), "'snapkv'", "kvtune policies"),
    "no policy file": (("simulate", "none.yaml", "--trace", "t"), "none.yaml", "kvtune search"),
    "text is missing": (("search", *SMOL, "--text", "no.txt"), "no.txt", None),
    "text of another kind": (("search", *SMOL, "--text", "no.pdf"), ".jsonl", None),
    "run directory is below a file": (
        ("search", *SMOL, "--run-dir", "/dev/null/run"), "is a file", "--run-dir",
    ),
    "trace would be below a file": (
        ("capture", "--model", "smollm2-135m", "--out", "/dev/null/t"), "is a file", "--out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_a_hint_and_writes_nothing(name: str, run: Run) -> None:
    words, said, hint = MISTAKES[name]
    ran = run(*words)
    assert_one_error(ran, said, hint, code=3 if said == "does not fit" else 2)
    assert list(Path.cwd().iterdir()) == []


def assert_one_error(ran: Ran, said: str, hint: str | None = None, code: int = 2) -> None:
    lines = ran.err.splitlines()
    assert ran.code == code
    assert ran.out == ""
    assert lines[0].startswith("error: ")
    assert said in lines[0]
    assert len(lines) == 1 or (lines[1] == "" and lines[2].startswith("hint: "))
    assert len(lines) <= 3
    assert hint is None or hint in lines[2]


def test_without_a_gpu_one_must_be_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtune.tuner.target.detect_gpu", lambda: None)
    assert_one_error(run("estimate", "--model", "llama-8b"), "no GPU", "--gpu 4090")


def test_a_wrong_type_in_a_policy_is_told_with_its_line(run: Run, policy: Path) -> None:
    policy.write_text(UNIFORM.replace("25%", "[1]"))
    assert_one_error(run("export", policy, "--to", "vllm", "--out", "o"), f"{policy}:2")


def test_a_policy_needs_a_trace_to_be_simulated_on(run: Run, policy: Path) -> None:
    assert_one_error(run("simulate", policy, *CARD), "none was given", "kvtune capture")


def test_an_unknown_stack_is_told_the_known_ones(run: Run, policy: Path) -> None:
    ran = run("export", policy, "--to", "vlm", "--out", "o")
    assert_one_error(ran, "'vlm'", "'vllm'")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0o500)
    ran = run("search", *SMOL, "--run-dir", tmp_path / "shut" / "run")
    assert_one_error(ran, "cannot write here", "--run-dir")


def test_prose_about_a_policy_flows_and_pseudo_code_keeps_its_lines(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = run("policies", "show", "snapkv").out
    assert "NeurIPS 2024, arXiv 2404.14469" in said
    assert "\n           pooled over ``kernel`` neighbours" in said
    assert "\nCost: O(Hq W P D)" in said
    assert "1..16 777 216" in said


def test_a_name_like_no_other_is_not_answered_with_all_that_are_known(run: Run) -> None:
    ran = run("estimate", "--model", "llama-8b", "--gpu", "xyzzy")
    assert_one_error(ran, "no GPU is known as 'xyzzy'", "kvtune gpus lists them")
    assert len(ran.err) < 300


def test_a_hub_id_that_is_not_known_is_told_the_nearest(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> None:
        raise OSError

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    ran = run("estimate", "--model", "some/llama-9b", *CARD)
    assert_one_error(ran, "'llama-8b'", "kvtune models")


def test_a_damaged_gguf_is_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0")
    ran = run("estimate", "--model", tmp_path / "cut.gguf", *CARD)
    assert_one_error(ran, "no readable GGUF", "Hugging Face folder")


# --- endings that are no mistakes --------------------------------------------------------------


def test_an_interrupt_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvtune.profiles.models.list_models", interrupted)
    assert run("models") == Ran(130, "", "interrupted before anything was saved\n")


def test_an_interrupt_says_whether_the_same_command_goes_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted() -> None:
        write_text(tmp_path / "half", "of the work")
        raise KeyboardInterrupt

    monkeypatch.setattr("kvtune.profiles.models.list_models", interrupted)
    again = "interrupted; run the same command again to go on\n"
    assert run("models") == Ran(130, "", again)


def test_a_closed_pipe_is_quiet() -> None:
    """The reader leaves before the first byte."""
    read, write = os.pipe()
    os.close(read)
    done = python("-m", "kvtune", "models", stdout=write)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode != 0


def test_no_colour_when_it_is_not_wanted() -> None:
    """Even where the environment forces a terminal."""
    environment = {**os.environ, "NO_COLOR": "1", "FORCE_COLOR": "1"}
    done = python("-m", "kvtune", "gpus", env=environment)
    assert "RTX 4090" in done.stdout
    assert "\x1b[3" not in done.stdout


def test_an_error_of_ours_keeps_its_plain_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("kvtune.profiles.models.list_models", broken)
    with pytest.raises(ZeroDivisionError):
        run("models")


# --- answers -----------------------------------------------------------------------------------


ANSWERS: dict[str, tuple[object, ...]] = {
    "gpus": ("gpus",),
    "gpus of one name": ("gpus", "h100"),
    "models": ("models",),
    "policies": ("policies",),
    "policies show": ("policies", "show", "pyramid"),
    "tables": ("tables",),
    "estimate": ("estimate", *SMOL, "--mem", "1GiB"),
}


SERVED = (
    "serve-sim",
    *SMOL,
    "--mem",
    "2GB",
    "--requests",
    50,
    "--prompt",
    512,
    "--output",
    "16-32",
)
ANSWERS["serve-sim"] = (*SERVED, "--rate", 20)


@pytest.mark.parametrize("name", ANSWERS)
def test_json_is_alone_on_stdout(name: str, run: Run) -> None:
    answer = run(*ANSWERS[name], "--json").json
    assert answer["command"] == name.removesuffix(" of one name")
    assert answer["kvtune"] == kvtune.__version__


@pytest.mark.parametrize(
    "words",
    [("gpus",), ("models",), ("policies",), ("tables",), ("gpus", "4090"), ("estimate", *SMOL)],
)
def test_tables_stay_within_a_hundred_columns(words: tuple[str, ...], run: Run) -> None:
    lines = run(*words).out.splitlines()
    assert max(map(len, lines)) <= 100
    assert all(line == line.rstrip() for line in lines)


def test_every_registered_policy_is_listed_with_its_source(run: Run) -> None:
    from kvtune.policies.allocator import allocators
    from kvtune.policies.format import formats
    from kvtune.policies.method import methods

    listed = {(p["name"], p["kind"]): p for p in run("policies", "--json").json["policies"]}
    kinds: dict[str, dict[str, Any]] = {
        "method": methods(),
        "format": formats(),
        "allocator": allocators(),
    }
    assert listed.keys() == {(name, kind) for kind, found in kinds.items() for name in found}
    assert all(part["source"] and part["summary"] for part in listed.values())


def test_parameters_carry_unit_default_and_doc(run: Run) -> None:
    (snapkv,) = run("policies", "show", "snapkv", "--json").json["policies"]
    window = next(p for p in snapkv["parameters"] if p["name"] == "window")
    assert (window["default"], window["unit"], window["low"]) == (32, "tokens", 1)
    assert window["doc"]


def test_estimate_sets_a_policy_beside_the_full_cache(run: Run, policy: Path) -> None:
    answer = run("estimate", *SMOL, "--context", 8192, "--policy", policy, "--json").json
    full, ours = answer["policies"]
    assert answer.keys() == documented("estimate")
    assert (full["name"], full["share"], full["prompt_bytes"]) == ("full cache", 1, 8192 * 23040)
    assert ours["share"] == pytest.approx(0.0703, abs=1e-4)
    assert ours["latency"]["value"] < full["latency"]["value"]
    assert ours["sequences_that_fit"] > 8 * full["sequences_that_fit"]


def test_serving_sets_a_policy_beside_the_full_cache(run: Run, policy: Path) -> None:
    words = (*SERVED, "--rate", 20, "--policy", policy, "--slo-ttft", "1s", "--json")
    answer = run(*words).json
    full, ours = answer["policies"]
    assert answer.keys() == documented("serve-sim")
    assert answer["slo"] == {"ttft_s": 1.0, "tpot_s": None}
    assert (full["finished"], ours["finished"]) == (50, 50)
    assert ours["figures"]["mean_memory"]["value"] < full["figures"]["mean_memory"]["value"]
    assert ours["figures"]["tpot_p50"]["tier"] == "datasheet"
    assert run(*words).json == answer


def test_requests_are_served_from_a_file(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,100,1\n1,200,2\n")
    answer = run("serve-sim", *SMOL, "--arrivals", path, "--json").json
    assert answer["requests"]["count"] == 2
    assert answer["policies"][0]["finished"] == 2


SERVING_MISTAKES: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "no requests": (SERVED, "from a number of clients, or from a file", "--rate 4"),
    "no time": ((*SERVED, "--rate", 1, "--slo-ttft", "1"), "time with a unit", "50ms"),
    "no rate": ((*SERVED, "--rate", 0), "not above zero", "--rate 4"),
    "no file": (("serve-sim", *SMOL, "--arrivals", "a.txt"), "nor .csv", "arrival_s"),
    "small steps": (
        (*SERVED, "--rate", 1, "--max-batched-tokens", 100), "one each", "--max-sequences"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SERVING_MISTAKES)
def test_a_mistake_in_serving_is_told(name: str, run: Run) -> None:
    words, says, hint = SERVING_MISTAKES[name]
    assert_one_error(run(*words), says, hint)


def test_the_estimate_of_bytes_is_the_policys_own(run: Run, policy: Path) -> None:
    from kvtune.policies.policy_file.document import read_policy

    ours = run("estimate", *SMOL, "--context", 8192, "--policy", policy, "--json").json["policies"][
        1
    ]
    assert ours["prompt_bytes"] == read_policy(policy).bind(30, 3).footprint(8192, 64)


def test_a_gguf_file_tells_its_shape(run: Run, tmp_path: Path) -> None:
    """The same as the shape of the same numbers in a config.json."""
    import gguf
    import numpy as np

    from kvtune.profiles.gguf_shape import shape_from_gguf

    path = tmp_path / "mine.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_context_length(1024)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_tensor("token_embd.weight", np.zeros((258, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shape = shape_from_gguf(path)
    assert (shape.layers, shape.query_heads, shape.kv_heads, shape.head_dim) == (3, 4, 2, 8)
    assert (shape.vocab_size, shape.max_context, shape.tied_embeddings) == (258, 1024, True)
    answer = run("estimate", "--model", path, *CARD, "--context", 512, "--json").json
    assert answer["model"] == "mine"
    assert answer["budget"]["full_cache_bytes"] == 512 * 2 * 2 * 3 * 2 * 8


def test_export_writes_files_and_reports_every_line(run: Run, policy: Path, tmp_path: Path) -> None:
    words = ("export", policy, "--to", "vllm", "--model", "smollm2-135m", "--out", tmp_path / "o")
    answer = run(*words, "--json").json
    assert answer.keys() == documented("export")
    assert all(Path(file).is_file() for file in answer["files"])
    lost = {line["field"] for line in answer["report"] if line["status"] == "not expressible"}
    assert any("snapkv" in field for field in lost)
    assert "not expressible" in run(*words).out


def test_strict_export_refuses_and_writes_nothing(run: Run, policy: Path, tmp_path: Path) -> None:
    words = ("export", policy, "--to", "vllm", "--model", "smollm2-135m", "--out", tmp_path / "o")
    assert_one_error(run(*words, "--strict"), "cannot keep", "--strict")
    assert not (tmp_path / "o").exists()


def test_a_stand_ins_plan_is_exported_only_when_allowed(
    run: Run, policy: Path, tmp_path: Path
) -> None:
    facts = "model: {name: smollm2-135m, layers: 30, kv_heads: 3, head_dim: 64}\n"
    source = "provenance: {quality: {source: stand-in, stand_in: other}}\n"
    policy.write_text(UNIFORM + facts + source)
    words = ("export", policy, "--to", "llama-cpp", "--out", tmp_path / "o")
    assert_one_error(run(*words), "stand-in", "--allow-stand-in")
    assert not (tmp_path / "o").exists()
    files = run(*words, "--allow-stand-in", "--json").json["files"]
    assert any("stand-in (other)" in Path(file).read_text() for file in files)


# --- a tiny model, from capture to replay ------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_folder(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a Hugging Face folder."""
    folder: Path = tmp_path_factory.mktemp("models") / "tiny-llama"
    implementation = tiny_model.model.config._attn_implementation
    tiny_model.model.save_pretrained(folder)
    tiny_model.model.config._attn_implementation = implementation
    tiny_model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of the user's, different all the way."""
    path = tmp_path / "mine.txt"
    path.write_text("\n\n".join(f"{n}: {n * n} apples, {n**3 % 97} pears." for n in range(4000)))
    return path


def test_a_model_is_captured_and_a_policy_simulated(
    run: Run, tiny_folder: Path, text: Path, policy: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    made = run(
        "capture", "--model", tiny_folder, "--text", text, "--out", trace, "--device", "cpu",
        "--tokens", 256, "--probes", 1, "--json", "--quiet",
    )  # fmt: skip
    assert made.code == 0, made.err
    assert made.json.keys() == documented("capture")
    assert {sample["kind"] for sample in made.json["samples"]} == {"user"}
    words = ("simulate", policy, "--trace", trace, "--model", tiny_folder, *CARD, "--context", 512)
    ran = run(*words, "--device", "cpu", "--json")
    quality = ran.json["quality"]
    assert ran.json.keys() == documented("simulate")
    assert (quality["tier"], quality["source"]) == ("replay", "own trace")
    low, high = quality["interval"]
    assert 0 < low <= quality["kl_nats_per_token"] <= high
    assert ran.json["latency"]["tier"] == "datasheet"
    assert "replaying" in ran.err


def test_validate_runs_the_held_out_samples_and_reports(
    run: Run, tiny_folder: Path, text: Path, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The live run itself is tested elsewhere; here a made-up one stands in its place."""
    from kvtune.common.estimate import Estimate

    seen: list[Any] = []
    live = Estimate(0.02, 0.01, 0.04, "nats/token", "live")
    found = types.SimpleNamespace(
        live=live, perplexity_change=None, retrieval_accuracy=None, full_cache_accuracy=None,
        prompt_bytes=1234, samples=3, by_kind={"code": live}, counters={"heads_compressed": 6},
        right_by_kind={"turns": types.SimpleNamespace(ours=0.5, full=0.75)}, rounding=0.0078,
    )  # fmt: skip

    def validate_policy(
        policy: Any, loaded: Any, samples: Any, *, stored_alike: bool, rounding: bool, progress: Any
    ) -> Any:
        assert (stored_alike, rounding) == (False, True)
        seen.extend([policy.layers, *samples])
        return found

    stub = types.ModuleType("kvtune.tuner.validate")
    stub.validate_policy = validate_policy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    words = ("validate", policy, "--model", tiny_folder, "--text", text, "--device", "cpu")
    answer = run(*words, "--json").json
    assert seen[0] == 3
    assert {sample.split for sample in seen[1:]} == {"evaluate"}
    assert answer.keys() == documented("validate")
    assert answer["quality"]["interval"] == answer["by_kind"]["code"]["interval"] == [0.01, 0.04]
    assert (answer["counted_bytes"], answer["counters"]) == (1234, {"heads_compressed": 6})
    assert (answer["times"], answer["untimed"]) == (None, NO_GPU)
    assert answer["rounding_kl_nats_per_token"] == 0.0078
    said = run(*words).out
    assert "differs from itself by 0.0078 nats a token" in " ".join(said.split())
    assert said.count("0.02 [0.01, 0.04] live") == 2
    assert "KL, code" in said
    assert answer["right_by_kind"] == {"turns": {"ours": 0.5, "full": 0.75}}
    assert "50 %, full cache 75 %" in said
    assert f"times: {NO_GPU}" in said
    assert_one_error(run(*words, "--gpu"), f"--gpu: {NO_GPU}", "without --gpu")


def test_an_earlier_live_run_is_no_prediction(tmp_path: Path) -> None:
    """The prediction is the search's, where its result tells of the same live run."""
    from kvtune.cli.validate_report import known_before
    from kvtune.policies.policy_file.document import read_policy
    from kvtune.tests.made_up import write_study

    run = write_study(tmp_path / "run", live=True)
    baseline = json.loads((run / "result.json").read_text())["baselines"][1]
    text = (run / "baselines" / "greedy.yaml").read_text()
    live = baseline["live"]
    quality = {"kl_nats_per_token": live["value"], "interval": live["interval"], "tier": "live"}
    provenance = {"quality": {"source": "own trace", **quality}}
    path = run / "policy.yaml"
    path.write_text(f"{text}\nprovenance: {json.dumps(provenance)}\n")
    known = known_before(read_policy(path), path, "")
    assert known.earlier is not None
    assert known.predicted is not None
    assert known.earlier.value == live["value"]
    assert known.predicted.value == baseline["predicted"]["value"]
    moved = tmp_path / "policy.yaml"
    moved.write_text(path.read_text())
    assert known_before(read_policy(moved), moved, "").predicted is None
    assert known_before(read_policy(path), path, "vllm").earlier is None, "it was run otherwise"


def test_validate_needs_weights(run: Run, policy: Path) -> None:
    assert_one_error(run("validate", policy), "names no model", "--model")
    assert_one_error(run("validate", policy, "--model", "llama-8b"), "not at hand", "--model PATH")


@pytest.mark.parametrize("command", ["capture", "bench"])
def test_what_runs_a_model_asks_for_weights_of_a_shape_that_is_only_known(
    run: Run, command: str
) -> None:
    ran = run(command, "--model", "llama-8b", "--out", "there")
    assert_one_error(ran, "weights of llama-3.1-8b are not at hand", "--model PATH")
    assert not Path("there").exists()


def test_a_policy_of_another_shape_is_refused_before_the_model_is_loaded(
    run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loading: list[object] = []
    monkeypatch.setattr("kvtune.traces.models.load_model", lambda *a, **b: loading.append(a))
    other = tmp_path / "other.yaml"
    other.write_text("kvtune_policy: 1\noptions: {a: {}}\nheads: [[a, a]]\n")
    ran = run("validate", other, "--model", tiny_folder, "--device", "cpu")
    assert_one_error(ran, "1 layers of 2 KV heads", "search again")
    assert not loading


def test_a_trace_of_another_shape_is_refused(run: Run, tiny_trace: Any, policy: Path) -> None:
    ran = run("simulate", policy, "--trace", tiny_trace.root, *SMOL, "--device", "cpu")
    assert_one_error(ran, "another model", "capture")


def test_a_trace_of_another_model_of_the_same_shape_is_refused(
    run: Run, tiny_trace: Any, tiny_folder: Path, policy: Path, tmp_path: Path
) -> None:
    """Of the same name too: only the weights tell them apart."""
    import shutil

    from safetensors.torch import load_file, save_file

    other = shutil.copytree(tiny_folder, tmp_path / "tiny-llama")
    (file,) = other.glob("*.safetensors")
    weights = load_file(file)
    weights["model.norm.weight"] += 1
    save_file(weights, file, {"format": "pt"})
    words = ("simulate", policy, "--trace", tiny_trace.root, *CARD, "--context", 512)
    ran = run(*words, "--model", other, "--device", "cpu")
    assert_one_error(ran, "another model (tiny-llama", "capture a trace of this model")


def test_a_truncated_shard_is_told(
    run: Run, tiny_trace: Any, tiny_folder: Path, policy: Path, tmp_path: Path
) -> None:
    import shutil

    copy = shutil.copytree(tiny_trace.root, tmp_path / "trace")
    for shard in copy.rglob("layer-01.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-9])
    words = ("simulate", policy, "--trace", copy, "--model", tiny_folder, *CARD, "--context", 512)
    ran = run(*words, "--device", "cpu", "--quiet")
    assert_one_error(ran, "layer-01.safetensors", "capture again")


@pytest.mark.full
def test_a_search_with_a_bound_plans_a_long_generation(
    run: Run, tiny_folder: Path, text: Path, tmp_path: Path
) -> None:
    words = (
        "search", "--model", tiny_folder, "--gpu", "4090", "--mem", "4GiB", "--context", 96,
        "--text", text, "--generated", "48", "--run-dir", tmp_path / "run", "--json",
    )  # fmt: skip
    ran = run(*words, "--held-bytes", "40%", "--device", "cpu")
    assert ran.code == 0, ran.err
    found = ran.json
    assert found["peak_bytes"] <= found["most_bytes"] <= found["bound_bytes"]
    assert found["generated_live"] == 48
    narrow = "rotated_int" in (tmp_path / "run" / "policy.yaml").read_text()
    assert any("16 bits only" in note for note in found["notes"]) == narrow
    assert len(found["live_rounds"]) > 1
    assert read_policy(tmp_path / "run" / "policy.yaml").bind(3, 2).layers == 3
    refused = run(*words, "--held-bytes", "0%")
    assert refused.code == 2
    assert "no share of the cache" in refused.err
