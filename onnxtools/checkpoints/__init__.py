"""Reads checkpoints: the places of the tensors in the files, one tensor at a time. It knows formats, not models."""
