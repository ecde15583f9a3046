"""Only one run at a time in a folder, also where several machines share it.

The lock decides among the runs of one machine, since the kernel drops it with its holder; but of
another machine's lock a network file system may tell nothing. So a run also leaves a claim, which
it renews: that of another machine counts until it is LEASE_S old.

Snakemake's own lock survives a SIGKILL and has to be removed by hand; profiles/default switches it
off, profiles/slurm keeps it.
"""

import atexit
import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from pipeline.stage.lock import machine, try_lock
from pipeline.workflow.hooks import LOCK

CLAIM = LOCK.with_name("run.claim")
RENEW_S = 15.0
LEASE_S = 120.0  # by the clock of the file system, whose answers to others may be a minute old


def lock_folder() -> None:
    """Take this folder for this process; ends it with one line if another run is at work here."""
    LOCK.parent.mkdir(exist_ok=True)
    file = os.open(LOCK, os.O_CREAT | os.O_RDWR, 0o666)  # stays open
    locked = try_lock(file)
    if locked is False:
        _refuse("")
    _claim(_mine(), locked is True)
    os.utime(file)


def _mine() -> dict[str, Any]:
    return {
        "machine": machine(),
        "container": _container(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def _container() -> str:
    """What process ids count in: that of another container on this machine says nothing here."""
    with suppress(OSError):  # not Linux
        return os.readlink("/proc/self/ns/pid")
    return ""


def _claim(mine: dict[str, Any], locked: bool) -> None:
    while not _leave(mine):
        there = _holder()
        if _is_at_work(there, locked):
            _refuse(there.get("host", "another machine"))
        _take_away(there)
    atexit.register(_release, mine)
    threading.Thread(target=_renew, args=(mine, CLAIM.absolute()), daemon=True).start()


def _leave(mine: dict[str, Any]) -> bool:
    """Write the claim; False if there is one."""
    try:
        file = os.open(CLAIM, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    with open(file, "w") as claim:
        json.dump(mine, claim)
    return True


def _holder(claim: Path = CLAIM) -> dict[str, Any]:
    """Whose claim there is, and its `age` in seconds; no names if it is damaged or half written."""
    try:
        with open(claim) as file:  # opened, since then its age is asked of the server
            age = abs(_now() - os.fstat(file.fileno()).st_mtime)  # it may be of another clock
            names = dict(json.load(file))
    except FileNotFoundError:
        return {"age": LEASE_S}
    except (ValueError, TypeError):
        names = {}
    return {"age": age, **names}


def _now() -> float:
    """The time by the clock of the file system."""
    probe = CLAIM.with_name(f"run.clock.{machine()}.{os.getpid()}")
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _is_at_work(there: dict[str, Any], locked: bool) -> bool:
    """Whether the run that left this claim can be at work still. The lock, held, knows best."""
    is_of_here = there.get("machine") == machine()
    if is_of_here and locked:
        return False
    if not is_of_here or there.get("container") != _container():
        return bool(there["age"] < LEASE_S)
    try:
        return bool(psutil.Process(there["pid"]).create_time() == there["started"])
    except psutil.Error:
        return False


def _take_away(there: dict[str, Any]) -> None:
    """Remove this claim. One that somebody else has left in its place meanwhile is put back."""
    aside = CLAIM.with_name(f"run.claim.{machine()}.{os.getpid()}")
    with suppress(FileNotFoundError):
        os.rename(CLAIM, aside)
        if {**_holder(aside), "age": 0} == {**there, "age": 0}:
            aside.unlink()
        else:
            os.rename(aside, CLAIM)


def _is(there: dict[str, Any], mine: dict[str, Any]) -> bool:
    return all(there.get(name) == value for name, value in mine.items())


def _renew(mine: dict[str, Any], claim: Path) -> None:
    """Keep the claim young. A run that was asleep for long may find the folder taken: it ends."""
    while True:
        time.sleep(RENEW_S)
        with suppress(OSError):  # a server that is away for a moment
            os.utime(claim)
            there = _holder(claim)
            if "pid" in there and not _is(there, mine):
                print(f"error: {there['host']} has taken this folder", file=sys.stderr)
                os.kill(mine["pid"], signal.SIGTERM)
                return


def _release(mine: dict[str, Any]) -> None:
    """At the end of the process that left the claim, and of none that it has forked."""
    with suppress(OSError):
        if os.getpid() == mine["pid"] and _is(_holder(), mine):
            CLAIM.unlink()


def _refuse(host: str) -> None:
    where = f" on {host}" if host else ""
    hint = "wait for its end, or use another --directory"
    if host:
        hint += f"; one that was killed counts for {LEASE_S:.0f} s more"
    raise SystemExit(
        f"error: another run is at work in {Path.cwd().name}/{where}; hint: {hint}"
    ) from None
