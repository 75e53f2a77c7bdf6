"""What the paged runtime reads at once, and what its allocator hands out; without torch."""

from __future__ import annotations

PREFILL_CHUNK_TOKENS = 2048
"""Tokens of prompts that the runtime works on at once, where it need not see a prompt whole."""
