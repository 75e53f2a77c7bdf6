"""A plan inside a serving engine: pages in the engine's own memory, requests that come and go."""
