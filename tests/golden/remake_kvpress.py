"""Golden kept-token sets of NVIDIA's kvpress, for tests/test_kvpress.py.

kvpress pins transformers below 5.3, so it runs in an environment of its own::

    python -m venv kvpress-env
    kvpress-env/bin/pip install kvpress==0.5.5 torch==2.13.0
    kvpress-env/bin/python tests/golden/remake_kvpress.py MODEL_FOLDER > tests/golden/kvpress.json

MODEL_FOLDER is SmolLM2 as kvtune's store keeps it (``kvtune models`` names the place). Token ids go
in, arithmetic is float32, and what comes out is read off the caches that kvpress leaves. A head
whose last kept and first dropped scores are closer than ``TIE`` is left out: a rounding decides it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import kvpress
import torch
import transformers
from kvpress import (
    AdaKVPress,
    BlockPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KVzipPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from kvpress.presses import kvzip_press

TIE = 1e-4
TOKENS = 160
TEXTS = (
    "The river had been low all summer, and the boats lay on the mud like sleeping cattle. In the "
    "village they said that rain would come with the new moon, as it had in the year of the great "
    "fair, when the bridge was carried off and the miller's clock was found in a field two miles "
    "below, still telling the hour. Old Marten, who kept the ferry, did not believe in the moon. "
    "He believed in the swallows, and in his left knee, and both of them had been silent since "
    "June. So he tarred his boat, and mended the rope, and waited, and in the evenings he read the "
    "only book he owned, which was about whales, and of which the last eleven pages were missing.",
    "def merge_sorted(left, right):\n    result = []\n    i = j = 0\n    while i < len(left) and "
    "j < len(right):\n        if left[i] <= right[j]:\n            result.append(left[i])\n"
    "            i += 1\n        else:\n            result.append(right[j])\n            j += 1\n"
    "    return result + left[i:] + right[j:]\n\n\nclass Stack:\n    def __init__(self):\n"
    "        self.items = []\n\n    def push(self, item):\n        self.items.append(item)\n\n"
    "    def pop(self):\n        if not self.items:\n            raise IndexError('empty')\n"
    "        return self.items.pop()\n\n    def __len__(self):\n        return len(self.items)\n",
)

PRESSES: dict[str, Callable[[], Any]] = {
    "snapkv-64-5": lambda: SnapKVPress(0.5),
    "snapkv-8-5": lambda: SnapKVPress(0.75, window_size=8),
    "pyramid": lambda: PyramidKVPress(0.75, window_size=8, beta=4),
    "pyramid-too-small": lambda: PyramidKVPress(0.75, window_size=8, beta=20),
    "tova": lambda: TOVAPress(0.75),
    "expected_attention": lambda: ExpectedAttentionPress(0.75),
    "expected_attention-mean": lambda: ExpectedAttentionPress(
        0.75, n_future_positions=64, use_covariance=False, use_vnorm=False
    ),
    "keydiff": lambda: KeyDiffPress(0.75),
    "keydiff_blockwise": lambda: BlockPress(KeyDiffPress(0.75), block_size=32),
    "streaming_llm": lambda: StreamingLLMPress(0.75),
    "adakv": lambda: AdaKVPress(SnapKVPress(0.75, window_size=8)),
    "kvzip": lambda: KVzipPress(0.75),
    "kvzip-layers": lambda: KVzipPress(0.75, layerwise=True),
    "kvzip-chunks": lambda: KVzipPress(0.75, chunk_size=64),
}


def main(folder: str) -> None:
    """Print the golden file."""
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None  # prompts are plain text
    kvzip_press.AutoTokenizer.from_pretrained = lambda *_: tokenizer
    prompts = [tokenizer(text, add_special_tokens=False).input_ids[:TOKENS] for text in TEXTS]
    golden = {
        "made_with": {
            "kvpress": kvpress.__version__ if hasattr(kvpress, "__version__") else "0.5.5",
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
        "remake": "see tests/golden/remake_kvpress.py",
        "prompts": prompts,
        "kept": {
            name: [kept_of(model, press(), prompt) for prompt in prompts]
            for name, press in PRESSES.items()
        },
    }
    print(json.dumps(golden, indent=0))


@torch.no_grad()
def kept_of(model: Any, press: Any, token_ids: list[int]) -> list[list[str | None]]:
    """Kept tokens of every layer and head, as hexadecimal sets of bits; None for ties."""
    cache, whole = transformers.DynamicCache(), transformers.DynamicCache()
    ids = torch.tensor([token_ids])
    model(input_ids=ids, past_key_values=whole)
    with noting_ties(press) as ties, press(model):
        model(input_ids=ids, past_key_values=cache)
    rows = []
    for layer, block in enumerate(model.model.layers):
        kept = masks(block.self_attn, cache.layers[layer].keys, whole.layers[layer].keys)
        tied = ties.get(layer, [False] * len(kept))
        rows.append([None if t else bits(k) for k, t in zip(kept, tied, strict=True)])
    return rows


def masks(attention: Any, keys: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Which of the prompt's tokens stay, ``[H, P]``: not masked, and still in the cache."""
    masked = getattr(attention, "masked_key_indices", None)
    attention.masked_key_indices = None
    if masked is not None:
        kept = torch.ones(whole.shape[1:3], dtype=torch.bool)
        kept[masked[1].cpu(), masked[2].cpu()] = False
        return kept
    near = (keys[0][:, None] - whole[0][:, :, None]).abs().amax(-1)  # [H, P, n]
    kept = (near < 1e-5).any(-1)
    assert (kept.sum(-1) == keys.shape[2]).all(), "keys of two tokens cannot be told apart"
    return kept


@contextmanager
def noting_ties(press: Any) -> Iterator[dict[int, list[bool]]]:
    """Notes, for every layer, the heads whose scores nearly tie at the budget."""
    ties: dict[int, list[bool]] = {}
    if not hasattr(press, "score"):
        yield ties
        return
    score = press.score

    def noting(module: Any, hidden: Any, keys: Any, *rest: Any) -> torch.Tensor:
        found: torch.Tensor = score(module, hidden, keys, *rest)
        budget = kvpress.utils.compute_n_kept(keys.shape[2], press.compression_ratio)
        if isinstance(press, PyramidKVPress):
            budget = press.get_layer_budget(module, keys.shape[2])
        if not isinstance(press, StreamingLLMPress):
            best = found[0].sort(-1, descending=True).values
            gap = (best[:, budget - 1] - best[:, budget]) / best[:, budget].abs().clamp_min(1e-20)
            ties[module.layer_idx] = (gap < TIE).tolist()
        return found

    press.score = noting
    yield ties


def bits(kept: torch.Tensor) -> str:
    """A set of tokens as one hexadecimal number, token 0 the lowest bit."""
    return f"{sum(1 << int(at) for at in kept.nonzero()):x}"


if __name__ == "__main__":
    main(sys.argv[1])
