"""The collectives of earlier steps, by which a data-parallel rank decides whether to follow them without exchange."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_largescale.parallel.rounds import Entry

# Upper limit of `patience`: steps of a model whose ranks differ now and then stay agreed.
_MOST_PATIENCE = 64


@dataclass
class StepPattern:
    """The collectives of the steps of one kind.

    Attributes:
        followed: the entries of a step that the next one follows; None if the next one is agreed.
        last: the entries of the last agreed step in which all ranks had the same.
        calm: the number of successive agreed steps with the entries `last`.
        patience: the number of such steps after which the next one follows them.
    """

    followed: list[Entry] | None = None
    last: list[Entry] = field(default_factory=list)
    calm: int = 0
    patience: int = 1

    def learn(self, entries: list[Entry], *, same: bool, departed: bool) -> None:
        """Record a step.

        Args:
            entries: this rank's entries.
            same: whether all ranks had the same.
            departed: whether a rank departed from the step that was followed.
        """
        if departed:
            self.patience = min(2 * self.patience, _MOST_PATIENCE)
        if not same:
            self.followed, self.calm = None, 0
        elif self.followed is None:
            self.calm = self.calm + 1 if self.calm and entries == self.last else 1
            self.last = entries
            if self.calm >= self.patience:
                self.followed = entries


class StepEntries:
    """The collectives of one step on this rank, beside those of the earlier step that it follows.

    Args:
        pattern: the pattern of the step's kind; None outside of steps.

    Attributes:
        followed: the entries of the earlier step; None if this one is agreed.
        own: this rank's entries so far.
        same: whether all ranks have entered the same collectives so far.
    """

    def __init__(self, pattern: StepPattern | None = None) -> None:
        self._pattern = pattern
        self.followed = None if pattern is None else pattern.followed
        self.own: list[Entry] = []
        self.same, self.departed = True, False
        self._position = 0

    @property
    def is_running(self) -> bool:
        """Return whether a step runs."""
        return self._pattern is not None

    @property
    def next(self) -> Entry:
        """The next entry of the earlier step."""
        assert self.followed is not None
        return self.followed[self._position]

    def has_next(self, entry: Entry) -> bool:
        """Return whether `entry` is the next one of the earlier step."""
        return self.followed is not None and self._position < len(self.followed) and self.next == entry

    def advance(self) -> None:
        """Take the next entry of the earlier step as entered."""
        self._position += 1

    def depart(self) -> None:
        """Stop following the earlier step, since this rank or another one entered something else."""
        self.followed, self.departed, self.same = None, True, False

    def end(self) -> None:
        """End the step, and let later steps of its kind follow it where they may."""
        if self._pattern is not None:
            self._pattern.learn(self.own, same=self.same, departed=self.departed)
