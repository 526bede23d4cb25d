"""Rules that concern more than one key of training: the batch, the steps, averages, offloading.

Nothing here concerns anybody who only generates: without a student most do not apply.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megadistill.config.problem import Problem
from megadistill.config.sections import Sections

MAX_GROUPS = 64


def default_groups(global_batch: int) -> int:
    """The largest divisor of `global_batch` that is at most 64."""
    return max(g for g in range(1, MAX_GROUPS + 1) if global_batch % g == 0)


def _batch(config: Sections) -> Iterator[Problem]:
    if config.student is None:
        return
    train, groups = config.train, config.order.groups
    if train.global_batch % train.micro_batch:
        yield Problem(
            ("train.global_batch", "train.micro_batch"),
            f"{train.global_batch} is not a multiple of train.micro_batch ({train.micro_batch}): "
            f"set train.micro_batch to a divisor of {train.global_batch}, for example "
            f"{max(d for d in range(1, train.micro_batch) if train.global_batch % d == 0)}",
        )
    if config.order.shuffle == "shuffle":
        yield from groups_problems(groups, train.global_batch)


def groups_problems(groups: int, global_batch: int) -> Iterator[Problem]:
    """A batch of a shuffled order takes equal shares of every group."""
    if global_batch % groups:
        yield Problem(
            ("order.groups", "train.global_batch"),
            f"{groups} does not divide train.global_batch ({global_batch}), and a batch "
            "takes equal shares of every group: leave order.groups out, or set it to "
            f"{default_groups(global_batch)}",
        )


def _averages(config: Sections) -> Iterator[Problem]:
    if config.student is None:
        return
    train = config.train
    wanted = config.eval
    if train.keep_best and not (wanted.cache or wanted.files or wanted.name):
        yield Problem(
            ("train.keep_best", "eval.cache", "eval.files", "eval.name"),
            "there is no held-out loss to be lowest without held-out text: set eval.files or "
            "eval.cache, or leave train.keep_best out",
        )
    if train.use_ema and not train.ema:
        yield Problem(
            ("train.use_ema", "train.ema"), "there is no average to use: set train.ema=true"
        )


def _nvme(config: Sections) -> Iterator[Problem]:
    """Parameters may lie there; the optimizer not.

    Tried with DeepSpeed 0.19.8 and torch's AdamW on 1 and 2 ranks: with the optimizer on NVMe
    training is right, and a checkpoint is not. It copies the files that were swapped out and brings
    back none of the moments (losses of the next steps were off by 4), and its universal checkpoint
    fails, since what it should convert is empty.
    """
    zero = _mapping(config.deepspeed, "zero_optimization")
    optimizer, parameters = _mapping(zero, "offload_optimizer"), _mapping(zero, "offload_param")
    if optimizer.get("device") == "nvme":
        key = "deepspeed.zero_optimization.offload_optimizer"
        yield Problem(
            (key,),
            "device is nvme, from where DeepSpeed does not bring the optimizer's state back when a "
            "run is resumed, expected cpu or none: set it to cpu (offload_param may be on nvme)",
        )
    if parameters.get("device") != "nvme":
        return
    key = "deepspeed.zero_optimization.offload_param"
    if config.train.ema:
        yield Problem(
            ("train.ema", key),
            "needs the weights in memory, and offload_param.device is nvme: set it to cpu, or "
            "leave train.ema out",
        )
    if not parameters.get("nvme_path"):
        yield Problem(
            (key,), "device is nvme without nvme_path: set it to a folder on a local disk"
        )


def _mapping(section: dict[str, Any], key: str) -> dict[str, Any]:
    """Returns the mapping at `key`; {} where it holds none, which another rule reports."""
    found = section.get(key)
    return found if isinstance(found, dict) else {}


def _trackers(config: Sections) -> Iterator[Problem]:
    names = config.train.trackers
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        yield Problem(
            ("train.trackers",), f"{', '.join(twice)} stands there twice: name each tracker once"
        )


def _steps(config: Sections) -> Iterator[Problem]:
    if config.student is None:
        return
    train = config.train
    keys = ("train", "train.steps", "train.epochs")
    if train.steps is not None and train.epochs is not None:
        yield Problem(
            keys,
            f"steps ({train.steps}) and epochs ({train.epochs:g}) are both set: keep one, for "
            "example with train.steps=null",
        )
    if train.steps is None and train.epochs is None:
        yield Problem(
            keys,
            "how long to train is not said: set train.steps (optimizer steps) or train.epochs "
            "(passes over the cache)",
        )
    if train.steps is not None and train.warmup_steps >= train.steps:
        yield Problem(
            ("train.warmup_steps", "train.steps"),
            f"{train.warmup_steps} leaves nothing of train.steps ({train.steps}): set "
            "train.warmup_steps to less, a tenth of the steps for example",
        )
    if train.decay_steps is not None and train.schedule != "wsd":
        yield Problem(
            ("train.decay_steps", "train.schedule"),
            f"is read with train.schedule=wsd only, and the schedule is {train.schedule}: remove "
            "it, or set train.schedule=wsd",
        )
    elif (
        train.decay_steps is not None
        and train.steps is not None
        and train.warmup_steps < train.steps < train.warmup_steps + train.decay_steps
    ):
        yield Problem(
            ("train.decay_steps", "train.warmup_steps", "train.steps"),
            f"{train.decay_steps} and train.warmup_steps ({train.warmup_steps}) together exceed "
            f"train.steps ({train.steps}): make them fit",
        )


TRAINING = (_batch, _steps, _averages, _nvme, _trackers)
