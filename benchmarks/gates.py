"""Gates learned on SmolLM2 in minutes, and whether answers need the heads that they keep.

    python benchmarks/gates.py --by duo --out benchmarks/results/duo-h200.json --heads HEADS
    python benchmarks/gates.py --by rlkv --out benchmarks/results/rlkv-h200.json --heads HEADS
    python benchmarks/gates.py --by duo --gates benchmarks/results/duo-h200.tsv --out FILE \
        --heads HEADS     # answers alone, by gates that were learned before
    python benchmarks/gates.py --by duo --device cpu --tiny --out FILE --heads HEADS     # it runs

``duo``: DuoAttention's, learned so that states stay as they are where hidden numbers are answered;
``rlkv``: RLKV's, learned from generated answers; both of the search split. Then held-out needles
are answered, greedily, with the heads of lowest gate seeing sinks and a window alone, beside as
many heads of lowest retrieval score and as many drawn at random (mean of five draws). Other gates
of the file HEADS are answered with too, and kept in it. A table of the gates as their authors
publish them is written beside --out (.tsv). ``history`` holds every step: of RLKV's the mean reward
and mean gate, of DuoAttention's the distance of states and mean gate.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recorded_parts import attempt, say
from scipy.stats import spearmanr
from torch import Tensor

from kvtune.policies.head_scores import (
    Floats,
    HeadScores,
    read_gates,
    read_heads,
    write_gates,
    write_heads,
)
from kvtune.runtime import duo_gates, rlkv_gates
from kvtune.runtime.duo_gates import Distillation, duo_scores
from kvtune.runtime.head_detectors import detect
from kvtune.runtime.head_gates import gated
from kvtune.runtime.rlkv_gates import (
    GateTraining,
    Question,
    questions_of,
    rlkv_scores,
    share_right,
)
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.samples import Sample
from kvtune.traces.seam import attending
from kvtune.traces.workloads import Workload, build

SHARES, DRAWS = (0.5, 0.75, 0.25), 5
LENGTHS = (768, 1024, 1536, 2048)
SINKS, WINDOW = 16, 64

Seen = Callable[..., None]


def needles(loaded: LoadedModel, split: str, samples: int, tokens: int) -> list[Sample]:
    plan = Workload({split: {"retrieval": samples}}, tokens=tokens, observed=min(128, tokens // 2))
    return list(build(plan, loaded.tokenizer))


def asked(loaded: LoadedModel, split: str, samples: int, tokens: int) -> list[Question]:
    return questions_of(needles(loaded, split, samples, tokens), loaded.device)


@torch.no_grad()
def right(loaded: LoadedModel, question: Question, gates: Tensor) -> float:
    """The share of an answer's tokens that are generated rightly, greedily, under these gates."""
    count, whole = len(question.answer), torch.cat([question.prompt, question.answer])[None]
    with attending(gated(gates, SINKS, WINDOW)):
        # As long as the answer is right, what is generated next is what follows the right answer.
        given = loaded.model(input_ids=whole, use_cache=False, logits_to_keep=count + 1).logits
        first = given[0, :-1].argmax(-1)
        wrong = (first != question.answer).nonzero()[:1].flatten().tolist()
        if not wrong:
            return 1.0
        ids = torch.cat(
            [whole[:, : len(question.prompt) + wrong[0]], first[None, wrong[0] : wrong[0] + 1]], 1
        )
        for _ in range(count - wrong[0] - 1):
            logits = loaded.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return float(share_right(ids[:, len(question.prompt) :], question.answer))


class Trial:
    """The model, its gates, and what it answers without some heads' far attention."""

    def __init__(self, device: str, tiny: bool, file: Path) -> None:
        self.loaded = load_model("smollm2-135m", device=device, dtype="float32")
        self.tokens, self.tiny, self.file = 300 if tiny else 768, tiny, file
        self.held_out = asked(self.loaded, "evaluate", 1 if tiny else 6, self.tokens)
        self.held_out = self.held_out[: 2 if tiny else 24]

    def rlkv(self, training: GateTraining, seen: Seen) -> tuple[HeadScores, dict[str, Any]]:
        """Only of questions that the model answers with open gates, as the authors' data are."""
        known = asked(self.loaded, "search", 1 if self.tiny else 12, self.tokens)
        known = known[: 1 if self.tiny else len(known)]
        shape = self.loaded.geometry.layers, self.loaded.geometry.kv_heads
        whole = torch.ones(shape, device=self.loaded.device)
        solved = [q for q in known if right(self.loaded, q, whole) > 0.5] or known
        gates = rlkv_gates.train_gates(self.loaded, solved, training, seen=seen)
        counts = {"questions": len(solved), "of": len(known)}
        return rlkv_scores(self.loaded, gates, training), counts

    def duo(self, training: Distillation, seen: Seen) -> tuple[HeadScores, dict[str, Any]]:
        """Samples of several lengths, each with as many needles as fit into what is asked."""
        lengths = (300,) if self.tiny else LENGTHS
        count = 1 if self.tiny else 6
        samples = [s for n in lengths for s in needles(self.loaded, "search", count, n)]
        gates = duo_gates.train_gates(self.loaded, samples, training, seen=seen)
        return duo_scores(self.loaded, gates, training), {"samples": len(samples)}

    def learn(self, training: GateTraining | Distillation) -> dict[str, Any]:
        history: list[tuple[int, float, float]] = []
        begun = time.monotonic()

        def seen(*step: Any) -> None:
            history.append(step)
            if step[0] % 10 == 0:
                say("step, measure, gate", *step, f"{time.monotonic() - begun:.0f} s")

        if isinstance(training, Distillation):
            scores, counts = self.duo(training, seen)
        else:
            scores, counts = self.rlkv(training, seen)
        taken = time.monotonic() - begun
        there = self.file.exists()
        write_heads(read_heads(self.file).joined(scores) if there else scores, self.file)
        (gates,) = scores.scores.values()
        return {
            "training": asdict(training), **counts, "seconds": taken, "history": history,
            "mean_gate": float(gates.mean()), "gates": gates.tolist(),
        }  # fmt: skip

    def known(self, gates: Path, training: Distillation) -> dict[str, Any]:
        """Gates of an earlier run, as it published them."""
        scores = duo_scores(self.loaded, torch.from_numpy(read_gates(gates)), training)
        write_heads(scores, self.file)
        return {"gates of": gates.name}

    def answers(self, until: float) -> list[dict[str, Any]]:
        found = detect(
            self.loaded,
            needles(self.loaded, "search", 1 if self.tiny else 6, self.tokens),
            block=32 if self.tiny else 500,
            repeats=2,
        )
        retrieval = found.of_kv_heads("retrieval", self.loaded.geometry.kv_heads)
        gates = dict(read_heads(self.file).scores)
        ranks = {**gates, "retrieval": retrieval}
        for draw in range(1 if self.tiny else DRAWS):
            ranks[f"random {draw}"] = np.random.default_rng(draw).random(retrieval.shape)
        rows: list[dict[str, Any]] = [
            {
                "spearman_with_retrieval": {
                    name: float(spearmanr(each.ravel(), retrieval.ravel())[0])
                    for name, each in gates.items()
                },
                "all_heads_in_full": self._accuracy(np.ones_like(retrieval)),
            }
        ]
        for share in SHARES[:1] if self.tiny else SHARES:
            if time.monotonic() > until:
                say("out of time before", share)
                break
            row = {name: self._accuracy(kept(score, 1 - share)) for name, score in ranks.items()}
            drawn = [row.pop(name) for name in list(row) if name.startswith("random")]
            rows.append(
                {"streaming": share, **row, "random": float(np.mean(drawn)), "draws": drawn}
            )
            say(rows[-1])
        return rows

    def _accuracy(self, gates: Floats) -> float:
        held = torch.from_numpy(gates.astype(np.float32)).to(self.loaded.device)
        return float(np.mean([right(self.loaded, q, held) for q in self.held_out]))


def kept(score: Floats, share: float) -> Floats:
    """Gates of 1 for the share of highest score; of equal scores the first."""
    from kvtune.policies.head_plans import most

    return most(score, share).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--by", choices=("duo", "rlkv"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--heads", type=Path, required=True, help="the gates are written there")
    parser.add_argument("--gates", type=Path, help="learned before by --by duo, as a table")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, help="left out: 300 (duo), 60 (rlkv)")
    parser.add_argument("--price", type=float, help="of the mean gate; 0.05 (duo), 0.1 (rlkv)")
    parser.add_argument("--seconds", type=float, default=240, help="begin no share after so many")
    given = parser.parse_args()
    begun = time.monotonic()
    trial = Trial(given.device, given.tiny, given.heads)
    found: dict[str, Any] = {"torch": torch.__version__, "device": trial.loaded.device}

    def record(name: str, part: Any) -> None:
        found[name] = part
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    training = training_of(given)
    if given.gates is not None and isinstance(training, Distillation):
        attempt(record, "learning", lambda: trial.known(given.gates, training))
        attempt(record, "answers", lambda: trial.answers(begun + given.seconds))
        return
    attempt(record, "learning", lambda: trial.learn(training))
    if given.heads.exists() and given.by in (gates := read_heads(given.heads)).scores:
        write_gates(gates.score(given.by), given.out.with_suffix(".tsv"))
    attempt(record, "answers", lambda: trial.answers(begun + given.seconds))


def training_of(given: argparse.Namespace) -> GateTraining | Distillation:
    """What was asked for; one step where it need only run."""
    asked = {n: v for n in ("steps", "price") if (v := getattr(given, n)) is not None}
    if given.by == "duo":
        training: GateTraining | Distillation = Distillation(sinks=SINKS, window=WINDOW)
        tiny: dict[str, Any] = {"steps": 1}
    else:
        training = GateTraining(
            questions=6, price=0.1, rate=0.02, sinks=SINKS, window=WINDOW
        )  # the authors' price and rate move gates too little in so few steps
        tiny = {"steps": 1, "questions": 1, "answers": 2}
    return replace(training, **(tiny if given.tiny else {}), **asked)


if __name__ == "__main__":
    main()
