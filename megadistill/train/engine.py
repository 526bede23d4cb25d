"""The DeepSpeed engine of the student: its configuration, its optimizer, and nothing divided twice.

DeepSpeed divides gradients by the accumulation steps and by the ranks. Our losses are sums over the
global batch divided once, by counts known beforehand, so the first division is switched off and the
second undone: the loss handed to `backward` is multiplied by the number of ranks.

The optimizer is torch's AdamW, also where DeepSpeed offloads it to the host. DeepSpeed's own
(FusedAdam, DeepSpeedCPUAdam) are compiled on first use, which needs a compiler, or nvcc, on every
host; torch's fused kernel is there on CPU and GPU alike, and updates the same flat partitions.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from megadistill.config import Config, LossConfig
from megadistill.errors import ConfigError
from megadistill.parallel import Mesh
from megadistill.student.head import LossTerms
from megadistill.student.model import Student

if TYPE_CHECKING:
    from megadistill.train.data import MicroBatch


def deepspeed_config(config: Config, world: int) -> dict[str, Any]:
    """What DeepSpeed gets: the configuration's own section, and what train.* decides.

    ConfigError where the ranks do not divide the batch, or the ZeRO stage is not 3.
    """
    train = config.train
    settings = copy.deepcopy(config.deepspeed)
    zero = settings.setdefault("zero_optimization", {})
    if zero.setdefault("stage", 3) != 3:
        raise ConfigError(
            f"deepspeed.zero_optimization.stage: {zero['stage']}, expected 3: the student is "
            "trained with ZeRO-3; leave the key out"
        )
    share, rest = divmod(train.global_batch, world * train.micro_batch)
    if rest:
        raise ConfigError(
            f"train.global_batch: {train.global_batch} is not a multiple of {world} rank(s) x "
            f"train.micro_batch {train.micro_batch}: set it to {(share + 1) * world}"
            f" x {train.micro_batch} = {(share + 1) * world * train.micro_batch}, or set "
            "train.micro_batch to a divisor of each rank's share"
        )
    settings |= {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": share,
        # 1.0 unless it is set; 0 clips nothing.
        "gradient_clipping": train.grad_clip,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    return settings


def parameter_groups(student: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases, which have one dimension, do not."""
    decayed: list[torch.Tensor] = []
    spared: list[torch.Tensor] = []
    for parameter in student.parameters():
        # Under ZeRO-3 `shape` is that of a partition.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (decayed if len(shape) > 1 else spared).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Trainer:
    """The engine, and the arithmetic that makes a step equal to one on the whole batch."""

    def __init__(self, student: Student, config: Config, mesh: Mesh) -> None:
        import deepspeed

        settings = deepspeed_config(config, mesh.world)
        optimizer = torch.optim.AdamW(
            parameter_groups(student, config.train.weight_decay),
            lr=config.train.lr, betas=config.train.betas, fused=True,
        )  # fmt: skip
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=student, optimizer=optimizer, config=settings
        )
        self.student, self.mesh = student, mesh

    def backward(
        self, batch: MicroBatch, loss: LossConfig, normalizer: tuple[float, float], *, last: bool
    ) -> LossTerms:
        """The gradients of one micro-batch, added to those of the step. Collective.

        loss: as it is at this step, see `LossConfig.at`.
        """
        options = loss.model_dump(exclude={"curriculum"}) | {"normalizer": normalizer}
        terms = self.engine(batch.labels_N, batch.targets, options, **batch.inputs)
        self.engine.backward(terms.loss * self.mesh.world, scale_wrt_gas=False)
        if not last:
            # DeepSpeed counts micro-batches here; it updates at the last one only.
            self.engine.step()
        return terms

    def step(self, lr: float) -> float:
        """Clip and update; the norm of the gradient before clipping. Collective.

        A gradient that is not finite gives infinity, and updates nothing.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        return float(self.engine.get_global_grad_norm())
