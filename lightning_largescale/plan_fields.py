"""Plan fields of a technique, with their checks and words: the base class, and checks that several techniques use."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, cast

from lightning_largescale.errors import PlanError
from lightning_largescale.units import parse_bytes

if TYPE_CHECKING:
    from lightning_largescale.hardware import Hardware
    from lightning_largescale.plan import Plan
    from lightning_largescale.workload import Workload

TIERS = (None, "cpu", "nvme")


class PlanFields:
    """Fields of one technique, of which `Plan` inherits.

    Attributes:
        _heap: treatment of the heap on the CPU that the technique needs at least where it is in use.
        _last_resort: whether it is one of those taken only if nothing fits without: the fewer, the simpler.
        _to_tiers: whether it offloads to another tier.
    """

    __slots__ = ()
    _heap: ClassVar[str] = "left"
    _last_resort: ClassVar[bool] = False
    _to_tiers: ClassVar[bool] = False

    @property
    def _plan(self) -> Plan:
        """The plan itself, for the fields of other techniques."""
        return cast("Plan", self)

    def _in_use(self) -> bool:
        """Return whether the plan has the technique do something."""
        return False

    def _check_values(self) -> Mapping[str, object]:
        """Check each field by itself; return those that are to be stored in another form, by name."""
        return {}

    def _check_combination(self) -> None:
        """Check the fields against one another and against those of other techniques, all of which are valid."""

    def _check_blocks(self, blocks: Collection[str]) -> None:
        """Check names of blocks against those of a model's repeated blocks."""

    def _check_hardware(self, hardware: Hardware) -> None:
        """Check the fields against the devices."""

    def _check_workload(self, workload: Workload) -> None:
        """Check the fields against a model."""

    def _layout_words(self, inner: str) -> str:
        """Return the use of the ranks in words; `inner` are the words of the techniques before, on fewer ranks."""
        return inner

    def _words(self) -> Iterable[str]:
        """Return the technique in words, if it is in use."""
        return ()


def techniques_of(plan: type[PlanFields]) -> tuple[type[PlanFields], ...]:
    """Return the techniques of which `Plan` inherits, in its order."""
    return tuple(base for base in plan.__bases__ if issubclass(base, PlanFields))


def check_fields(plan: PlanFields) -> None:
    """Check the fields of all techniques, and store those in another form that have one."""
    techniques = techniques_of(type(plan))
    for fields in techniques:
        # JSON and YAML give names as a list, and amounts may be text.
        for name, value in fields._check_values(plan).items():
            object.__setattr__(plan, name, value)
    for fields in techniques:
        fields._check_combination(plan)


def check_against_blocks(plan: PlanFields, blocks: Collection[str]) -> None:
    """Check names of blocks in the fields of all techniques."""
    for fields in techniques_of(type(plan)):
        fields._check_blocks(plan, blocks)


def check_against_hardware(plan: PlanFields, hardware: Hardware) -> None:
    """Check the fields of all techniques against the devices."""
    for fields in techniques_of(type(plan)):
        fields._check_hardware(plan, hardware)


def check_against_workload(plan: PlanFields, workload: Workload) -> None:
    """Check the fields of all techniques against a model."""
    for fields in techniques_of(type(plan)):
        fields._check_workload(plan, workload)


def in_use(plan: PlanFields) -> list[type[PlanFields]]:
    """Return the techniques that the plan has do something."""
    return [fields for fields in techniques_of(type(plan)) if fields._in_use(plan)]


def last_resorts(plan: PlanFields) -> int:
    """Return the number of techniques in use that are taken only if nothing fits without."""
    return sum(fields._last_resort for fields in in_use(plan))


def offloads(plan: PlanFields) -> bool:
    """Return whether a technique in use offloads to another tier."""
    return any(fields._to_tiers for fields in in_use(plan))


def needed_heaps(plan: PlanFields) -> set[str]:
    """Return the treatments of the heap that the techniques in use need at least."""
    return {fields._heap for fields in in_use(plan)}


def in_words(plan: PlanFields) -> str:
    """Return the words of all techniques: first the use of the ranks."""
    layout, words = "", list[str]()
    for fields in techniques_of(type(plan)):
        layout = fields._layout_words(plan, layout)
        words += fields._words(plan)
    return ", ".join([layout or ("one device" if last_resorts(plan) else "plain, one device"), *words])


def check_count(plan: PlanFields, name: str, of: str) -> None:
    """Check that the field is a whole number, 1 or more.

    Args:
        plan: the plan.
        name: the field's name.
        of: the things that it counts, for the error: "devices".

    Raises:
        PlanError: it is not.
    """
    value = getattr(plan, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PlanError(f"{name}={value!r} is not accepted; give a whole number of {of}, 1 or more.")


def check_flag(plan: PlanFields, name: str) -> None:
    """Raise PlanError unless the field is True or False."""
    value = getattr(plan, name)
    if not isinstance(value, bool):
        raise PlanError(f"{name}={value!r} is not accepted; give True or False.")


def check_choice(plan: PlanFields, name: str, accepted: Sequence[str | None]) -> None:
    """Check that the field is one of `accepted`.

    Args:
        plan: the plan.
        name: the field's name.
        accepted: the accepted values, two or more.

    Raises:
        PlanError: it is not.
    """
    value = getattr(plan, name)
    if value not in accepted:
        *others, last = map(repr, accepted)
        raise PlanError(f"{name}={value!r} is not accepted; give {', '.join(others)} or {last}.")


def check_modules(plan: PlanFields, name: str) -> Mapping[str, tuple[str, ...]]:
    """Return the field, names of modules, as a tuple.

    Raises:
        PlanError: the field is not a list of distinct names.
    """
    names = getattr(plan, name)
    if not are_names(names):
        raise PlanError(f"{name}={names!r} is not accepted; give the names of modules, each once, or none.")
    return {name: tuple(names)}


def as_bytes(plan: PlanFields, *names: str) -> Mapping[str, int]:
    """Return the amounts of bytes that were given as text."""
    given = {name: getattr(plan, name) for name in names}
    return {name: parse_bytes(value, name=name) for name, value in given.items() if isinstance(value, str)}


def check_amount(plan: PlanFields, name: str, of: str, tiers: Sequence[str]) -> None:
    """Check that the field is None, or a number of bytes of what is offloaded.

    Args:
        plan: the plan.
        name: the field's name.
        of: the field that offloads.
        tiers: the values of that field with which there may be an amount.

    Raises:
        PlanError: it is not.
    """
    value, tier = getattr(plan, name), getattr(plan, of)
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise PlanError(f"{name}={value!r} is not accepted; give a whole number of bytes, 0 or more.")
    if tier not in tiers:
        raise PlanError(
            f"{name}={value!r} contradicts {of}={tier!r}; give {' or '.join(map(repr, tiers))} there, or leave it out."
        )


def check_names_of_blocks(plan: PlanFields, name: str, blocks: Collection[str]) -> None:
    """Check the names in the field.

    Args:
        plan: the plan.
        name: the field's name.
        blocks: names of the model's repeated blocks.

    Raises:
        PlanError: a name is not in `blocks`.
    """
    for one in getattr(plan, name) or ():
        if one in blocks:
            continue
        near = difflib.get_close_matches(one, blocks, 1) or list(blocks)[:1]
        raise PlanError(
            f"{name} has {one!r}, which is no repeated block of the model; accepted are its"
            f" {len(blocks)}, such as {near[0]!r}."
        )


def check_has_blocks(plan: PlanFields, name: str, workload: Workload, remedy: object) -> None:
    """Check that the model has repeated blocks.

    Args:
        plan: the plan.
        name: the name of the field that needs them.
        workload: the model's.
        remedy: the value to use instead.

    Raises:
        PlanError: it has none.
    """
    if not workload.blocks:
        raise PlanError(
            f"{name}={getattr(plan, name)!r} needs repeated blocks and {workload.name} has none; use {remedy!r}."
        )


def refuse_together(plan: PlanFields, name: str, others: Mapping[str, bool], why: str = "") -> None:
    """Check that the field is combined with no field that it excludes.

    Args:
        plan: the plan.
        name: the field's name.
        others: whether the value of another field is excluded, by name.
        why: the reason, for the error.

    Raises:
        PlanError: one is.
    """
    for other, refused in others.items():
        if refused:
            raise PlanError(
                f"{name}={getattr(plan, name)!r} cannot be combined with {other}={getattr(plan, other)!r}{why};"
                " leave one of them out."
            )


def are_names(value: object) -> bool:
    """Return whether `value` is a list or tuple of distinct strings."""
    named = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    return named and len(set(value)) == len(value)  # type: ignore[arg-type, call-overload]


def counted(count: int, noun: str) -> str:
    """Return `"1 block"` or `"2 blocks"`."""
    return f"{count} {noun}{'s' if count > 1 else ''}"
