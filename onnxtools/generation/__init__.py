"""Tokens out of a model: what a runtime is, how the next token is chosen, and text around it."""
