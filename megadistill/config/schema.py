"""The configuration as a whole: every section, checked by every rule."""

from __future__ import annotations

from pydantic import ValidationInfo, model_validator

from megadistill.config.held_out import evaluation_problems
from megadistill.config.problem import Problem
from megadistill.config.rules import problems
from megadistill.config.sections import Sections
from megadistill.config.training import LossConfig
from megadistill.config.training_rules import default_groups


def all_problems(config: Sections) -> list[Problem]:
    """Every rule that concerns more than one key and is broken."""
    return [*problems(config), *evaluation_problems(config)]


def with_temperature(loss: LossConfig, temperature: float) -> LossConfig:
    """The loss at a temperature that no key of the configuration names."""
    copy = loss.model_copy(update={"temperature": temperature})
    copy.__pydantic_fields_set__.discard("temperature")
    return copy


class Config(Sections):
    """Every stage's configuration. One file serves them all."""

    @model_validator(mode="after")
    def _as_a_whole(self, info: ValidationInfo) -> Config:
        if "groups" not in self.order.model_fields_set:
            groups = default_groups(self.train.global_batch)
            # The model is frozen for everybody else; here it is still being made.
            self.__dict__["order"] = self.order.model_copy(update={"groups": groups})
        if self.follows_targets:
            self.__dict__["loss"] = with_temperature(self.loss, self.targets.temperature)
        # The loader applies the rules itself, so as to report them beside wrong single keys.
        found = [] if (info.context or {}).get("rules_later") else all_problems(self)
        if found:
            raise ValueError("; ".join(str(problem) for problem in found))
        return self
