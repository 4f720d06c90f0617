"""Frozen dataclasses from JSON: every field is checked, and a wrong one is a `PlanError` that names it.

A field's type says what is read; `accepting`, as the field's metadata, what of that is accepted.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from lightning_largescale.errors import PlanError

_T = TypeVar("_T")
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def accepting(words: str, test: Callable[[Any], bool]) -> dict[str, Any]:
    """Metadata of a field: the values of its type that are accepted.

    Args:
        words: for an error message, what follows "give".
        test: whether a value is accepted.
    """
    return {"accepting": (words, test)}


def at_least(least: int) -> dict[str, Any]:
    """Metadata of a field of whole numbers."""
    return accepting(f"a whole number, {least} or more", lambda value: bool(value >= least))


def above_zero() -> dict[str, Any]:
    """Metadata of a field of numbers."""
    return accepting("a number above 0", lambda value: bool(value > 0))


def not_negative() -> dict[str, Any]:
    """Metadata of a field of numbers."""
    return accepting("a number, 0 or more", lambda value: bool(value >= 0))


def one_of(*choices: str) -> dict[str, Any]:
    """Metadata of a field of text."""
    return accepting(" or ".join(map(repr, choices)), choices.__contains__)


def from_fields(kind: type[_T], fields: Any, where: str, *, also: tuple[str, ...] = ()) -> _T:
    """The dataclass with these fields, as `json.loads` returns them; a field with a default may be missing.

    Args:
        kind: a dataclass, of text, numbers, booleans, tuples, mappings and dataclasses, each or None.
        fields: an object of JSON.
        where: its name in messages.
        also: names that were read before, for the message that lists what is accepted.

    Raises:
        PlanError: `fields` is no object, or one of them is missing, unknown, or not of the accepted type or range.
    """
    if not isinstance(fields, Mapping):
        raise PlanError(f"{where}={fields!r} is not accepted; give an object of fields.")
    known = _known_fields(kind)  # type: ignore[arg-type]
    for name, value in fields.items():
        if name not in known:
            raise PlanError(f"{name}={value!r} is no field of {where}; accepted: {', '.join((*also, *known))}.")
    values = {}
    for name, (hint, field) in known.items():
        if name in fields:
            values[name] = _value(hint, fields[name], f"{where}.{name}", field.metadata.get("accepting"))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise PlanError(f"{where} lacks the field {name!r}; give it, or write the file again.")
    return kind(**values)


def take_version(fields: Mapping[str, Any], newest: int, what: str) -> dict[str, Any]:
    """`fields` without "version", that of their format.

    Args:
        fields: an object of JSON.
        newest: the last version that is read.
        what: they are of, for messages: "hardware".

    Raises:
        PlanError: there is none, or a newer one.
    """
    others = dict(fields)
    if "version" not in others:
        raise PlanError(f"{what} lacks the field 'version'; give it, or write the file again.")
    version = others.pop("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise PlanError(f"{what}.version={version!r} is not accepted; give a whole number, 1 or more.")
    if version > newest:
        raise PlanError(
            f"the {what} is of version {version} and this release reads up to {newest};"
            " upgrade lightning-largescale, or make it again with this one."
        )
    return others


@functools.cache
def _known_fields(kind: type) -> dict[str, tuple[Any, dataclasses.Field[Any]]]:
    hints = get_type_hints(kind)
    return {field.name: (hints[field.name], field) for field in dataclasses.fields(kind)}


def _value(hint: Any, value: Any, where: str, accepting: tuple[str, Callable[[Any], bool]] | None = None) -> Any:
    words, accepts = accepting or (None, None)
    inner = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        if value is None and types.NoneType in inner:
            return None
        [hint] = [one for one in inner if one is not types.NoneType]
        inner = get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_fields(hint, value, where)
    origin, found = get_origin(hint), value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _refused(where, value, words or "an array")
        found = tuple(_value(inner[0], one, f"{where}[{index}]") for index, one in enumerate(value))
    elif origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _refused(where, value, words or "an object")
        found = {_key(inner[0], key, where): _value(inner[1], one, f"{where}.{key}") for key, one in value.items()}
    elif hint is float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
            raise _refused(where, value, words or _WORDS[float])
        found = float(value)
    elif not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise _refused(where, value, words or _WORDS[hint])
    if accepts is not None and not accepts(found):
        raise _refused(where, value, words or "")
    return found


def _key(hint: Any, key: str, where: str) -> Any:
    """A key of an object, which JSON has as text whatever it is."""
    try:
        return hint(key)
    except ValueError as error:
        raise _refused(f"a key of {where}", key, _WORDS[hint]) from error


def _refused(where: str, value: Any, accepted: str) -> PlanError:
    return PlanError(f"{where}={value!r} is not accepted; give {accepted}.")
