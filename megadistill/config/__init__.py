"""The configuration of every stage: one YAML file, one typed tree. Imports no torch.

    config = load_config("demo.yaml", ["train.lr=3e-4"])
    config.teacher.model, config.train.lr, ...

generating.py, training.py and sections.py have the keys, rules.py and training_rules.py what
concerns several of them, schema.py the class that applies the rules, deepspeed_keys.py what
DeepSpeed may be told, load.py the way from a file to a checked Config.
"""

from __future__ import annotations

from megadistill.config.find import DEFAULT, find_config
from megadistill.config.generating import CacheConfig, DataConfig, TargetsConfig, TeacherConfig
from megadistill.config.load import load_config
from megadistill.config.messages import all_keys
from megadistill.config.rules import worst_bytes_per_position
from megadistill.config.schema import Config
from megadistill.config.sections import ParallelConfig
from megadistill.config.training import (
    ALL_TERMS_FROM,
    FEATURES_FROM,
    EvalConfig,
    FeaturesConfig,
    LossConfig,
    OrderConfig,
    StudentConfig,
    TrainConfig,
)
from megadistill.config.training_rules import default_groups
from megadistill.config.yaml_reader import write_yaml

__all__ = [
    "ALL_TERMS_FROM",
    "DEFAULT",
    "FEATURES_FROM",
    "CacheConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "FeaturesConfig",
    "LossConfig",
    "OrderConfig",
    "ParallelConfig",
    "StudentConfig",
    "TargetsConfig",
    "TeacherConfig",
    "TrainConfig",
    "all_keys",
    "default_groups",
    "find_config",
    "load_config",
    "to_yaml",
    "worst_bytes_per_position",
]


def to_yaml(config: Config) -> str:
    """The resolved configuration as a file that `load_config` reads back to an equal one."""
    return write_yaml(config.model_dump(mode="json"))
