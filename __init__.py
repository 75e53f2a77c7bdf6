"""kvtune: a hardware-aware memory simulator and auto-tuner for KV-cache policies."""

__version__ = "0.1.0"
