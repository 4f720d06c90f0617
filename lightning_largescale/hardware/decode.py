"""Fields of a JSON object, each read once, its type and range checked; a wrong one is a `PlanError` that names it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lightning_largescale.errors import PlanError

T = TypeVar("T")


class Reader:
    """Reads the fields of one object; `finish` refuses those that nothing read."""

    def __init__(self, where: str, fields: Any) -> None:
        if not isinstance(fields, Mapping):
            raise PlanError(f"{where}={fields!r} is not accepted; give an object of fields.")
        self._where = where
        self._fields = dict(fields)
        self._known: list[str] = []

    def take(self, name: str) -> Any:
        """The value of field `name`, which may be read once.

        Raises:
            PlanError: there is no such field.
        """
        if name not in self._fields:
            raise PlanError(f"{self._where} lacks the field {name!r}; give it, or write the file again with .save.")
        self._known.append(name)
        return self._fields.pop(name)

    def optional(self, name: str, read: Callable[[str], T]) -> T | None:
        """None where field `name` is null or missing, else what `read(name)` returns or raises."""
        if self._fields.get(name) is None:
            self._fields.pop(name, None)
            self._known.append(name)
            return None
        return read(name)

    def text(self, name: str) -> str:
        """A string; `PlanError` otherwise."""
        value = self.take(name)
        if isinstance(value, str):
            return value
        raise self._refused(name, value, "text")

    def choice(self, name: str, *accepted: str) -> str:
        """One of the `accepted` strings; `PlanError` otherwise."""
        value = self.take(name)
        if isinstance(value, str) and value in accepted:
            return value
        raise self._refused(name, value, " or ".join(map(repr, accepted)))

    def whole(self, name: str, *, least: int = 0) -> int:
        """A whole number of at least `least`; `PlanError` otherwise."""
        value = self.take(name)
        if isinstance(value, int) and not isinstance(value, bool) and value >= least:
            return value
        raise self._refused(name, value, f"a whole number, {least} or more")

    def number(self, name: str) -> float:
        """A finite number of at least 0; `PlanError` otherwise."""
        value = self.take(name)
        if _finite(value) and value >= 0:
            return float(value)
        raise self._refused(name, value, "a number, 0 or more")

    def positive(self, name: str) -> float:
        """A finite number above 0; `PlanError` otherwise."""
        value = self.take(name)
        if _finite(value) and value > 0:
            return float(value)
        raise self._refused(name, value, "a number above 0")

    def rates(self, name: str) -> dict[str, float]:
        """An object of names and finite numbers above 0; `PlanError` otherwise."""
        value = self.take(name)
        if isinstance(value, Mapping) and all(_finite(rate) and rate > 0 for rate in value.values()):
            return {str(key): float(rate) for key, rate in value.items()}
        raise self._refused(name, value, "an object of names and numbers above 0")

    def items(self, name: str) -> list[Any]:
        """An array; `PlanError` otherwise."""
        value = self.take(name)
        if isinstance(value, list):
            return value
        raise self._refused(name, value, "an array")

    def finish(self) -> None:
        """Refuse fields that were not read.

        Raises:
            PlanError: there is one; the message names it and the fields that were read.
        """
        for name, value in self._fields.items():
            raise PlanError(f"{name}={value!r} is no field of {self._where}; accepted: {', '.join(self._known)}.")

    def _refused(self, name: str, value: Any, accepted: str) -> PlanError:
        return PlanError(f"{self._where}.{name}={value!r} is not accepted; give {accepted}.")


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
