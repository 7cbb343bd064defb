"""The transforms, one a file. The top-level `passes` is a symbolic link to this folder."""
