"""`Pass`, `PassManager` and the instruments that watch it."""
