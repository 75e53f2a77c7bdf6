"""Terminal user interface, and reports as pages and pictures."""
