"""Fits to a model, once, what two methods use: OSCAR's rotations and LoCoCo's kernels.

    python -m kvtune.runtime.learn MODEL oscar|lococo [--steps 100] [--device cuda]

Texts are of the search split, so that nothing evaluated was fitted on. The model's own weights stay
as they are. What is fitted is kept in the cache folder, where policies find it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from kvtune.common.progress import Bars, Progress, Silent
from kvtune.policies.gathering import of_tokens
from kvtune.policies.methods.lococo import LoCoCo, fused
from kvtune.policies.signals import Needs, Signals
from kvtune.runtime.prompts import Prompt, fresh_prompt
from kvtune.traces.learned import keep_learned, learned
from kvtune.traces.models import LoadedModel, best_device, load_model
from kvtune.traces.samples import Sample
from kvtune.traces.workloads import Workload, build

_PER_KIND = 3
WORKLOAD = Workload(
    {"search": dict.fromkeys(("prose", "code", "retrieval"), _PER_KIND)}, tokens=1280, observed=256
)
_QUERIES = 512  # newest of each prompt, whose products make a rotation
_WIDTH = 21  # tokens that a kernel spans
_BUDGETS = (32, 64, 128)  # entries in all, that kernels are trained for in turn
_RATE = 3e-3


def learn_rotations(loaded: LoadedModel, progress: Progress | None = None) -> None:
    """Fit and keep OSCAR's bases, if the model has none."""
    if "oscar_keys" not in learned(loaded.fingerprint):
        samples = build(WORKLOAD, loaded.tokenizer)
        keep_learned(loaded.fingerprint, rotations(loaded, samples, progress))


def rotations(
    loaded: LoadedModel, samples: Sequence[Sample], progress: Progress | None = None
) -> dict[str, Tensor]:
    """OSCAR's bases of keys and of values, ``[L, H, D, D]`` each."""
    shape = loaded.geometry
    size = (shape.layers, shape.kv_heads, shape.head_dim, shape.head_dim)
    of_queries, of_outputs = torch.zeros(size).double(), torch.zeros(size).double()
    for sample in (progress or Silent()).track(samples, "reading prompts", len(samples)):
        prompt = fresh_prompt(loaded, sample, Needs(window=_QUERIES))
        for layer in range(shape.layers):
            signals = prompt(layer)
            queries = signals.queries.unflatten(0, (shape.kv_heads, -1)).flatten(1, 2)
            paid = signals.window_attention(_QUERIES).flatten(1, 2)
            of_queries[layer] += _products(queries)
            of_outputs[layer] += _products(paid @ signals.values.float())
    return {"oscar_keys": _basis(of_queries), "oscar_values": _basis(of_outputs)}


def _products(rows: Tensor) -> Tensor:
    """``[H, D, D]`` of ``[H, n, D]``."""
    wide = rows.double().cpu()
    products: Tensor = wide.transpose(1, 2) @ wide
    return products


def _basis(squares: Tensor) -> Tensor:
    """Eigenvectors as columns, those of the largest eigenvalues first."""
    vectors: Tensor = torch.linalg.eigh(squares).eigenvectors
    return vectors.flip(-1).float()


def kernels(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    steps: int = 100,
    slots: int = LoCoCo().slots,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """LoCoCo's convolutions, trained layer by layer: tokens to come attend as to the whole prompt.

    Args:
        loaded: the model, which is not trained.
        samples: prompts, and tokens behind them whose attention is matched.
        steps: of the optimiser in each layer.
        slots: fused entries.
        seed: of the first kernels.
        progress: a bar over layers.
    """
    method = LoCoCo("convolution", slots)
    needs = Needs(window=method.window, future=True)
    prompts = [fresh_prompt(loaded, sample, needs) for sample in samples]
    layers = range(loaded.geometry.layers)
    found = [
        _trained(prompts, layer, method, steps, seed + layer)
        for layer in (progress or Silent()).track(layers, "training kernels", len(layers))
    ]
    names = ("lococo_weight", "lococo_bias", "lococo_share")
    return {
        name: torch.stack(each) for name, each in zip(names, zip(*found, strict=True), strict=True)
    }


def _trained(
    prompts: Sequence[Prompt], layer: int, method: LoCoCo, steps: int, seed: int
) -> list[Tensor]:
    """Weight, bias and share of one layer, in 16 bits."""
    signals = [prompt(layer) for prompt in prompts]
    head_dim, device = signals[0].keys.shape[-1], signals[0].keys.device
    drawn = torch.Generator().manual_seed(seed)
    weight = torch.randn(method.slots, 2 * head_dim, _WIDTH, generator=drawn)
    weight *= (2 * head_dim * _WIDTH) ** -0.5
    made = [weight.to(device), torch.zeros(method.slots, device=device)]
    made.append(torch.tensor(0.5, device=device))
    made = [tensor.requires_grad_() for tensor in made]
    adam = torch.optim.Adam(made, lr=_RATE)
    for step in range(steps):
        one = signals[step % len(signals)]
        budget = _BUDGETS[step // len(signals) % len(_BUDGETS)]
        loss = _loss(one, method, min(budget, one.prompt_tokens - 1), (made[0], made[1], made[2]))
        adam.zero_grad()
        loss.backward()
        adam.step()
    return [tensor.detach().bfloat16() for tensor in made]


def _loss(
    signals: Signals, method: LoCoCo, budget: int, kernels: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Squared error of the attention output of tokens to come, over the output's square."""
    heavy = method.keep(signals, max(budget - method.slots, 0))
    residual = method.residual(signals, max(budget, method.slots))
    sums = fused(signals.keys, signals.values, heavy, residual, kernels)
    whole = signals.keys.float(), signals.values.float()
    fewer = (torch.cat([of_tokens(x, heavy), y], 1) for x, y in zip(whole, sums, strict=True))
    exact = _attended(signals, *whole)
    return (_attended(signals, *fewer) - exact).square().mean() / exact.square().mean()


def _attended(signals: Signals, keys: Tensor, values: Tensor) -> Tensor:
    """What tokens to come read of these entries and of each other, ``[H, G, C, D]``."""
    future = signals.given("future")
    rows = future.queries.float().unflatten(0, (len(keys), -1)) * signals.scale
    logits = rows @ torch.cat([keys, future.keys.float()], 1)[:, None].transpose(-1, -2)
    later = torch.ones(rows.shape[2], rows.shape[2], device=rows.device).triu(1).bool()
    mask = torch.cat([later.new_zeros(len(later), keys.shape[1]), later], 1)
    paid = logits.masked_fill(mask, -torch.inf).softmax(-1)
    output: Tensor = paid @ torch.cat([values, future.values.float()], 1)[:, None]
    return output


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("what", choices=("oscar", "lococo"))
    parser.add_argument("--steps", type=int, default=100, help="of training, in each layer")
    parser.add_argument("--device", default=best_device())
    arguments = parser.parse_args()
    loaded = load_model(arguments.model, device=arguments.device, dtype="float32")
    samples = build(WORKLOAD, loaded.tokenizer)
    if arguments.what == "oscar":
        found = rotations(loaded, samples, Bars())
    else:
        found = kernels(loaded, samples, arguments.steps, progress=Bars())
    print(keep_learned(loaded.fingerprint, found))


if __name__ == "__main__":
    main()
