"""Errors, options, reading of untrusted input, progress, memory, entry points. It imports no other package of ours."""
