"""Releases of vLLM that kvtune speaks of, and what is known of each: they are named here."""

from __future__ import annotations

LOGGED = "0.31"
"""The newest whose startup logs memory was held against; ``estimate --stack vllm`` means it."""

SERVED = ("0.26", "0.32")
"""Those that a plan was served in, by the plugin."""

LIKE_SERVED = ("0.33",)
"""Those whose source has every interface that the plugin uses; it did not run there."""

EXPORTED = "0.33.0"
"""Whose options and schema an exported file is held to."""
