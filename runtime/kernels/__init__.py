"""Triton kernels over the paged cache, and their reference in plain torch."""
