"""Quantization of weights, activations and caches."""
