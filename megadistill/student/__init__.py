"""The student: its model under ZeRO-3, and a head that returns the distillation loss."""
