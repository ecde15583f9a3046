"""Listings left without a vector: they wait until one of their files or rows appears or changes.

They stay pending, but cause no rerun and take no place under `limit_listings` meanwhile. The
ledger `cache_dir/waiting-*.parquet`, one a key of the target, newest edit first, remembers them
from load to load; deleting it makes the next run try them again, no more.

A plan looks at LOOKED_AT of them at most: the newest half, since files that come late come soon,
and a block of the older ones, another by lot each hour. The rest is left out by its key alone.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.photos.files import FileStat
from pipeline.photos.root import photos_at
from pipeline.stage import parquet
from pipeline.stage.command import log
from pipeline.stage.errors import StorageError
from pipeline.stage.lock import wait_for_lock
from pipeline.stage.settings import PHOTO_LIMITS, Identity, Settings

if TYPE_CHECKING:  # a plan does without
    import duckdb

LOOKED_AT = 10_000  # listings a plan
TURN_S = 3600  # how long plans look at the same of the older ones
MEMORY_MB = 512  # for DuckDB to rewrite a ledger; beyond, it spills to disk
ROW_GROUP = 4096

KEY = ["generation", "listing_id", "edited_date"]
LEDGER = pa.schema(
    [*parquet.WITHOUT_VECTOR, pa.field("limits", pa.string()), pa.field("reason", pa.string())]
)
CANCELLED = "cancelled"  # the reason of a listing whose image vectors have no direction together

# What a listing was tried with: one text that Postgres and DuckDB run alike, grouped by listing.
CANDIDATES_SQL = """md5(string_agg(
    concat_ws('|', image_index, storage_path, score,
        is_stock_photo::int, battery_screenshot::int),
    chr(10) ORDER BY image_index, storage_path COLLATE "C"))"""


class LeftOut(NamedTuple):
    """Listings to leave out of an export, by (generation, listing_id, edited_date), and why.

    `looked_at` has their `candidates` too: they are left out while that hash is what it was.
    `changed` are not left out: a file of theirs is another than it was.
    """

    looked_at: pa.Table
    unseen: pa.Table
    changed: pa.Table

    @classmethod
    def of(cls, looked_at: pa.Table, unseen: pa.Table, changed: pa.Table) -> "LeftOut":
        """Of tables with the columns of LEDGER that are needed, and others."""
        return cls(
            looked_at.select([*KEY, "candidates", "reason"]),
            unseen.select([*KEY, "reason"]),
            changed.select(KEY),
        )

    def __bool__(self) -> bool:
        return any(table.num_rows for table in self)


NOBODY = LeftOut.of(*[LEDGER.empty_table()] * 3)


class Files:
    """The files of waiting listings as they are now, each looked at once."""

    def __init__(self, chosen: Settings, image_root: Path | str) -> None:
        self._chosen, self._image_root = chosen, image_root
        self._now: dict[str, FileStat | None] = {}
        self._failed = False

    def changed(self, tried: pa.ChunkedArray) -> list[list[tuple[str, int, int]]]:
        """Of each listing the files that can be read now and differ from what was tried."""
        listings = tried.to_pylist()
        paths = {file["storage_path"] for files in listings for file in files}
        self._look_at(sorted(paths - self._now.keys() - {None}))
        return [[change for file in files for change in self._change(file)] for files in listings]

    def _change(self, file: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
        now = self._now.get(file["storage_path"])
        if now and now != (file["size"], file["mtime_ns"]):
            yield file["storage_path"], now.size, now.mtime_ns

    def _look_at(self, paths: list[str]) -> None:
        """A place that fails is not asked again: who waits for it waits on."""
        if self._failed or not paths:
            return
        photos = photos_at(self._image_root, self._chosen, patient=False)
        try:
            for path, found in zip(paths, photos.stats(paths), strict=True):
                self._now[path] = found if isinstance(found, FileStat) else None
        except StorageError as error:
            log.warning("%s; listings that wait for files wait on", error)
            self._failed = True


def left_out(files: Files, chosen: Settings, identity: Identity) -> LeftOut:
    """The listings that still wait: those whose files are as they were, as far as looked at."""
    path = ledger_of(Path(chosen.cache_dir), identity)
    try:
        return _left_out(path, files, chosen)
    except FileNotFoundError:
        return NOBODY
    except (OSError, pa.ArrowException) as error:
        log.warning("%s cannot be read: %s; who waits is tried again", path, _one_line(error))
        return NOBODY


def _left_out(path: Path, files: Files, chosen: Settings) -> LeftOut:
    with pq.ParquetFile(path) as ledger:
        if not _is_ledger(ledger):
            return NOBODY
        blocks = window(ledger.metadata.num_rows, time.time())
        keys = ledger.read(columns=[*KEY, "limits", "reason"])
        seen = _rows(ledger, blocks, [*KEY, "candidates", "files", "limits", "reason"])
    waits = pc.equal(keys["limits"], _limits(chosen)).to_numpy()  # else it may be read now
    unseen = np.ones(len(waits), bool)
    for block in blocks:
        unseen[block.start : block.stop] = False
    same = pc.equal(seen["limits"], _limits(chosen)).to_numpy()
    same[same] = [not changes for changes in files.changed(seen["files"].filter(pa.array(same)))]
    changed = [seen.filter(pa.array(~same)), keys.filter(pa.array(unseen & ~waits))]
    return LeftOut.of(
        seen.filter(pa.array(same)),
        keys.filter(pa.array(unseen & waits)),
        pa.concat_tables(table.select(KEY) for table in changed),
    )


def files_of(
    chosen: Settings, identity: Identity, listing_id: int
) -> dict[datetime, list[dict[str, Any]]]:
    """Of each edit of a listing that is remembered: the files that were tried, with their errors.

    It waits only if its files and rows are as they were: `left_out` and the export decide.
    """
    path = ledger_of(Path(chosen.cache_dir), identity)
    if not _has_ledger(path):
        return {}
    rows = pq.read_table(path, columns=[*KEY, "files"], filters=[("listing_id", "=", listing_id)])
    return {row["edited_date"]: row["files"] for row in rows.to_pylist()}


def changed_files(files: Files, without_vector: Path) -> str:
    """A digest of the files that failed in the last run and have appeared or changed since.

    `without_vector` is aggregate's; empty if nothing failed or all that is looked at is as it was.
    """
    if not without_vector.exists():
        return ""
    with pq.ParquetFile(without_vector) as file:
        rows = _rows(file, window(file.metadata.num_rows, time.time()), ["files"])
    changed = [change for changes in files.changed(rows["files"]) for change in changes]
    return hashlib.sha256(json.dumps(changed).encode()).hexdigest()[:12] if changed else ""


def window(rows: int, now: float) -> list[range]:
    """Which rows of a file that is sorted newest first a plan looks at, `now` in s since 1970."""
    if rows <= LOOKED_AT:
        return [range(rows)]
    half = LOOKED_AT // 2
    blocks = -(-(rows - half) // half)
    lot = hashlib.sha256(str(int(now // TURN_S)).encode()).digest()
    start = half + half * (int.from_bytes(lot[:8], "big") % blocks)
    return [range(half), range(start, min(start + half, rows))]


def _rows(file: pq.ParquetFile, blocks: list[range], columns: list[str]) -> pa.Table:
    """These rows; of the file only the row groups that hold them are read."""
    tables = [file.schema_arrow.empty_table().select(columns)]
    tables += [parquet.read_rows(file, block, columns) for block in blocks if block]
    return pa.concat_tables(tables)


def remember(without_vector: Path, tried: Path, chosen: Settings, identity: Identity) -> int:
    """Replace what is remembered of the listings tried in this run; returns how many wait now.

    `without_vector` is aggregate's, `tried` the export's listings.parquet. Memory does not grow
    with either. What ends it early is logged, no more: the rows are in the table, and at stake is
    a retry too many.
    """
    import duckdb

    path = ledger_of(Path(chosen.cache_dir), identity)
    try:
        with _locked(path):
            return _rewrite(path, without_vector, tried, chosen, identity)
    except (OSError, duckdb.Error, pa.ArrowException) as error:
        log.warning("%s cannot be written: %s", path, _one_line(error))
        return parquet.rows([without_vector])


def release(tried: Path, chosen: Settings, identity: Identity) -> None:
    """Let the listings of this export wait no more, whatever becomes of the run.

    A later plan may not look at the file that ended the wait, and would leave the listing out.
    """
    import duckdb

    path = ledger_of(Path(chosen.cache_dir), identity)
    if not path.exists():
        return
    try:
        with _locked(path):
            _rewrite(path, None, tried, chosen, identity)
    except (OSError, duckdb.Error, pa.ArrowException) as error:
        log.warning("%s cannot be written: %s", path, _one_line(error))


# Of a listing that was tried, this edit and the earlier ones are settled.
_SETTLED = """
    FROM ledger l SEMI JOIN tried t ON t.generation = l.generation
    AND t.listing_id = l.listing_id AND t.edited_date >= l.edited_date"""

_KEPT = _SETTLED.replace("SEMI", "ANTI")

# Why a listing waits: what most of its files are, the first of them where that is open.
_REASON = f"""coalesce(list_aggregate(
    list_transform(files, lambda f: split_part(f.error, ':', 1)), 'mode'), '{CANCELLED}')"""

_REWRITTEN = f"""
    SELECT {", ".join(LEDGER.names)} FROM (
        SELECT *, $limits AS limits, {_REASON} AS reason FROM failed
        UNION ALL BY NAME SELECT l.* {_KEPT})
    ORDER BY edited_date DESC, listing_id, generation"""


def _rewrite(
    path: Path, without_vector: Path | None, tried: Path, chosen: Settings, identity: Identity
) -> int:
    """Merge what failed into the ledger, unless that changes nothing; returns its rows."""
    import duckdb

    remembered = _has_ledger(path)
    failed = parquet.rows([without_vector]) if without_vector else 0
    if not remembered and not failed:
        return 0
    with closing(duckdb.connect(config={"memory_limit": f"{MEMORY_MB}MB", "threads": 2})) as con:
        con.execute("SET TimeZone = 'UTC'")
        _view(con, "tried", tried, parquet.LISTINGS)
        _view(con, "ledger", path if remembered else None, LEDGER)
        _view(con, "failed", without_vector, parquet.WITHOUT_VECTOR)
        if not failed and not con.sql(f"SELECT count(*) {_SETTLED}").fetchall()[0][0]:
            return parquet.rows([path])
        rows = con.sql(_REWRITTEN, params={"limits": _limits(chosen)})
        with parquet.writer(path, LEDGER, {"waiting": identity._asdict()}) as writer:
            for batch in rows.to_arrow_reader(ROW_GROUP):
                writer.write_table(pa.Table.from_batches([batch]).cast(LEDGER))
    return parquet.rows([path])


def _view(
    con: "duckdb.DuckDBPyConnection", name: str, path: Path | None, schema: pa.Schema
) -> None:
    """Name the rows of a file, or no rows, so that SQL can."""
    rows = con.read_parquet(str(path)) if path else con.from_arrow(schema.empty_table())
    rows.create_view(name)


def ledger_of(cache_dir: Path, identity: Identity) -> Path:
    """The file that remembers who waits under this key."""
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return cache_dir / f"waiting-{digest[:12]}.parquet"


def _is_ledger(file: pq.ParquetFile) -> bool:
    return bool(file.schema_arrow.equals(LEDGER))


def _has_ledger(path: Path) -> bool:
    try:
        with pq.ParquetFile(path) as file:
            return _is_ledger(file)
    except (OSError, pa.ArrowException):
        return False


def _limits(chosen: Settings) -> str:
    return json.dumps([getattr(chosen, name) for name in PHOTO_LIMITS])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process at a time replaces a ledger; the kernel drops the lock with its holder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        wait_for_lock(lock.fileno())
        yield
