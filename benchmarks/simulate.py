"""The job without photos, at growing sizes: what each step costs, how it grows, what ends first.

The rows are made in an embedded Postgres that waits for its disk. In the place of encode, vectors
are made up. The stages are their own commands, each a process of its own, as in a run. The sizes
stand side by side and take each step by turns: what makes a machine slow for a while meets all.
"""

import argparse
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from subprocess import Popen
from typing import Any, NamedTuple, TypeVar

import numpy as np
import psutil
import pyarrow as pa

from benchmarks import export, material, measure
from pipeline.cache.parts import Entry
from pipeline.cache.vectors import VectorCache
from pipeline.database.connection import connect, fetch
from pipeline.database.pending import prepare
from pipeline.encoder.model import Fingerprint
from pipeline.encoder.processor import cpu_name
from pipeline.stage import parquet
from pipeline.stage.settings import MOST_SHARDS, Settings
from pipeline.workflow.plan import PHOTOS_A_SHARD

T = TypeVar("T")

MILLION = 1_000_000
SIZES = (0.1, 1, 2, 4, 8, 16, 32)  # millions of listings
MADE_UP = 4096  # vectors, drawn once and dealt out again and again
WATCH_S = 0.5
LOOKUPS = 16_384  # photos that are looked up in the cache at a time
ADD = "cache: add, a photo each"
ONCE = {"(encode)", "(room)", "(room again)", ADD}  # steps that leave no way back
STANDING = ("export", "select", "(encode)", "aggregate", "load")  # on the disk in the end, at once


@dataclass(frozen=True)
class Cost:
    """What a step took. Memory is the most at a time, of its process and of one of the server's."""

    step: str
    listings: int
    seconds: float
    cpu_seconds: float  # of its process and of the server's: others on the machine do not change it
    megabytes: float
    server_megabytes: float
    disk_bytes: int  # added at most, while it ran, to the work folder with the database in it
    wal_bytes: int


@dataclass(frozen=True)
class Size:
    """One size of the job, and where its files are."""

    listings: int
    images: int  # a listing
    dim: int
    folder: Path
    chosen: Settings
    dsn: str

    @property
    def shards(self) -> int:
        return shards_of(self.listings * self.images)

    def path(self, name: str) -> Path:
        return self.folder / "results" / name


def shards_of(photos: int) -> int:
    """As many as a run would take."""
    return max(1, min(MOST_SHARDS, -(-photos // PHOTOS_A_SHARD)))


def main() -> None:
    parser = material.parser(__doc__)
    parser.add_argument("--millions", type=float, nargs="+", help="of listings; default: what fits")
    parser.add_argument("--images", type=int, default=2, help="a listing")
    parser.add_argument("--dim", type=int, default=512, help="of the vectors")
    args = parser.parse_args()
    with material.work_folder(args.work) as folder:
        model = apart(material.tiny, folder, args.dim)  # torch would count as each child's memory
        sizes = args.millions or fitting(shutil.disk_usage(folder).free / 2, args)
        with ExitStack() as stack:
            there = [stack.enter_context(made(n, args, model, folder)) for n in sizes]
            costs = list(simulate(there, args))
    print("\n".join(report(costs, args)))


def fitting(room: float, args: argparse.Namespace) -> list[float]:
    """The sizes that fit in so many bytes together, in millions of listings."""
    needs = accumulate(needed(millions, args.images, args.dim) for millions in SIZES)
    return [millions for millions, need in zip(SIZES, needs, strict=True) if need < room]


def needed(millions: float, images: int, dim: int) -> float:
    """About how many bytes a size takes at most, the rows among them.

    That is image vectors and their means; or the means, their copy, sorted, in the table and WAL.
    """
    return millions * MILLION * (1000 + max(images + 1, 5) * (4 * dim + 100))


@contextmanager
def made(millions: float, args: argparse.Namespace, model: str, folder: Path) -> Iterator[Size]:
    """One size, with a server and in a folder of its own."""
    listings, work = round(millions * MILLION), folder / f"simulated-{millions:g}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    chosen = material.defaults().model_copy(
        update={
            **material.IDENTITY, "model_name": model,
            "limit_listings": listings, "topk": args.images, "cache_dir": str(work / "cache"),
        }
    )  # fmt: skip
    with material.database(work, args.dim, durable=True) as dsn:
        export.run(export.FILL.format(n=listings, images=args.images))
        yield Size(listings, args.images, args.dim, work, chosen, dsn)
    shutil.rmtree(work)


def simulate(sizes: Sequence[Size], args: argparse.Namespace) -> Iterator[Cost]:
    """What each step costs at each size; of its rounds the fastest counts."""
    ways = [steps(size, args.threads) for size in sizes]
    for step in ways[0]:
        rounds = range(1 if step in ONCE else args.rounds)
        taken = [[watched(step, size, way[step]) for size, way in zip(sizes, ways, strict=True)]
                 for _ in rounds]  # fmt: skip
        for of_size in zip(*taken, strict=True):
            cost = min(of_size, key=lambda each: each.seconds)
            if of_the_job([cost]):
                measure.emit("simulate", **asdict(cost), images=args.images, dim=args.dim)
            yield cost


def watched(step: str, size: Size, run: "Work") -> Cost:
    """Take a step, and look at the server and at the disk meanwhile.

    What a step before has left to write to the disk is written first.
    """
    os.environ["PG_DSN"] = size.dsn
    export.run("TRUNCATE ml.img_vec512_v1; CHECKPOINT" if step == "load" else "CHECKPOINT")
    server = psutil.Process(int((size.folder / "postgres/postmaster.pid").read_text().split()[0]))
    server_cpu = cpu_seconds(server)
    memory, disk, stop = [0.0], [bytes_of(size.folder)], threading.Event()

    def watch() -> None:
        while not stop.wait(WATCH_S):
            disk.append(bytes_of(size.folder))
            for process in server.children():
                with suppress(psutil.Error):
                    used = process.memory_info()
                    memory.append((used.rss - used.shared) / measure.MB)

    thread, before = threading.Thread(target=watch), wal_bytes()
    thread.start()
    try:
        used = run()
    finally:
        stop.set()
        thread.join()
    disk.append(bytes_of(size.folder))
    wal = wal_bytes() - before
    return Cost(
        step=step,
        listings=size.listings,
        seconds=used.seconds,
        cpu_seconds=used.cpu_seconds + cpu_seconds(server) - server_cpu,
        megabytes=used.megabytes,
        server_megabytes=max(memory),
        disk_bytes=max(disk) - disk[0],
        wal_bytes=wal,
    )


def cpu_seconds(server: psutil.Process) -> float:
    """What the server and its processes have taken, those that have ended too."""
    alive = 0.0
    for process in server.children():
        with suppress(psutil.Error):
            alive += sum(process.cpu_times()[:2])
    return float(sum(server.cpu_times()[:4])) + alive


def bytes_of(folder: Path) -> int:
    """What the files take; some go meanwhile."""
    found = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                found += os.stat(os.path.join(place, name)).st_blocks * 512
    return found


def wal_bytes() -> int:
    """How much the server has written ahead since it was made."""
    with connect(read_only=True) as connection, connection.cursor() as cursor:
        sql = "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint"
        return int(fetch(cursor, sql)[0][0])


class Used(NamedTuple):
    """What a process has taken; its memory at most."""

    seconds: float
    cpu_seconds: float
    megabytes: float

    @classmethod
    def of(cls, seconds: float, usage: Any) -> "Used":
        """From what `resource` says of a process."""
        return cls(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


Work = Callable[[], Used]


def steps(size: Size, threads: int) -> dict[str, Work]:
    """In the order in which they are taken. Those in parentheses are not part of the job."""
    named = {
        n: str(size.path(f"{n}.parquet")) for n in ("listings", "images", "vectors", "without")
    }
    exported = ["--listings", named["listings"], "--images", named["images"]]
    key = [f"--{name.replace('_', '-')}={value}" for name, value in material.IDENTITY.items()]
    cache = ["--cache-dir", size.chosen.cache_dir]
    shards = ["--shards", str(size.shards)]
    asked = ("model_name", "cache_dir", "limit_listings", "topk", *material.IDENTITY)
    config = [f"{name}={getattr(size.chosen, name)}" for name in asked]
    load = stage(
        "load", "--vectors", named["vectors"], "--without-vector", named["without"],
        "--listings", named["listings"], "--receipt", str(size.path("receipt.json")), *cache,
    )  # fmt: skip
    return {
        "digest, all pending": alone(digest, size),
        "export": stage("export", *exported, *key, *cache, "--limit-listings", str(size.listings)),
        "select": stage(
            "select", *exported, "--selected", str(size.path("select")), *shards,
            "--topk", str(size.images),
        ),
        "(encode)": alone(made_up, size),
        "aggregate": stage(
            "aggregate", "--encoded", str(size.path("encode")), *shards, "--images",
            named["images"], "--output", named["vectors"], "--without-vector", named["without"],
            "--failures", str(size.path("failures.json")), *key, "--threads", str(threads),
        ),
        "(room)": alone(shutil.rmtree, size.path("encode")),
        "load": load,
        "load, unchanged": load,
        "digest, nothing pending": alone(digest, size),
        "status": command("-m", "pipeline", "status", "--json", "--config", *config),
        "(room again)": alone(shutil.rmtree, size.path("")),
        ADD: alone(fill_cache, size),
        "cache: open": alone(open_cache, size),
        "cache: open, 16,384 neighbours": alone(look_up, size, False),
        "cache: open, 16,384 at random": alone(look_up, size, True),
    }  # fmt: skip


def stage(name: str, *flags: str) -> Work:
    """A stage's own command."""
    return command("-m", f"pipeline.{name}", *flags)


def command(*words: str) -> Work:
    """Python with these words, to its end."""

    def work() -> Used:
        start = time.perf_counter()
        process = Popen([sys.executable, *words], stdout=sys.stderr)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"error: {' '.join(words[:2])} ended with {process.returncode}")
        return Used.of(time.perf_counter() - start, usage)

    return work


def alone(function: Callable[..., object], *words: object) -> Work:
    """A function in a process of its own, whose start is not counted."""
    return lambda: apart(timed, function, *words)


def apart(function: Callable[..., T], *words: Any) -> T:
    """What a function gives in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *words).result()


def timed(function: Callable[..., object], *words: object) -> Used:
    """What this process takes for a call."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    used = Used.of(
        measure.seconds(lambda: function(*words)), resource.getrusage(resource.RUSAGE_SELF)
    )
    return used._replace(cpu_seconds=used.cpu_seconds - before.ru_utime - before.ru_stime)


def digest(size: Size) -> None:
    """What a plan asks the database: which listings are pending, and of what photos."""
    with connect(read_only=True, repeatable=True) as connection, connection.cursor() as cursor:
        fetch(cursor, prepare(cursor, material.environment(), size.chosen).digest)


def made_up(size: Size) -> None:
    """Encode's shards with vectors that say nothing."""
    values = material.unit_vectors(MADE_UP, size.dim, 0)
    schema = parquet.encoded(size.dim)
    folders = size.path("select"), size.path("encode")
    for selected, encoded in zip(*(parquet.shards(f, size.shards) for f in folders), strict=True):
        made_by = {**parquet.metadata(selected), "encoder": material.ENCODER}
        with parquet.writer(encoded, schema, made_by) as writer:
            for batch in parquet.batches(selected, MADE_UP):
                rows = len(batch)
                more = {
                    "size": np.ones(rows, np.int64),
                    "mtime_ns": np.ones(rows, np.int64),
                    "vec": values[:rows],
                    "error": pa.nulls(rows, pa.string()),
                }
                columns = dict(zip(batch.schema.names, batch.columns, strict=True)) | more
                writer.write_table(pa.table(columns, schema=schema), row_group_size=1024)


def cache_of(size: Size) -> VectorCache:
    made_by = Fingerprint(**material.ENCODER, decode="full", apply_exif_orientation=True)
    return VectorCache.of(Path(size.chosen.cache_dir), made_by.as_dict(), size.dim)


def fill_cache(size: Size) -> None:
    """A photo for each listing, by the shards of a run."""
    values = np.random.default_rng(0).standard_normal((MADE_UP, size.dim), np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    for start in range(0, size.listings, PHOTOS_A_SHARD):
        with cache_of(size) as cache:
            for n in range(start, min(start + PHOTOS_A_SHARD, size.listings)):
                name = f"{n}/0.jpg"
                digest = sha256(name.encode()).digest()
                cache.add(Entry(name, n, n, digest, values[n % MADE_UP]))


def open_cache(size: Size) -> None:
    cache_of(size)


def look_up(size: Size, at_random: bool) -> None:
    """Open it and look up LOOKUPS photos: some that came together, or any."""
    rows = min(LOOKUPS, size.listings)
    numbers = np.arange(size.listings // 2, size.listings // 2 + rows) % size.listings
    if at_random:
        numbers = np.random.default_rng(0).choice(size.listings, rows, replace=False)
    names = [f"{n}/0.jpg" for n in numbers]
    found = len(cache_of(size).lookup_files(names, numbers, numbers))
    if found != rows:
        raise RuntimeError(f"expected {rows} photos in the cache, found {found}")


def report(costs: Sequence[Cost], args: argparse.Namespace) -> Iterator[str]:
    """Markdown: the table, how the costs grow, and what ends first beyond."""
    sizes = sorted({cost.listings for cost in costs})
    yield (
        f"Measured on {cpu_name()}, {args.threads} of {os.cpu_count()} cores; {args.images} images"
        f" a listing, vectors of {args.dim} floats; Postgres waits for its disk."
    )
    yield ""
    columns = [f"{n / MILLION:g} M" for n in sizes]
    head = [
        "µs a listing (of a processor)", *columns, "grows as", "MB", "server MB", "disk, B",
        "WAL, B a listing",
    ]  # fmt: skip
    yield f"| {' | '.join(head)} |"
    yield f"|---|{'---:|' * (len(head) - 1)}"
    for step, of_step in by_step(of_the_job(costs)).items():
        last = of_step[-1]
        figures = [
            *(
                f"{micros(cost, cost.seconds)} ({micros(cost, cost.cpu_seconds)})"
                for cost in of_step
            ),
            f"n^{growth(of_step):.2f}",
            *(f"{of_step[0].megabytes:.0f} to {last.megabytes:.0f}",),
            f"{last.server_megabytes:.0f}",
            f"{last.disk_bytes / last.listings:.0f}",
            f"{last.wal_bytes / last.listings:.0f}",
        ]
        yield f"| {' | '.join([step, *figures])} |"
    for listings in (10 * MILLION, 100 * MILLION):
        yield ""
        yield f"At {listings // MILLION} million listings, by these figures, the first to end:"
        yield ""
        yield from (f"- {line}" for line in first_to_end(costs, listings, args.images))


def micros(cost: Cost, seconds: float) -> str:
    return f"{1e6 * seconds / cost.listings:.3g}"


def of_the_job(costs: Sequence[Cost]) -> list[Cost]:
    """Without what stands for a step of the job, or makes room for one."""
    return [cost for cost in costs if not cost.step.startswith("(")]


def by_step(costs: Sequence[Cost]) -> dict[str, list[Cost]]:
    """The costs of each step, the smallest size first."""
    ordered = sorted(costs, key=lambda cost: cost.listings)
    return {step: [c for c in ordered if c.step == step] for step in {c.step: 0 for c in costs}}


def growth(of_step: Sequence[Cost]) -> float:
    """The power of the number of listings with which the processor's time grows.

    By least squares over the sizes of a million and more, where there are two: below, the start of
    a process counts.
    """
    large = [cost for cost in of_step if cost.listings >= MILLION]
    fitted = large if len(large) > 1 else of_step
    if len(fitted) < 2:
        return 1.0
    listings, seconds = zip(*((c.listings, c.cpu_seconds) for c in fitted), strict=True)
    return float(np.polyfit(np.log(listings), np.log(seconds), 1)[0])


# What a step takes, how much of it is at hand, and what to set where that is too little.
AT_HAND = {
    "hours": (8.0, "limit_listings: as many as a night holds, the next one takes the rest"),
    "GB of memory": (16.0, "limit_listings; for aggregate, fewer cores"),
    "GB of disk": (1000.0, "limit_listings: the next run's files take the place of this one's"),
    "GB of WAL": (100.0, "limit_listings; max_wal_size, and room where it is archived"),
}


def first_to_end(costs: Sequence[Cost], listings: int, images: int) -> Iterator[str]:
    """What takes the most of what is at hand, of each kind, the tightest first."""
    tightest: dict[str, tuple[float, float, str]] = {}
    for step, of_step in by_step(of_the_job(costs)).items():
        for kind, amount in expected(of_step, listings).items():
            share = amount / AT_HAND[kind][0]
            tightest[kind] = max(tightest.get(kind, (0.0, 0.0, "")), (share, amount, step))
    amount = standing(costs, images) * listings / 1e9
    tightest["GB of disk"] = amount / AT_HAND["GB of disk"][0], amount, "all files, at the load"
    for kind, (share, amount, step) in sorted(tightest.items(), key=lambda one: -one[1][0]):
        at_hand, remedy = AT_HAND[kind]
        line = f"{step}: {amount:.3g} {kind}, {share:.0%} of {at_hand:g}"
        yield f"{line}; set {remedy}" if share > 1 else line
    photos = listings * images
    yield (
        f"shards: {shards_of(photos)} of {MOST_SHARDS} at most,"
        f" {photos // shards_of(photos)} photos each"
    )


def standing(costs: Sequence[Cost], images: int) -> float:
    """The bytes a listing of all that is on the disk while a load runs, the cache too."""
    last = {step: of_step[-1] for step, of_step in by_step(costs).items()}
    times = dict.fromkeys(STANDING, 1) | {ADD: images}
    there = times.keys() & last.keys()
    return sum(times[step] * last[step].disk_bytes / last[step].listings for step in there)


def expected(of_step: Sequence[Cost], listings: int) -> dict[str, float]:
    """What a step would take of each kind, as it has grown so far.

    Not the server's memory: what it sorts and hashes, it spills beyond a limit.
    """
    last = of_step[-1]
    times = listings / last.listings
    before = of_step[-2] if len(of_step) > 1 else last

    grown = max(0.0, last.megabytes - before.megabytes) / max(1, last.listings - before.listings)
    return {
        "hours": last.seconds * times ** max(1.0, growth(of_step)) / 3600,
        "GB of memory": (last.megabytes + grown * (listings - last.listings)) / 1024,
        "GB of WAL": last.wal_bytes * times / 1e9,
    }


if __name__ == "__main__":
    main()
