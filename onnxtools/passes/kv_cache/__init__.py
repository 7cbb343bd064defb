"""KV caches into and out of graphs."""
