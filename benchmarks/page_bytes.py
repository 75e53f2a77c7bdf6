"""What plans take in pages, by what their options were priced: the bytes of formats, or pages.

    python benchmarks/page_bytes.py

Plans of the packaged tables for a prompt of their own length, without generated tokens. For each
share of the uncompressed bytes and both prices: payload, as formats count it, and pages, as shares
of the uncompressed prompt, their ratio, and the loss predicted on the selection samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtune.policies.paging import TABLE_BYTES, Growth, head_bytes
from kvtune.simulator.quality.tables import Tables
from kvtune.tuner.allocate import Problem, solve
from kvtune.tuner.source_models import packaged_tables

SHARES = 0.03, 0.06, 0.12, 0.25


@dataclass(frozen=True)
class Line:
    """What one plan takes as formats count it, and as pages are handed out.

    Args:
        share: asked for.
        price: what its options were priced by.
        payload: share of the uncompressed bytes, as formats count it.
        pages: likewise, as the allocator hands them out.
        kl: predicted, nats/token.
    """

    share: float
    price: str
    payload: float
    pages: float
    kl: float

    @property
    def ratio(self) -> float:
        """Pages over payload."""
        return self.pages / self.payload


def lines(tables: Tables, shares: tuple[float, ...] = SHARES) -> Iterator[Line]:
    """Plans at every share, by formats and then by pages."""
    tokens, head_dim = tables.prompt_tokens, tables.head_dim
    whole = 4 * tables.heads * head_dim * tokens
    payload, pages = tables.footprints(tokens, head_dim), in_pages(tables)
    fit, check = tables.of_split("search"), tables.of_split("select")
    problems = {
        "formats": Problem.of(fit, payload),
        "pages": Problem.of(fit, pages),
    }
    for share in shares:
        for price, problem in problems.items():
            choice = solve(problem, int(share * whole))
            kl = float(check.sample_weights() @ check.by_sample(choice))
            held, taken = (float(each[choice].sum()) / whole for each in (payload, pages))
            yield Line(share, price, held, taken, kl)


def in_pages(tables: Tables) -> NDArray[np.int64]:
    """Bytes of one head's pages under each option, ``[O]``, tables aside."""
    tokens, head_dim = tables.prompt_tokens, tables.head_dim
    each = [
        head_bytes(o, o.budget.resolve(tokens), tokens, head_dim, Growth(0)) for o in tables.options
    ]
    return np.array(each, np.int64) - TABLE_BYTES


def main() -> None:
    tables, _ = packaged_tables()
    print("share  priced by  payload  pages  pages/payload  predicted KL")
    for line in lines(tables):
        print(
            f"{line.share:5.0%}  {line.price:9}  {line.payload:7.2%}  {line.pages:6.2%}  "
            f"{line.ratio:13.3f}  {line.kl:.4f}"
        )


if __name__ == "__main__":
    main()
