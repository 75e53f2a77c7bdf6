"""RLKV's gates learned on SmolLM2 in minutes, and whether answers need the heads that they keep.

    python benchmarks/rlkv.py --out benchmarks/results/rlkv-h200.json --heads rlkv.safetensors
    python benchmarks/rlkv.py --device cpu --tiny --out FILE --heads FILE     # that it runs

Gates begin open and are learned from generated answers to hidden numbers (search split). Then
held-out needles are answered, greedily, with the heads of lowest gate seeing sinks and a window
alone, beside as many heads drawn at random (mean of five draws) and as many of lowest retrieval
score. ``history`` holds every step's mean reward and mean gate.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recorded_parts import attempt, say
from scipy.stats import spearmanr
from torch import Tensor

from kvtune.policies.head_scores import Floats, write_heads
from kvtune.runtime.head_detectors import detect
from kvtune.runtime.head_gates import (
    GateTraining,
    Question,
    gate_scores,
    gated,
    questions_of,
    share_right,
    train_gates,
)
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.seam import attending
from kvtune.traces.workloads import Workload, build

SHARES, DRAWS = (0.25, 0.5, 0.75), 5


def asked(loaded: LoadedModel, split: str, samples: int, tokens: int) -> list[Question]:
    plan = Workload({split: {"retrieval": samples}}, tokens=tokens, observed=min(128, tokens // 2))
    return questions_of(build(plan, loaded.tokenizer), loaded.device)


@torch.no_grad()
def right(loaded: LoadedModel, question: Question, gates: Tensor, training: GateTraining) -> float:
    """The share of an answer's tokens that are generated rightly, greedily, under these gates."""
    count, whole = len(question.answer), torch.cat([question.prompt, question.answer])[None]
    with attending(gated(gates, training.sinks, training.window)):
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

    def __init__(self, device: str, tiny: bool) -> None:
        self.loaded = load_model("smollm2-135m", device=device)
        tokens = 300 if tiny else 768
        self.training = GateTraining(
            steps=1 if tiny else 100, questions=1 if tiny else 6, answers=2 if tiny else 4
        )
        self.held_out = asked(self.loaded, "evaluate", 1 if tiny else 6, tokens)[
            : 2 if tiny else 24
        ]
        self.tokens, self.tiny = tokens, tiny
        self.gates: Floats = np.ones(0, np.float32)

    def learn(self, file: Path) -> dict[str, Any]:
        """Only of questions that the model answers with open gates, as the authors' data are."""
        known = asked(self.loaded, "search", 1 if self.tiny else 12, self.tokens)
        shape = self.loaded.geometry.layers, self.loaded.geometry.kv_heads
        whole = torch.ones(shape, device=self.loaded.device)
        known = known[: 1 if self.tiny else len(known)]
        solved = [q for q in known if right(self.loaded, q, whole, self.training) > 0.5] or known
        history: list[tuple[int, float, float]] = []
        begun = time.monotonic()

        def seen(*step: Any) -> None:
            history.append(step)
            if step[0] % 10 == 0:
                say("step, reward, gate", *step, f"{time.monotonic() - begun:.0f} s")

        gates = train_gates(self.loaded, solved, self.training, seen=seen)
        scores = gate_scores(self.loaded, gates, self.training)
        write_heads(scores, file)
        self.gates = scores.scores["rlkv"]
        taken = time.monotonic() - begun
        return {
            "training": asdict(self.training),
            "questions": len(solved), "of": len(known), "seconds": taken, "history": history,
            "mean_gate": float(self.gates.mean()), "gates": self.gates.tolist(),
        }  # fmt: skip

    def answers(self) -> list[dict[str, Any]]:
        plan = Workload({"search": {"retrieval": 1 if self.tiny else 6}}, self.tokens, 128)
        found = detect(
            self.loaded,
            build(plan, self.loaded.tokenizer),
            block=32 if self.tiny else 500,
            repeats=2,
        )
        retrieval = found.of_kv_heads("retrieval", self.loaded.geometry.kv_heads)
        ranks = {"rlkv": self.gates, "retrieval": retrieval}
        for draw in range(1 if self.tiny else DRAWS):
            ranks[f"random {draw}"] = np.random.default_rng(draw).random(self.gates.shape)
        rows: list[dict[str, Any]] = [
            {
                "spearman_with_retrieval": float(
                    spearmanr(self.gates.ravel(), retrieval.ravel())[0]
                ),
                "all_heads_in_full": self._accuracy(np.ones_like(self.gates)),
            }
        ]
        for share in SHARES[1:2] if self.tiny else SHARES:
            row = {name: self._accuracy(kept(score, 1 - share)) for name, score in ranks.items()}
            drawn = [row.pop(name) for name in list(row) if name.startswith("random")]
            rows.append(
                {"streaming": share, **row, "random": float(np.mean(drawn)), "draws": drawn}
            )
            say(rows[-1])
        return rows

    def _accuracy(self, gates: Floats) -> float:
        held = torch.from_numpy(gates.astype(np.float32)).to(self.loaded.device)
        return float(np.mean([right(self.loaded, q, held, self.training) for q in self.held_out]))


def kept(score: Floats, share: float) -> Floats:
    """Gates of 1 for the share of highest score; of equal scores the first."""
    from kvtune.policies.head_plans import most

    return most(score, share).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--heads", type=Path, required=True, help="the gates are written there")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--price", type=float, default=0.1, help="of the mean gate")
    parser.add_argument("--rate", type=float, default=0.02, help="of the optimiser")
    given = parser.parse_args()
    trial = Trial(given.device, given.tiny)
    if not given.tiny:
        trial.training = replace(
            trial.training, steps=given.steps, price=given.price, rate=given.rate
        )
    found: dict[str, Any] = {"torch": torch.__version__, "device": trial.loaded.device}

    def record(name: str, part: Any) -> None:
        found[name] = part
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    attempt(record, "learning", lambda: trial.learn(given.heads))
    attempt(record, "answers", trial.answers)


if __name__ == "__main__":
    main()
