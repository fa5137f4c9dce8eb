"""Values from YAML, checked by pydantic. An error is one line with the key, what was expected and what was given."""

import dataclasses
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass  # noqa: F401  (for the modules that use this)


CHECKED = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

# Integers and booleans are strict, as YAML has both types. Floats may be strings, because YAML 1.1 reads 5e-4 as a
# string.
Flag = Annotated[bool, Field(strict=True)]
Whole = Annotated[int, Field(strict=True, ge=0)]
Count = Annotated[int, Field(strict=True, ge=1)]
AtLeast0 = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def validated(cls: type, values: dict[str, Any], place: str, **given: Any) -> Any:
    """Build a checked dataclass from plain values.

    Args:
        cls: The dataclass.
        values: Values by key.
        place: Where the values come from, for error messages.
        given: Fields that are set by the caller and that `values` must not contain.

    Raises:
        ValueError: If a key does not fit; the message names it.
    """
    try:
        allowed = {f.name for f in dataclasses.fields(cls)} - set(given)
        if unknown := sorted(set(values) - allowed):
            raise ValueError(f"Unknown key `{unknown[0]}` in {place}. Allowed keys: {', '.join(sorted(allowed))}.")
        return TypeAdapter(cls).validate_python({**values, **given})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "value_error":  # our own error, whose message is complete
            raise ValueError(f"{place}: {first['ctx']['error']}") from None
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise ValueError(f"Missing key `{key}` in {place}.") from None
        raise ValueError(f"{place}: {first['msg']} for `{key}`, got {first['input']!r}.") from None


def require(condition: bool, name: str, expected: str, value: Any) -> None:
    """Raise a `ValueError` unless a condition holds; for conditions that involve several keys."""
    if not condition:
        raise ValueError(f"Expected `{name}` to be {expected}, got {value!r}.")
