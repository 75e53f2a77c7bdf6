"""Ways to search beside each other: the same bytes, the same samples, the same wall-clock."""
