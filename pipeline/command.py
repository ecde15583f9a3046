"""How every stage runs as a command: log lines, clean stops, one line for an error."""

import argparse
import logging
import sys
import time
from collections.abc import Callable

from pipeline import lifetime
from pipeline.errors import PipelineError, storage_errors

log = logging.getLogger("pipeline")


def run(main: Callable[[], None], stage: str) -> None:
    """Run a stage's main(); what a user can mend ends it with one line and exit code 1."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {stage}: %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    lifetime.guard(stage)
    try:
        with storage_errors():
            main()
    except PipelineError as error:
        sys.exit(f"error in {stage}: {error}")
    except KeyboardInterrupt:  # how the database driver answers SIGINT inside a query
        sys.exit(130)


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """A description as it was written, and the default behind each flag."""


def parser(doc: str | None) -> argparse.ArgumentParser:
    """An argument parser whose help is the module's docstring and shows the defaults."""
    return argparse.ArgumentParser(
        description=doc,
        formatter_class=_Help,
        allow_abbrev=False,
    )


class Progress:
    """Log lines 'done/total unit, rate, time left': one every few seconds, in any log."""

    def __init__(self, total: int, unit: str, every_s: float = 5.0) -> None:
        self.total, self.unit, self.every_s = total, unit, every_s
        self.start = self.last = time.monotonic()

    def update(self, done: int) -> None:
        """Log the state of the work if the last line is old enough."""
        now = time.monotonic()
        if now - self.last < self.every_s or done == 0:
            return
        self.last = now
        rate = done / (now - self.start)
        left = (self.total - done) / rate
        log.info(
            "%d/%d %s, %.1f %s/s, %s left",
            done, self.total, self.unit, rate, self.unit, _clock(left),
        )  # fmt: skip


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02d} min" if hours else f"{m} min {s:02d} s" if m else f"{s} s"
