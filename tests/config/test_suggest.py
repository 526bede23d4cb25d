"""Suggestions for unknown keys: other trainers' names, typos, and keys of another section."""

import pytest

from megadistill.config.other_trainers import KEYS as OTHERS
from megadistill.config.schema import Config
from megadistill.config.suggest import did_you_mean

KEYS = [
    f"{section}.{key}"
    for section, field in Config.model_fields.items()
    for key in getattr(field.annotation, "model_fields", {})
]
# By the documentation of TrainingArguments, TRL and DeepSpeed.
MEANT = {
    "learning_rate": "train.lr",
    "max_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch",
    "max_grad_norm": "train.grad_clip",
    "gradient_clipping": "train.grad_clip",
    "lr_scheduler_type": "train.schedule",
    "output_dir": "train.out_dir",
    "save_steps": "train.save_every",
    "eval_steps": "train.eval_every",
    "max_seq_length": "data.seq_len",
    "max_length": "data.seq_len",
    "top_k": "targets.k",
    "tp_size": "teacher.tp",
}


@pytest.mark.parametrize(("name", "meant"), MEANT.items())
def test_a_name_of_another_trainer_is_suggested_ours(name, meant):
    siblings = [key.rpartition(".")[2] for key in KEYS if key.startswith("order.")]
    found = did_you_mean(name, siblings, prefix="order", all_keys=KEYS)
    assert found == f", did you mean {meant}?"


def test_every_suggestion_is_a_key_that_there_is():
    places = [*KEYS, *Config.model_fields]
    assert [key for key in OTHERS.values() if not key.startswith(tuple(places))] == []


def test_a_typo_is_suggested_the_key_beside_it():
    found = did_you_mean("sed", ["seed", "shuffle"], prefix="order", all_keys=KEYS)
    assert found == ", did you mean order.seed?"


def test_a_key_of_another_section_is_suggested_with_its_path():
    found = did_you_mean("warmup_steps", ["seed", "shuffle"], prefix="order", all_keys=KEYS)
    assert found == ", did you mean train.warmup_steps?"
