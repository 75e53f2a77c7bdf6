"""What all tests share: tiny models made here, so that none of them needs a download."""

from __future__ import annotations

import copy
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, whoever does that
if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core: more threads would only be in the way
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Or every worker and every process that a test starts would compile all of kvtune again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
settings.register_profile("kvtune", deadline=None, derandomize=True)
settings.load_profile("kvtune")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "real_model: needs SmolLM2 in the model store, or pip once")


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: Any, name: str, obj: Any) -> list[Any] | None:
    """Leave out tests of the full tier where it is not asked for: thousands of cases to make."""
    asked = collector.config.option.markexpr != "not full" or "::" in " ".join(
        collector.config.args
    )
    full = any(mark.name == "full" for mark in getattr(obj, "pytestmark", ()))
    return [] if full and not asked else None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Spare the garbage collector what outlives all tests: modules and thousands of cases."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.fixture(autouse=True)
def usual_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the terminal is that tests were started from."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same draws in any order of tests; tests without torch do not load it for this."""
    if "torch" in sys.modules:
        # torch.manual_seed would also write down a stack trace for every kind of device not there.
        sys.modules["torch"].default_generator.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors are faster so, and the machine may be shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def quick_interpreter() -> None:
    """Triton's interpreter takes 40 % less."""
    from kvtune.tests.interpreter import quicken

    quicken()


def tiny_tokenizer() -> Any:
    """One token a byte; texts begin with <s> when special tokens are added."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {c: i for i, c in enumerate(alphabet, start=2)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **ends
    )


TINY: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.3,  # sharp enough that attention and predictions are not uniform
}
"""Fields of a tiny model's configuration: 3 layers, 4 query heads on 2 KV heads."""


def tiny_network(config: Any, seed: int = 0, tried: bool = False) -> Any:
    """A randomly initialised causal language model in fp32, of one's own to change.

    Args:
        config: of the model.
        seed: of its weights.
        tried: whether it answers through kvtune as by itself need not be found out anew where it
            was of another copy that was asked for so, which takes ten times as long as making a
            copy; for tests that change nothing of how it answers.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from kvtune.traces import self_check

    key = type(config), config.to_json_string(use_diff=False), seed
    if key not in _MADE:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _MADE[key] = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    own = copy.deepcopy(_MADE[key])
    if tried:
        self_check._checked[own] = self_check._checked.setdefault(_MADE[key], set())
    return own


_MADE: dict[Any, Any] = {}
"""The models that all others are copies of, by configuration and seed."""


@pytest.fixture(scope="session")
def tiny_fields() -> dict[str, Any]:
    """Fields of a tiny model's configuration, for any architecture."""
    return dict(TINY)


@pytest.fixture(scope="session")
def make_network() -> Callable[..., Any]:
    """A function that makes a random network of a configuration, always the same for a seed."""
    return tiny_network


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The byte tokenizer of the tiny models."""
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tokenizer: Any) -> Any:
    """A random 3-layer Llama with grouped queries, loaded as load_model would: do not change it."""
    from transformers import LlamaConfig

    from kvtune.traces.models import wrap

    return wrap(tiny_network(LlamaConfig(**TINY)), tokenizer, name="tiny-llama")


@pytest.fixture(scope="session")
def make_samples() -> Callable[..., list[Any]]:
    """A function that makes samples of random tokens, every third row an answer digit."""
    import random

    from kvtune.traces.samples import Sample

    def make(
        count: int, tokens: int = 48, observed: int = 12, splits: Sequence[str] = ("search",)
    ) -> list[Any]:
        rng = random.Random(count)  # noqa: S311
        return [
            Sample(
                id=f"random-{index}",
                split=splits[index % len(splits)],  # type: ignore[arg-type]
                kind="prose",
                token_ids=tuple(rng.randrange(2, 258) for _ in range(tokens)),
                next_token=rng.randrange(2, 258),
                observed=observed,
                needle_of_row=tuple(0 if row % 3 == 0 else -1 for row in range(observed)),
            )
            for index in range(count)
        ]

    return make


@pytest.fixture(scope="session")
def tiny_trace(
    tiny_model: Any,
    make_samples: Callable[..., list[Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """A captured trace of the tiny model: 2 search and 2 evaluate samples, S = 3. Read only."""
    from kvtune.traces.capture import capture

    samples = make_samples(4, splits=("search", "evaluate"))
    folder = tmp_path_factory.mktemp("trace")
    return capture(tiny_model, samples, folder, probes=3, signals=("column_sums",))


@pytest.fixture(scope="session")
def make_tables() -> Callable[..., Any]:
    """A function that makes plausible tables: smaller options lose more, heads differ, texts too.

    The uncompressed option loses nothing; heads err partly alike, so that cross terms matter.
    """
    import numpy as np

    from kvtune.policies.formats.bf16 import Bf16
    from kvtune.policies.formats.grouped import Int2, Int4
    from kvtune.policies.methods.h2o import H2O
    from kvtune.policies.methods.streaming_llm import StreamingLLM
    from kvtune.simulator.quality.tables import SampleFacts, Tables
    from kvtune.tuner.options import Menu, alike

    menu = Menu(
        (H2O(), StreamingLLM()), (1 / 16, 1 / 8, 1 / 4, 1 / 2), alike((Bf16(), Int4(), Int2()))
    )
    options = menu.options()

    def make(
        layers: int = 3, kv_heads: int = 2, count: int = 6, features: int = 7, seed: int = 0
    ) -> Tables:
        rng = np.random.default_rng(seed)
        heads, prompt, head_dim = layers * kv_heads, 256, 16
        full = options[0].footprint(prompt, prompt, head_dim)
        share = [o.footprint(o.budget.resolve(prompt), prompt, head_dim) / full for o in options]
        size = 0.02 * (1 / np.array(share) - 1) ** 0.7 * rng.uniform(0.7, 1.3, len(options))
        alike_ = rng.standard_normal(features)
        shape = (count, heads, len(options), features)
        noise = 0.4 * alike_ + rng.standard_normal(shape)
        factor = noise * size[:, None] * rng.lognormal(0, 0.7, (heads, 1, 1)) / features**0.5
        splits, kinds = ("search", "select", "evaluate"), ("prose", "code")
        factor = factor.astype(np.float32)
        return Tables(
            model="made-up",
            layers=layers,
            kv_heads=kv_heads,
            head_dim=head_dim,
            prompt_tokens=prompt,
            options=options,
            samples=tuple(
                SampleFacts(f"sample-{n}", splits[n % 3], kinds[n // 3 % 2]) for n in range(count)
            ),
            loss=(factor**2).sum(-1),
            factor=factor,
            group=np.arange(count),
        )

    return make


@pytest.fixture(scope="session")
def systems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of made-up kernel tables of stacks, as their package has it: read only."""
    from kvtune.tests.made_up_tables import write_systems

    folder = tmp_path_factory.mktemp("wheel") / "systems"
    write_systems(folder)
    return folder


def _curve(name: str, factor: float) -> list[dict[str, Any]]:
    """A baseline's live losses, falling with bytes, over any share that a search may choose."""
    return [
        {"at": at, "name": f"{name} {at}", "kl": factor * (1 - at) / at / 1000,
         "kl_interval": [0.5 * factor * (1 - at) / at / 1000, 2 * factor * (1 - at) / at / 1000]}
        for at in (0.001, 0.01, 0.1, 0.5, 1.0)
    ]  # fmt: skip


@pytest.fixture
def packaged(make_tables: Callable[..., Any], monkeypatch: Any, tmp_path: Any) -> Any:
    """Small made-up tables in the place of those that the package ships."""
    from dataclasses import replace

    from kvtune.tuner import source_models

    tables = replace(make_tables(layers=4, kv_heads=3, count=12), model="smollm2-135m")
    monkeypatch.setenv("KVTUNE_CACHE", str(tmp_path / "cache"))
    about = {
        "baselines": {name: _curve(name, 3.0) for name in ("uniform", "pyramid", "adakv")},
        "gpu": "made up",
    }
    monkeypatch.setattr(source_models, "packaged_tables", lambda: (tables, about))
    return tables


@pytest.fixture(scope="session")
def saved_model(
    make_network: Callable[..., Any],
    tiny_fields: dict[str, Any],
    tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A tiny model as users have theirs: a folder with weights and a tokenizer."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_network(LlamaConfig(**tiny_fields)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
