"""Number formats, sparsity and error compensation: numpy in, numpy out."""
