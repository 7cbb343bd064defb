"""What can be said of a graph without running it: shapes, axes, attention, masks, positions, caches, matrix
products.
"""
