"""`Model`, and functions that read and edit its graph."""
