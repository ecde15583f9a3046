"""Nothing is lost: killed, interrupted, out of disk, cut off, two at once, many runs in a row.

The rounds and the seed are settings of the environment, small here:
LISTING_KILL_ROUNDS, LISTING_LOAD_ROUNDS, LISTING_SOAK_ROUNDS, LISTING_SEED.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import adbc_driver_postgresql.dbapi as adbc
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import T0, Database, Workspace, administrator, waits_for_a_lock
from oracle_table import embedder, expected_rows
from PIL import Image

from demo import postgres
from pipeline import encode as encoding
from pipeline import load as loading
from pipeline.stage import parquet
from pipeline.stage.errors import DatabaseError, DatabaseUnreachable
from pipeline.stage.settings import Environment, Settings

KILL_ROUNDS = int(os.environ.get("LISTING_KILL_ROUNDS", "1"))
LOAD_ROUNDS = int(os.environ.get("LISTING_LOAD_ROUNDS", "10"))
SOAK_ROUNDS = int(os.environ.get("LISTING_SOAK_ROUNDS", "2"))
SEED = int(os.environ.get("LISTING_SEED", "1"))

STAGES = ("export", "select", "encode", "aggregate", "load")
KEPT = "listing_id, edited_date, source, model_rev, pca_rev, vec, n_images"  # all but updated_at
COUNTS = ("inserted", "updated", "unchanged")
LEAVES_S = 10.0  # a few seconds, on a busy machine
DIM = 512

as_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="mounts a small file system"
)

T = TypeVar("T")


# --- what the tests work on


def jpeg(colour: tuple[int, int, int], size: tuple[int, int]) -> bytes:
    data = io.BytesIO()
    image = Image.new("RGB", size, colour)
    image.paste("white", (0, 0, size[0] // 3, size[1] // 3))
    image.save(data, "jpeg")
    return data.getvalue()


def photos(workspace: Workspace, count: int, size: tuple[int, int] = (48, 36)) -> list[str]:
    """Photos of different bytes, quick to write: what follows the end of a JPEG counts."""
    pictures = [jpeg((60 * i, 90, 200 - 40 * i), size) for i in range(5)]
    names = []
    for number in range(count):
        path = workspace.photos / f"{number:05}.jpg"
        path.write_bytes(pictures[number % 5] + number.to_bytes(4, "big"))
        names.append(path.name)
    return names


def market(workspace: Workspace, listings: int, each: int = 2) -> None:
    """Listings 1..n with photos of their own, a broken one and a missing one among them."""
    names = photos(workspace, listings * each)
    (workspace.photos / names[1]).write_bytes(b"no photo")
    (workspace.photos / names[-1]).unlink()
    workspace.database.execute(
        f"INSERT INTO \"iPhone\".iphone_listings SELECT 1, i, '{T0}'::timestamptz - i * interval"
        f" '1 microsecond', 'https://example.com', NULL FROM generate_series(1, {listings}) i"
    )
    workspace.database.execute(
        'INSERT INTO "iPhone".iphone_image_assets'
        f" SELECT 1, 1 + n / {each}, n % {each}, lpad(n::text, 5, '0') || '.jpg'"
        f" FROM generate_series(0, {listings * each - 1}) n"
    )


def shard(workspace: Workspace, names: list[str]) -> list[str]:
    """Write a select shard of one listing per photo; returns the words of its encode."""
    selected = workspace.results / "select" / "1-of-1.parquet"
    rows = len(names)
    table = pa.table(
        {
            "generation": [1] * rows,
            "listing_id": range(rows),
            "edited_date": [0] * rows,
            "image_index": [0] * rows,
            "storage_path": names,
            "score": [0] * rows,
            "rank": [1] * rows,
            "fallback": [False] * rows,
        }
    ).cast(parquet.SELECTED)
    with parquet.writer(selected, parquet.SELECTED, {"export": {"force": False}}) as writer:
        writer.write_table(table)
    return [
        "-m", "pipeline.encode", "--selected", str(selected),
        "--encoded", "results/encode/1-of-1.parquet", "--stats", "results/encode/1-of-1.json",
        "--model-name", f"local-dir:{workspace.encoder}", "--threads", "1",
    ]  # fmt: skip


def start(workspace: Workspace, *words: str) -> subprocess.Popen[str]:
    """Start `python` with these words in the workspace, as a process group of its own."""
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=workspace.folder,
        env=workspace.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def start_snakemake(workspace: Workspace, *words: str, **config: Any) -> subprocess.Popen[str]:
    return start(workspace, *workspace.command(*words, config=config)[1:])


def stage_of(process: subprocess.Popen[str], stage: str) -> psutil.Process:
    """The process of a stage, once it runs."""

    def find() -> psutil.Process | None:
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                words = child.cmdline()
                if f"pipeline.{stage}" in words and "python" in words[0]:
                    return child
        return None

    return until(find)


def until(probe: Callable[[], T | None], seconds: float = 60.0) -> T:
    """The first answer of a probe that is not empty."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := probe():
            return answer
        time.sleep(0.01)
    raise TimeoutError(f"nothing after {seconds:.0f} s")


def ended(process: psutil.Process) -> bool:
    """Whether a process is gone, or only waits to be reaped."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a process and all that it has started, at one moment."""
    tree = []
    with contextlib.suppress(psutil.NoSuchProcess):  # it has come to its end by itself
        tree = [psutil.Process(process.pid)]
        tree += tree[0].children(recursive=True)
    for signum in (signal.SIGSTOP, signal.SIGKILL):
        for member in tree:
            with contextlib.suppress(psutil.Error):
                member.send_signal(signum)
    process.communicate()


def output_of(process: subprocess.Popen[str], seconds: float = 120) -> str:
    """What a process prints until it ends."""
    return process.communicate(timeout=seconds)[0]


def data_files(workspace: Workspace) -> dict[str, bytes]:
    """Every Parquet file under a final name, which must open, by its path."""
    found = {}
    for folder in ("results", "cache"):
        for path in sorted((workspace.folder / folder).rglob("*.parquet")):
            if not path.name.startswith("."):
                pq.read_table(path)
                found[str(path.relative_to(workspace.folder))] = path.read_bytes()
    return found


def temporary_files(workspace: Workspace) -> list[str]:
    folders = [workspace.folder / "results", workspace.folder / "cache"]
    return sorted(path.name for folder in folders for path in folder.rglob("*.tmp"))


def undo(workspace: Workspace) -> None:
    """Make the workspace and the table as they were before the first run."""
    for folder in ("results", "cache", "logs", ".snakemake"):
        shutil.rmtree(workspace.folder / folder, ignore_errors=True)
    workspace.database.execute("TRUNCATE ml.img_vec512_v1, ml.img_vec512_v1_encoders")


@contextlib.contextmanager
def locked_target(database: Database, mode: str = "EXCLUSIVE") -> Iterator[None]:
    """Another session holds the target table until the block ends; it can be read meanwhile."""
    with adbc.connect(database.dsn) as connection, connection.cursor() as cursor:
        cursor.execute(f"LOCK TABLE ml.img_vec512_v1 IN {mode} MODE")
        yield
        connection.rollback()


# --- killed


def test_kill_anywhere(workspace: Workspace) -> None:
    """After SIGKILL at any moment, a plain rerun gives the table of an undisturbed run."""
    draw = random.Random(SEED)
    market(workspace, listings=30)
    workspace.config |= {"shards": 2, "topk": 2}
    begin = time.monotonic()
    workspace.run()
    length = time.monotonic() - begin
    expected = workspace.database.vectors(KEPT)
    waiting = waiting_listings(workspace)
    assert len(expected) + waiting == 30
    stages: dict[str, int] = {}
    for _ in range(KILL_ROUNDS):
        undo(workspace)
        for _ in range(draw.choice([1, 1, 2])):
            process = start_snakemake(workspace)
            where = wait_for_a_moment(process, draw, length)
            stages[where] = stages.get(where, 0) + 1
            kill_tree(process)
            data_files(workspace)
        run = workspace.snakemake()

        assert run.code == 0, run.output
        assert workspace.database.vectors(KEPT) == expected
        assert temporary_files(workspace) == []
        assert waiting_listings(workspace) == waiting
    print(f"{sum(stages.values())} kills: {stages}")


def wait_for_a_moment(process: subprocess.Popen[str], draw: random.Random, length: float) -> str:
    """Wait for a random moment of a run, most often of one of its stages; says where it is."""
    if draw.random() < 0.3:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0.1, 1.0) * length)
    else:
        stage = draw.choice(STAGES)
        until(lambda: stage in running_stages(process) or process.poll() is not None)
        time.sleep(draw.uniform(0, 0.1 * length))
    if process.poll() is not None:
        return "after its end"
    return ",".join(running_stages(process)) or "between stages"


def running_stages(process: subprocess.Popen[str]) -> list[str]:
    """The stages that are running now."""
    names = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                words = child.cmdline()
                if words and "python" in words[0]:
                    names += [stage for stage in STAGES if f"pipeline.{stage}" in words]
    return sorted(names)


def waiting_listings(workspace: Workspace) -> int:
    """How many listings the ledger remembers."""
    return parquet.rows((workspace.folder / "cache").glob("waiting-*.parquet"))


def test_a_stage_that_outlives_its_run_changes_nothing(workspace: Workspace) -> None:
    """A stage whose Snakemake was killed leaves without touching what the next run has written."""
    market(workspace, listings=5)
    process = start_snakemake(workspace)
    orphan = stage_of(process, "encode")
    orphan.suspend()
    process.kill()
    run = workspace.snakemake()
    files, rows = data_files(workspace), workspace.database.vectors()
    orphan.resume()
    until(lambda: ended(orphan), LEAVES_S)
    process.communicate()

    assert run.code == 0, run.output
    assert data_files(workspace) == files
    assert workspace.database.vectors() == rows
    assert temporary_files(workspace) == []


def test_a_killed_encode_loses_seconds(workspace: Workspace) -> None:
    """What was encoded more than the cache's few seconds before a SIGKILL is not encoded again."""
    words = shard(workspace, photos(workspace, 6000, (400, 300)))
    process = start(workspace, *words)
    until(lambda: cached(workspace))
    time.sleep(1.0)
    kill_tree(process)
    kept = sum(pq.read_metadata(p).num_rows for p in cached(workspace))
    again = workspace.python(*words)
    stats = json.loads((workspace.results / "encode" / "1-of-1.json").read_text())

    assert again.code == 0, again.output
    assert kept >= 1000
    assert stats["saved"]["same file"] == kept
    assert stats["encoded"] == 6000 - kept
    assert temporary_files(workspace) == []


def cached(workspace: Workspace) -> list[Path]:
    return sorted((workspace.folder / "cache").rglob("part-*.parquet"))


# --- interrupted


def test_a_run_leaves_on_a_signal_and_refuses_a_second(workspace: Workspace) -> None:
    """Signals end a run in seconds without a traceback; a second run in its folder is refused."""
    market(workspace, listings=5)
    workspace.run("vectors")
    with locked_target(workspace.database):
        for signum, whole_group in ((signal.SIGTERM, False), (signal.SIGINT, True)):
            process = start_snakemake(workspace, lock_timeout_s=120)
            until(lambda: waits_for_a_lock(workspace.database))
            loading_now = stage_of(process, "load")
            begin = time.monotonic()
            (os.killpg if whole_group else os.kill)(process.pid, signum)
            said = output_of(process)

            assert time.monotonic() - begin < LEAVES_S
            assert process.returncode != 0
            assert ended(loading_now)
            assert "Traceback" not in said, said
            assert temporary_files(workspace) == []
            workspace.database.execute(  # the server notices later that nobody waits any more
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'listing-vectors' AND datname = current_database()"
                " AND wait_event_type = 'Lock'"
            )
        process = start_snakemake(workspace, lock_timeout_s=120)
        until(lambda: waits_for_a_lock(workspace.database))
        second = workspace.snakemake()
    first = output_of(process)

    assert second.code != 0
    assert "error: another run is at work in work/" in second.output
    assert "Traceback" not in second.output
    assert second.rules == []
    assert process.returncode == 0, first
    assert len(workspace.database.vectors()) == 5


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_encode_leaves_on_a_signal(workspace: Workspace, signum: signal.Signals) -> None:
    """An interrupted encode says so in one line, leaves no half of a file and keeps its vectors."""
    words = shard(workspace, photos(workspace, 6000, (400, 300)))
    process = start(workspace, *words)
    until(lambda: cached(workspace))
    time.sleep(0.2)
    begin = time.monotonic()
    process.send_signal(signum)
    said = output_of(process)

    assert time.monotonic() - begin < LEAVES_S
    assert process.returncode == 128 + signum
    assert f"encode: stopped by {signum.name}" in said
    assert "Traceback" not in said
    assert data_files(workspace).keys() == {"results/select/1-of-1.parquet"} | {
        str(path.relative_to(workspace.folder)) for path in cached(workspace)
    }
    assert len(cached(workspace)) >= 2
    assert temporary_files(workspace) == []


# --- no disk, no photos


def on_a_small_disk(workspace: Workspace, folder: str, words: list[str]) -> subprocess.Popen[str]:
    """Start `python` where `folder` is a file system of 64 kB that nobody else sees."""
    script = (
        f'mkdir -p {folder} && mount -t tmpfs -o size=64k tmpfs {folder} && "$@"; code=$?;'
        f" find {folder} -type f; exit $code"
    )
    process = ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, *words]
    return subprocess.Popen(
        process,
        cwd=workspace.folder,
        env=workspace.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@as_root
def test_a_full_disk_is_one_line(workspace: Workspace) -> None:
    """Without room for the shard nothing partial is left, and with room again it is all cached."""
    words = shard(workspace, photos(workspace, 300))
    process = on_a_small_disk(workspace, "results/encode", words)
    said = output_of(process)
    again = workspace.python(*words)

    assert process.returncode == 1
    assert said.splitlines()[-1] == (
        "error in encode: expected free space, found no space left on device"
        " (results/encode/1-of-1.parquet); hint: make room, then run it again"
    )
    assert "Traceback" not in said
    assert again.code == 0
    assert "300 images: 0 encoded, 300 same file" in again.output
    assert temporary_files(workspace) == []


@as_root
def test_a_full_cache_disk_costs_no_shard(workspace: Workspace) -> None:
    """Vectors that cannot be cached are written to the shard all the same, with one warning."""
    words = shard(workspace, photos(workspace, 3000))
    process = on_a_small_disk(workspace, "cache", words)
    said = output_of(process)
    encoded = pq.read_table(workspace.results / "encode" / "1-of-1.parquet")

    assert process.returncode == 0, said
    assert encoded["vec"].null_count == 0
    assert said.count("expected a cache folder that takes files, found no space left") == 1
    assert ".tmp" not in said


def test_the_image_root_vanishes(workspace: Workspace) -> None:
    """Photos that vanish all at once stop the shard; when they are back, all are embedded."""
    words = shard(workspace, photos(workspace, 4000, (400, 300)))
    process = start(workspace, *words)
    until(lambda: cached(workspace))
    away = workspace.photos.rename(workspace.folder / "away")
    said = output_of(process)
    left = data_files(workspace)
    away.rename(workspace.photos)
    again = workspace.python(*words)
    stats = json.loads((workspace.results / "encode" / "1-of-1.json").read_text())

    assert process.returncode == 1
    assert "error in encode: expected a folder of images at IMAGE_ROOT_DIR, found none" in said
    assert "Traceback" not in said
    assert "results/encode/1-of-1.parquet" not in left
    assert again.code == 0, again.output
    assert stats["failed"] == {}
    assert 0 < stats["encoded"] < 3000 <= stats["encoded"] + stats["saved"]["same file"]


# --- the database, cut off


def vectors_file(folder: Path, ids: range, *, reverse: bool = False, seed: int = 0) -> Path:
    """A listing_vectors.parquet of random unit vectors, the same for the same id and seed."""
    order = list(reversed(ids)) if reverse else list(ids)
    rows = [np.random.default_rng([seed, i]).standard_normal(DIM, np.float32) for i in order]
    matrix = np.stack(rows)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    schema = parquet.listing_vectors(DIM)
    columns = {
        "generation": [1] * len(order),
        "listing_id": order,
        "edited_date": [0] * len(order),
        "source": ["s"] * len(order),
        "model_rev": ["m"] * len(order),
        "pca_rev": [""] * len(order),
        "n_images": [seed + 1] * len(order),
    }
    table = pa.table(
        {name: pa.array(columns[name], schema.field(name).type) for name in columns}
    ).append_column("vec", pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), DIM))
    made_by = {
        "export": {"force": False},
        "aggregate": {"source": "s", "model_rev": "m", "pca_rev": ""},
        "encoder": {"weights": "w", "architecture": "a", "transform": "t"},
        "select": {"topk": 5},
    }
    path = folder / f"{ids.start}-{ids.stop}-{reverse}-{seed}.parquet"
    with parquet.writer(path, schema, made_by) as writer:
        writer.write_table(table.select(schema.names))
    return path


class Load:
    """One load of a file, on the thread that calls it."""

    def __init__(self, folder: Path, vectors: Path, **settings: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.args = argparse.Namespace(
            vectors=vectors,
            without_vector=folder / "without_vector.parquet",
            listings=folder / "listings.parquet",
            receipt=folder / "receipt.json",
        )
        for path, schema in (
            (self.args.listings, parquet.LISTINGS),
            (self.args.without_vector, parquet.WITHOUT_VECTOR),
        ):
            with parquet.writer(path, schema, {}):
                pass
        self.chosen = Settings(cache_dir=str(folder / "cache"), **settings)

    def __call__(self) -> dict[str, Any]:
        return loading.load(self.args, self.chosen, Environment.read({}))


@pytest.fixture
def dsn(database: Database, monkeypatch: pytest.MonkeyPatch) -> str:
    """The database of the loads that run in this process."""
    monkeypatch.setenv("PG_DSN", database.dsn)
    return database.dsn


def query_runs(database: Database, pattern: str) -> list[int]:
    """The backends of this job that run such a query."""
    rows = database.execute(
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'listing-vectors'"
        " AND datname = current_database() AND state = 'active' AND query ~ $1",
        pattern,
    )
    return [pid for (pid,) in rows]


@pytest.mark.parametrize("moment", ["COPY", "INSERT INTO .* AS t"])
def test_a_connection_cut_while_loading(
    database: Database,
    dsn: str,
    tmp_path: Path,
    moment: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A load whose connection is cut goes on with another; every row is there once."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(Load(tmp_path, vectors_file(tmp_path, range(20_000))))
    backends = until(lambda: query_runs(database, moment))
    database.execute("SELECT pg_terminate_backend($1::int)", backends[0])
    receipt = future.result(60)

    assert "attempt 1 of 4 failed, trying again" in caplog.text
    assert [receipt[name] for name in COUNTS] == [20_000, 0, 0]
    assert database.execute("SELECT count(*) FROM ml.img_vec512_v1") == [(20_000,)]


def test_postgres_restarts_while_loading(
    database: Database, server: Path, dsn: str, tmp_path: Path
) -> None:
    """A load goes on after a restart of the server; every row is there once."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(Load(tmp_path, vectors_file(tmp_path, range(20_000))))
    until(lambda: query_runs(database, "COPY"))
    postgres.stop(server)
    postgres.start(server, durable=False)
    for cut in (database, administrator(postgres.dsn(server))):
        cut.close()
    receipt = future.result(60)

    assert [receipt[name] for name in COUNTS] == [20_000, 0, 0]
    assert database.execute("SELECT count(*) FROM ml.img_vec512_v1") == [(20_000,)]


def test_a_commit_whose_answer_is_lost(
    database: Database, dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that may or may not have happened is tried again and writes no row twice."""
    load = Load(tmp_path, vectors_file(tmp_path, range(50)))
    merge = loading._merge
    lost: list[tuple[int, int]] = []

    def merge_and_lose(connection: Any, *rest: Any) -> tuple[int, int]:
        counts = merge(connection, *rest)
        if not lost:
            lost.append(counts)
            connection.commit()
            raise DatabaseUnreachable("an answer", "none")
        return counts

    monkeypatch.setattr(loading, "_merge", merge_and_lose)
    receipt = load()

    assert lost == [(50, 0)]
    assert [receipt[name] for name in COUNTS] == [0, 0, 50]
    assert database.execute("SELECT count(*) FROM ml.img_vec512_v1") == [(50,)]


def test_a_lock_on_the_target(database: Database, dsn: str, tmp_path: Path) -> None:
    """A load says whose fault it is when the table stays locked, and works when it is free."""
    load = Load(tmp_path, vectors_file(tmp_path, range(5)), lock_timeout_s=1)
    with (
        locked_target(database),
        pytest.raises(DatabaseError, match="expected a lock on the table within lock_timeout_s"),
    ):
        load()

    assert load()["inserted"] == 5


def test_a_lock_that_keeps_readers_out(workspace: Workspace) -> None:
    """A run whose plan cannot read the target ends with one line after lock_timeout_s."""
    market(workspace, listings=2)
    with locked_target(workspace.database, "ACCESS EXCLUSIVE"):
        run = workspace.snakemake(config={"lock_timeout_s": 1})

    assert run.code == 1
    assert "error: expected a lock on the table within lock_timeout_s" in run.output
    assert "Traceback" not in run.output


# --- two at once


def test_loads_of_the_same_listings_at_the_same_time(
    database: Database, dsn: str, tmp_path: Path
) -> None:
    """Overlapping loads in any order end without an error; each row is wholly one's or other's."""
    files = [
        vectors_file(tmp_path, range(150), seed=1),
        vectors_file(tmp_path, range(50, 200), reverse=True, seed=2),
    ]
    wanted = {
        (row["listing_id"], row["n_images"]): np.array(row["vec"], np.float32)
        for path in files
        for row in pq.read_table(path, columns=["listing_id", "n_images", "vec"]).to_pylist()
    }
    with ThreadPoolExecutor(3) as pool:
        for round_ in range(LOAD_ROUNDS):
            loads = [Load(tmp_path / str(i), path) for i, path in enumerate(files)]
            if round_ % 2:
                database.execute("TRUNCATE ml.img_vec512_v1, ml.img_vec512_v1_encoders")
            changing = pool.submit(database.add_listing, round_, ["1.jpg"], edited_date=T0)
            receipts = [future.result(60) for future in [pool.submit(load) for load in loads]]
            changing.result(60)
            rows = database.vectors("listing_id, n_images, vec")

            assert [sum(r[name] for name in COUNTS) for r in receipts] == [150, 150]
            assert [row[0] for row in rows] == list(range(200))
            for listing, n_images, vec in rows:
                assert np.array_equal(
                    np.array(json.loads(vec), np.float32), wanted[listing, n_images]
                )


def test_two_runs_with_one_cache(workspace: Workspace, tmp_path: Path) -> None:
    """Two runs of the same listings, in two folders with one cache, end well and with one table."""
    market(workspace, listings=20)
    other = tmp_path / "other"
    shutil.copytree(workspace.folder, other)
    twin = Workspace(other, workspace.database, workspace.encoder, workspace.env)
    cache = tmp_path / "cache"
    runs = [start_snakemake(space, cache_dir=cache) for space in (workspace, twin)]
    said = [output_of(run) for run in runs]
    rows = workspace.database.vectors(KEPT)
    undo(workspace)
    workspace.run()

    assert [run.returncode for run in runs] == [0, 0], said
    assert rows == workspace.database.vectors(KEPT)
    assert list(cache.rglob("*.tmp")) == []


# --- many runs in a row


def test_a_soak_of_incremental_runs(workspace: Workspace) -> None:
    """After each of many changes and runs, the table is what the rows and the files say."""
    draw = random.Random(SEED)
    workspace.config |= {"topk": 2, "shards": 2}
    embed = embedder(workspace.encoder, workspace.photos)
    shop = Shop(workspace, draw)
    table: dict[tuple[int, str], tuple[str, int]] = {}
    for number in range(SOAK_ROUNDS):
        shop.change(number)
        workspace.run()
        rows = {
            (listing, edited): (vec, n_images)
            for listing, edited, vec, n_images in workspace.database.vectors(
                "listing_id, edited_date, vec, n_images"
            )
        }
        expected = expected_rows(workspace.database, embed, topk=2)
        new = {key: row for key, row in expected.items() if key not in table}

        assert {key: rows.get(key) for key in table} == table, "old rows changed"
        assert rows.keys() - table.keys() == new.keys()
        for key, row in new.items():
            vec, n_images = rows[key]
            assert n_images == row.n_images
            np.testing.assert_allclose(json.loads(vec), row.vec, rtol=0, atol=2e-6)
        assert temporary_files(workspace) == []
        table = rows
    print(f"{SOAK_ROUNDS} runs, {len(table)} rows")


class Shop:
    """A database that changes as a marketplace does."""

    def __init__(self, workspace: Workspace, draw: random.Random) -> None:
        self.workspace, self.draw = workspace, draw
        self.listings: list[int] = []
        self.edits = 0

    def change(self, number: int) -> None:
        """What happens between two runs."""
        for _ in range(6):
            self._new()
        for _ in range(3):
            self._edit(self.draw.choice(self.listings))
            self._replace_photo(self.draw.choice(self.listings))
        self._flags(self.draw.choice(self.listings))
        self._flags(self.listings[-1])
        self._arrive()
        spam, gone = self.draw.sample(self.listings, 2)
        execute = self.workspace.database.execute
        execute("UPDATE \"iPhone\".iphone_listings SET spam = 'spam' WHERE listing_id = $1", spam)
        for table in ("iphone_listings", "iphone_image_assets"):
            execute(f'DELETE FROM "iPhone".{table} WHERE listing_id = $1', gone)
        self.listings = [listing for listing in self.listings if listing not in (spam, gone)]

    def _new(self) -> None:
        listing = len(self.listings) + 1000 * (1 + self.edits)
        self.edits += 1
        paths: list[str | None] = [f"{listing}/{i}.jpg" for i in range(self.draw.randint(1, 4))]
        for path in paths:
            kind = self.draw.choice(["there"] * 6 + ["missing", "broken"])
            if kind != "missing":
                self._photo(str(path), broken=kind == "broken")
        self.workspace.database.add_listing(listing, paths, edited_date=self._now())
        self.listings.append(listing)

    def _photo(self, path: str, *, broken: bool = False) -> None:
        colour = f"#{self.draw.randrange(2**24):06x}"
        self.workspace.photo(path, colour)
        file = self.workspace.photos / path
        if broken:
            file.write_bytes(file.read_bytes()[:100])
        self.edits += 1
        os.utime(file, (1_700_000_000 + self.edits,) * 2)

    def _now(self) -> str:
        self.edits += 1
        return f"2026-02-01 00:00:00.{self.edits:06}+00"

    def _edit(self, listing: int) -> None:
        self.workspace.database.edit(listing, self._now())

    def _replace_photo(self, listing: int) -> None:
        self._photo(f"{listing}/0.jpg")
        self._edit(listing)

    def _flags(self, listing: int) -> None:
        self.workspace.database.add_features(
            listing, self.draw.randint(0, 2), stock=self.draw.random() < 0.3,
            screenshot=self.draw.random() < 0.3, quality=self.draw.randint(0, 5),
            background=self.draw.randint(0, 5),
        )  # fmt: skip

    def _arrive(self) -> None:
        """Photos that were missing are there, for some listings."""
        for listing in self.listings[::2]:
            for index in range(2):
                if not (self.workspace.photos / f"{listing}/{index}.jpg").exists():
                    self._photo(f"{listing}/{index}.jpg")


def test_memory_and_open_files_stay_flat(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encode of many images needs no more memory or descriptors than one of a few."""
    monkeypatch.chdir(workspace.folder)
    names = photos(workspace, 6000)
    shard(workspace, names)
    process = psutil.Process()
    seen: list[tuple[int, int, int]] = []
    counted = encoding.Stats.add

    def watched(self: encoding.Stats, photo: encoding.Photo) -> None:
        counted(self, photo)
        if self.images % 1000 == 0:
            gc.collect()
            seen.append((process.memory_info().rss, process.num_fds(), threading.active_count()))

    monkeypatch.setattr(encoding.Stats, "add", watched)
    chosen = Settings(model_name=f"local-dir:{workspace.encoder}", num_workers=2)
    environment = Environment.read({"IMAGE_ROOT_DIR": str(workspace.photos)})
    job = encoding.EncodeJob.prepare(chosen, environment, threads=1)
    selected = workspace.results / "select" / "1-of-1.parquet"
    stats = encoding.encode(selected, workspace.results / "encode.parquet", chosen, job)
    memory, files, threads = zip(*seen, strict=True)

    assert stats.how["encoded"] == 6000
    assert max(memory[2:]) - memory[1] < 64 * 2**20
    assert max(files) - files[0] <= 8
    assert max(threads) == threads[0]
