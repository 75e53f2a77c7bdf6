"""The runtime under OpenVINO GenAI, asked for every token, over the model that GenAI makes.

It is compiled with paged attention, as GenAI's continuous batching does. A prompt is read in chunks
of GenAI's default; then the observed tokens come one by one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from started_stacks import Logs, Observed, Samples, said
from torch import Tensor


def openvino(arguments: argparse.Namespace, samples: Samples, folder: Path | None) -> Logs:
    """Precision of the cache as the file says it, else 16 bits."""
    properties = settings_of(folder)["properties"] if folder else SIXTEEN
    model = compiled(converted(arguments.gguf), properties)
    return [paged_answers(model, sample) for sample in samples]


SIXTEEN = {"KV_CACHE_PRECISION": "f16"}
PAGE_TOKENS, CHUNK_TOKENS = 32, 256


def settings_of(folder: Path) -> Any:
    """The exported file, without its header."""
    text = (folder / "openvino.json").read_text("utf-8")
    return json.loads("\n".join(x for x in text.splitlines() if not x.startswith("#")))


def compiled(path: Path, properties: dict[str, Any]) -> Any:
    """The model with paged attention, as GenAI's continuous batching compiles it."""
    import openvino as runtime
    from openvino._offline_transformations import paged_attention_transformation

    core = runtime.Core()
    read = core.read_model(path)
    paged_attention_transformation(read)
    return core.compile_model(read, "CPU", properties)


def new_pages(model: Any, pages: int) -> dict[Any, Any]:
    """Cache tensors of a number of pages for every layer, by the compiled model's input."""
    import openvino as runtime

    found = {}
    for port in model.inputs:
        if "cache" in port.any_name:
            shape = [pages, *(each.get_length() for each in list(port.partial_shape)[1:])]
            found[port] = runtime.Tensor(port.element_type, runtime.Shape(shape))
    return found


def converted(gguf: Path) -> Path:
    """The model that OpenVINO GenAI makes of a GGUF file, which it writes beside it when asked."""
    if (known := gguf.with_name("openvino_model.xml")).exists():
        return known
    import openvino_genai

    folder = Path(tempfile.mkdtemp())
    (folder / gguf.name).symlink_to(gguf.resolve())
    settings = openvino_genai.SchedulerConfig()
    settings.num_kv_blocks = 8
    openvino_genai.LLMPipeline(
        str(folder / gguf.name), "CPU", scheduler_config=settings, enable_save_ov_model=True
    )
    return folder / "openvino_model.xml"


def paged_answers(model: Any, sample: Observed) -> Tensor:
    """One sequence in pages of its own."""
    import numpy as np
    from openvino import Tensor as Given

    request, ids = model.create_infer_request(), sample.token_ids
    for port, pages in new_pages(model, -(-len(ids) // PAGE_TOKENS)).items():
        request.set_tensor(port, pages)

    def step(start: int, stop: int) -> Tensor:
        held, small = -(-stop // PAGE_TOKENS), np.int32
        given = {
            "input_ids": np.array(ids[start:stop], np.int64),
            "position_ids": np.arange(start, stop), "max_context_len": np.array(stop, small),
            "past_lens": np.array([start], small),
            "subsequence_begins": np.array([0, stop - start], small),
            "block_indices_begins": np.array([0, held], small),
            "block_indices": np.arange(held, dtype=small),
        }  # fmt: skip
        for name, value in given.items():
            request.set_tensor(name, Given(value))
        request.infer()
        logits = request.get_output_tensor(0).data.reshape(stop - start, -1)
        return torch.from_numpy(logits[-1].copy()).float().log_softmax(-1)

    for start in range(0, sample.prompt, CHUNK_TOKENS):
        step(start, min(start + CHUNK_TOKENS, sample.prompt))
    found = torch.stack([step(at, at + 1) for at in range(sample.prompt, len(ids))])
    said(sample.id)
    return found
