"""What happens as a run starts, ends well, ends ill, or finds nothing to do.

The last line on the screen says how it went. Snakemake prints a page about a job that failed, and
then where its own log is.
"""

import atexit
import logging
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.database.connection import quoted
from pipeline.stage import lifetime
from pipeline.stage.errors import PipelineError, storage_errors
from pipeline.workflow import summary
from pipeline.workflow.summary import LOGS, NOTHING, Run

if TYPE_CHECKING:
    from pipeline.workflow.plan import Workflow

LOCK = Path(".snakemake/run.lock")  # written as the run starts
AGAIN = "run it again: nothing that was encoded is lost"
NOTHING_TO_BE_DONE = "Nothing to be done"  # how Snakemake begins to say so

refusals: list[str] = []  # why this run was refused before its first job


class Hooks:
    """The words of one run of Snakemake."""

    def __init__(self, flow: "Workflow", snakemake: Any) -> None:
        """`snakemake` is its workflow object."""
        self._flow = flow
        self._snakemake = snakemake
        self._began = time.time()
        if snakemake.is_main_process:
            logging.getLogger("snakemake.logging").addFilter(self._hear)
            atexit.register(self._refused)

    def succeeded(self) -> None:
        """Say what the run did, and where the listings stand after a load."""
        told = summary.stages(LOCK.stat().st_mtime_ns)
        run = self._keep(told, self._standing() if "load" in told else "")
        print("\n".join(run.lines()), flush=True)

    def failed(self) -> None:
        """Print why as the last line, after all that Snakemake has to say."""
        since_ns = LOCK.stat().st_mtime_ns
        line = last_line(LOGS, since_ns)
        atexit.register(print, line, file=sys.stderr)
        self._keep(summary.stages(since_ns), line)

    def _hear(self, record: logging.LogRecord) -> bool:
        """Remember also a run that had nothing to do: Snakemake calls no hook at its end."""
        if record.getMessage().startswith(NOTHING_TO_BE_DONE) and not self._snakemake.dryrun:
            self._keep({}, NOTHING)
        return True

    def _refused(self) -> None:
        """Remember also a run that was refused while Snakemake built its graph."""
        if refusals and self._snakemake.executor_plugin and not self._snakemake.dryrun:
            with suppress(PipelineError):  # the model may be what is wrong: then there is no key
                self._keep({}, refusals[-1])

    def _keep(self, told: dict[str, str], outcome: str) -> Run:
        rate = summary.measured_rate(LOCK.stat().st_mtime_ns) if told else None
        run = Run(
            began=self._began,
            ended=time.time(),
            database=self._flow.database,
            table=quoted(self._flow.environment.vectors),
            key=self._flow.identity,
            stages=told,
            outcome=outcome,
            images_per_second=rate or summary.last_rate(),
        )
        summary.keep(run)
        return run

    def _standing(self) -> str:
        try:
            with storage_errors():
                return self._flow.standing()
        except PipelineError as error:
            return f"loaded; where the listings stand can't be told: {error}"


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
