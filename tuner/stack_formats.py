"""A serving stack's own formats where a stand-in answers: losses beside those of its 4 bits.

The packaged tables know kvtune's own integers. What a stack's arithmetic loses beside them was
measured live on the same model with all tokens kept, and is carried over as a ratio by kind of
text.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import numpy as np

from kvtune.policies.export.limits import EngineLimits
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.methods.full import Full
from kvtune.policies.option import ALL, Option
from kvtune.simulator.quality.tables import Tables

BESIDE = Option(Full(), ALL, Int4(), Int4())

OVER_INT4: dict[str, dict[str, float]] = {
    "int4_token_head": {"prose": 0.665, "code": 1.27, "retrieval": 1.44},
    "int8_token_head": {"prose": 0.00738, "code": 0.018, "retrieval": 0.0131},
    "fp8_token_head": {"prose": 0.106, "code": 0.189, "retrieval": 0.207},
    "q8_0-rotated": {"prose": 0.00369, "code": 0.00437, "retrieval": 0.00271},
    "q4_0-rotated": {"prose": 0.518, "code": 1.04, "retrieval": 0.706},
    "openvino_u8": {"prose": 0.00134, "code": 0.00291, "retrieval": 0.00271},
    "openvino_u4": {"prose": 0.451, "code": 0.754, "retrieval": 0.531},
}
"""By format and kind of text: live loss over that of ``BESIDE``, SmolLM2-135M
(``benchmarks/results/formats-stacks-cpu.json``)."""


def with_formats_of(tables: Tables, limits: EngineLimits | None) -> Tables:
    """A stand-in's tables with all tokens in each of a stack's own formats, where it has some."""
    forms = [form for form in limits.own if form.label in OVER_INT4] if limits else []
    if not forms:
        return tables
    beside = tables.options.index(BESIDE)
    ratios = np.array([[_ratio(form.label, s.kind) for form in forms] for s in tables.samples])
    loss = tables.loss[:, :, [beside]] * ratios[:, None].astype(np.float32)
    factor = np.repeat(tables.factor[:, :, [beside]], len(forms), 2)
    options = tuple(Option(Full(), ALL, form, form) for form in forms)
    return replace(
        tables,
        options=(*tables.options, *options),
        loss=np.concatenate([tables.loss, loss], 2),
        factor=np.concatenate([tables.factor, factor], 2),
    )


def _ratio(label: str, kind: str) -> float:
    """Of a kind of text as it is named beside other sources; of one that was not measured, all."""
    ratios = OVER_INT4[label]
    return ratios.get(kind.split(",")[0], fmean(ratios.values()))
