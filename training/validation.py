"""Values from YAML, checked by pydantic; an error is one line that names the key, what was expected and what was given."""

import dataclasses
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass  # noqa: F401  (for the modules that use this)


CHECKED = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

# YAML has whole numbers and truth values of its own, so that neither stands for the other. A float may be a string, as which
# YAML 1.1 reads 5e-4.
Flag = Annotated[bool, Field(strict=True)]
Whole = Annotated[int, Field(strict=True, ge=0)]
Count = Annotated[int, Field(strict=True, ge=1)]
AtLeast0 = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def validated(cls: type, values: dict[str, Any], place: str, **given: Any) -> Any:
    """A checked dataclass from plain values.

    Args:
        cls: The dataclass.
        values: Values by key.
        place: Name of what holds the values, for error messages.
        given: Fields that the values may not have.

    Raises:
        ValueError: Naming the key that does not fit.
    """
    try:
        allowed = {f.name for f in dataclasses.fields(cls)} - set(given)
        if unknown := sorted(set(values) - allowed):
            raise ValueError(f"Unknown key `{unknown[0]}` in {place}. Allowed keys: {', '.join(sorted(allowed))}.")
        return TypeAdapter(cls).validate_python({**values, **given})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "value_error":  # of our own, which says it all
            raise ValueError(f"{place}: {first['ctx']['error']}") from None
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise ValueError(f"Missing key `{key}` in {place}.") from None
        raise ValueError(f"{place}: {first['msg']} for `{key}`, got {first['input']!r}.") from None


def require(condition: bool, name: str, expected: str, value: Any) -> None:
    """Raise a `ValueError` unless the condition, which concerns several keys, holds."""
    if not condition:
        raise ValueError(f"Expected `{name}` to be {expected}, got {value!r}.")
