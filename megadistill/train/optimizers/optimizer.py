"""Base class of optimizers, and what all of them share: groups of parameters, options, resuming.

DeepSpeed's ZeRO-3 partitions what an optimizer updates: it replaces the parameters of every group
by float32 vectors, this rank's parts of many parameters one after another. So an optimizer that
works element by element works as it is; one that needs whole matrices does not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from megadistill.config import TrainConfig
from megadistill.config.optimizer_registry import OPTIMIZERS
from megadistill.errors import ConfigError, TrainError


class Optimizer(ABC):
    """One kind of optimizer. Stateless: `make` gives the torch optimizer that has the state.

    options  name -> default, of `train.optimizer_options`
    elastic  whether a checkpoint loads at another number of ranks. DeepSpeed's universal checkpoint
             converts Adam's `exp_avg`, `exp_avg_sq` and `step`, and nothing else
    """

    options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    elastic: ClassVar[bool] = False

    @abstractmethod
    def make(
        self, student: torch.nn.Module, train: TrainConfig, options: Mapping[str, Any]
    ) -> torch.optim.Optimizer:
        """The optimizer over the student's parameters, which ZeRO-3 has partitioned already.

        Training sets `lr` of every group before each step. options: a value for each of `options`.
        """


def chosen_optimizer(train: TrainConfig) -> tuple[Optimizer, dict[str, Any]]:
    """The optimizer that `train` names, and all of its options.

    ConfigError where it cannot be imported, or does not take an option.
    """
    kind: Optimizer = OPTIMIZERS.get(train.optimizer, key="train.optimizer")
    for name in train.optimizer_options:
        if name not in kind.options:
            known = f"expected one of {', '.join(kind.options)}" if kind.options else "it has none"
            raise ConfigError(
                f"train.optimizer_options.{name}: no such option of {train.optimizer}, {known}: "
                "remove it"
            )
    return kind, {**kind.options, **train.optimizer_options}


def require_same_ranks(train: TrainConfig, path: Path, *, written_by: int, world: int) -> None:
    """TrainError where the optimizer's state cannot be converted to another number of ranks.

    path: the checkpoint that `written_by` ranks wrote.
    """
    if written_by != world and not chosen_optimizer(train)[0].elastic:
        raise TrainError(
            f"{path}: was written by {written_by} rank(s), found {world} here: the state of "
            f"train.optimizer={train.optimizer} cannot be converted to another number of ranks: "
            f"start {written_by} rank(s), or choose another train.out_dir"
        )


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
