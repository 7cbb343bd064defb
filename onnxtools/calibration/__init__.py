"""Runs a model on texts, layer by layer, and collects statistics of its activations."""
