"""Decode attention compiled for a GPU, without one: its loops copy pages in the background."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed; there is nothing to compile")

COMPILE = """
import sys

from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvtune.policies.pages import PageLayout
from kvtune.runtime.kernels.decode import decode_attention as kernel

pairs = tuple(PageLayout(128, name, name).code for name in sys.argv[1:])
constants = {"D": 128, "G": 4, "M": 8, "PAIRS": pairs, "N_PAIRS": len(pairs), "STAGES": 3}
constants |= {"NATIVE": True, "EXPORT": 0, "SIGNS": 0, "H": 1, "SEAT_TILES": 0}
constants |= {"seats": None, "query_stride": 0}
pools = {"pool_half": "*fp16", "pool_bf16": "*bf16", "pool_fp8": "*fp8e4nv"}
ints = dict.fromkeys(("tiles", "table", "lengths", "arrived"), "*i32")
others = {"q": "*bf16", "out": "*bf16", "softmax_scale": "fp32"}
known = dict.fromkeys(constants, "constexpr") | pools | ints | others
signature = {name: known.get(name, "*fp32") for name in kernel.arg_names}
aligned = {
    (n,): [["tt.divisibility", 16]]
    for n, type_ in enumerate(signature.values()) if type_.startswith("*")
}
source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
copied = made.asm["ttgir"].split("async_copy_global_to_local")[1:]
kinds = [text.split("->")[1].split(",")[0].strip() for text in copied]
print(sum("xbf16" in kind for kind in kinds), sum("xf16" in kind for kind in kinds), len(kinds))
"""


def copies(*names: str) -> list[int]:
    """Loads that are copied ahead where these formats are read: of bf16, of fp16, and of all."""
    plain = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-W", "ignore", "-c", COMPILE, *names],
        env=plain, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [int(number) for number in done.stdout.split()]


@pytest.mark.full
def test_pages_of_either_kind_are_copied_while_others_are_worked_on() -> None:
    """Triton gives the copies up where it does not see that addresses are aligned."""
    in_bf16, coded, _ = copies("bf16", "int4")
    assert in_bf16 >= 6, "keys and values, three steps of them"
    assert coded >= 6, "codes and scales likewise"


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "loads"),
    [
        ("turboquant4", 2 + 2), ("turboquant3", 4 + 2), ("turboquant2", 2 + 2), ("mxfp4", 4 + 4),
        ("int4_token_head", 2 + 2), ("fp8_unscaled", 2),
    ],
)  # fmt: skip
def test_blocks_compile_and_all_their_loads_are_copied_ahead(name: str, loads: int) -> None:
    """Of keys and values together, codes (third bits apart) and scales, three steps of each."""
    assert copies(name)[2] == 3 * loads
