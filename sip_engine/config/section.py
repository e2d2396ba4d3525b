"""What all sections of a config are made of: the base class and the types of common limits."""

from __future__ import annotations

from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Positive = Annotated[int, Field(gt=0, lt=2**31)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


def former(value: Any, now: str, *names: str) -> Any:
    """A setting's value, `now` where it is given by a name of the last version, which one notice says."""
    if value not in names:
        return value
    _say_once(f'"{value}" is called "{now}" now; the old name works in this version only')
    return now


@cache
def _say_once(notice: str) -> None:
    from sip_engine.utils.progress import console

    console.print(notice, soft_wrap=True, markup=False)


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, attribute docstrings become descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`seed = true` is a slip, not the seed 1."""
        if isinstance(value, bool) and info.field_name is not None:
            kinds = _kinds(cls.model_fields[info.field_name].annotation)
            if kinds & {int, float} and bool not in kinds:
                raise ValueError(f"{str(value).lower()} is no number: give one")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation admits."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return {kind for part in get_args(annotation) for kind in _kinds(part)}
    return {annotation}
