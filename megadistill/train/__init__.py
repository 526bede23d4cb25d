"""Training: from stores of sequences to checkpoints, metrics and an exported model."""
