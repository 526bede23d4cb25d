"""Names of settings in TRL, TrainingArguments and DeepSpeed, and the keys that answer them."""

from __future__ import annotations

import pytest

from megadistill.config import all_keys, load_config
from megadistill.config.deepspeed_keys import deepspeed_problems
from megadistill.config.other_trainers import ABSENT, KEYS
from megadistill.errors import ConfigError


def test_every_name_leads_to_a_key_that_there_is() -> None:
    own, theirs = set(all_keys()), {k for k in KEYS.values() if k.startswith("deepspeed.")}
    assert set(KEYS.values()) - theirs <= own
    for key in theirs:
        *sections, last = key.split(".")[1:]
        section: dict = {last: None}
        for name in reversed(sections):
            section = {name: section}
        assert not [said for _, said in deepspeed_problems(section) if "unknown key" in said], key


def test_no_name_has_two_answers() -> None:
    assert not KEYS.keys() & ABSENT.keys()
    assert not {key.rpartition(".")[2] for key in all_keys()} & ABSENT.keys()


@pytest.mark.parametrize("name", ABSENT)
def test_a_setting_without_a_counterpart_is_answered_with_the_reason(name: str) -> None:
    for key in (name, f"train.{name}"):
        with pytest.raises(ConfigError) as refused:
            load_config("demo.yaml", [f"{key}=1"])
        assert str(refused.value) == f"command line: {key}: unknown key: {ABSENT[name]}"
