"""The paged cache: what each KV head keeps, in pages of its own format."""
