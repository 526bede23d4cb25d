"""Models: their files, loading, and what teacher and student share of a forward pass."""
