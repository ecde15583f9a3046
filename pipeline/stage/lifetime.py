"""How a stage ends before its time: on a signal, or with the run that it belongs to.

Either way it is gone within seconds and leaves no file that it has not finished. A stage that
outlived its run could put an older file in the place of one that the next run has written.
"""

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

log = logging.getLogger("pipeline")

RUN = "LISTING_VECTORS_RUN"  # the process id of the Snakemake that started the stage
GRACE_S = 5.0  # to unwind after a signal; a call into the database may take longer
POLL_S = 0.25

_stopped = threading.Event()
unwinding: list[int] = []  # the exit code, once a signal has come; the first one counts
_said = threading.Event()  # by which signal
_unfinished: set[Path] = set()
_runs: list[psutil.Process] = []  # the one that this stage belongs to; none by hand


def mark_run() -> None:
    """Let the stages that this process starts end with it, however it ends."""
    os.environ[RUN] = str(os.getpid())


def end_stages_on_signals() -> None:
    """Let SIGINT and SIGTERM to this process reach its stages, before it acts on them itself.

    Snakemake alone would wait for running jobs to finish their work, which may take hours. A
    second signal changes nothing: an impatient one would interrupt the ending.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        before = signal.getsignal(signum)

        def forward(signum: int, frame: FrameType | None, before: object = before) -> None:
            if _stopped.is_set():
                return
            _stopped.set()
            threading.Thread(target=_end_stages, daemon=True).start()
            if callable(before):
                before(signum, frame)

        signal.signal(signum, forward)


def was_stopped() -> bool:
    """Whether a signal has ended the stages of this process."""
    return _stopped.is_set()


def _end_stages() -> None:
    while True:  # a job that is just being started is met a moment later
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if any(word.startswith("pipeline.") for word in process.cmdline()):
                    process.terminate()
        time.sleep(POLL_S)


def guard() -> None:
    """End this process on SIGINT and SIGTERM, and when the run that started it is gone.

    A signal unwinds it like an exit; where that takes longer than GRACE_S it is cut short.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _unwind)
    arrived, wake = os.pipe()
    os.set_blocking(wake, False)
    # Written to as the signal arrives, also while the main thread is inside a C library.
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    if RUN in os.environ:
        try:
            _runs[:] = [psutil.Process(int(os.environ[RUN]))]
        except psutil.NoSuchProcess:
            _leave(1)
    threading.Thread(target=_watch, args=(arrived,), daemon=True).start()


def check() -> None:
    """Leave if the run that this stage belongs to is gone."""
    if any(_is_gone(run) for run in _runs):
        _leave(1)


def leave_undisturbed() -> None:
    """Ignore signals from now on; if one has come, it has been said when this returns."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    if unwinding:
        _said.wait(GRACE_S)


def _unwind(signum: int, frame: FrameType | None) -> None:
    if unwinding:  # once is enough; a handler set here would make Python say that it lost another
        return
    unwinding.append(128 + signum)
    raise SystemExit(128 + signum)


def _watch(arrived: int) -> None:
    while not select.select([arrived], [], [], POLL_S)[0]:
        check()
    signum = min(os.read(arrived, 16))  # after Ctrl-C the run sends a SIGTERM as well
    log.warning("stopped by %s", signal.Signals(signum).name)
    _said.set()
    time.sleep(GRACE_S)
    _leave(128 + signum)


def _is_gone(run: psutil.Process) -> bool:
    try:
        return not run.is_running() or run.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def leave_soon(code: int) -> None:
    """Leave within GRACE_S, also if a thread then still waits for a disk or a device."""

    def leave() -> None:
        time.sleep(GRACE_S)
        _leave(code)

    threading.Thread(target=leave, daemon=True).start()


def _leave(code: int) -> NoReturn:
    """Leave without waiting for threads or for the call that the main thread is in."""
    for path in list(_unfinished):
        with suppress(OSError):
            path.unlink(missing_ok=True)
    os._exit(code)


@contextmanager
def unfinished(path: Path) -> Iterator[None]:
    """`path` is removed if the process has to leave before the block ends."""
    _unfinished.add(path)
    try:
        yield
    finally:
        _unfinished.discard(path)
