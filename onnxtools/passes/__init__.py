"""The transforms, one a file. Imported as `onnxtools.passes` (a symbolic link), never as `passes`."""
