"""Build an HNSW index on the vectors of one key, and measure what it brings to a search.

Reads: the pgvector table, as its owner. Writes: the index, concurrently, so that searches and loads
go on, and a report of its recall, latency, size and build time. Guarantees: one that is there as
asked for is left alone, and one that is to replace it does so when it is whole; what is left of a
build that was cut off is replaced, and a build that another session runs is not disturbed.
"""

import argparse
import json
import logging
import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from adbc_driver_manager.dbapi import Cursor

from pipeline.database import hnsw, target
from pipeline.database.connection import connect, fetch, quoted, session
from pipeline.database.hnsw import Definition
from pipeline.database.neighbours import EF_SEARCH, Neighbour, Neighbourhood, Query
from pipeline.encoder.model import key_of
from pipeline.stage import command, parquet, settings
from pipeline.stage.errors import DatabaseError, PipelineError, SettingsError
from pipeline.stage.settings import Environment, Identity, Settings

log = logging.getLogger("pipeline")

TOP = 10
MEASURED = (40, 100, 200)  # ef_search
RECALL = 0.95  # that the proposed ef_search reaches
SAME = 1e-6  # cosines: of two neighbours that are as near, either is right
MOST_WORKERS = 7
POLL_S = 0.5
MB = 2**20

# Given none, an index that is there stays as it is.
_FLAGS: dict[str, tuple[int, int, str]] = {
    "m": (2, 100, "neighbours of each vector in the graph (16 for a new index)"),
    "ef_construction": (4, 1000, "candidates for them, twice m at least (64 for a new index)"),
}


def main() -> None:
    """The rule's command."""
    parser = command.stage_parser(__doc__)
    settings.add_flags(parser, *Identity._fields, "lock_timeout_s")
    parser.add_argument("--report", type=Path, required=True, help="index.json to write")
    _add_flags(parser)
    args = parser.parse_args()
    chosen = settings.from_flags(args)
    report = index(args, chosen, Environment.read(), chosen.identity)
    parquet.write_json(args.report, report)
    for line in table(report):
        log.info("%s", line)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Of which key, which index, and how it is built."""
    parser.formatter_class = argparse.HelpFormatter
    for name in Identity._fields:
        parser.add_argument(
            f"--{name.replace('_', '-')}", metavar="TEXT", help="of the key; else of the settings"
        )
    _add_flags(parser)
    parser.add_argument("--json", action="store_true", help="one line of JSON")


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--halfvec", action=argparse.BooleanOptionalAction,
        help="on 16-bit floats: half the size (no for a new index)",
    )  # fmt: skip
    for name, (_, _, what) in _FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=what)
    parser.add_argument(
        "--maintenance-work-mem", type=int, metavar="MB",
        help="memory for the build; else what the graph needs, within a quarter of what is free"
        " here, or half of shared_buffers of a server elsewhere",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, metavar="N",
        help="processes that build beside the first; else one a core, or as the server has it",
    )  # fmt: skip
    parser.add_argument(
        "--sample", type=int, default=100, metavar="N", help="vectors to measure with (100)"
    )


def by_hand(args: argparse.Namespace) -> None:
    """`python -m pipeline index`: build and measure, for a person or in JSON."""
    chosen = settings.under_key(settings.read_config(args.config), args)
    report = index(args, chosen, Environment.read(), key_of(chosen))
    print(json.dumps(report) if args.json else "\n".join(table(report)))


def index(
    args: argparse.Namespace, chosen: Settings, environment: Environment, identity: Identity
) -> dict[str, Any]:
    """Build what is missing, measure, and report; see `table` for what the report says."""
    check_flags(args)
    with session() as cursor:
        target.check(cursor, environment, None)
        hnsw.refuse_faulty(cursor)
        hnsw.refuse_without_right(cursor, environment.vectors)
        Neighbourhood(cursor, environment, identity, None)  # refuses what could not be measured
        builder = Builder(cursor, args, environment, identity, chosen.lock_timeout_s)
        built = builder.settle()
        there = hnsw.of_key(cursor, environment, identity)
    if there is None:
        raise DatabaseError("an index that is valid", "none: another has dropped it")
    return {
        "table": quoted(environment.vectors),
        "index": there.name,
        **identity._asdict(),
        **asdict(there.definition),
        "bytes": there.bytes,
        "build": built and asdict(built),
        **measure(environment, identity, there.name, args.sample),
    }


def check_flags(args: argparse.Namespace) -> None:
    """SettingsError for what pgvector would refuse after a while."""
    for name, (least, most, _) in _FLAGS.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            flag = f"--{name.replace('_', '-')}"
            raise SettingsError(f"{flag} from {least} to {most}", str(value), "command line")
    for name, least in {"maintenance_work_mem": 1, "workers": 0, "sample": 1}.items():
        value = getattr(args, name)
        if value is not None and value < least:
            flag = f"--{name.replace('_', '-')}"
            raise SettingsError(f"{flag}, {least} at least", str(value), "command line")


@dataclass(frozen=True)
class Resources:
    """What a build may take: bytes, and processes beside the first."""

    memory: int
    workers: int


@dataclass(frozen=True)
class Machine:
    """This one: bytes that are free, bytes free for what processes share, cores."""

    available: int
    shared: int
    cores: int

    @classmethod
    def here(cls) -> "Machine":
        """As it is now."""
        shared = 0
        with suppress(OSError):
            shared = psutil.disk_usage("/dev/shm").free
        return cls(psutil.virtual_memory().available, shared, os.cpu_count() or 1)


def resources(server: hnsw.Server, needed: int, machine: Machine) -> Resources:
    """For a graph of `needed` bytes; of a server that is elsewhere no more is known than it says.

    The graph of a build with workers lies in shared memory as a whole, which containers have
    little of: without room for it there, one process builds alone.
    """
    least = server.maintenance_work_mem
    if not server.local:
        most, workers = server.shared_buffers // 2, server.workers
    else:
        most, workers = machine.available // 4, max(0, min(machine.cores - 1, MOST_WORKERS))
    memory = max(least, min(needed + needed // 8, most))
    if server.local and memory > machine.shared // 2:
        workers = 0
    return Resources(memory, workers)


@dataclass(frozen=True)
class Built:
    """What a build took."""

    seconds: float
    rows: int
    maintenance_work_mem: int  # bytes
    workers: int  # allowed beside the first process


class Builder:
    """Brings the index of a key to what is asked for."""

    def __init__(
        self,
        cursor: Cursor,
        args: argparse.Namespace,
        environment: Environment,
        identity: Identity,
        lock_timeout_s: int,
    ) -> None:
        self._cursor, self._args = cursor, args
        self._environment, self._identity = environment, identity
        self._lock_timeout_s = lock_timeout_s
        self._name = hnsw.name_of(environment, identity)
        self._new = hnsw.new_name_of(environment, identity)

    def settle(self) -> Built | None:
        """Make what is missing, drop what is left over; None: there was nothing to build.

        DatabaseError: another session builds, a lock was not to be had, or the server refused.
        """
        self._set(
            statement_timeout="0",
            lock_timeout=f"{self._lock_timeout_s}s",
            client_min_messages="error",  # it would say what `_build` says, and not as a line
            client_connection_check_interval="2s",  # a build ends soon after this process
        )
        hnsw.refuse_while_building(self._cursor, self._environment)
        for name in (self._name, self._new):
            left = self._find(name)
            if left and not left.valid:
                log.info("%s is left of a build that was cut off: it is dropped", name)
                self._drop(name)
        there, coming = self._find(self._name), self._find(self._new)
        wanted = self._wanted(there)
        if coming and coming.definition != wanted:
            self._drop(self._new)
            coming = None
        if there and there.definition == wanted:
            if coming:
                self._drop(self._new)
            return None
        built = None
        if not coming:
            built = self._build(self._new if there else self._name, wanted)
        if there:
            self._drop(self._name)
        if there or coming:
            hnsw.rename(self._cursor, self._environment, self._new, self._name)
        return built

    def _wanted(self, there: hnsw.Index | None) -> Definition:
        """What the flags name; else as it is, or by default."""
        names = ("m", "ef_construction", "halfvec")
        given = {n: getattr(self._args, n) for n in names if getattr(self._args, n) is not None}
        wanted = replace(there.definition if there else Definition(), **given)
        if wanted.ef_construction < 2 * wanted.m:
            raise SettingsError(
                "--ef-construction, twice --m at least", str(wanted.ef_construction),
                "command line", f"--ef-construction {4 * wanted.m}",
            )  # fmt: skip
        dimension = self._dimension()
        most = hnsw.MOST_DIMENSIONS[wanted.halfvec]
        if dimension > most:
            raise SettingsError(
                f"vectors of {most} dimensions at most for this index", str(dimension),
                quoted(self._environment.vectors), "" if wanted.halfvec else "try --halfvec",
            )  # fmt: skip
        return wanted

    def _build(self, name: str, wanted: Definition) -> Built:
        rows = self._rows()
        needed = wanted.graph_bytes(rows, self._dimension())
        taken = self._resources(needed)
        log.info(
            "building %s: %d vectors, with %d MB and %d workers beside the first",
            name, rows, taken.memory // MB, taken.workers,
        )  # fmt: skip
        if needed > taken.memory:
            log.warning(
                "the graph takes about %d MB: what is beyond maintenance_work_mem is built three"
                " times slower or worse; hint: --maintenance-work-mem %d, if the server has it",
                needed // MB, (needed + needed // 8) // MB,
            )  # fmt: skip
        start = time.monotonic()
        try:
            self._create(name, wanted, rows, taken)
        except DatabaseError as error:
            if not (taken.workers and "shared memory" in str(error)):
                raise
            log.warning("no shared memory for a build by several processes: one builds alone")
            self._drop(name)
            taken = replace(taken, workers=0)
            self._create(name, wanted, rows, taken)
        hnsw.run(self._cursor, f"ANALYZE {quoted(self._environment.vectors)}")
        seconds = round(time.monotonic() - start, 1)
        return Built(seconds, rows, taken.memory, taken.workers)

    def _create(self, name: str, wanted: Definition, rows: int, taken: Resources) -> None:
        self._set(
            lock_timeout="0",  # it waits for older transactions, without being in anyone's way
            maintenance_work_mem=f"{taken.memory // 1024}kB",
            max_parallel_maintenance_workers=str(taken.workers),
        )
        with _progress(self._pid(), rows):
            hnsw.build(self._cursor, self._environment, self._identity, name, wanted)
        self._set(lock_timeout=f"{self._lock_timeout_s}s")

    def _resources(self, needed: int) -> Resources:
        found = resources(hnsw.server(self._cursor), needed, Machine.here())
        memory, workers = self._args.maintenance_work_mem, self._args.workers
        return Resources(
            found.memory if memory is None else memory * MB,
            found.workers if workers is None else workers,
        )

    def _rows(self) -> int:
        where = quoted(self._environment.vectors)
        same = " AND ".join(f"{n} = ${i}" for i, n in enumerate(Identity._fields, 1))
        found = fetch(self._cursor, f"SELECT count(*) FROM {where} WHERE {same}", self._identity)
        return int(found[0][0])

    def _dimension(self) -> int:
        return hnsw.dimension_of(self._cursor, self._environment, self._identity)

    def _pid(self) -> int:
        return int(fetch(self._cursor, "SELECT pg_backend_pid()")[0][0])

    def _find(self, name: str) -> hnsw.Index | None:
        return hnsw.find(self._cursor, self._environment, name)

    def _drop(self, name: str) -> None:
        hnsw.drop(self._cursor, self._environment, name)

    def _set(self, **values: str) -> None:
        """Settings of the session, of those that this server knows."""
        for name, value in values.items():
            known = "SELECT set_config(name, $2, false) FROM pg_settings WHERE name = $1"
            fetch(self._cursor, known, (name, value))


@contextmanager
def _progress(pid: int, rows: int) -> Iterator[None]:
    """Say how far the build in that session is, asked by a second connection."""
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(pid, rows, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(2 * POLL_S)


def _watch(pid: int, rows: int, ended: threading.Event) -> None:
    line, phase = command.Progress(rows, "vectors"), ""
    with suppress(PipelineError), session() as cursor:  # the build does without
        while not ended.wait(POLL_S):
            now = hnsw.progress(cursor, pid)
            if now is None:
                continue
            if now.phase != phase:
                phase = now.phase
                log.info("%s", phase)
            if phase.startswith("building"):
                line.update(min(now.rows, rows))


def measure(environment: Environment, identity: Identity, name: str, sample: int) -> dict[str, Any]:
    """How a search by the index compares with an exact one, for vectors of the table itself.

    Both as `search` asks, so without the listing itself. A neighbour counts as found if it is as
    near as one of the exact ten. Times are medians; `used`: whether Postgres takes the index at
    all, which in a small table it may not.
    """
    with connect(read_only=True, repeatable=True) as connection, connection.cursor() as cursor:
        there = Neighbourhood(cursor, environment, identity, None)
        queries = there.sample(sample)
        _scan_indexes(cursor, "off")
        exact, exact_ms = _asked(there, queries, EF_SEARCH)
        _scan_indexes(cursor, "on")
        measured = []
        for ef_search in MEASURED:
            found, ms = _asked(there, queries, ef_search)
            used = bool(queries) and name in there.plan(queries[0].vector, TOP)
            measured.append(
                {"ef_search": ef_search, "recall": recall(exact, found), "ms": ms, "used": used}
            )
    good = [m["ef_search"] for m in measured if m["used"] and (m["recall"] or 0) >= RECALL]
    return {
        "sample": len(queries),
        "top": TOP,
        "exact_ms": exact_ms,
        "measured": measured,
        "proposed_ef_search": min(good, default=None),
        "search_uses": EF_SEARCH,
    }


def _scan_indexes(cursor: Cursor, on: str) -> None:
    fetch(cursor, "SELECT set_config('enable_indexscan', $1, true)", (on,))


def _asked(
    there: Neighbourhood, queries: Sequence[Query], ef_search: int
) -> tuple[list[list[Neighbour]], float | None]:
    """The neighbours of each, and the median milliseconds."""
    found, times = [], []
    for query in queries:
        start = time.perf_counter()
        found.append(there.nearest(query.vector, TOP, query.listing_id, ef_search))
        times.append(1000 * (time.perf_counter() - start))
    return found, round(statistics.median(times), 2) if times else None


def recall(exact: Sequence[Sequence[Neighbour]], found: Sequence[Sequence[Neighbour]]) -> Any:
    """Which share of the exact neighbours was found, from 0 to 1; None where there are none."""
    wanted, right = 0, 0
    for best, got in zip(exact, found, strict=True):
        wanted += len(best)
        right += sum(one.cosine >= best[-1].cosine - SAME for one in got) if best else 0
    return round(right / wanted, 4) if wanted else None


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report for people."""
    kind = "halfvec" if report["halfvec"] else "vector"
    yield (
        f"{report['index']} on {report['table']}: {kind}, m {report['m']}, ef_construction"
        f" {report['ef_construction']}, {report['bytes'] / MB:.1f} MB, {_how(report['build'])}"
    )
    if not report["sample"] or report["measured"][0]["recall"] is None:
        yield "too few vectors to measure a search"
        return
    yield f"of {report['sample']} vectors:  recall@{report['top']}  median"
    yield f"{'exact':<17} {1:>9.3f} {report['exact_ms']:>8.1f} ms"
    for each in report["measured"]:
        unused = "" if each["used"] else "  not used: Postgres takes another way to be cheaper"
        yield (
            f"{'ef_search ' + str(each['ef_search']):<17} {each['recall']:>9.3f}"
            f" {each['ms']:>8.1f} ms{unused}"
        )
    if proposed := report["proposed_ef_search"]:
        yield f"ef_search {proposed} finds {RECALL:.0%}; search uses {report['search_uses']}"
    elif report["measured"][-1]["used"]:
        yield f"none finds {RECALL:.0%}; hint: --m {2 * report['m']} --ef-construction 200"


def _how(built: dict[str, Any] | None) -> str:
    if built is None:
        return "there already"
    return (
        f"built in {command.clock(built['seconds'])} with {built['maintenance_work_mem'] // MB} MB"
        f" and {built['workers']} workers"
    )


if __name__ == "__main__":
    command.run(main, "index")
