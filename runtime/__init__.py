"""A policy live on the real model."""
