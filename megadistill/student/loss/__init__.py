"""The fused distillation loss: chunks of logits, divergences, and their gradients."""
