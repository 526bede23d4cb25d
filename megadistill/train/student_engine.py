"""The DeepSpeed engine of the student: its configuration, its optimizer, and nothing divided twice.

DeepSpeed divides gradients by the accumulation steps and by the ranks. Our losses are sums over the
global batch divided once, by counts known beforehand, so the first division is switched off and the
second undone: the loss handed to `backward` is multiplied by the number of ranks.

The optimizer is one of optimizers/, by `train.optimizer`; DeepSpeed gives it flat partitions.
"""

from __future__ import annotations

import contextlib
import copy
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megadistill.config import Config, LossConfig
from megadistill.config.optimizer_registry import OPTIMIZERS
from megadistill.errors import ConfigError, TrainError
from megadistill.parallel import Mesh
from megadistill.student.loss.terms import LossTerms
from megadistill.student.model import Student
from megadistill.train.checkpoint.background import Background
from megadistill.train.ema import Ema
from megadistill.train.optimizers import chosen_optimizer
from megadistill.train.reporting.device_stats import DeviceStats
from megadistill.train.reporting.flops import Flops

if TYPE_CHECKING:
    from megadistill.train.online.online_teacher import OnlineTeacher
    from megadistill.train.teachers import OnlineEnsemble
    from megadistill.train.training_source import MicroBatch


def deepspeed_config(config: Config, world: int) -> dict[str, Any]:
    """Returns the DeepSpeed configuration: the section `deepspeed`, and what train.* decides.

    ConfigError where the ranks do not divide the batch, the ZeRO stage is not 3, or the optimizer
    cannot be made.
    """
    train = config.train
    settings = copy.deepcopy(config.deepspeed)
    zero = settings.setdefault("zero_optimization", {})
    if zero.setdefault("stage", 3) != 3:
        raise ConfigError(
            f"deepspeed.zero_optimization.stage: {zero['stage']}, expected 3: the student is "
            "trained with ZeRO-3; leave the key out"
        )
    grad_accum_steps, rest = divmod(train.global_batch, world * train.micro_batch)
    if rest:
        raise ConfigError(
            f"train.global_batch: {train.global_batch} is not a multiple of {world} rank(s) x "
            f"train.micro_batch {train.micro_batch}: set it to {(grad_accum_steps + 1) * world}"
            f" x {train.micro_batch} = {(grad_accum_steps + 1) * world * train.micro_batch}, or "
            "set train.micro_batch to a divisor of each rank's share"
        )
    settings |= {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": grad_accum_steps,
        # 1.0 unless it is set; 0 clips nothing.
        "gradient_clipping": train.grad_clip,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    if (settings.get("bf16") or {}).get("enabled"):
        # Sums of bfloat16 gradients are mostly exact in float32, so in any order, of any number of
        # ranks and micro-batches: 50 steps at 1 and at 2 ranks gave the same losses to the bit. In
        # bfloat16, half the bytes, they were 2e-3 apart.
        settings.setdefault("communication_data_type", "fp32")
        settings["data_types"] = {"grad_accum_dtype": "fp32"} | (settings.get("data_types") or {})
    chosen_optimizer(train)  # which refuses options that it does not take
    if OPTIMIZERS.distribution(train.optimizer) is not None:
        # DeepSpeed's word for one that is not in its own list.
        settings.setdefault("zero_allow_untested_optimizer", True)
    return settings


class Trainer:
    """The engine, and the arithmetic that makes a step equal to one on the whole batch."""

    def __init__(self, student: Student, config: Config, mesh: Mesh, *, seq_len: int) -> None:
        import deepspeed

        settings = deepspeed_config(config, mesh.world)
        kind, options = chosen_optimizer(config.train)
        optimizer = kind.make(student, config.train, options)
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=student, optimizer=optimizer, config=settings
        )
        self.student, self.mesh = student, mesh
        train = config.train
        self.ema = Ema(self.engine, decay=train.ema_decay) if train.ema else None
        self._use_ema = train.use_ema
        # Beside the student; loaded after it.
        self.teacher: OnlineTeacher | OnlineEnsemble | None = None
        self.background = Background(self.engine, mesh) if train.save_in_background else None
        self.readings = DeviceStats(
            Flops.of(student, seq_len=seq_len),
            device=mesh.device,
            world=mesh.world,
            dtype=student.head.weight.dtype,
        )

    def _router_mask(self, batch: MicroBatch) -> torch.Tensor | None:
        if not self.student.router_loss_weight or not batch.padding_B.any():
            return None
        B, T = batch.tokens_BT.shape
        is_token_BT = np.arange(T) < T - batch.padding_B.reshape(B, 1)
        return torch.as_tensor(is_token_BT.astype(np.int64), device=self.mesh.device)

    def backward(
        self, batch: MicroBatch, loss: LossConfig, normalizer: tuple[float, float], *, last: bool
    ) -> LossTerms:
        """The gradients of one micro-batch, added to those of the step. Collective.

        loss: as it is at this step, see `LossConfig.at`. Where what it gives is not finite its
        gradients are not either, so that `step` updates nothing.
        """
        # What else the section holds is not for the head: other terms' weights.
        mine = {"curriculum", "options", "hidden_weight", "attention_weight"}
        options = loss.model_dump(exclude=mine)
        options |= {"divergence_options": loss.options, "normalizer": normalizer}
        grad_accum_steps = 1 / (self.mesh.world * self.engine.gradient_accumulation_steps())
        terms = self.engine(
            batch.labels_N,
            batch.targets,
            options,
            router_share=grad_accum_steps,
            router_mask_BT=self._router_mask(batch),
            features=batch.features,
            weights={term.name: term.weight(loss) for term in self.student.terms},
            **batch.inputs,
        )
        # Infinity minus something may well have a finite gradient. Chosen without a look at the
        # value, for which an accelerator would have to be waited.
        undone = torch.where(terms.loss.detach().isfinite(), float(self.mesh.world), torch.nan)
        self.engine.backward(terms.loss * undone, scale_wrt_gas=False)
        if not last:
            # DeepSpeed counts micro-batches here; it updates at the last one only.
            self.engine.step()
        return terms

    def step(self, lr: float) -> float:
        """Clip and update; the norm of the gradient before clipping. Collective.

        A gradient that is not finite on any rank gives infinity on all, and updates nothing.
        TrainError where float16's loss scaler has tried every scale in vain.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        try:
            self.engine.step()
        except Exception as error:
            if "loss scale already at minimum" not in str(error):  # DeepSpeed has no class for it
                raise
            raise TrainError(
                "the gradient overflows float16 at the smallest loss scale, deepspeed.fp16."
                f"min_loss_scale={self.engine.optimizer.loss_scale:g}: lower train.lr, or train in "
                "bfloat16 (deepspeed.bf16.enabled=true, and without fp16)"
            ) from None
        norm = float(self.engine.get_global_grad_norm())
        if self.ema is not None and math.isfinite(norm):
            self.ema.update()
        return norm

    @property
    def scales_losses(self) -> bool:
        """Whether a loss scaler (float16) tries out which gradients overflow."""
        return bool(self.engine.fp16_enabled() and self.engine.optimizer.dynamic_loss_scale)

    def evaluation_weights(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the engine has the weights to evaluate and export: the average where asked for.

        Collective.
        """
        if self.ema is None or not self._use_ema:
            return contextlib.nullcontext()
        return self.ema.in_place()
