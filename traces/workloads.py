"""Workloads: which samples are run, and how they are cut from text or made up.

Equal workloads give equal samples on one Python and tokenizer. Samples of different splits share
no document, no run of ``texts.SHARED_WORDS`` words, and no needle's word or number.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, cast

from kvtune.common.errors import KvtuneError, nearest
from kvtune.traces import texts
from kvtune.traces.made_up_texts import MAKERS
from kvtune.traces.needles import Codec, Passage, copied, recall, retrieval
from kvtune.traces.samples import KINDS, SPLITS, Kind, Sample, Split
from kvtune.traces.tasks import TASKS, Setting

Counts = Mapping[str, Mapping[str, int]]
"""Samples a split and kind; the names are checked."""


@dataclass(frozen=True)
class Workload:
    """What to run.

    Args:
        counts: samples a split and kind.
        tokens: N of every sample.
        observed: C of every sample.
        seed: of every choice.
        needles: questions a retrieval or recall sample asks at most; as many as fit into C.
        files: the user's ``.txt`` and ``.jsonl`` files, which ``user`` samples are cut from.
    """

    counts: Counts
    tokens: int = 2048
    observed: int = 256
    seed: int = 0
    needles: int = 8
    files: tuple[Path, ...] = field(default=())

    def __post_init__(self) -> None:
        """Refuse unknown splits and kinds, and sizes that do not fit together."""
        for split, kinds in self.counts.items():
            _known(split, SPLITS, "split")
            for kind, count in kinds.items():
                _known(kind, KINDS, "kind of sample")
                if count < 0:
                    raise KvtuneError(f"{count} {kind} samples")
        if not 0 < self.observed < self.tokens:
            raise KvtuneError(
                f"{self.observed} observed of {self.tokens} tokens",
                hint="observe fewer tokens than a sample has; an eighth is usual.",
            )
        if any(kinds.get("user") for kinds in self.counts.values()) and not self.files:
            raise KvtuneError("user samples without a file", hint="give a .txt or .jsonl file.")

    def describe(self) -> str:
        """One line for people: ``search: 1 prose, 1 code; evaluate: 2 prose; N=1024, C=128``."""
        parts = [
            f"{split}: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
            for split, kinds in self.counts.items()
        ]
        return "; ".join(parts) + f"; N={self.tokens}, C={self.observed}, seed {self.seed}"

    def as_dict(self) -> dict[str, Any]:
        """The form that goes into JSON."""
        return {**asdict(self), "files": [str(path) for path in self.files]}


_USER_SAMPLES = {"small": 3, "mixed": 3, "full": 8, "tasks": 2}


def small(seed: int = 0) -> Workload:
    """Nine samples of 1024 tokens, sized for two CPU cores and 4 GB of memory.

    Six would do without selection samples, but plans judged on what they were fitted to look
    several times better than they are.
    """
    each = {"prose": 1, "code": 1, "retrieval": 1}
    return Workload(dict.fromkeys(SPLITS, each), tokens=1024, observed=128, seed=seed)


def mixed(seed: int = 0) -> Workload:
    """As ``small``, with texts that no packaged model was trained on beside the three kinds.

    A guide and sources that are younger than these models, and made-up JSON, logs, conversations
    and stories in other languages.
    """
    each = dict.fromkeys(("prose", "code", "retrieval", *texts.WRITTEN, *MAKERS), 1)
    return Workload(dict.fromkeys(SPLITS, each), tokens=1024, observed=128, seed=seed)


def standard(seed: int = 0) -> Workload:
    """The samples that kvtune's published figures are measured with, sized for a GPU."""
    counts: Counts = {
        "search": {"prose": 4, "code": 4, "retrieval": 6},
        "select": {"prose": 2, "code": 2, "retrieval": 4},
        "evaluate": {"prose": 4, "code": 4, "retrieval": 8},
    }
    return Workload(counts, seed=seed)


def tasks(seed: int = 0) -> Workload:
    """Two held-out samples of every made-up task, of 1024 tokens; nothing to search on."""
    return Workload({"evaluate": dict.fromkeys(TASKS, 2)}, tokens=1024, observed=128, seed=seed)


def named_workload(
    name: Literal["small", "mixed", "full", "tasks"], seed: int, texts: Sequence[Path] = ()
) -> Workload:
    """One of the ready-made ones; with texts of the user's, cut from those alone."""
    workload = {"small": small, "mixed": mixed, "full": standard, "tasks": tasks}[name](seed)
    if not texts:
        return workload
    each: Mapping[str, int] = {"user": _USER_SAMPLES[name]}
    return replace(workload, counts=dict.fromkeys(workload.counts, each), files=tuple(texts))


def build(workload: Workload, tokenizer: Any) -> list[Sample]:
    """Make all samples of a workload.

    Args:
        workload: what to make.
        tokenizer: the model's tokenizer (transformers).

    Raises:
        KvtuneError: there is not enough text, or a user's file cannot be read.
    """
    codec = codec_of(tokenizer)
    return [
        sample
        for split, kinds in workload.counts.items()
        for kind, count in kinds.items()
        for sample in _samples(workload, codec, cast(Split, split), cast(Kind, kind), count)
    ]


def codec_of(tokenizer: Any) -> Codec:
    """The tokenizer as the needles need it.

    A text begins with what the tokenizer itself puts there (BOS for Llama, nothing for SmolLM2).
    No chat template: SmolLM2-135M-Instruct answers plain text just as well.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    plain, full = encode("a"), list(tokenizer("a").input_ids)
    start = full[: full.index(plain[0])] if plain and plain[0] in full else []

    @cache
    def decode(token: int) -> str:
        return str(tokenizer.decode([token]))

    return Codec(encode, decode, tuple(start))


def _samples(
    workload: Workload, codec: Codec, split: Split, kind: Kind, count: int
) -> Iterator[Sample]:
    if count == 0:
        return
    made = _drawn if kind in ("retrieval", "recall", "copy", *TASKS) else _windows
    for index, passage in enumerate(made(workload, codec, split, kind, count)):
        yield _sample(workload, split, kind, index, passage)


def _sample(workload: Workload, split: Split, kind: Kind, index: int, passage: Passage) -> Sample:
    assert len(passage.token_ids) == workload.tokens + 1  # noqa: S101 - an error of this room's
    return Sample(
        id=f"{split}-{kind}-{index:03d}",
        split=split,
        kind=kind,
        token_ids=passage.token_ids[:-1],
        next_token=passage.token_ids[-1],
        observed=workload.observed,
        needle_of_row=passage.needle_of_token[-workload.observed :],
    )


def _drawn(
    workload: Workload, codec: Codec, split: Split, kind: Kind, count: int
) -> Iterator[Passage]:
    """Samples that are made up, each from its own random stream."""
    sizes = (workload.tokens, workload.observed, workload.needles)
    for index in range(count):
        stream = f"{workload.seed}/{split}/{kind}/{index}"
        rng = random.Random(stream)  # noqa: S311 - samples, not secrets
        if kind == "recall":
            yield recall(codec, split, *sizes, rng)
            continue
        tokens = _stream(codec, _documents(workload, "prose", split), stream)
        haystack = _first(tokens, workload.tokens + 1)
        if kind in TASKS:
            yield TASKS[kind](Setting(codec, haystack, split, *sizes[:2], rng))
        elif kind == "copy":
            yield copied(codec, haystack, workload.tokens, workload.observed, rng)
        else:
            yield retrieval(codec, haystack, split, *sizes, rng)


def _windows(
    workload: Workload, codec: Codec, split: Split, kind: Kind, count: int
) -> Iterator[Passage]:
    """Consecutive windows of N + 1 tokens from the split's documents in a drawn order."""
    documents = _documents(workload, kind, split)
    tokens = _stream(codec, documents, f"{workload.seed}/{split}/{kind}")
    length = workload.tokens + 1
    for made in range(count):
        body = _first(tokens, length - len(codec.start))
        window = (*codec.start, *body)
        if len(window) < length:
            raise KvtuneError(
                f"the {kind} text for {split!r} is enough for {made} samples of "
                f"{workload.tokens} tokens, not {count}",
                hint="ask for fewer or shorter samples, or give more text.",
            )
        yield Passage(window, (-1,) * length)


def _documents(workload: Workload, kind: Kind, split: Split) -> list[Sequence[texts.Document]]:
    """A split's documents of a kind, and those that follow them where they are not enough."""
    sources: Mapping[str, Callable[[], Mapping[Split, Sequence[texts.Document]]]] = {
        "prose": texts.prose,
        "code": texts.code,
        "chat": texts.chat,
        "user": lambda: texts.user(workload.files),
        **{kind: partial(texts.written, kind) for kind in texts.WRITTEN},
        **{kind: partial(texts.made_up, kind) for kind in MAKERS},
    }
    return [sources[kind]()[split], texts.further(kind)[split]]


def _stream(codec: Codec, groups: Sequence[Sequence[texts.Document]], seed: str) -> Iterator[int]:
    """Tokens of all documents, group after group, each group's in a drawn order."""
    rng = random.Random(seed)  # noqa: S311 - samples, not secrets
    for documents in groups:
        for document in rng.sample(documents, len(documents)):
            yield from codec.encode(document.text + "\n\n")


def _first(tokens: Iterator[int], count: int) -> list[int]:
    return [token for token, _ in zip(tokens, range(count), strict=False)]


def _known(name: str, known: Sequence[str], what: str) -> None:
    if name not in known:
        raise KvtuneError(f"{name!r} is no {what}", hint=nearest(name, known))
