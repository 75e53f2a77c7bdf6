"""What fits in a memory limit: weights, prefill peak, caches, and what engines take."""
