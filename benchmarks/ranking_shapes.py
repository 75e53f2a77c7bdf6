"""How the responses to what heads do add up to a loss, and what of that live runs can refit.

    response = sum over heads of  weight(what it does, its depth) x bounded(response of the head)
    loss of a position = most x (1 - exp(-(half the mean square of the response / most)^power))

with ``most`` what the position loses where hardly anything of the prompt is left, which one live
run a text says. A shape fixes the weights, the bound of single heads and the power.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from predictions import by_block
from ranking_rows import GROUPS, Record
from torch import Tensor

FREE: dict[str, tuple[str, ...]] = {"levels by what is done": ("levels",)}
"""What is refitted by gradient. A slope over depth, a bound of heads and a power beside the levels
changed no rank by more than 0.001."""
STIFF = 0.02
"""Of the prior that nothing need be refitted, beside one squared logarithm."""
NO_CAP = 3.0


@dataclass
class Shape:
    """What a refining run fits: logarithms, all but the depth's slope."""

    levels: Tensor
    depth: Tensor
    cap: Tensor
    power: Tensor

    @staticmethod
    def start(free: Sequence[str] = ()) -> Shape:
        """Heads add up as they are; a cap that is free begins where it can be felt."""
        cap = torch.tensor(0.0 if "cap" in free else NO_CAP)
        return Shape(torch.zeros(len(GROUPS)), torch.tensor(0.0), cap, torch.tensor(0.0))

    @staticmethod
    def known() -> Shape:
        """As a text of prose and one of retrieval of 384 tokens had it, 49 policies each."""
        levels, depth = torch.tensor([0.0, 0.5]), torch.tensor(-1.0)
        return Shape(levels, depth, torch.tensor(NO_CAP), torch.tensor(0.0))

    def moved(self) -> Tensor:
        """How far it lies from where it began, squared."""
        return sum(  # type: ignore[return-value]
            ((mine - first) ** 2).sum()
            for mine, first in zip(vars(self).values(), vars(Shape.start()).values(), strict=True)
        )

    def losses(self, each: Record, groups: Tensor, layers: int) -> Tensor:
        """Of every policy at every position, ``[B, C]``."""
        depth = torch.arange(groups.shape[1]) * layers // groups.shape[1] / layers - 0.5
        weight = (self.levels[groups] + self.depth * depth).exp()  # [B, I]
        heads = each.responses.float()
        size = (heads**2).mean(2, keepdim=True)
        cap, power = (each.to(heads.device).exp() for each in (self.cap, self.power))
        bounded = heads * (1 + size / cap**2).rsqrt()
        response = (bounded * weight.to(heads.device)[..., None, None]).sum(1)
        row = (response**2).mean(1) / 2
        most = each.most.to(row)
        return most * -torch.expm1(-(((row + 1e-9) / most) ** power))


@dataclass(frozen=True)
class Texts:
    """Records of one split, and what was asked in each."""

    records: dict[str, tuple[str, Record]]
    groups: Tensor
    layers: int

    @property
    def kinds(self) -> list[str]:
        return sorted({kind for kind, _ in self.records.values()})

    @property
    def asked(self) -> list[str]:
        """Kinds all of whose texts hold answers."""
        records = list(self.records.values())
        return [k for k in self.kinds if all(bool(r.answers.any()) for of, r in records if of == k)]

    def live(self, kind: str, *, answers: bool = False) -> Tensor:
        """Mean over a kind's texts, ``[B]``."""
        return torch.stack([_mean(r.live, r, answers) for r in self.of(kind)]).mean(0)

    def predicted(self, shape: Shape, kind: str, rows: Tensor) -> Tensor:
        """The same of some policies, as a shape says it."""
        found = []
        for each in self.of(kind):
            some = Record(each.live[rows], each.most, each.answers, each.responses[rows])
            losses = shape.losses(some, self.groups[rows], self.layers)
            found.append(losses.mean(1))
        return torch.stack(found).mean(0).cpu()

    def in_blocks(self, kind: str) -> Tensor:
        """What a search's tables say, ``[B]``."""
        found = [
            by_block(r.responses.float().sum(1)).sum(-1) / r.live.shape[1] for r in self.of(kind)
        ]
        return torch.stack(found).mean(0).cpu()

    def of(self, kind: str) -> list[Record]:
        """Records of a kind's texts."""
        return [record_ for of, record_ in self.records.values() if of == kind]


def _mean(losses: Tensor, each: Record, answers: bool) -> Tensor:
    return losses[:, each.answers.to(losses.device)].mean(1) if answers else losses.mean(1)


def refined(texts: Texts, rows: Tensor, free: Sequence[str]) -> Shape:
    """The shape that fits some policies' live losses on the refining texts best, in logarithms."""
    shape = Shape.start(free)
    fitted = [getattr(shape, name).requires_grad_() for name in free]
    if not fitted:
        return shape
    truth = {kind: texts.live(kind)[rows].clamp(min=1e-6).log() for kind in texts.kinds}
    optimiser = torch.optim.LBFGS(fitted, max_iter=25, line_search_fn="strong_wolfe")

    def error() -> Tensor:
        optimiser.zero_grad()
        total = STIFF * shape.moved()
        total.backward()  # type: ignore[no-untyped-call]
        for kind, seen in truth.items():  # one after the other, for the card's memory
            off = texts.predicted(shape, kind, rows).clamp(min=1e-6).log() - seen
            part = off.abs().mean() / len(truth)
            part.backward()  # type: ignore[no-untyped-call]
            total = total + part
        return total.detach()

    optimiser.step(error)  # type: ignore[arg-type]
    return Shape(*(each.detach() for each in vars(shape).values()))


@torch.no_grad()
def predictions(texts: Texts, shape: Shape) -> dict[str, Tensor]:
    """Of every policy by kind of text, ``[B]`` nats/token."""
    rows = [torch.arange(len(texts.groups))[at : at + 16] for at in range(0, len(texts.groups), 16)]
    return {
        kind: torch.cat([texts.predicted(shape, kind, some) for some in rows])
        for kind in texts.kinds
    }
