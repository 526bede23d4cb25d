"""Online distillation: the teacher runs beside the student."""
