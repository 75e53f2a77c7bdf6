"""Looking at it."""
