"""Linear layers, norm, rotary, activation, residual and sampling, and a whole layer of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F

from kvtune.profiles.kernel_table import Point
from kvtune.profiles.models import find_model
from kvtune.runtime.measure.grid import Grid
from kvtune.runtime.measure.operation import Call, Operation, Setting, Wanted, Work, copies
from kvtune.runtime.measure.plain_model import (
    PlainDecoder,
    gated,
    likeliest,
    random_tensor,
    rms_norm,
    rotary_tables,
    rotate,
)


def _linear_points(grid: Grid) -> Iterator[Wanted]:
    groups = (
        (0, grid.matrices, grid.rows),
        (1, grid.matrices, grid.more_rows),
        (1, grid.more_matrices, (*grid.rows[::2], *grid.more_rows[-3:])),
    )
    for turn, matrices, all_rows in groups:
        for out, wide in matrices:
            for rows in all_rows:
                if rows * out <= 2**29:  # logits of a whole prompt are never made
                    yield Wanted(
                        turn, Point("linear", "cublas", rows=rows, width_in=wide, width_out=out)
                    )


def _prepare_linear(point: Point, setting: Setting) -> Work:
    matrix = 2 * point.width_in * point.width_out
    inputs = random_tensor(point.rows, point.width_in, device=setting.device, scale=1.0)
    weights = [
        random_tensor(point.width_out, point.width_in, device=setting.device)
        for _ in range(copies(setting.grid, point, matrix))
    ]
    return Work(
        [lambda w=w: F.linear(inputs, w) for w in weights],  # type: ignore[misc]
        matrix + inputs.nbytes + 2 * point.rows * point.width_out,
        2 * point.rows * point.width_in * point.width_out,
        most_calls=512 if point.rows <= 64 else 32,
    )


def _small_points(op: str) -> Callable[[Grid], Iterator[Wanted]]:
    def points(grid: Grid) -> Iterator[Wanted]:
        queries, kv_heads, width = grid.heads[0]
        widths = {
            "rms_norm": (grid.hidden, grid.hidden),
            "rope": ((queries + kv_heads) * width,) * 2,
            "gated": (2 * grid.intermediate, grid.intermediate),
            "residual": (grid.hidden, grid.hidden),
            "argmax": (grid.vocabulary, 1),
            "embedding": (grid.hidden, grid.hidden),
        }[op]
        for turn, all_rows in ((0, grid.rows), (1, grid.more_rows)):
            for rows in all_rows:
                if rows <= 64 or op not in ("argmax", "embedding"):
                    yield Wanted(
                        turn,
                        Point(
                            op, "torch", rows=rows, width_in=widths[0], width_out=widths[1],
                            head_dim=width if op == "rope" else 0, l2="warm",
                        ),
                    )  # fmt: skip

    return points


def _prepare_small(point: Point, setting: Setting) -> Work:
    """On data that the kernel before has just written, as in a step: warm."""
    inputs = random_tensor(point.rows, point.width_in, device=setting.device, scale=1.0)
    return Work(
        [_small_call(point, inputs, setting)],
        2 * point.rows * (point.width_in + point.width_out),
    )


def _small_call(point: Point, inputs: torch.Tensor, setting: Setting) -> Call:
    if point.op == "rms_norm":
        weight = torch.ones(point.width_in, dtype=torch.bfloat16, device=setting.device)
        return lambda: rms_norm(inputs, weight)
    if point.op == "rope":
        heads = inputs.view(point.rows, -1, point.head_dim)
        cosine, sine = rotary_tables(1000, point.head_dim, setting.device)
        return lambda: rotate(heads, cosine, sine)
    if point.op == "embedding":
        table = random_tensor(4096, point.width_in, device=setting.device)
        tokens = torch.arange(point.rows, device=setting.device)
        return lambda: F.embedding(tokens, table)
    calls: dict[str, Call] = {
        "gated": lambda: gated(inputs),
        "residual": lambda: inputs + inputs,
        "argmax": lambda: likeliest(inputs),
    }
    return calls[point.op]


def _layer_points(grid: Grid) -> Iterator[Wanted]:
    queries, kv_heads, width = grid.heads[0]
    for depth in grid.depths:
        for batch in grid.rows:
            yield Wanted(
                0,
                Point(
                    "decode_layers", "plain-loop", batch=batch, query_heads=queries,
                    kv_heads=kv_heads, head_dim=width, length=2 * grid.lengths[0], rows=depth,
                    width_in=grid.hidden, width_out=grid.intermediate,
                ),
            )  # fmt: skip


def _step_points(grid: Grid) -> Iterator[Wanted]:
    """Whole steps at every depth, and on a shallow model with as much cache as a layer may have."""
    for _, layers in _layer_points(grid):
        yield Wanted(0, replace(layers, op="decode_step"))
        if layers.rows == min(grid.depths) and layers.batch > 1:
            length = grid.cache_tokens // layers.batch
            yield Wanted(0, replace(layers, op="decode_step", length=length))


def _decoder(point: Point, setting: Setting, vocabulary: int) -> PlainDecoder:
    shape = replace(
        find_model("llama-8b"),
        query_heads=point.query_heads,
        kv_heads=point.kv_heads,
        head_dim=point.head_dim,
        hidden_size=point.width_in,
        intermediate_size=point.width_out,
        vocab_size=vocabulary,
    )
    model = PlainDecoder(shape, setting.device, layers=point.rows)
    model.hold(point.batch, point.length)
    return model


def _prepare_step(point: Point, setting: Setting) -> Work:
    """A whole step, one graph a step, step after step: as a model is served."""
    model = _decoder(point, setting, setting.grid.vocabulary)
    moved = model.weight_bytes + model.cache_bytes
    return Work([model.step], moved, most_calls=1, steady=True)


def _prepare_layers(point: Point, setting: Setting) -> Work:
    """So many different layers one after another as in a step: what the parts alone do not say.

    Weights spread over more memory are read more slowly than a few that are met again and again.
    """
    model = _decoder(point, setting, vocabulary=16)
    state = [random_tensor(point.batch, point.width_in, device=setting.device, scale=1.0)]

    def call(index: int) -> None:
        state[0] = model.run_layer(state[0], model.layers[index], model.caches[index])

    moved = (model.weight_bytes + model.cache_bytes) // len(model.layers)
    return Work([lambda i=i: call(i) for i in range(len(model.layers))], moved)  # type: ignore[misc]


OPERATIONS = (
    Operation("linear", _linear_points, _prepare_linear),
    *(
        Operation(name, _small_points(name), _prepare_small)
        for name in ("rms_norm", "rope", "gated", "residual", "argmax", "embedding")
    ),
    Operation("decode_layers", _layer_points, _prepare_layers),
    Operation("decode_step", _step_points, _prepare_step),
)
