"""Reading checkpoints: what lies where in the files, one tensor at a time. Knows formats, not models."""
