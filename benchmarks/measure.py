"""Clocks, memory, and the JSON line that every benchmark ends with."""

import gc
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

MB = 2**20


def say(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


def emit(benchmark: str, **figures: Any) -> None:
    """The JSON line, on stdout; floats with four digits that count."""
    rounded = {
        k: float(f"{v:.4g}") if isinstance(v, float) and v > 1.1 else v for k, v in figures.items()
    }
    print(json.dumps({"benchmark": benchmark, **rounded}), flush=True)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Timing:
    """Seconds of one work: of the clock, and of the processor (this process and its children)."""

    wall: float = float("inf")
    cpu: float = float("inf")


def fastest(rounds: int, **works: Callable[[], object]) -> dict[str, Timing]:
    """Each work at its fastest in `rounds`.

    They take turns, so that all meet the same machine, and the fastest met the least of whatever
    else ran on it. Processor time hardly depends on that at all.
    """
    best = dict.fromkeys(works, Timing())
    for _ in range(rounds):
        for name, work in works.items():
            before = _cpu_seconds()
            wall = seconds(work)
            cpu = _cpu_seconds() - before
            best[name] = Timing(min(best[name].wall, wall), min(best[name].cpu, cpu))
    return best


def _cpu_seconds() -> float:
    process = psutil.Process()
    times = [p.cpu_times() for p in [process, *process.children(recursive=True)]]
    return float(sum(t.user + t.system for t in times))


class Memory:
    """Resident memory of this process in megabytes, sampled while a block runs."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float]] = []  # seconds since the start, megabytes

    @property
    def peak(self) -> float:
        return max(mb for _, mb in self.samples)

    @property
    def start(self) -> float:
        return self.samples[0][1]

    def after(self, share: float) -> float:
        """The most up to that share of the time."""
        end = self.samples[-1][0]
        return max(mb for t, mb in self.samples if t <= share * end)


@contextmanager
def memory(every_s: float = 0.05) -> Iterator[Memory]:
    """Sample this process's resident memory while the block runs."""
    found, process, stop = Memory(), psutil.Process(), threading.Event()
    begin = time.perf_counter()

    def sample() -> None:
        found.samples.append((time.perf_counter() - begin, process.memory_info().rss / MB))

    def watch() -> None:
        while not stop.wait(every_s):
            sample()

    sample()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
        sample()


def megabytes(paths: list[Path]) -> float:
    """Mean size of the files."""
    return sum(path.stat().st_size for path in paths) / len(paths) / MB
