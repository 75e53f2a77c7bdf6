"""Kernels that are compiled ahead are those that a plan launches, to the last argument."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from kvtune.common.progress import Silent
from kvtune.policies.formats.grouped import Int2, Int4
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.option import Budget, Option
from kvtune.policies.pages import PageLayout
from kvtune.policies.policy import Policy
from kvtune.runtime import compiled_ahead
from kvtune.runtime.compile_only import Aimed
from kvtune.runtime.compiled_ahead import Compiling, Kernels, kernels_of

TARGET = "cuda", 90, 32
GEOMETRY: Any = SimpleNamespace(query_heads=6, kv_heads=2, head_dim=64, scale=0.125)
LLAMA = SimpleNamespace(hidden_act="silu", hidden_size=384, intermediate_size=512)


def python(module: str, given: str = "", **env: str) -> str:
    """What a module prints, in a process in which Triton compiles."""
    environment = os.environ | {"TRITON_INTERPRET": "0"} | env
    return subprocess.run(  # noqa: S603 - our own module, by this interpreter
        [sys.executable, "-m", module], input=given, env=environment, check=True,
        capture_output=True, text=True,
    ).stdout  # fmt: skip


def policy(*formats: type[Int4] | type[Int2]) -> Policy:
    """A layer for each format, whose second head keeps all in 16 bits."""
    rows = [(Option(H2O(), Budget(tokens=8), form(), form()), Option()) for form in formats]
    return Policy("p", tuple(rows))


def made(*policies: Policy) -> Kernels:
    return kernels_of(policies, GEOMETRY, LLAMA, "bfloat16", TARGET)


def test_what_is_compiled_ahead_is_what_is_launched() -> None:
    found = json.loads(python("kvtune.tests.launched_kernels"))
    launched, ahead = (set(found[name]) for name in ("launched", "ahead"))
    assert len(launched) == 14  # 4 sets of formats, 4 layouts, norms, activation, sums, appending
    assert launched == ahead


def test_a_process_leaves_kernels_in_tritons_cache(tmp_path: Path) -> None:
    kernels = Kernels(TARGET, 1, 1, 64, 0.125, "bfloat16", stored=(("bf16", "bf16"),))
    python("kvtune.runtime.compile_only", kernels.text(), TRITON_CACHE_DIR=str(tmp_path))
    assert [path.stem for path in tmp_path.rglob("*.cubin")] == ["store_pages"]


def test_layers_of_the_same_formats_share_a_kernel() -> None:
    plain, four = PageLayout(64).code, PageLayout(64, "int4", "int4").code
    kernels = made(policy(Int4, Int4), Policy.uniform(Option(), 2, 2))
    both = tuple(sorted((plain, four), reverse=True))
    assert [pairs for pairs, _ in kernels.decode] == [both, (plain,)]
    assert kernels.stored == (("bf16", "bf16"), ("int4", "int4"))
    assert kernels.column_sums


def test_shares_are_all_of_it() -> None:
    kernels = made(policy(Int4, Int2), Policy.uniform(Option(), 2, 2))
    parts = kernels.shares(2)
    assert {each[0] for part in parts for each in part.decode} == {e[0] for e in kernels.decode}
    assert sum(len(part.decode) for part in parts) == len(kernels.decode)
    assert [part.stored for part in parts if part.stored] == [kernels.stored]
    assert len(kernels.shares(20)) <= len(kernels.decode) + 1


def test_what_is_sent_is_what_arrives() -> None:
    kernels = made(policy(Int4, Int2))
    assert Kernels.of_text(kernels.text()) == kernels


def test_norms_of_other_families_are_left_alone() -> None:
    gemma = SimpleNamespace(hidden_act=None, hidden_activation="gelu_pytorch_tanh")
    assert kernels_of([policy(Int4)], GEOMETRY, gemma, "bfloat16", TARGET).widths is None


def test_the_target_is_the_one_that_was_named() -> None:
    target = Aimed(TARGET).get_current_target()
    assert (target.backend, target.arch, target.warp_size) == TARGET


def test_without_a_gpu_nothing_is_begun() -> None:
    model = SimpleNamespace(device=SimpleNamespace(type="cpu"))
    compiling = Compiling()
    compiling.begin([policy(Int4)], GEOMETRY, model)
    compiling.wait(Silent())
    assert compiling.processes == []


def test_each_kernel_is_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Kernels] = []
    monkeypatch.setattr(compiled_ahead, "_process", sent.append)
    compiling = Compiling()
    compiling.send(made(policy(Int4)))
    compiling.send(made(policy(Int4, Int2)))
    compiling.send(made(policy(Int2)))
    pairs = [pairs for part in sent for pairs, _ in part.decode]
    assert len(pairs) == len(set(pairs)) == 2
    assert [names for part in sent for names in part.stored].count(("bf16", "bf16")) == 1
    assert len([part for part in sent if part.widths]) == 1
    assert len([part for part in sent if part.column_sums]) == 1


def test_what_only_the_column_sums_are_new_of_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Kernels] = []
    monkeypatch.setattr(compiled_ahead, "_process", sent.append)
    compiling, whole = Compiling(), made(policy(Int4))
    compiling.send(replace(whole, column_sums=False))
    before = len(sent)
    compiling.send(whole)
    (last,) = sent[before:]
    assert last.column_sums
    assert (last.decode, last.stored, last.widths) == ((), (), None)
    compiling.send(whole)
    assert len(sent) == before + 1


def test_processes_that_failed_are_noted_once() -> None:
    class Notes(Silent):
        notes: ClassVar[list[str]] = []

        def note(self, message: str) -> None:
            self.notes.append(message)

    compiling = Compiling()
    for code in (0, 3, 3):
        ending = [sys.executable, "-c", f"raise SystemExit({code})"]
        compiling.processes.append(subprocess.Popen(ending, text=True))  # noqa: S603 - harmless
    compiling.wait(Notes())
    (note,) = Notes.notes
    assert "(exit codes 3)" in note


def test_processes_end_when_they_are_told_to() -> None:
    compiling = Compiling()
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    compiling.processes.append(subprocess.Popen(sleeping, text=True))  # noqa: S603 - harmless
    compiling.end()
    assert compiling.processes[0].poll() is not None
