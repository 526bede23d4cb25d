"""Our list of DeepSpeed's keys against what the installed DeepSpeed reads."""

from __future__ import annotations

import os
import types
import typing

import pytest

from megadistill.config.deepspeed_keys import (
    ALLOWED,
    BF16,
    FP16,
    REFUSED,
    REMOVED,
    ZERO_OPTIMIZATION,
    deepspeed_problems,
)

# Read by DeepSpeed under a condition only, so not seen below: under a mesh without mpu, and by
# its old writing of zero_optimization as a truth value.
UNSEEN = {"sequence_parallel_size"}
OLD_ZERO_KEYS = {
    "cpu_offload",
    "cpu_offload_param",
    "cpu_offload_use_pin_memory",
    "elastic_checkpoint",
    "stage3_gather_fp16_weights_on_model_save",
}


class Watched(dict):
    """A mapping that remembers which keys were asked for."""

    asked: typing.ClassVar[set[str]] = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def __copy__(self):
        return Watched(self)

    def keys(self):
        return self


@pytest.fixture(scope="module")
def deepspeed_config():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.runtime.config as module

    return module


def test_our_list_of_top_level_keys_is_what_deepspeed_asks_for(deepspeed_config):
    deepspeed_config.DeepSpeedConfig(Watched(train_micro_batch_size_per_gpu=2))
    assert Watched.asked == (ALLOWED.keys() | REFUSED.keys() | set(REMOVED)) - UNSEEN
    assert set(REMOVED) == set(deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert not ALLOWED.keys() & REFUSED.keys()


def _kind(annotation) -> object:
    from enum import Enum
    from pathlib import Path

    from pydantic import BaseModel

    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        (annotation,) = [a for a in typing.get_args(annotation) if a is not type(None)]
    if typing.get_origin(annotation) is list:
        return "list"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping" if annotation.__name__ == "ZenFlowConfig" else _kinds(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "|".join(dict.fromkeys(str(e.value) for e in annotation))
    return {bool: "bool", int: "int", float: "number", Path: "text"}[annotation]


def _kinds(model) -> dict[str, object]:
    kinds: dict[str, object] = {}
    for name, field in model.model_fields.items():
        for key in {name, field.alias or name}:
            kinds[key] = _kind(field.annotation)
    return kinds


def test_our_lists_of_nested_keys_and_their_types_are_deepspeeds_models(deepspeed_config):
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = _kinds(DeepSpeedZeroConfig)
    assert theirs.keys() - OLD_ZERO_KEYS == ZERO_OPTIMIZATION.keys()
    assert {k: v for k, v in theirs.items() if k not in OLD_ZERO_KEYS} == ZERO_OPTIMIZATION
    assert _kinds(DeepSpeedBF16Config) == BF16
    assert _kinds(DeepSpeedFP16Config) == FP16


@pytest.mark.parametrize(
    ("section", "path", "said"),
    [
        ({"optimizer": {}}, "optimizer", "set train.lr, train.betas and train.weight_decay"),
        ({"scheduler": {}}, "scheduler", "set train.schedule"),
        ({"train_batch_size": 8}, "train_batch_size", "train.global_batch and train.micro_batch"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu", "train.global"),
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps", "train.global_batch"),
        ({"gradient_clipping": 1.0}, "gradient_clipping", "set train.grad_clip"),
        ({"tensor_parallel": {}}, "tensor_parallel", "teacher.tp shards the teacher"),
        ({"prescale_gradients": True}, "prescale_gradients", "the loss is divided by"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal", "converts"),
        ({"amp": {}}, "amp", "DeepSpeed has removed it"),
        ({"bfloat16": {}}, "bfloat16", "write bf16"),
        ({"bf17": {}}, "bf17", "did you mean deepspeed.bf16?"),
        ({"bf16": {"enable": True}}, "bf16.enable", "did you mean deepspeed.bf16.enabled?"),
        ({"bf16": True}, "bf16", "expected a mapping of enabled, "),
        ({"bf16": {"enabled": "auto"}}, "bf16.enabled", "filled in by transformers' Trainer"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "fp16.enabled", "keep one"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage", "one of 0, 1, 2, 3"),
        ({"zero_optimization": {"overlap_comm": 1}}, "zero_optimization.overlap_comm", "true or"),
        (
            {"zero_optimization": {"sub_group_size": 1.5}},
            "zero_optimization.sub_group_size",
            "expected a whole number, found 1.5",
        ),
        (
            {"zero_optimization": {"cpu_offload": True}},
            "zero_optimization.cpu_offload",
            "write offload_optimizer: {device: cpu}",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "disk"}}},
            "zero_optimization.offload_param.device",
            "one of none, cpu, nvme",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}},
            "zero_optimization.offload_optimizer.ratio",
            "the optimizer here is torch's",
        ),
        ({"zero_optimization": {"zenflow": {}}}, "zero_optimization.zenflow", "CPU Adam alone"),
        (
            {"bf16": {"bf16_master_weights_and_grads": True}},
            "bf16.bf16_master_weights_and_grads",
            "CPU Adam alone",
        ),
        ({"compile": {"deepcompile": True}}, "compile", "graphs break at every module"),
        ({"checkpoint": {"writer": {}}}, "checkpoint.writer", "set train.save_in_background"),
        ({"wandb": 3}, "wandb", "expected a mapping, found 3"),
    ],
)
def test_a_key_that_is_wrong_or_works_against_ours_is_refused_with_a_pointer(section, path, said):
    ((found, message),) = deepspeed_problems(section)
    assert ".".join(found) == path
    assert said in message


def test_a_usual_section_passes():
    section = {
        "bf16": {"enabled": True},
        "steps_per_print": 100,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "stage3_prefetch_bucket_size": 5e7,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
        },
    }
    assert list(deepspeed_problems(section)) == []
