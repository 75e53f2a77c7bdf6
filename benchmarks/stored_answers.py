"""What serving stacks lose by storing all tokens alike: the prompt is read, and answers are kept.

    python benchmarks/stored_answers.py --out FILE [--only FORMAT]

A plan's loss is that of a prompt that was read uncompressed and then stored, its answer in 16 bits.
vLLM, llama.cpp and OpenVINO store each token as it comes and read what is stored, prompts
included. For each of their formats, SmolLM2-135M in float32 on the samples that searches hold out
(``data/held_out_smollm2.json``), the observed tokens' mean KL to the uncompressed cache, nats a
token, by kind of text:

    prompt          the prompt stored when it has been read, the observed tokens exact
    answers         these stored too, each as it comes
    everything      the prompt read through what is stored as well: what the stacks do
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from kvtune.common.files import write_json
from kvtune.common.progress import Silent
from kvtune.policies.format import Format, Role
from kvtune.policies.formats.llama_cpp import Q4, Q8
from kvtune.policies.formats.openvino import OpenVINO4, OpenVINO8
from kvtune.policies.formats.token_head import Fp8TokenHead, Int4TokenHead, Int8TokenHead
from kvtune.traces.models import model_folder

SAMPLES = Path(__file__).parent / "data" / "held_out_smollm2.json"
FORMATS: tuple[Format, ...] = (
    Q4(rotation="hadamard"), Int4TokenHead(), Q8(rotation="hadamard"), Int8TokenHead(),
    Fp8TokenHead(), OpenVINO8(), OpenVINO4(),
)  # fmt: skip


class Stored(DynamicCache):  # type: ignore[misc]
    """Keeps keys and values as a format gives them back; token by token, so that none waits."""

    form: Format | None = None

    def update(self, keys: Tensor, values: Tensor, layer: int, *rest: Any, **named: Any) -> Any:
        """Stored as they come; keys with those of their page, where it is not full."""
        if self.form is not None:
            if layer < len(self.layers) and (held := self.layers[layer]).is_initialized:
                open_ = held.keys.shape[2] % self.form.page_tokens
                if open_:
                    keys = torch.cat([held.keys[:, :, -open_:], keys], 2)
                    held.keys = held.keys[:, :, :-open_]
            keys, values = self.back(keys, "keys"), self.back(values, "values")
        return super().update(keys, values, layer, *rest, **named)

    def back(self, tensor: Tensor, role: Role) -> Tensor:
        heads = tensor[0]
        counts = torch.full((len(heads),), heads.shape[1])
        return self.form.roundtrip(heads, counts, role)[None].to(tensor.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=[form.label for form in FORMATS])
    arguments = parser.parse_args()
    folder = model_folder("smollm2-135m", Silent())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = json.loads(arguments.out.read_text("utf-8")) if arguments.out.exists() else {}
    for sample in json.loads(SAMPLES.read_text("utf-8")):
        ids, prompt = torch.tensor([sample["token_ids"]]), sample["prompt"]
        read = Stored()
        answered(model, ids[:, :prompt], read)
        full = answered(model, ids[:, prompt:], copied(read))
        for form in FORMATS:
            if arguments.only in (None, form.label):
                told = found.setdefault(form.label, {})
                told[sample["kind"]] = losses(model, ids, prompt, read, form, full)
                print(sample["kind"], form.label, told[sample["kind"]], file=sys.stderr, flush=True)
                write_json(arguments.out, found)


def losses(
    model: Any, ids: Tensor, prompt: int, read: Stored, form: Format, full: Tensor
) -> dict[str, float]:
    """Nats a token with the prompt stored in a format, its answer too, and the reading as well."""
    held, observed = copied(read, form), ids[:, prompt:]
    ways = {"prompt": answered(model, observed, copied(held))}
    held.form = form
    ways["answers"] = said(model, observed, held)
    anew = Stored()
    anew.form = form
    answered(model, ids[:, :prompt], anew)
    ways["everything"] = said(model, observed, anew)
    return {name: divergence(full, there) for name, there in ways.items()}


def said(model: Any, ids: Tensor, cache: Stored) -> Tensor:
    """The same, token by token where a page is stored again with each of them."""
    assert cache.form is not None
    if cache.form.page_tokens == 1:
        return answered(model, ids, cache)
    return torch.cat([answered(model, token, cache) for token in ids.split(1, 1)])


def answered(model: Any, ids: Tensor, cache: Stored) -> Tensor:
    """Log-probabilities of the tokens after these."""
    with torch.no_grad():
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=128)
    return out.logits[0].float().log_softmax(-1)


def copied(cache: Stored, form: Format | None = None) -> Stored:
    """The same tokens in a cache of its own, as a format gives them back."""
    other = Stored()
    other.form = form
    for number, layer in enumerate(cache.layers):
        other.update(layer.keys, layer.values, number)
    other.form = None
    return other


def divergence(of: Tensor, to: Tensor) -> float:
    """Mean KL(of || to), nats a token."""
    return float(f"{float((of.exp() * (of - to)).sum(-1).mean()):.4g}")


if __name__ == "__main__":
    main()
