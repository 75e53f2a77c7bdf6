"""How long a decode step, a prefill and compression take: measured kernels, else datasheets."""
