"""Fewer keys and values that answer reference queries as a whole prompt does, in closed form.

All of it works on the attention that reference queries pay to the prompt, ``[H, R, P]``: its rows
sum to one, so a set of keys that keeps the attention's mass has rows that sum to one as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INDEPENDENT = 1e-5  # of a column's square that must be left beside those chosen before it
RIDGE = 1e-3  # of the mean square of the columns: how firmly fits are held to what was there
_ROUNDS, _STEPS = 3, 30  # of solving without negative weights, and of projected gradients
_LEAST_WEIGHT = 1e-4
_REFINED, _DAMPING = 6, 0.1  # steps of fitting weights and values together, and the first one's


def pursued(attention: Tensor, values: Tensor, count: int) -> Tensor:
    """The keys that explain most of the reference queries' outputs, best first: ``[H, count]``.

    Orthogonal least squares, greedily: every key is a column of attention, and the target is the
    output together with the attention's mass, which is one everywhere. Each step adds the column
    that leaves least of the target when all weights of the chosen columns are fitted anew. When
    no column is independent of the chosen ones any more, those of most mass follow.

    Args:
        attention: ``[H, R, P]`` float32.
        values: ``[H, P, D]`` float32.
        count: at most P.
    """
    heads, _, tokens = attention.shape
    outputs = attention @ values
    loudness = outputs.square().sum(-1).mean(1).sqrt()[:, None, None]
    target = torch.cat([outputs, loudness.expand(*outputs.shape[:2], 1)], -1)
    left = attention.transpose(1, 2).double() @ target.double()  # [H, P, 1 + D]
    square = attention.double().square().sum(1)  # [H, P], of what each column has left
    whole, mass = square.clone(), attention.double().mean(1) - 2  # below every gain
    factor = square.new_zeros(heads, tokens, count)
    row, order = torch.arange(heads, device=square.device), []
    for step in range(count):
        is_open = square > _INDEPENDENT * whole
        gain = (left.square().sum(-1) / square.clamp_min(1e-300)).where(is_open, mass)
        best = gain.argmax(-1)
        order.append(best)
        column = attention[row, :, best]
        product = (attention.transpose(1, 2) @ column[..., None])[..., 0].double()
        product -= (factor[..., :step] @ factor[row, best, :step, None])[..., 0]
        length = square[row, best].clamp_min(1e-300).sqrt()
        new = (product / length[:, None]).where(is_open[row, best, None], 0)
        part = (left[row, best] / length[:, None]).where(is_open[row, best, None], 0)
        factor[..., step] = new
        left -= new[..., None] * part[:, None]
        square = (square - new.square()).clamp_min(0)
        whole[row, best], mass[row, best] = torch.inf, -torch.inf
    return torch.stack(order, -1) if order else row.new_zeros(heads, 0)


def mass_weights(columns: Tensor, ridge: float = RIDGE) -> Tensor:
    """Weights of the kept keys whose weighted attention sums to one for every query: ``[H, n]``.

    Non-negative least squares, held to weights of one: a few solutions, each without the keys
    whose weight was negative before, then projected gradients with momentum.

    Args:
        columns: of attention, ``[H, R, n]`` float64.
        ridge: how firmly, of the mean square of the columns.
    """
    gram = columns.transpose(1, 2) @ columns
    wanted, held_by = columns.sum(1), _ridge(gram, ridge)
    gram = gram + torch.diag_embed(held_by)
    wanted = wanted + held_by
    rate = 1 / gram.sum(-1).amax(-1, keepdim=True).clamp_min(1e-300)
    held = torch.ones_like(wanted)
    for _ in range(_ROUNDS):
        inner = gram * held[:, None] * held[..., None] + torch.diag_embed(1 - held)
        solved = _solved(inner, (wanted * held)[..., None])[..., 0]
        held = held * (solved > 0)
    weights = ahead = solved * held
    for step in range(_STEPS):
        slope = (gram @ ahead[..., None])[..., 0] - wanted
        further = (ahead - rate * slope).clamp_min(0)
        ahead = further + step / (step + 3) * (further - weights)
        weights = further
    return weights.clamp_min(_LEAST_WEIGHT)


def fitted_values(
    columns: Tensor, weights: Tensor, outputs: Tensor, own: Tensor, ridge: float = RIDGE
) -> Tensor:
    """Values whose attention is nearest to the outputs over the whole prompt: ``[H, n, D]``.

    Least squares, held to the tokens' own values.

    Args:
        columns: of attention, ``[H, R, n]`` float64.
        weights: of the keys, ``[H, n]``.
        outputs: of the reference queries, ``[H, R, D]``.
        own: values of the kept tokens, ``[H, n, D]``.
        ridge: how firmly they are held to these, of the mean square of the shares.
    """
    mass = (columns @ weights[..., None]).clamp_min(1e-300)
    shares = columns / mass  # without the weights, which scale rows and columns of what is small
    alike = (shares.mT @ shares) * weights[:, None] * weights[..., None]
    wanted = (shares.mT @ outputs.double()) * weights[..., None]
    gram = alike + torch.diag_embed(_ridge(alike, ridge))
    return own.double() + _solved(gram, wanted - alike @ own.double())


def fitted_together(columns: Tensor, outputs: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Weights ``[H, n]`` and values ``[H, n, D]`` that lose least of outputs and mass together.

    From ``mass_weights`` and ``fitted_values`` on: damped steps of Gauss and Newton's for the
    logarithms of the weights, after each of which values are solved anew. A step that is no better
    is not taken, so that no head ends with more error than it began with.

    Args:
        columns: of attention, ``[H, R, n]`` float64.
        outputs: of the reference queries, ``[H, R, D]``.
        own: values of the kept tokens, ``[H, n, D]``.
    """
    weights = mass_weights(columns)
    values = fitted_values(columns, weights, outputs, own)
    least = match_error(columns, weights, values, outputs)
    damping = torch.full_like(least, _DAMPING)
    for _ in range(_REFINED):
        step = _weight_step(columns, weights, values, outputs.double(), damping)
        tried = weights * step.clamp(-1, 1).exp()
        fitted = fitted_values(columns, tried, outputs, own)
        error = match_error(columns, tried, fitted, outputs)
        better = error < least
        damping = torch.where(better, damping / 3, damping * 4)
        least = torch.where(better, error, least)
        weights = torch.where(better[:, None], tried, weights)
        values = torch.where(better[:, None, None], fitted, values)
    return weights.clamp_min(_LEAST_WEIGHT), values


def match_error(columns: Tensor, weights: Tensor, values: Tensor, outputs: Tensor) -> Tensor:
    """Squared error of outputs, and of the logarithm of mass in the outputs' units: ``[H]``."""
    mass, shares = _mass_and_shares(columns, weights)
    error = (outputs.double() - shares @ values).square().sum(-1).mean(1)
    return error + _loudness(outputs) * mass.log().square().mean(1)


def _weight_step(
    columns: Tensor, weights: Tensor, values: Tensor, outputs: Tensor, damping: Tensor
) -> Tensor:
    """What to add to the logarithms of the weights, ``[H, n]``.

    d output / d log w_j = share_j (v_j - output), d log mass / d log w_j = share_j.
    """
    mass, shares = _mass_and_shares(columns, weights)
    read, loudness = shares @ values, _loudness(outputs)[:, None]
    left, crossed = outputs - read, shares * (read @ values.mT)
    alike, mixed = shares.mT @ shares, crossed.mT @ shares
    gram = shares.mT @ (shares * read.square().sum(-1, keepdim=True)) - mixed - mixed.mT
    gram = gram + alike * (values @ values.mT + loudness[..., None])
    slope = (shares * (left @ values.mT - (left * read).sum(-1, keepdim=True))).sum(1)
    slope = slope - loudness * (shares * mass.log()[..., None]).sum(1)
    ridge = damping[:, None] * gram.diagonal(dim1=1, dim2=2).clamp_min(1e-12)
    return _solved(gram + torch.diag_embed(ridge), slope[..., None])[..., 0]


def _mass_and_shares(columns: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """What the weighted keys have of each query's attention, and how they divide that."""
    weighted = columns * weights[:, None]
    mass = weighted.sum(-1).clamp_min(1e-300)
    return mass, weighted / mass[..., None]


def _loudness(outputs: Tensor) -> Tensor:
    """Mean square of a head's outputs, ``[H]``."""
    return outputs.double().square().sum(-1).mean(1)


def _solved(gram: Tensor, wanted: Tensor) -> Tensor:
    """Solve a positive definite system without reading anything back from the device."""
    solution: Tensor = torch.cholesky_solve(wanted, torch.linalg.cholesky_ex(gram).L)
    return solution


def _ridge(gram: Tensor, share: float) -> Tensor:
    """``[H, n]``, the same for all columns of a head."""
    square = gram.diagonal(dim1=-2, dim2=-1)
    return (share * square.mean(-1, keepdim=True)).clamp_min(1e-12).expand_as(square)
