"""Text in, sequences out: sources, packing, the token store, and the order of training."""
