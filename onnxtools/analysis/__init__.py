"""Static analysis of a graph: shapes, axes, attention, masks, positions, caches, matrix products."""
