"""What a stage says and where: lines, a line that moves, and at the end the error."""

import contextlib
import fcntl
import logging
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY, Workspace
from test_reliability import market, shard, until

from pipeline.stage import command
from pipeline.workflow import hooks

WIDTH = 100


# --- the rate


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("pipeline.stage.command.time.monotonic", made)
    return made


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "pipeline"]


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pipeline")


def test_loading_is_not_in_the_rate(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """Twenty seconds of loading, then 24 images a second: 'left' is what is left."""
    progress = command.Progress(330, "images")
    for tick in range(1, 61):
        clock.now = 20 + tick / 8
        progress.update(3 * tick)

    assert ["3/330 images", "123/330 images, 24.0 images/s, 9 s left"] == said(caplog)


def test_hits_promise_nothing(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """What came from the cache before, and beside the work, is not taken for speed."""
    progress = command.Progress(6000, "images")
    progress.update(4000, 0)
    for tick in range(1, 81):
        clock.now = tick / 8
        hits = 80 if tick > 60 else 0
        progress.update(4000 + tick + hits, tick)

    # 8 a second of real work; later half of the rows have been hits, and as many are expected
    assert [
        "4040/6000 images, 8.0 images/s, 4 min 05 s left",
        "4160/6000 images, 8.0 images/s, 1 min 49 s left",
    ] == said(caplog)


def test_the_rate_is_that_of_the_last_half_minute(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """When a disk slows down to a tenth, the rate does so within half a minute."""
    progress = command.Progress(1000, "images")
    done = 0
    for second in range(1, 101):
        clock.now = second
        done += 10 if second <= 60 else 1
        progress.update(done)

    assert "600/1000 images, 10.0 images/s, 40 s left" in said(caplog)
    assert "640/1000 images, 1.0 images/s, 6 min 00 s left" == said(caplog)[-1]


# --- the terminal


class Terminal:
    """A command in a terminal of its own, whose Ctrl-C reaches all that it has started."""

    def __init__(self, words: Sequence[str], folder: Path, env: dict[str, str]) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, WIDTH, 0, 0))

        def control() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            words, cwd=folder, env={**env, "TERM": "xterm"}, stdin=slave, stdout=slave,
            stderr=slave, start_new_session=True, preexec_fn=control,
        )  # fmt: skip
        os.close(slave)
        self.shown = ""

    def until(self, pattern: str = r"\Z.") -> str:
        """Read until the text matches, or to the end; returns all that was shown."""
        with contextlib.suppress(OSError):  # how the end of a terminal is read on Linux
            while not re.search(pattern, self.shown) and (data := os.read(self.master, 65536)):
                self.shown += data.decode(errors="replace").replace("\r\n", "\n")
        return self.shown

    def end(self) -> int:
        """Read to the end; the exit code."""
        self.until()
        os.close(self.master)
        return self.process.wait(60)


def screen(shown: str) -> list[str]:
    """The lines that stay on the screen when all was shown: \\r goes back, CSI K clears."""
    lines = []
    for line in shown.split("\n"):
        cells: list[str] = []
        at = 0
        for part in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|.", line, re.S):
            if part == "\r":
                at = 0
            elif part == "\x1b[K":
                del cells[at:]
            elif not part.startswith("\x1b"):
                cells[at : at + 1] = [part]
                at += 1
        lines.append("".join(cells).rstrip())
    return [line for line in lines if line]


MOVING = re.compile(r"\r\x1b\[Kencode: (\d+/\d+ images[^\r\n]*)\r")


def test_progress_moves_in_a_terminal_and_stays_in_a_log(workspace: Workspace) -> None:
    """One line that is drawn again and then is gone; the log gets lines."""
    large = (workspace.photos / workspace.photo("0.jpg", size=(3000, 2250))).read_bytes()
    names = [f"{number}.jpg" for number in range(120)]
    for name in names:  # of bytes of its own, behind its end
        (workspace.photos / name).write_bytes(large + name.encode())
    words = [*shard(workspace, names), "--batch-size", "8", "--log", "logs/encode.log"]
    terminal = Terminal([sys.executable, *words], workspace.folder, workspace.env)
    code = terminal.end()
    log = (workspace.folder / "logs/encode.log").read_text()
    drawn = MOVING.findall(terminal.shown)

    assert 0 == code, terminal.shown
    assert len(drawn) >= 2
    assert max(map(len, drawn)) < WIDTH
    assert [] == [line for line in screen(terminal.shown) if "/120 images" in line]
    assert "120 images: 120 encoded" in screen(terminal.shown)[-1]
    assert "120 images: 120 encoded" in log.splitlines()[-1]
    assert [] == [sign for sign in ("\r", "\x1b") if sign in log]


def test_of_two_stages_in_a_terminal_one_moves(tmp_path: Path) -> None:
    """Of two in a terminal, one has the line that moves, the other says lines, as in a pipe."""
    program = """
import sys, time
from pipeline.stage import command
command.Progress.LINE_S = command.Progress.MOVE_S = 0.05
def main():
    progress = command.Progress(40, "images")
    open(sys.argv[1], "w").close()
    for done in range(1, 41):
        time.sleep(0.05)
        progress.update(done)
command.run(main, sys.argv[1])
"""
    (tmp_path / "stage.py").write_text(program)
    both = (
        f"{sys.executable} stage.py one & until [ -e one ]; do sleep 0.1; done;"
        f" {sys.executable} stage.py two; wait"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    terminal = Terminal(["bash", "-c", both], tmp_path, env)
    code = terminal.end()
    kept = screen(terminal.shown)
    piped = subprocess.run(
        [sys.executable, "stage.py", "three"],
        cwd=tmp_path,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    ).stderr

    assert 0 == code, terminal.shown
    assert re.search(r"\r\x1b\[Kone: \d+/40 images", terminal.shown)
    assert re.search(r"^\d\d:\d\d:\d\d two: \d+/40 images", "\n".join(kept), re.M)
    assert [] == [line for line in kept if not re.match(r"\d\d:\d\d:\d\d two: ", line)]
    assert re.fullmatch(r"(\d\d:\d\d:\d\d three: \d+/40 images.*\n)+", piped)


def test_ctrl_c_ends_with_what_to_do(workspace: Workspace) -> None:
    """Ctrl-C twice, as people do: the last line says to run it again, which finds what it did."""
    market(workspace, listings=500)
    terminal = Terminal(workspace.command(), workspace.folder, workspace.env)
    terminal.until(MOVING.pattern)
    for _ in range(2):
        os.write(terminal.master, b"\x03")
        time.sleep(0.3)
    code = terminal.end()
    log = (workspace.folder / "logs/encode/1-of-1.log").read_text()
    again = workspace.run()

    assert 0 != code
    assert "stopped; run it again: nothing that was encoded is lost" == screen(terminal.shown)[-1]
    assert "Traceback" not in terminal.shown
    assert log.splitlines()[-1].endswith("encode: stopped by SIGINT")
    assert re.search(r"images: \d+ encoded, \d+ same file", again.output)


@pytest.mark.parametrize("ends", ["pass", "raise KeyboardInterrupt", "raise OSError"])
def test_two_signals_at_once_end_a_stage_as_one(ends: str) -> None:
    """Ctrl-C comes to a stage from the terminal and from its run; on a busy machine together.

    However what it was at ends then: like the database driver in a query, or a broken file.
    """
    program = f"""
import time
from pipeline.stage import command
def main():
    print("at work", flush=True)
    try:
        time.sleep(60)
    finally:
        {ends}
command.run(main, "waits")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        process.send_signal(signum)
    said = process.communicate(timeout=60)[1]

    assert re.fullmatch(r"\d\d:\d\d:\d\d waits: stopped by SIGINT\n", said), said
    assert 128 + signal.SIGINT == process.returncode


def test_the_last_line_on_the_screen_is_the_error(workspace: Workspace) -> None:
    """A stage's error is said again after Snakemake's page about it."""
    market(workspace, listings=2)
    env = {**workspace.env, "IMAGE_ROOT_DIR": "nowhere"}
    terminal = Terminal(workspace.command(), workspace.folder, env)
    code = terminal.end()
    (last,) = screen(terminal.shown)[-1:]

    assert 1 == code
    assert last.startswith("error in encode: expected a folder of images at IMAGE_ROOT_DIR, found")
    assert last == (workspace.folder / "logs/encode/1-of-1.log").read_text().splitlines()[-1]


# --- the last line


def test_the_first_error_of_this_run_is_the_last_line(tmp_path: Path) -> None:
    """Not one of an earlier run; of several the first, since it may have caused the others."""
    logs = tmp_path / "logs"
    logs.mkdir()
    for at, (name, text) in enumerate(
        [
            ("export", "error in export: of yesterday"),
            ("select", "12:00:00 select: fine"),
            ("2-of-2", "12:00:00 encode: went well until\nerror in encode: the first"),
            ("1-of-2", "error in encode: the second"),
        ]
    ):
        (logs / f"{name}.log").write_text(f"{text}\n")
        os.utime(logs / f"{name}.log", ns=(at, at))
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (stopped / "load.log").write_text("12:00:00 load: stopped by SIGTERM\n")

    assert "error in encode: the first" == hooks.last_line(logs, 1)
    assert hooks.last_line(stopped, 0) == (
        "error in load: stopped by SIGTERM; run it again: nothing that was encoded is lost"
    )
    assert hooks.last_line(tmp_path / "none", 0).startswith("error: a job ended without a word")


# --- faults of the program


def test_a_fault_ends_with_its_traceback_and_one_line(tmp_path: Path) -> None:
    """What no user can mend is shown whole, on the screen and in the log, the error last."""
    program = (
        "from pipeline.stage import command\n"
        "def main():\n"
        "    command.stage_parser(None).parse_args()\n"
        "    raise ZeroDivisionError('two\\nlines')\n"
        "command.run(main, 'encode')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--log", str(tmp_path / "logs/x.log")],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
    )  # fmt: skip

    assert 1 == done.returncode
    assert "error in encode: ZeroDivisionError: two lines" == done.stderr.splitlines()[-1]
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr == (tmp_path / "logs/x.log").read_text()


def test_no_memory_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A machine without memory left is no fault of the program."""
    program = (
        "from pipeline.stage import command\n"
        "def main():\n"
        "    bytearray(2**62)\n"
        "command.run(main, 'select')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
    )  # fmt: skip

    assert 1 == done.returncode
    assert done.stderr == f"error in select: {command.NO_MEMORY}\n"
