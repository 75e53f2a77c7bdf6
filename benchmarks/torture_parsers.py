"""Every reader of kvtune with valid inputs to begin from: what ``torture.py`` feeds."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from kvtune.common.errors import KvtuneError
from kvtune.common.progress import Silent
from kvtune.common.stored import checked, parse_json
from kvtune.common.units import parse_bytes, parse_tokens
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.document import PolicyDocument, read_policy, write_policy
from kvtune.profiles.gguf_shape import shape_from_gguf
from kvtune.profiles.gpus import parse_gpu
from kvtune.profiles.measured import read_measured
from kvtune.profiles.model_config import shape_from_config
from kvtune.profiles.models import shape_from_record
from kvtune.profiles.strict import parse
from kvtune.profiles.tuned import parse_tuned
from kvtune.simulator.quality.tables import SampleFacts, Tables
from kvtune.simulator.quality.tables_file import load_tables, save_tables
from kvtune.tests.made_up import facts, write_study
from kvtune.traces import calibration, store, texts
from kvtune.traces.geometry import Geometry, Rope
from kvtune.traces.manifest import read_entry, read_manifest
from kvtune.traces.samples import Sample
from kvtune.traces.trace import Trace, open_trace
from kvtune.traces.writer import CaptureSettings, TraceWriter
from kvtune.tuner.bench_runs import RUNS, read_runs
from kvtune.tuner.explore import COLUMNS_FILE, PLANS_FILE
from kvtune.tuner.explore.measured import keep_answer
from kvtune.tuner.explore.reader import StudyReader
from kvtune.tuner.explore.what_if import Setting, figures_of
from kvtune.tuner.finished import Finished
from kvtune.tuner.journal import FORMAT, Journal
from kvtune.tuner.stored_result import read_result

SHAPES = ("M0 8k", "16GB", "24.5 GiB", "32k", "8192", "1m", "0.5tb")


@dataclass(frozen=True)
class Parser:
    """A reader under torture.

    Args:
        seeds: valid inputs.
        feed: reads one input; may write it into the folder that it is given.
        structured: whether inputs are JSON, so that values can be swapped inside.
    """

    seeds: tuple[bytes, ...]
    feed: Callable[[bytes, Path], object]
    structured: bool = False


def parsers(work: Path) -> dict[str, Parser]:
    """All of them, by name; their seeds are made in ``work``."""
    run, trace = (
        write_study(work / "run", 4, live=True, live_kinds=True),
        make_trace(work / "trace"),
    )
    manifest = (trace / "manifest.json").read_bytes()
    entry = (trace / "sample-0000" / "sample.json").read_bytes()
    read = read_manifest(json.loads(manifest), "")
    tables = work / "tables.safetensors"
    save_tables(_tables(), tables, {"trace": "x"})
    return {
        "policy": Parser(_policies(), lambda data, _: read_policy(_text(data) + "\n")),
        "plans": Parser((_bytes(run / "plans.jsonl"),), _plans, structured=True),
        "columns": Parser((_columns_of(run),), _columns(_bytes(run / PLANS_FILE))),
        "result": Parser((_bytes(run / "result.json"),), _file(read_result), structured=True),
        "validated": Parser((_answer(),), _validated, structured=True),
        "finished": Parser((_finished(),), _finished_file, structured=True),
        "journal": Parser((_journal(),), _file(lambda path: Journal(path, Silent())), True),
        "tables": Parser((tables.read_bytes(),), _file(load_tables)),
        "trace": Parser((manifest,), lambda d, _: read_manifest(parse_json(d, "m"), "m"), True),
        "entry": Parser((entry,), lambda d, _: read_entry(parse_json(d, "e"), read, "e"), True),
        "calibration": Parser((_calibration(),), _calibrated, structured=True),
        "bench": Parser((_run(),), _runs, True),
        "kernels": Parser((_kernels(),), _measured("kernels.csv")),
        "measured": Parser((_measured_gpu(),), _measured("gpu.yaml")),
        "gpuyaml": Parser(_shipped("gpus"), lambda d, _: parse_gpu("x", _text(d), "x.yaml")),
        "modelyaml": Parser(_shipped("models"), _models),
        "tuned": Parser(_tuned(), _tuned_file),
        "text": Parser((b'{"text": "one two"}\n{"text": "three"}\n' * 6,), _texts, True),
        "store": Parser((b'{"format": 1, "sha256": {"a": "' + b"0" * 64 + b'"}}',), _store, True),
        "config": _configs_parser(work),
        "gguf": Parser((_gguf(work / "m.gguf"),), _file(shape_from_gguf, "m.gguf")),
        "amount": Parser(tuple(s.encode() for s in SHAPES), _amount),
    }  # fmt: skip


def _finished_file(data: bytes, _: Path) -> None:
    checked(Finished, parse_json(data, "f"), "f")


def _calibrated(data: bytes, _: Path) -> None:
    calibration._read(parse_json(data, "c"), "c")


def _tuned_file(data: bytes, _: Path) -> None:
    parse_tuned(_text(data), "k", ("warps", "stages"))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _bytes(path: Path) -> bytes:
    return path.read_bytes()


def _file(read: Callable[[Path], object], name: str = "input") -> Callable[[bytes, Path], object]:
    def feed(data: bytes, work: Path) -> object:
        (work / name).write_bytes(data)
        return read(work / name)

    return feed


def _plans(data: bytes, work: Path) -> None:
    (work / "plans.jsonl").write_bytes(data)
    study = StudyReader(work).read()
    _ = study.chosen, study.option_counts
    if study.facts.gpu == "rtx-4090":
        figures_of(study, Setting.asked(study.facts))


def _columns_of(run: Path) -> bytes:
    StudyReader(run).keep_columns()
    return _bytes(run / COLUMNS_FILE)


def _columns(lines: bytes) -> Callable[[bytes, Path], object]:
    """Damaged or not, the plans are those of the lines."""

    def feed(data: bytes, work: Path) -> None:
        (work / PLANS_FILE).write_bytes(lines)
        (work / COLUMNS_FILE).write_bytes(data)
        read = StudyReader(work).read().plans
        (work / COLUMNS_FILE).unlink()
        assert (read.kl == StudyReader(work).read().plans.kl).all()

    return feed


def _validated(data: bytes, work: Path) -> None:
    keep_answer(work, "study", 0, _text(data))


def _runs(data: bytes, work: Path) -> None:
    (work / RUNS).write_bytes(data)
    read_runs(work)


def _measured(name: str) -> Callable[[bytes, Path], object]:
    def feed(data: bytes, work: Path) -> object:
        (work / "gpu.yaml").write_bytes(_measured_gpu())
        (work / "kernels.csv").write_bytes(_kernels())
        (work / name).write_bytes(data)
        return read_measured(work)

    return feed


def _models(data: bytes, _: Path) -> None:
    for name, record in parse(_text(data), "models.yaml").entries():
        shape_from_record(name, record)


def _texts(data: bytes, work: Path) -> None:
    (work / "t.jsonl").write_bytes(data)
    texts.user([work / "t.jsonl"])


def _store(data: bytes, work: Path) -> None:
    (work / "manifest.json").write_bytes(data)
    store._intact(work)


def _configs_parser(work: Path) -> Parser:
    """The reader of configurations, its classes imported before anything is timed."""
    os.environ["KVTUNE_CACHE"] = str(work / "cache")  # what it remembers goes with the folder
    for seed in _configs():
        _config(seed, work)
    return Parser(_configs(), _config, True)


def _config(data: bytes, work: Path) -> None:
    (work / "config.json").write_bytes(data)
    shape = shape_from_config(work)
    _ = shape.parameters, shape.kv_bytes(1024)


def _amount(data: bytes, _: Path) -> None:
    text = data.decode("utf-8", "replace")
    with suppress(KvtuneError):
        parse_bytes(text)
    parse_tokens(text)


def _policies() -> tuple[bytes, ...]:
    whole = write_policy(_study_policy())
    return (
        whole.encode(),
        b"kvtune_policy: 1\nname: t\npolicy: {method: h2o, budget: 25%, keys: int4}\n",
    )


def _study_policy() -> PolicyDocument:
    return PolicyDocument(policy=Policy("options", (facts().options,)))


def _answer() -> bytes:
    figure = {"value": 0.1, "interval": [0.05, 0.2], "unit": "share", "tier": "live"}
    return json.dumps({
        "quality": {"kl_nats_per_token": 0.02, "interval": [0.01, 0.03], "tier": "live"},
        "perplexity_change": figure, "retrieval_accuracy": figure, "full_cache_accuracy": None,
        "counted_bytes": 1000, "device": "cpu", "by_kind": {"code": figure},
    }).encode()  # fmt: skip


def _finished() -> bytes:
    plain = {"format": 1, "asked": "a" * 64, "files": {"result.json": "b" * 64}}
    return json.dumps({**plain, "times": None, "untimed": None}).encode()


def _journal() -> bytes:
    trial = {"h2o": True, "least_bits": 2, "split": "heads", "shrinkage": 0.4}
    lines = [{"kvtune_journal": FORMAT}]
    lines += [{"trial": n, "state": "complete", "parameters": trial} for n in range(4)]  # type: ignore[dict-item]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def _calibration() -> bytes:
    plain = {"format": 1, "fingerprint": "a", "head_scores": [[0.1, 0.2]] * 2}
    return json.dumps({**plain, "layer_errors": [0.1, 0.2], "source": "x"}).encode()


def _run() -> bytes:
    pair = [1, 2]
    run = {"policy": "a", "share": 0.1, "sample": "s", "kind": "code", "setting": "asked after",
           "kl": 0.1, "taken": 0.1, "evicted": 3, "first": pair, "later": pair, "full_first": pair,
           "full_later": pair, "needles": pair}  # fmt: skip
    return (json.dumps(run) + "\n").encode() * 3


def _folder() -> Path:
    return Path(str(resources.files("kvtune.profiles"))) / "measured" / "h100-sxm"


def _kernels() -> bytes:
    return b"\n".join((_folder() / "kernels.csv").read_bytes().splitlines()[:8]) + b"\n"


def _measured_gpu() -> bytes:
    return (_folder() / "gpu.yaml").read_bytes()


def _tuned() -> tuple[bytes, ...]:
    return tuple(path.read_bytes() for path in sorted(_folder().parent.glob("*/kernels.yaml")))[:2]


def _shipped(folder: str) -> tuple[bytes, ...]:
    root = Path(str(resources.files("kvtune.profiles"))) / folder
    return tuple(path.read_bytes() for path in sorted(root.glob("*.yaml")))[:4]


def _configs() -> tuple[bytes, ...]:
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4,
             "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 128, "vocab_size": 256, "max_position_embeddings": 2048,
             "tie_word_embeddings": False, "torch_dtype": "bfloat16"}  # fmt: skip
    gemma = {**llama, "model_type": "gemma3_text", "head_dim": 16, "sliding_window": 512,
             "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}  # fmt: skip
    return json.dumps(llama).encode(), json.dumps(gemma).encode()


def _gguf(path: Path) -> bytes:
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    for key, number in (("block_count", 2), ("embedding_length", 32), ("feed_forward_length", 64),
                        ("attention.head_count", 4), ("attention.head_count_kv", 2),
                        ("context_length", 512), ("vocab_size", 32)):  # fmt: skip
        writer.add_uint32(f"llama.{key}", number)
    for name, rows in (("token_embd", 32), ("blk.0.attn_q", 32), ("blk.0.attn_k", 16),
                       ("blk.0.ffn_up", 64)):  # fmt: skip
        writer.add_tensor(f"{name}.weight", np.zeros((rows, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def _tables() -> Tables:
    options, rng = facts().options[:6], np.random.default_rng(0)
    samples = tuple(
        SampleFacts(f"s{n}", split, "code")
        for n, split in enumerate(("search", "select", "evaluate"))
    )
    loss = rng.random((3, 4, 6), np.float32)
    factor = rng.random((3, 4, 6, 2), np.float32)
    return Tables("m", 2, 2, 16, 64, options, samples, loss, factor, np.arange(3))


def make_trace(folder: Path) -> Path:
    """A small trace of random numbers, as a capture writes it."""
    rope = Rope("default", 10000.0, (), 1.0, (1.0, 0.1, 0.01, 0.001))
    shape = Geometry(2, 4, 2, 8, 8**-0.5, (None, None), (rope,), (0, 0), 64, 512)
    sample = Sample("s", "search", "prose", tuple(range(24)), 24, 8, (-1,) * 8)
    loaded = SimpleNamespace(
        name="m", fingerprint="f" * 64, geometry=shape, dtype="float32", dtype_reason="x"
    )
    settings = CaptureSettings.of(loaded, [sample], 2, 0, "made up", "all", ())  # type: ignore[arg-type]
    torch.manual_seed(0)
    writer = TraceWriter(folder, settings)
    with writer.sample(0, sample) as one:
        for layer in range(2):
            one.write_layer(layer, {"q": torch.randn(4, 24, 8), "k": torch.randn(2, 24, 8)})
        one.finish([-1.0] * 8, [1] * 8)
    writer.close()
    read_layers(open_trace(folder))
    return folder


def read_layers(trace: Trace) -> None:
    """Every layer of every sample, and with it the hash of every file."""
    for sample in trace.samples:
        for layer in range(trace.geometry.layers):
            trace.layer(sample.id, layer, names=())
