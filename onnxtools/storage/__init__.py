"""Weights on disk and in memory: lazy tensors, data files, and saves that are atomic and streamed."""
