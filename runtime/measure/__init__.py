"""Measures the GPU that it runs on: kernels by the point, memory, clocks; the profile's writer."""
