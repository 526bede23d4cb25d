"""Base of every section: types with their bounds, and the section itself."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
)
from pydantic_core import PydanticCustomError


def _not_a_truth_value(value: Any) -> Any:
    # pydantic takes true for 1; a configuration that says `k: true` is a typo.
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "expected a number")
    return value


Number = BeforeValidator(_not_a_truth_value)

Text = Annotated[str, StringConstraints(min_length=1)]
PositiveInt = Annotated[int, Field(gt=0), Number]
CountInt = Annotated[int, Field(ge=0), Number]
Seed = Annotated[int, Field(ge=0, lt=2**63), Number]
PositiveFloat = Annotated[float, Field(gt=0), Number]
WeightFloat = Annotated[float, Field(ge=0), Number]
Share = Annotated[float, Field(ge=0, le=1), Number]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1), Number]
InnerShare = Annotated[float, Field(gt=0, lt=1), Number]


def _an_existing_part(text: str) -> str:
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not found or int(found[1]) >= int(found[2]):
        raise PydanticCustomError("part", "expected I/N with I from 0 to N-1, such as 0/3")
    return text


Part = Annotated[str, AfterValidator(_an_existing_part)]


class Section(BaseModel):
    """A part of the configuration: frozen, and without keys that nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Section):
    """A model of transformers: teacher or student."""

    model: Text | None = Field(default=None, description="a folder or a hub id")
    revision: Text | None = Field(default=None, description="the hub model's branch, tag or commit")
    attention: Literal["eager", "sdpa", "flash_attention_2"] = Field(
        default="sdpa",
        description="transformers' attention implementation; `sdpa` means `eager` for a model that "
        "has no sdpa",
    )
    trust_remote_code: bool = Field(default=False, description="run code that comes with the model")
