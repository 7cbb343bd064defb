"""Ground floor: errors, options, reading of untrusted input, progress, memory, entry points. Imports no other room."""
