"""How a run ends that does not succeed: the last line on the screen says why.

Snakemake prints a page about a job that failed, and then where its own log is.
"""

import atexit
import re
import sys
from pathlib import Path

from pipeline.stage import lifetime

LOCK = Path(".snakemake/run.lock")  # written as the run starts
LOGS = Path("logs")
AGAIN = "run it again: nothing that was encoded is lost"


def end_with_the_error() -> None:
    """Print the last line, after all that Snakemake has to say."""
    atexit.register(print, last_line(LOGS, LOCK.stat().st_mtime_ns), file=sys.stderr)


def last_line(logs: Path, since_ns: int) -> str:
    """The first error in the stages' logs of this run, or what to do where there is none."""
    if lifetime.was_stopped():
        return f"stopped; {AGAIN}"
    written = sorted((path.stat().st_mtime_ns, path) for path in logs.rglob("*.log"))
    for said in (path.read_text(errors="replace") for when, path in written if when >= since_ns):
        if errors := re.findall(r"^error in .*$", said, re.M):
            return str(errors[-1])
        if stopped := re.findall(r"(\w+): (stopped by \w+)$", said, re.M):
            return f"error in {stopped[-1][0]}: {stopped[-1][1]}; {AGAIN}"
    return f"error: a job ended without a word of its own; what Snakemake says is above; {AGAIN}"
