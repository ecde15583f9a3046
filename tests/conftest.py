"""A real Postgres with pgvector, a real encoder (tiny), and folders that Snakemake runs in."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import adbc_driver_postgresql.dbapi as adbc
import forked
import numpy as np
import psutil
import pytest
from adbc_driver_manager.dbapi import Cursor
from PIL import Image

from demo import postgres
from demo.encoder import random_encoder
from pipeline.cache.vectors import VectorCache
from pipeline.database import target
from pipeline.encode import EncodeJob, Line
from pipeline.stage.settings import Environment, Settings

REPOSITORY = Path(__file__).parent.parent
T0 = "2026-01-01 12:00:00.000001+00"
ADD_IMAGE = 'INSERT INTO "iPhone".iphone_image_assets VALUES ($1, $2, $3, $4)'
ENCODERS: dict[str, Any] = {}  # by their weights, loaded in this process
WITH_PGVECTOR = "with_pgvector"  # a database to copy: six times as fast as making the extension
MEMORY = Path("/dev/shm")  # a file system in memory, on Linux
TIMEOUT_S = 300  # of a run


def _is_roomy(folder: Path) -> bool:
    """Whether a file system in memory takes what all tests leave, and runs programs."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return False
    free = min(found.f_bavail * found.f_frsize, psutil.virtual_memory().available - (4 << 30))
    return free >= 2 << 30 and not found.f_flag & os.ST_NOEXEC


# On a disk the making of a database, of which there are hundreds, may take a quarter of a second.
if _is_roomy(MEMORY):
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


class Database:
    """One database of the test server; a statement is a transaction.

    All are run on one connection, which takes longer to make than most statements to run, by one
    thread at a time.
    """

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self._connection: adbc.Connection | None = None
        self._lock = threading.RLock()

    @contextmanager
    def cursor(self) -> Iterator[Cursor]:
        """A cursor on the connection, which ends with an error: the next one is on another."""
        with self._lock:
            if self._connection is None:
                self._connection = adbc.connect(self.dsn, autocommit=True)
                with self._connection.cursor() as cursor:
                    cursor.execute("SET TIME ZONE 'UTC'")
            try:
                with self._connection.cursor() as cursor:
                    yield cursor
            except adbc.Error:
                self.close()
                raise

    def close(self) -> None:
        """End the connection: who is connected keeps others from copying the database."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    def execute(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run a statement; returns its rows, if it has any."""
        with self.cursor() as cursor:
            cursor.execute(sql, parameters or None)
            return list(cursor.fetchall()) if cursor.description else []

    def add_listing(
        self,
        listing_id: int,
        paths: Sequence[str | None] = (),
        *,
        generation: int = 1,
        edited_date: str | None = T0,
        url: str | None = "https://example.com",
        spam: str | None = None,
    ) -> None:
        """A listing and its images, numbered from 0."""
        with self.cursor() as cursor:
            cursor.execute(
                'INSERT INTO "iPhone".iphone_listings'
                " VALUES ($1, $2, $3::text::timestamptz, $4, $5)",
                (generation, listing_id, edited_date, url, spam),
            )
            for index, path in enumerate(paths):
                cursor.execute(ADD_IMAGE, (generation, listing_id, index, path))

    def add_image(
        self, listing_id: int, image_index: int, path: str | None, *, generation: int = 1
    ) -> None:
        """One image row."""
        self.execute(ADD_IMAGE, generation, listing_id, image_index, path)

    def add_features(
        self,
        listing_id: int,
        image_index: int,
        *,
        generation: int = 1,
        version: int = 1,
        stock: bool | None = False,
        screenshot: bool | None = False,
        quality: int | None = 0,
        background: int | None = 0,
    ) -> None:
        """One row of quality flags."""
        self.execute(
            "INSERT INTO ml.iphone_image_features_v1 VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
            version, generation, listing_id, image_index, stock, screenshot, quality, background,
        )  # fmt: skip

    def edit(self, listing_id: int, edited_date: str) -> None:
        """Give a listing a new edited_date."""
        self.execute(
            'UPDATE "iPhone".iphone_listings SET edited_date = $1::text::timestamptz'
            " WHERE listing_id = $2",
            edited_date, listing_id,
        )  # fmt: skip

    def vectors(self, columns: str = "*") -> list[tuple[Any, ...]]:
        """The rows of the target in key order; vec as text, times as text in UTC."""
        return self.execute(
            f"SELECT {columns} FROM (SELECT listing_id, edited_date::text, source, model_rev,"
            " pca_rev, vec::text, n_images, updated_at::text FROM ml.img_vec512_v1"
            " ORDER BY listing_id, edited_date, source, model_rev, pca_rev) t"
        )


def waits_for_a_lock(database: Database) -> bool:
    """Whether the load waits for a lock."""
    waiting = database.execute(
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'listing-vectors'"
        " AND datname = current_database() AND wait_event_type = 'Lock'"
    )
    return len(waiting) > 0


# The longest files, begun first, so that two workers end at about the same time.
LONGEST = ("test_workflow.py", "test_security.py", "test_reliability.py", "test_status.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files; within one, tests stay as they are. Those of a mutant: the quick first."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))
    known = Path(os.environ.get("TEST_SECONDS", "-"))
    if known.exists():
        seconds = json.loads(known.read_text())["duration_by_test"]
        items.sort(key=lambda item: seconds.get(item.nodeid, 0.0))


@dataclass
class Run:
    """A finished Snakemake run."""

    code: int
    output: str
    rules: list[str] = field(init=False)  # the rules whose jobs were started, sorted

    def __post_init__(self) -> None:
        started = re.findall(r"^(?:local)?rule (\w+):$", self.output, re.M)
        self.rules = sorted(
            {rule for rule in started if rule not in ("all", "selected", "vectors")}
        )


@dataclass
class Workspace:
    """A folder to run in, with photos of its own, a database and a tiny encoder."""

    folder: Path
    database: Database
    encoder: Path
    env: dict[str, str]
    config: dict[str, Any] = field(default_factory=dict)
    knows_photos: bool = False  # a run finds those that are there in the cache

    @property
    def photos(self) -> Path:
        return self.folder / "listing_images"

    @property
    def results(self) -> Path:
        return self.folder / "results"

    def photo(self, name: str, colour: str = "red", size: tuple[int, int] = (48, 36)) -> str:
        """Write a photo of one colour with a corner that tells up from down; returns its path."""
        path = self.photos / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", size, colour)
        image.paste("white", (0, 0, size[0] // 3, size[1] // 3))
        image.save(path, quality=90)
        return name

    def noise(self, name: str, draw: np.random.Generator) -> str:
        """Write a photo that is like no other; returns its path."""
        path = self.photos / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = draw.integers(0, 256, (12, 12, 3), np.uint8)
        Image.fromarray(noise).resize((64, 64), Image.Resampling.NEAREST).save(path, "PNG")
        return name

    def command(self, *words: str, config: Mapping[str, Any] | None = None) -> list[str]:
        """The words of a snakemake command in this folder."""
        settings = {"model_name": f"local-dir:{self.encoder}", "shards": 1, **self.config}
        settings |= config or {}
        return [
            sys.executable, "-m", "snakemake", "--snakefile", str(REPOSITORY / "Snakefile"),
            "--workflow-profile", str(REPOSITORY / "profiles" / "default"),
            "--cores", "2", *words,
            "--config", *(f"{key}={value}" for key, value in settings.items()),
        ]  # fmt: skip

    def snakemake(
        self, *words: str, config: Mapping[str, Any] | None = None, env: Mapping[str, str] = {}
    ) -> Run:
        """Run Snakemake to its end."""
        if self.knows_photos:
            self._encode_photos()
        return self.python(*self.command(*words, config=config)[1:], env=env)

    def _encode_photos(self) -> None:
        """Put the vectors of all photos into the cache.

        In this process, where torch is loaded: each stage that has to load it takes seconds.
        """
        paths: list[str | None] = [
            str(path.relative_to(self.photos)) for path in self.photos.rglob("*.*")
        ]
        chosen = Settings(
            model_name=f"local-dir:{self.encoder}", cache_dir=str(self.folder / "cache")
        )
        job = EncodeJob.prepare(chosen, Environment.read({"IMAGE_ROOT_DIR": str(self.photos)}), 1)
        vars(job)["encoder"] = ENCODERS.get(job.model.weights) or job.encoder
        ENCODERS[job.model.weights] = job.encoder
        made_by = job.fingerprint.as_dict()
        cache = VectorCache.of(Path(chosen.cache_dir), made_by, job.dim)
        with cache, Line(job, cache) as line:
            list(line.done(line.looked_up_ahead([paths])))

    def python(self, *words: str, env: Mapping[str, str] = {}) -> Run:
        """Run `python` with these words in this folder."""
        everything = {**self.env, **env}
        if words[0] == "-m" and everything["PYTHONPATH"] == str(REPOSITORY):
            return Run(*forked.run(words[1:], self.folder, everything, TIMEOUT_S))
        return self.execute([sys.executable, *words], env)

    def execute(self, words: list[str], env: Mapping[str, str]) -> Run:
        """Run a command in this folder to its end."""
        done = subprocess.run(
            words,
            cwd=self.folder,
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
        return Run(done.returncode, done.stdout)

    def run(self, *words: str, config: Mapping[str, Any] | None = None) -> Run:
        """Run Snakemake, which must succeed."""
        run = self.snakemake(*words, config=config)
        assert run.code == 0, run.output
        return run


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a running Postgres server: one of its own, or the mutants', who share one."""
    if shared := os.environ.get("TEST_SERVER"):
        yield Path(shared)
        return
    folder = tmp_path_factory.mktemp("postgres")
    with postgres.embedded_postgres(folder):
        postgres.create_database(folder, WITH_PGVECTOR)
        yield folder


@contextmanager
def copy_of(original: Database) -> Iterator[Database]:
    """A copy of a database that nobody is connected to, dropped at the end."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    before, template, after = re.split(r"/([^/?]+)(?=\?)", original.dsn)
    original.close()
    admin = administrator(f"{before}/postgres{after}")
    admin.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    database = Database(f"{before}/{name}{after}")
    yield database
    database.close()
    admin.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@functools.cache
def administrator(dsn: str) -> Database:
    """A connection of this process to a server."""
    return Database(dsn)


@contextmanager
def new_database(server: Path) -> Iterator[Database]:
    """A database with pgvector and nothing else, dropped at the end."""
    with copy_of(Database(postgres.dsn(server, WITH_PGVECTOR))) as database:
        yield database


def new_environment(dsn: str) -> dict[str, str]:
    """The environment of a run, with nothing of the caller's settings in it."""
    names = ("PG", "IMAGE_", "LISTINGS_", "ASSETS_", "ML_SCHEMA", "VECTORS_", "SNAKEMAKE")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    return {**kept, "PG_DSN": dsn, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}


def create_tables(database: Database, dimension: int | None = 512) -> None:
    """The three input tables and the target, under their default names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PG_DSN", database.dsn)
        target.create_tables(Environment.read({}), dimension, inputs=True)


def new_workspace(folder: Path, database: Database, encoder: Path) -> Workspace:
    """A new folder where the job can run; Snakefile, profile and code are the repository's."""
    folder.mkdir()
    shutil.copy(REPOSITORY / "config.yaml", folder)
    space = Workspace(folder, database, encoder, new_environment(database.dsn))
    space.photos.mkdir()
    return space


@contextmanager
def fork_of(original: Workspace, folder: Path) -> Iterator[Workspace]:
    """A copy of a workspace: its folder with all mtimes, and its database."""
    shutil.copytree(original.folder, folder)
    with copy_of(original.database) as database:
        yield Workspace(
            folder, database, original.encoder, new_environment(database.dsn), dict(original.config)
        )


@pytest.fixture
def empty_database(server: Path) -> Iterator[Database]:
    """A database with pgvector and nothing else."""
    with new_database(server) as database:
        yield database


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny 512-d encoder, made from a fixed seed."""
    return random_encoder(tmp_path_factory.mktemp("encoders") / "tiny", seed=1)


@pytest.fixture(scope="session")
def tables(server: Path) -> Iterator[Database]:
    """A database with the three input tables and the target, to copy."""
    with new_database(server) as database:
        create_tables(database)
        yield database


@pytest.fixture
def database(tables: Database) -> Iterator[Database]:
    """A database with the three input tables and the target, all empty."""
    with copy_of(tables) as database:
        yield database


@pytest.fixture
def workspace(tmp_path: Path, database: Database, encoder: Path) -> Workspace:
    """A folder where the job can run; its Snakefile, profile and code are the repository's."""
    return new_workspace(tmp_path / "work", database, encoder)


def new_listing(workspace: Workspace, listing: int, photos: int = 2, **columns: Any) -> None:
    """A listing with photos of its own: no two files have the same bytes."""
    names = [f"{listing}/{index}.jpg" for index in range(photos)]
    for index, name in enumerate(names):
        workspace.photo(name, "red", (40 + listing, 36 + index))
    workspace.database.add_listing(listing, [*names], **columns)


@pytest.fixture(scope="session")
def first_run(
    server: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Workspace, Run]]:
    """A finished run: listings 1 and 2 are in the table, 3 waits for its two files."""
    with new_database(server) as database:
        create_tables(database)
        workspace = new_workspace(tmp_path_factory.mktemp("finished") / "work", database, encoder)
        new_listing(workspace, 1)
        new_listing(workspace, 2)
        workspace.database.add_listing(3, ["3/0.jpg", "3/1.jpg"])
        yield workspace, workspace.run()


@pytest.fixture
def finished(first_run: tuple[Workspace, Run], tmp_path: Path) -> Iterator[Workspace]:
    """A copy of the finished run, to go on with."""
    with fork_of(first_run[0], tmp_path / "work") as workspace:
        workspace.knows_photos = True
        yield workspace
