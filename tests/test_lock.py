"""One run at a time in a folder, and no writer's file taken away, on any file system."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import REPOSITORY

from pipeline.stage import lock as locks
from pipeline.stage import parquet
from pipeline.workflow import lock as folder_lock

# A run that takes the folder and stays until its input ends: ("machine/container", its locks).
RUN = """
import errno, fcntl, sys
from pipeline.workflow import lock
name, locks = sys.argv[1:]
lock.machine = lambda: name.partition("/")[0]
lock._container = lambda: name.partition("/")[2]
lock.RENEW_S = 0.05
def flock(file, how):
    if locks != "of one machine":
        raise OSError(getattr(errno, locks), "as this file system says")
fcntl.flock = flock
lock.lock_folder()
print("in", flush=True)
sys.stdin.read()
"""
OF_ONE_MACHINE = "of one machine"
LOCKS = (OF_ONE_MACHINE, "ENOLCK", "ENOSYS")


@contextmanager
def run(folder: Path, machine: str, locks: str) -> Iterator["subprocess.Popen[str]"]:
    """A run that was let into the folder, or has ended with a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, machine, locks],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdin and process.stdout
    try:
        process.first_line = process.stdout.readline()  # type: ignore[attr-defined]
        yield process
    finally:
        process.stdin.close()
        process.wait(120)
        process.stdout.close()


def said(folder: Path, machine: str, locks: str) -> str:
    """What a run says that ends as soon as it was let in."""
    with run(folder, machine, locks) as process:
        return str(process.first_line)  # type: ignore[attr-defined]


def kill(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(120)


@pytest.mark.parametrize("locks", LOCKS)
def test_two_machines_do_not_share_a_folder(tmp_path: Path, locks: str) -> None:
    """Where a lock is not seen by another machine, the second run names the first and ends."""
    with run(tmp_path, "a", locks):
        refused = said(tmp_path, "b", locks)
    after_it = said(tmp_path, "b", locks)

    assert refused.startswith(f"error: another run is at work in {tmp_path.name}/ on ")
    assert "in\n" == after_it


@pytest.mark.parametrize("locks", ["ENOLCK", "ENOSYS"])
def test_one_machine_without_locks(tmp_path: Path, locks: str) -> None:
    """The process decides: while it lives the folder is taken, when it was killed it is free."""
    with run(tmp_path, "a", locks) as first:
        refused = said(tmp_path, "a", locks)
        kill(first)
        after_it = said(tmp_path, "a", locks)

    assert "another run is at work" in refused
    assert "in\n" == after_it


def test_two_containers_of_a_machine_without_locks(tmp_path: Path) -> None:
    """A process id of the one says nothing in the other: there the claim's age decides."""
    claim = tmp_path / folder_lock.CLAIM
    claim.parent.mkdir()
    written = {"machine": "a", "container": "1", "host": "pod", "pid": 2**22 + 1, "started": 0.0}
    claim.write_text(json.dumps(written))
    refused = said(tmp_path, "a/2", "ENOLCK")
    same = said(tmp_path, "a/1", "ENOLCK")

    assert refused.startswith(f"error: another run is at work in {tmp_path.name}/ on pod;")
    assert "in\n" == same


@pytest.mark.parametrize("written", [b"", b"\0\0\0", b"\xff", b'{"mach', b"[]", b"1", b'"a"'])
def test_a_damaged_claim_is_of_nobody_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: bytes
) -> None:
    """It counts until it is old, or from a future that is as far; then the folder is free."""
    monkeypatch.chdir(tmp_path)
    folder_lock.CLAIM.parent.mkdir()
    counts = []
    for age in (0.0, folder_lock.LEASE_S + 1, -folder_lock.LEASE_S - 60):
        folder_lock.CLAIM.write_bytes(written)
        os.utime(folder_lock.CLAIM, (time.time() - age,) * 2)
        there = folder_lock._holder()
        counts += [folder_lock._is_at_work(there, locked) for locked in (True, False)]
        folder_lock._take_away(there)
        assert not folder_lock.CLAIM.exists()

    assert [True, True, False, False, False, False] == counts


@pytest.mark.parametrize("locks", LOCKS)
def test_what_a_killed_run_leaves(tmp_path: Path, locks: str) -> None:
    """Its own machine goes on at once, another when the claim has not been renewed for long."""
    claim = tmp_path / folder_lock.CLAIM
    with run(tmp_path, "a", locks) as first:
        kill(first)
        refused = said(tmp_path, "b", locks)
        old = time.time() - folder_lock.LEASE_S - 1
        os.utime(claim, (old, old))
        other = said(tmp_path, "b", locks)
    with run(tmp_path, "a", locks) as first:
        kill(first)
        same = said(tmp_path, "a", locks)

    assert "one that was killed counts for 120 s" in refused
    assert ["in\n", "in\n"] == [other, same]
    assert ["run.lock"] == [file.name for file in claim.parent.iterdir()]


def test_a_run_renews_its_claim(tmp_path: Path) -> None:
    """However long it lasts."""
    claim = tmp_path / folder_lock.CLAIM
    with run(tmp_path, "a", OF_ONE_MACHINE):
        os.utime(claim, (0, 0))
        wait_until(lambda: claim.stat().st_mtime > 0)


def test_a_run_ends_when_its_folder_was_taken(tmp_path: Path) -> None:
    """One that was asleep, machine and all, while another took the folder, does not go on."""
    with run(tmp_path, "a", OF_ONE_MACHINE) as first:
        (tmp_path / folder_lock.CLAIM).write_text('{"machine": "b", "host": "b", "pid": 1}')
        first.wait(120)

    assert -signal.SIGTERM == first.returncode


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS])
def test_without_locks_age_decides_whose_file_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """No writer's file is removed while it may be at work; one that is a day old is."""

    def none(file: int, how: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("fcntl.flock", none)
    young, _ = unfinished(tmp_path, locks.machine())
    with parquet.replacing(tmp_path / "rows.parquet") as temporary:
        temporary.touch()

    assert {young.name, "rows.parquet"} == {path.name for path in tmp_path.iterdir()}


def test_another_machines_file_goes_by_its_age(tmp_path: Path) -> None:
    """Its writer's lock may not be seen here. Of this machine's writers the lock tells."""
    theirs, _ = unfinished(tmp_path, "another")
    unfinished(tmp_path, locks.machine())
    with parquet.replacing(tmp_path / "rows.parquet") as temporary:
        temporary.touch()

    assert {theirs.name, "rows.parquet"} == {path.name for path in tmp_path.iterdir()}


def unfinished(folder: Path, machine: str) -> tuple[Path, Path]:
    """Files that writers have left, a young one and one that is more than a day old."""
    young, old = (folder / f".rows.parquet.{machine}.{pid}.tmp" for pid in (1, 2))
    long_ago = time.time() - parquet.ABANDONED_S - 60
    young.touch()
    old.touch()
    os.utime(old, (long_ago, long_ago))
    return young, old


def test_one_process_has_a_claim(tmp_path: Path) -> None:
    """Until its block ends, however it does; one of that age counts for nothing."""
    claim = tmp_path / "claim"
    with (
        pytest.raises(KeyError),
        locks.claimed(claim, 60) as mine,
        locks.claimed(claim, 60) as other,
    ):
        assert (mine, other) == (True, False)
        raise KeyError
    assert not claim.exists()
    for age in (61, -65):  # of a clock that goes ahead
        claim.touch()
        os.utime(claim, (time.time() - age, time.time() - age))
        with locks.claimed(claim, 70) as mine:
            assert not mine
        with locks.claimed(claim, 60) as mine:
            assert mine

    assert not claim.exists()


def test_a_claim_where_no_file_can_be_made_is_nobodys(tmp_path: Path) -> None:
    """Neither in a folder that is not there nor below a file."""
    with locks.claimed(tmp_path / "nowhere" / "claim", 60) as mine:
        assert not mine
