"""`Model`, and what reads and edits its graph."""
