"""Output on standard output and standard error that never ends a run.

A stream may have an encoding that lacks a character, be closed, be a pipe without a reader or on a full disk, or be
None.

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
    """Print on standard output as `rich.print` does, with `options` of `Console.print`."""
    if sys.stdout is not None:
        stream = _Forgiving(sys.stdout)
        if stream.is_read():
            Console(file=cast(Any, stream)).print(said, **options)


def tell(line: str) -> None:
    """Print a line on standard error and flush it."""
    if sys.stderr is not None:
        stream = _Forgiving(sys.stderr)
        stream.write(f"{line}\n")
        stream.flush()


def flush() -> None:
    """Flush standard output."""
    if sys.stdout is not None:
        _Forgiving(sys.stdout).flush()


def error_console() -> Console:
    """Return a console on standard error."""
    return Console(file=cast(Any, io.StringIO() if sys.stderr is None else _Forgiving(sys.stderr)))


def as_text(said: RenderableType, *, width: int) -> str:
    """Return the text that `show` would print, `width` columns wide, without colours, in the encoding of stdout."""
    buffer = _Buffer()
    Console(file=buffer, width=width, color_system=None).print(said)
    return buffer.getvalue()


class Bars:
    """A filled bar followed by an empty one; in ASCII if the console has nothing else.

    Args:
        filled: the length of the filled bar.
        style: the style of the filled bar.
        empty: the length of the empty bar.
    """

    def __init__(self, filled: int, style: str, empty: int = 0) -> None:
        self._parts = ((filled, style, "█", "#"), (empty, "dim", "░", "."))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the bars as one line."""
        plain = options.ascii_only
        parts = [
            ((ascii_ if plain else block) * length, Style.parse(style)) for length, style, block, ascii_ in self._parts
        ]
        yield Text.assemble(*parts)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Return the length of the bars."""
        length = sum(length for length, *_ in self._parts)
        return Measurement(length, length)


class _Forgiving:
    """A stream wrapper that suppresses errors: it replaces characters that the encoding lacks and drops failed writes.

    The wrapped stream may be any object and raise any exception.
    """

    def __init__(self, stream: Any) -> None:
        # The stream of a rich live display is a proxy of another.
        self._stream = getattr(stream, "rich_proxied_file", stream)

    @property
    def encoding(self) -> str:
        """The encoding of the stream; UTF-8 if it has none."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write `text`."""
        with contextlib.suppress(Exception):
            self._stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        with contextlib.suppress(Exception):
            self._stream.flush()

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        with contextlib.suppress(Exception):
            return bool(self._stream.isatty())
        return False

    def fileno(self) -> int:
        """Return the file descriptor of the stream."""
        return int(self._stream.fileno())

    def is_read(self) -> bool:
        """Return False for a pipe without a reader: text left in its buffer would make the exit of the process fail."""
        with contextlib.suppress(Exception):
            poll = select.poll()
            poll.register(self.fileno(), select.POLLOUT)
            return not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
        # The stream is no file, or the system cannot tell.
        return True


class _Buffer(io.StringIO):
    """A text buffer with the encoding of standard output."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of standard output; UTF-8 if it has none."""
        return getattr(sys.stdout, "encoding", None) or "utf-8"
