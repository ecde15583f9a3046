"""How every stage runs as a command: what it says and where, clean stops, one line for an error."""

import argparse
import fcntl
import functools
import gc
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from pipeline.stage import lifetime
from pipeline.stage.errors import PipelineError, storage_errors

log = logging.getLogger("pipeline")

CLEAR = "\r\x1b[K"  # a terminal's line, from its first column
NEW_OBJECTS = 50_000  # before the garbage collector looks: importing torch makes millions
NO_MEMORY = (
    "expected more memory, found none left;"
    " hint: give fewer --cores, or a smaller batch_size or memory_mb"
)


def run(main: Callable[[], None], stage: str) -> None:
    """Run a stage's main(); what a user can mend ends it with one line and exit code 1.

    Anything else is a fault of this program: it ends with its traceback, and with the same code.
    Threads that still wait for a disk or a device are left behind.
    """
    log.addHandler(Screen(sys.stderr, stage))
    log.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a full disk under the log is no reason to end
    lifetime.guard()
    gc.set_threshold(NEW_OBJECTS)
    try:
        with storage_errors():
            main()
    except PipelineError as error:
        _end(str(error))
    except MemoryError:
        _end(NO_MEMORY)
    except KeyboardInterrupt:  # how the database driver answers SIGINT inside a query
        lifetime.unwinding.append(128 + signal.SIGINT)
        sys.exit(lifetime.unwinding[0])
    except Exception as error:
        if lifetime.unwinding:  # a block that a signal left halfway fails as it may
            sys.exit(lifetime.unwinding[0])
        log.error("%s: %s", type(error).__name__, " ".join(str(error).split()), exc_info=True)
        _leave()
    finally:
        lifetime.leave_undisturbed()  # a signal that comes now would end in a traceback


def _end(line: str) -> NoReturn:
    log.error("%s", line)
    _leave()


def _leave() -> NoReturn:
    lifetime.leave_soon(1)
    sys.exit(1)


class _Lines(logging.Formatter):
    """'12:00:00 encode: what it does'; an error as 'error in encode: ...', the last line it has."""

    def __init__(self, stage: str) -> None:
        super().__init__(f"%(asctime)s {stage}: %(message)s", "%H:%M:%S")
        self.stage = stage

    def format(self, record: logging.LogRecord) -> str:
        if record.levelno < logging.ERROR:
            return super().format(record)
        line = f"error in {self.stage}: {record.getMessage()}"
        return f"{self.formatException(record.exc_info)}\n{line}" if record.exc_info else line


class Screen(logging.StreamHandler[TextIO]):
    """Standard error: lines, and in a terminal one line that moves.

    Of several stages in one terminal, the first has the line that moves until it ends, by a lock
    on the terminal; the others say theirs in lines of their own.
    """

    def __init__(self, stream: TextIO, stage: str) -> None:
        super().__init__(stream)
        self.stage = stage
        self.setFormatter(_Lines(stage))
        self.is_terminal = stream.isatty() and os.environ.get("TERM") != "dumb"

    @functools.cached_property
    def moves(self) -> bool:
        """Whether the line that moves is this process's, from the first time that it asks."""
        if not self.is_terminal:
            return False
        try:
            # Opened anew: a lock on what was inherited would be shared with the other stages.
            name = os.ttyname(self.stream.fileno())
            terminal = os.open(name, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
            fcntl.flock(terminal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """A line; not one of Progress where its line moves."""
        if hasattr(record, "progress") and self.moves:
            return
        if self.is_terminal:
            self._write(CLEAR)
        super().emit(record)

    def move(self, text: str) -> None:
        """Draw the line that moves. Who writes next does so over it, from the first column."""
        with suppress(OSError):  # a terminal that was closed is no reason to end
            width = os.get_terminal_size(self.stream.fileno()).columns or 80
            self._write(f"{CLEAR}{f'{self.stage}: {text}'[: width - 1]}\r")

    def clear(self) -> None:
        """Take the line that moves away."""
        self._write(CLEAR)

    def _write(self, text: str) -> None:
        self.acquire()
        try:
            with suppress(OSError):
                self.stream.write(text)
                self.stream.flush()
        finally:
            self.release()


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """A description as it was written, and the default behind each flag."""


def parser(doc: str | None) -> argparse.ArgumentParser:
    """An argument parser whose help is the module's docstring and shows the defaults."""
    return argparse.ArgumentParser(
        description=doc,
        formatter_class=_Help,
        allow_abbrev=False,
    )


def stage_parser(doc: str | None) -> argparse.ArgumentParser:
    """The parser of a rule's command: with --log, which keeps all that is said in a file."""
    made = parser(doc)
    made.add_argument("--log", action=_KeepLog, help="file that keeps what is said here too")
    return made


def bigint(text: str) -> int:
    """The type of a flag that names a listing. ValueError: it is none of Postgres's bigints."""
    if not -(2**63) <= int(text) < 2**63:
        raise ValueError("beyond the range of a bigint")
    return int(text)


class _KeepLog(argparse.Action):
    """Write each line to the file too, from now on. In it no line moves."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        namespace.log = Path(str(values))
        namespace.log.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(namespace.log, "w")
        stages = [handler.stage for handler in log.handlers if isinstance(handler, Screen)]
        file.setFormatter(_Lines(stages[0] if stages else parser.prog))
        log.addHandler(file)


class Progress:
    """'done/total unit, rate, time left': a line every few seconds, or one that moves.

    The rate is that of real work in the last half minute, and its clock starts with the first of
    it: neither what comes before, such as loading a model, nor what costs nothing, such as a hit in
    a cache, is in it. Of what is left, as much is taken for work as of what was done since.
    """

    LINE_S = 5.0
    MOVE_S = 0.5
    WINDOW_S = 30.0
    TOGETHER_S = 1.0  # what comes within a second of the first came with it, in one batch

    def __init__(self, total: int, unit: str) -> None:
        self.total, self.unit = total, unit
        self._screen = next((h for h in log.handlers if isinstance(h, Screen) and h.moves), None)
        self._said = self._moved = time.monotonic()
        self._first: float | None = None  # when the first real work was done
        self._start = 0, 0  # what was done, and worked on, when the clock started
        self._last = 0.0, 0  # when real work was last done, and how much by then
        self._recent: deque[tuple[float, int]] = deque()  # times, and what was worked on by then

    def update(self, done: int, worked: int | None = None) -> None:
        """Say how far the work is, unless that was said a moment ago.

        `worked` is how many of the `done` took real work; None: all of them.
        """
        now = time.monotonic()
        worked = done if worked is None else worked
        if worked > self._last[1]:
            self._last = now, worked
        if worked and (self._first is None or now - self._first < self.TOGETHER_S):
            self._first = now if self._first is None else self._first
            self._start = done, worked
            self._recent = deque([(now, worked)])
        if self._screen and now - self._moved >= self.MOVE_S:
            self._moved = now
            self._screen.move(self._text(now, done, worked))
        if now - self._said >= self.LINE_S:
            self._said = now
            log.info("%s", self._text(now, done, worked), extra={"progress": True})
        if self._screen and done >= self.total:
            self._screen.clear()

    @property
    def rate(self) -> float | None:
        """Units of real work a second, since the first of it; None where all came at once."""
        if self._first is None or self._last[0] - self._first < self.TOGETHER_S:
            return None
        return (self._last[1] - self._start[1]) / (self._last[0] - self._first)

    def _text(self, now: float, done: int, worked: int) -> str:
        text = f"{done}/{self.total} {self.unit}"
        if not self._recent:
            return text
        self._recent.append((now, worked))
        while len(self._recent) > 1 and self._recent[1][0] <= now - self.WINDOW_S:
            self._recent.popleft()
        then, before = self._recent[0]
        if worked == before or now == then:
            return text
        rate = (worked - before) / (now - then)
        share = (worked - self._start[1]) / (done - self._start[0])
        left = (self.total - done) * share / rate
        return f"{text}, {rate:.1f} {self.unit}/s, {clock(left)} left"


def clock(seconds: float) -> str:
    """12 s, 3 min 05 s or 2 h 07 min."""
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02d} min" if hours else f"{m} min {s:02d} s" if m else f"{s} s"
