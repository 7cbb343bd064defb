"""Weights in 2:4 blocks."""
