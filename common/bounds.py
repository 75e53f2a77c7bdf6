"""Bounded numbers and texts, the field types of everything that is read back from a file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

LARGEST_WHOLE = 2**53
"""Integers up to here are exact in every JSON reader."""

LARGEST_LOSS = 1e6
"""Nats a token; far beyond any."""

Whole = Annotated[int, Field(ge=0, le=LARGEST_WHOLE)]
"""A whole number from 0 on."""

Count = Annotated[int, Field(ge=1, le=LARGEST_WHOLE)]
"""A whole number from 1 on."""

Exact = Annotated[int, Field(ge=-LARGEST_WHOLE, le=LARGEST_WHOLE)]
"""A whole number of either sign."""

Finite = Annotated[float, Field(allow_inf_nan=False, ge=-1e18, le=1e18)]
"""A number that is neither infinite nor NaN."""

NotNegative = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1e18)]
"""A finite number from 0 on."""

Loss = Annotated[float, Field(allow_inf_nan=False, ge=0, le=LARGEST_LOSS)]
"""A KL divergence, nats a token: never negative."""

Share = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1)]
"""A part of a whole."""

Name = Annotated[str, Field(max_length=1000)]
"""A name, a path or a sentence."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A sha256 in hexadecimal."""

Parameter = bool | Exact | Finite | Name
"""What a study may choose for a parameter of a trial."""
