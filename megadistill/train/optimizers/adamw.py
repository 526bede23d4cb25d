"""adamw: torch's AdamW (decoupled weight decay, arXiv 1711.05101), also where it is offloaded.

DeepSpeed's own (FusedAdam, DeepSpeedCPUAdam) are compiled on first use, which needs a compiler, or
nvcc, on every host; torch's fused kernel is there on CPU and GPU alike, and updates the same flat
partitions. State: 8 bytes a parameter over all ranks, beside the 4 of the float32 weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from megadistill.config import TrainConfig
from megadistill.train.optimizers.optimizer import Optimizer, parameter_groups


class AdamW(Optimizer):
    elastic: ClassVar[bool] = True

    def make(
        self, student: torch.nn.Module, train: TrainConfig, options: Mapping[str, Any]
    ) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            parameter_groups(student, train.weight_decay),
            lr=train.lr,
            betas=train.betas,
            fused=True,
        )


ADAMW = AdamW()
