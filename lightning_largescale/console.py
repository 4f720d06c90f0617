"""What is said on standard output and error, as far as they take it: no run ends for what it says.

They may be of an encoding that lacks a character, closed, a pipe that nobody reads, on a full disk, or None.

Source: man page poll(2), POLLERR; rich.console.Console.on_broken_pipe, which ends the process.
"""

from __future__ import annotations

import contextlib
import io
import select
import sys
from typing import Any, cast

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.style import Style
from rich.text import Text


def show(said: RenderableType, **options: Any) -> None:
    """Print on standard output, as `rich.print` does with `options` of `Console.print`."""
    if sys.stdout is not None:
        stream = _Forgiving(sys.stdout)
        if stream.is_read():
            Console(file=cast(Any, stream)).print(said, **options)


def tell(line: str) -> None:
    """Print a line on standard error at once."""
    if sys.stderr is not None:
        stream = _Forgiving(sys.stderr)
        stream.write(f"{line}\n")
        stream.flush()


def flush() -> None:
    """Have what was printed on standard output written."""
    if sys.stdout is not None:
        _Forgiving(sys.stdout).flush()


def error_console() -> Console:
    """A console on standard error."""
    return Console(file=cast(Any, io.StringIO() if sys.stderr is None else _Forgiving(sys.stderr)))


def as_text(said: RenderableType, *, width: int) -> str:
    """What `show` would print, in `width` columns and without colours: in characters that standard output has."""
    buffer = _Buffer()
    Console(file=buffer, width=width, color_system=None).print(said)
    return buffer.getvalue()


class Bars:
    """Bars side by side, of lengths and styles, the last of which may be empty; in ASCII where there is no more.

    Args:
        filled: the length of the first.
        style: of it.
        empty: the length of what it lacks.
    """

    def __init__(self, filled: int, style: str, empty: int = 0) -> None:
        self._parts = ((filled, style, "█", "#"), (empty, "dim", "░", "."))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The line that it is."""
        plain = options.ascii_only
        parts = [
            ((ascii_ if plain else block) * length, Style.parse(style)) for length, style, block, ascii_ in self._parts
        ]
        yield Text.assemble(*parts)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Its length."""
        length = sum(length for length, *_ in self._parts)
        return Measurement(length, length)


class _Forgiving:
    """A stream whose own errors are nobody's: characters that it lacks are replaced, what it does not take is lost.

    Any object may stand for a stream, and raise anything.
    """

    def __init__(self, stream: Any) -> None:
        # A live display's stands for another.
        self._stream = getattr(stream, "rich_proxied_file", stream)

    @property
    def encoding(self) -> str:
        """Its encoding; UTF-8 of one that has none."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write `text`."""
        with contextlib.suppress(Exception):
            self._stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        """Have it written."""
        with contextlib.suppress(Exception):
            self._stream.flush()

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        with contextlib.suppress(Exception):
            return bool(self._stream.isatty())
        return False

    def fileno(self) -> int:
        """The number of its file."""
        return int(self._stream.fileno())

    def is_read(self) -> bool:
        """Whether it is not a pipe that nobody reads: what is left in its buffer would make the process's end fail."""
        with contextlib.suppress(Exception):
            poll = select.poll()
            poll.register(self.fileno(), select.POLLOUT)
            return not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
        # It is no file, or the system cannot tell.
        return True


class _Buffer(io.StringIO):
    """Text in the characters of standard output."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of standard output."""
        return getattr(sys.stdout, "encoding", None) or "utf-8"
