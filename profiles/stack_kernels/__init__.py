"""Kernel times of vLLM, SGLang and TensorRT-LLM from the tables that NVIDIA measured."""
