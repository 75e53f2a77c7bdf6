"""A study as files that anyone can open: one HTML page, pictures, tables."""
