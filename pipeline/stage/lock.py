"""Locks on files, as far as a file system has them, and whose they can be.

The kernel drops a lock with its holder. But some network file systems know none, and on some a
lock holds within one machine only: what another machine holds is judged by its age.
"""

import fcntl
import functools
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@functools.cache
def machine() -> str:
    """A short name of this machine until it is started anew, one for all containers on it."""
    try:
        return BOOT_ID.read_text()[:8]
    except OSError:  # not Linux
        return socket.gethostname().partition(".")[0]


def try_lock(descriptor: int) -> bool | None:
    """Take a file's lock, without waiting; None where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def wait_for_lock(descriptor: int) -> None:
    """Take a file's lock; no more than a courtesy where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return


@contextmanager
def claimed(claim: Path, age_s: float) -> Iterator[bool]:
    """Whether this process is the one that made a file: a lock that every file system has.

    A claim of that age was left by a killed process. Two processes may both come to see that: only
    for work that may be done twice.
    """
    mine = False
    with suppress(OSError):
        if abs(time.time() - claim.stat().st_mtime) > age_s:
            claim.unlink()
    with suppress(OSError), open(claim, "x"):
        mine = True
    try:
        yield mine
    finally:
        if mine:
            claim.unlink(missing_ok=True)
