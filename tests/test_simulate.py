"""make simulate at toy size: every step of the job, and what is said of them."""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REPOSITORY

from benchmarks import simulate
from benchmarks.simulate import Cost, first_to_end, fitting, growth, needed, report

STEPS = [
    "digest, all pending", "export", "select", "aggregate", "load", "load, unchanged",
    "digest, nothing pending", "status", "cache: add, a photo each", "cache: open",
    "cache: open, 16,384 neighbours", "cache: open, 16,384 at random",
]  # fmt: skip


def test_every_step(tmp_path: Path) -> None:
    """The real stages run; each step leaves its line, its row in the table, and no file."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.simulate", "--millions", "0.0004",
         "--rounds", "1", "--dim", "8", "--work", str(tmp_path)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert 0 == done.returncode, done.stderr
    written = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    lines = [line for line in written if "benchmark" in line]

    assert [(step, 400) for step in STEPS] == [(line["step"], line["listings"]) for line in lines]
    assert all(line["seconds"] > 0 and line["megabytes"] > 30 for line in lines)
    assert lines[STEPS.index("load")]["wal_bytes"] > 392 * 40  # eight out of 400 are spam
    assert STEPS == [line.split(" | ")[0][2:] for line in done.stdout.splitlines() if "n^" in line]
    assert "At 100 million listings, by these figures, the first to end:" in done.stdout
    assert ["tiny-8"] == [path.name for path in tmp_path.iterdir()]


def test_sizes_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step at each size, round by round; the fastest round counts, and some have one only."""
    taken: list[tuple[str, int]] = []

    def watched(step: str, size: argparse.Namespace, way: None) -> Cost:
        taken.append((step, size.listings))
        return cost(size.listings, seconds=float(len(taken)))

    monkeypatch.setattr(simulate, "steps", lambda *_: dict.fromkeys(["load", simulate.ADD]))
    monkeypatch.setattr(simulate, "watched", watched)
    sizes = [argparse.Namespace(listings=1), argparse.Namespace(listings=2)]
    args = argparse.Namespace(rounds=2, threads=2, images=4, dim=8)
    costs = list(simulate.simulate(sizes, args))  # type: ignore[arg-type]

    assert [*[("load", 1), ("load", 2)] * 2, (simulate.ADD, 1), (simulate.ADD, 2)] == taken
    assert [(1, 1.0), (2, 2.0), (1, 5.0), (2, 6.0)] == [(c.listings, c.seconds) for c in costs]


def test_sizes_fit_together() -> None:
    """As many sizes as have room side by side, the smallest first."""
    args = argparse.Namespace(images=2, dim=512)
    room = needed(0.1, 2, 512) + needed(1, 2, 512)

    assert [[0.1], [0.1, 1]] == [fitting(room, args), fitting(room + 1, args)]


def cost(listings: int, seconds: float, megabytes: float = 100.0) -> Cost:
    """Of one step, half of it on a processor."""
    return Cost(
        "load", listings, seconds, seconds / 2, megabytes, server_megabytes=10.0,
        disk_bytes=3000 * listings, wal_bytes=2000 * listings,
    )  # fmt: skip


def test_what_grows_is_told() -> None:
    """The power of the growth; what is worse than linear, or grows in memory, is the first to end.

    What fits is named too, and what to set only where it does not.
    """
    square = [cost(n, n**2 / 1e10, n / 1e4) for n in (10**5, 10**6)]
    ended = list(first_to_end(square, 10**7, 4))

    assert 2.0 == pytest.approx(growth(square))
    assert ended[0] == ("load: 2.78 hours, 35% of 8")
    assert "all files, at the load: 30 GB of disk, 3% of 1000" in ended
    assert "shards: 4000 of 10000 at most, 10000 photos each" == ended[-1]
    beyond = list(first_to_end(square, 10**8, 4))

    assert beyond[0].startswith("load: 278 hours, 3472% of 8; set limit_listings: as many as")
    assert "shards: 10000 of 10000 at most, 40000 photos each" == beyond[-1]


def test_the_disk_holds_all_files_at_once() -> None:
    """Encode's and the cache's too, of which there is one a photo; not what has gone again."""
    steps = ["export", "(encode)", "load", simulate.ADD, "(room)", "status"]
    costs = [replace(cost(10**6, 1.0), step=step) for step in steps]
    ended = list(first_to_end(costs, 10**8, 4))

    assert 3000 * (3 + 4) == simulate.standing(costs, 4)
    assert any(line.startswith("all files, at the load: 2.1e+03 GB of disk") for line in ended)


def test_one_size_is_taken_to_grow_as_the_work() -> None:
    """With nothing to compare it with, cost is linear and memory flat."""
    lines = list(report([cost(10**6, 36.0)], argparse.Namespace(threads=2, images=4, dim=512)))

    assert "| load | 36 (18) | n^1.00 | 100 to 100 | 10 | 3000 | 2000 |" in lines
    assert "- load: 0.1 hours, 1% of 8" in lines
