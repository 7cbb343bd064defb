"""Running a model over texts, a layer at a time, to learn what its activations look like."""
