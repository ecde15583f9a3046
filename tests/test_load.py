"""The load: literal vectors into a real pgvector table, and what it refuses."""

import argparse
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import Database

from pipeline import load as stage
from pipeline import parquet, target
from pipeline.errors import DatabaseError, MixedModels, TooManyFailures
from pipeline.settings import Environment, Settings

T0 = datetime(2026, 1, 1, 12, 0, 0, 1, tzinfo=UTC)
ENCODER = {"weights": "w", "architecture": "a", "transform": "t", "precision": "fp32"}
IDENTITY = {"source": "s", "model_rev": "m", "pca_rev": ""}
REPORT: dict[str, Any] = {"failed": {}, "images": 4, "listings": 2, "listings_without_vector": []}


class Load:
    """The files of one load job; vectors have three dimensions."""

    def __init__(self, folder: Path, database: Database) -> None:
        self.folder = folder
        self.database = database

    def run(
        self,
        *rows: tuple[int, list[float], int],
        force: bool = False,
        encoder: dict[str, str] = ENCODER,
        report: dict[str, Any] = REPORT,
        edited_date: datetime = T0,
        pca_rev: str = "",
        dim: int = 3,
        **settings: Any,
    ) -> dict[str, Any]:
        """Load (listing_id, vec, n_images); returns the receipt less its load_id."""
        identity = {**IDENTITY, "pca_rev": pca_rev}
        listings = [
            {"generation": 1, "listing_id": i, "edited_date": edited_date, **identity, "vec": v,
             "n_images": n} for i, v, n in rows
        ]  # fmt: skip
        made_by = {"export": {"force": force}, "encoder": encoder, "aggregate": identity}
        files = {name: self.folder / name for name in ("vectors", "listings", "failures")}
        for name, schema in (
            ("vectors", parquet.listing_vectors(dim)),
            ("listings", parquet.LISTINGS),
        ):
            with parquet.writer(files[name], schema, made_by) as writer:
                keys = [{k: row[k] for k in schema.names} for row in listings]
                writer.write_table(pa.Table.from_pylist(keys, schema))
        files["failures"].write_text(json.dumps(report))
        args = argparse.Namespace(**files, receipt=self.receipt)
        chosen = Settings(cache_dir=str(self.folder / "cache"), **settings)
        stage.load(args, chosen, Environment.read({}))
        receipt: dict[str, Any] = json.loads(self.receipt.read_text())
        assert 32 == len(receipt.pop("load_id"))
        return receipt

    @property
    def receipt(self) -> Path:
        return self.folder / "receipt.json"

    def table(self) -> list[tuple[Any, ...]]:
        return self.database.vectors("listing_id, edited_date, vec, n_images")

    def updates(self) -> dict[int, str]:
        return dict(self.database.vectors("listing_id, updated_at"))


@pytest.fixture
def load(tmp_path: Path, empty_database: Database, monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.setenv("PG_DSN", empty_database.dsn)
    target.create_tables(Environment.read({}), 3, inputs=False)
    return Load(tmp_path, empty_database)


def counts(receipt: dict[str, Any]) -> tuple[int, int, int]:
    return receipt["inserted"], receipt["updated"], receipt["unchanged"]


def test_rows_and_receipt(load: Load) -> None:
    """Every vector is in the table bit for bit, and the receipt says what was done."""
    receipt = load.run((1, [0.1, -0.0, 1e-40], 2), (2, [3.4028235e38, 1.0, -1.0], 5))
    exact = load.database.execute("SELECT vec::real[] FROM ml.img_vec512_v1 ORDER BY listing_id")
    expected = pa.array([0.1, -0.0, 1e-40, 3.4028235e38, 1.0, -1.0], pa.float32()).to_pylist()

    assert [
        (1, "2026-01-01 12:00:00.000001+00", 2),
        (2, "2026-01-01 12:00:00.000001+00", 5),
    ] == load.database.vectors("listing_id, edited_date, n_images")
    assert expected == [value for (vec,) in exact for value in vec]
    assert {
        "inserted": 2,
        "updated": 0,
        "unchanged": 0,
        **IDENTITY,
        "encoder": ENCODER,
        "table": '"ml"."img_vec512_v1"',
        "waiting": 0,
    } == receipt


def test_a_file_of_many_batches_arrives_whole(load: Load) -> None:
    """Every row of a file that is read in several batches, the last one short, is in the table."""
    count = 2 * stage.BATCH_ROWS + 1
    rows = [(i, [float(i), 1.0, 0.5], i % 5 + 1) for i in range(count)]

    assert count == load.run(*rows)["inserted"]
    assert [(i, f"[{i},1,0.5]", n) for i, _, n in rows] == sorted(
        load.database.vectors("listing_id, vec, n_images")
    )


def test_a_row_that_the_server_refuses_ends_the_copy(load: Load) -> None:
    """NaN amid several batches: one error, no row, and nobody waits for the reading thread."""
    rows = [(i, [1.0, 0.0, 0.0], 1) for i in range(2 * stage.BATCH_ROWS)]
    rows[stage.BATCH_ROWS + 1] = (-1, [float("nan"), 0.0, 0.0], 1)
    with pytest.raises(DatabaseError, match="NaN not allowed in vector"):
        load.run(*rows)

    assert [] == load.table()


@pytest.mark.parametrize("end", [SystemExit(143), OSError(5, "Input/output error")])
def test_an_end_amid_the_copy_is_no_fault_of_the_database(
    load: Load, end: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal or a broken file ends the load as what it is: at once, and with no row."""

    def ending(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        yield next(batches)
        raise end

    monkeypatch.setattr(stage, "_one_ahead", ending)
    with pytest.raises(type(end)) as caught:
        load.run((1, [1, 0, 0], 1))

    assert end is caught.value
    assert [] == load.table()
    assert not load.receipt.exists()


def test_a_table_of_another_dimension_stays_as_it_is(load: Load) -> None:
    """Creating it again with another dimension is refused, and changes nothing."""
    stored = "SELECT attstorage FROM pg_attribute WHERE attname = 'vec' AND attnum > 0"
    before = load.database.execute(stored)
    with pytest.raises(
        DatabaseError, match=r"expected column vec vector\(4096\).*found vector\(3\)"
    ):
        target.create_tables(Environment.read({}), 4096, inputs=False)

    assert before == load.database.execute(stored)


@pytest.mark.parametrize("dim", [target.WIDEST_IN_ROW, target.WIDEST_IN_ROW + 1, 4096])
def test_any_dimension_loads(load: Load, dim: int) -> None:
    """A vector is stored whole, be it shorter or longer than a page of the database."""
    load.database.execute("DROP TABLE ml.img_vec512_v1")
    target.create_tables(Environment.read({}), dim, inputs=False)
    vec = [i / dim - 0.3 for i in range(dim)]

    assert 1 == load.run((1, vec, 1), dim=dim)["inserted"]
    [(stored,)] = load.database.execute("SELECT vec::real[] FROM ml.img_vec512_v1")
    assert pa.array(vec, pa.float32()).to_pylist() == stored


def test_only_rows_that_differ_are_written(load: Load) -> None:
    """A vector or an n_images that changed is written; an equal row keeps its updated_at."""
    load.run((1, [1, 0, 0], 1), (2, [0, 1, 0], 2), (3, [0, 0, 1], 3))
    before = load.updates()
    receipt = load.run((1, [1, 0, 0], 1), (2, [0, 1, 0], 9), (3, [1, 0, 0], 3), (4, [1, 0, 0], 1))
    after = load.updates()

    assert (1, 2, 1) == counts(receipt)
    assert [1] == [listing for listing in before if before[listing] == after[listing]]
    assert [(1, "[1,0,0]", 1), (2, "[0,1,0]", 9), (3, "[1,0,0]", 3), (4, "[1,0,0]", 1)] == (
        load.database.vectors("listing_id, vec, n_images")
    )


def test_force_writes_every_row(load: Load) -> None:
    """Rows of a forced export are all written again, equal or not."""
    load.run((1, [1, 0, 0], 1), (2, [0, 1, 0], 2))
    before = load.updates()
    receipt = load.run((1, [1, 0, 0], 1), (2, [0, 1, 0], 2), force=True)
    after = load.updates()

    assert (0, 2, 0) == counts(receipt)
    assert [1, 2] == [listing for listing in before if before[listing] < after[listing]]


def test_an_edit_or_another_key_is_another_row(load: Load) -> None:
    """A new edited_date, to the microsecond, or pca_rev leaves the row of the old one alone."""
    load.run((1, [1, 0, 0], 1))
    load.run((1, [0, 1, 0], 1), edited_date=T0.replace(microsecond=2))
    load.run((1, [0, 0, 1], 1), pca_rev="p")

    assert [
        ("2026-01-01 12:00:00.000001+00", "", "[1,0,0]"),
        ("2026-01-01 12:00:00.000001+00", "p", "[0,0,1]"),
        ("2026-01-01 12:00:00.000002+00", "", "[0,1,0]"),
    ] == load.database.vectors("edited_date, pca_rev, vec")


def test_nothing_to_load_still_makes_a_receipt(load: Load) -> None:
    """No vectors: no row, zeros in the receipt, and no encoder registered."""
    assert (0, 0, 0) == counts(load.run())
    assert [] == load.table()
    assert [] == load.database.execute("SELECT * FROM ml.img_vec512_v1_encoders")


@pytest.mark.parametrize(
    ("failed", "images", "limit", "refused"),
    [(5, 10, 0.5, False), (6, 10, 0.5, True), (1, 10, 0.0, True), (10, 10, 1.0, False)],
)
def test_too_many_failures_stop_the_load(
    load: Load, failed: int, images: int, limit: float, refused: bool
) -> None:
    """Above max_failed_fraction nothing is written; at the limit all is."""
    report = {**REPORT, "failed": {"missing": failed}, "images": images}
    error = ""
    try:
        load.run((1, [1, 0, 0], 1), report=report, max_failed_fraction=limit)
    except TooManyFailures as refusal:
        error = str(refusal)

    assert refused == (error != "")
    assert refused == (
        f"found {failed} of {images}: {failed} missing (nothing was loaded)" in error
    )
    assert refused == ([] == load.table())
    assert refused == (not load.receipt.exists())


def test_one_listing_alone_is_no_evidence(load: Load) -> None:
    """A run over a single broken listing is not stopped: it only has to wait."""
    report = {**REPORT, "failed": {"broken": 2}, "images": 2, "listings": 1}

    assert (0, 0, 0) == counts(load.run(report=report))


def test_other_weights_under_the_same_key_are_refused(load: Load) -> None:
    """One key never holds two encoders' vectors, unless the export was forced."""
    load.run((1, [1, 0, 0], 1))
    other = {**ENCODER, "weights": "x"}
    before = load.database.vectors()
    with pytest.raises(MixedModels, match="another weights") as error:
        load.run((1, [0, 1, 0], 1), (2, [0, 1, 0], 1), encoder=other)
    refused = load.database.vectors()
    receipt = load.run((1, [0, 1, 0], 1), encoder=other, force=True)

    assert "\n" not in str(error.value)
    assert before == refused
    assert (0, 1, 0) == counts(receipt)
    assert [(1, "[0,1,0]")] == load.database.vectors("listing_id, vec")


def test_a_failed_load_writes_nothing(load: Load) -> None:
    """All rows or none: one that the table refuses leaves no row and no receipt."""
    load.database.execute("ALTER TABLE ml.img_vec512_v1 ADD CHECK (n_images < 3)")
    with pytest.raises(DatabaseError, match="violates check constraint"):
        load.run((1, [1, 0, 0], 1), (2, [1, 0, 0], 3))

    assert [] == load.table()
    assert [] == load.database.execute("SELECT * FROM ml.img_vec512_v1_encoders")
    assert not load.receipt.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("DROP TABLE ml.img_vec512_v1", 'the target table "ml"."img_vec512_v1", found no such'),
        (
            "ALTER TABLE ml.img_vec512_v1 ALTER vec TYPE vector(4)",
            "expected column vec vector(3), the model's dimension, found vector(4)",
        ),
        (
            "ALTER TABLE ml.img_vec512_v1 ALTER vec TYPE real[]",
            "expected column vec vector(3), the model's dimension, found real[]",
        ),
        (
            "ALTER TABLE ml.img_vec512_v1 DROP CONSTRAINT img_vec512_v1_pkey",
            "expected a primary key (listing_id, edited_date, source, model_rev, pca_rev),"
            " found no unique key",
        ),
        (
            "ALTER TABLE ml.img_vec512_v1 DROP CONSTRAINT img_vec512_v1_pkey,"
            " ADD PRIMARY KEY (listing_id, source)",
            "found listing_id source",
        ),
        (
            "ALTER TABLE ml.img_vec512_v1 ALTER edited_date TYPE timestamp",
            "expected column edited_date timestamp with time zone,"
            " found timestamp without time zone",
        ),
        ("ALTER TABLE ml.img_vec512_v1 DROP COLUMN n_images", "n_images integer, found no such"),
        ("DROP EXTENSION vector CASCADE", "the pgvector extension, found none in this database"),
    ],
    ids=["table", "dimension", "type", "no key", "key", "date", "column", "extension"],
)
def test_a_target_of_another_shape_is_refused(load: Load, change: str, message: str) -> None:
    """One line with what was expected, what was found and a hint; nothing is written."""
    load.database.execute(change)
    with pytest.raises(DatabaseError) as error:
        load.run((1, [1, 0, 0], 1))

    assert message in str(error.value)
    assert "; hint: " in str(error.value) or "CREATE EXTENSION" in str(error.value)
    assert "\n" not in str(error.value)
    assert not load.receipt.exists()


FAILED = {
    "generation": 1,
    "listing_id": 2,
    "edited_date": "2026-01-01T12:00:00.000001+00:00",
    "files": [{"storage_path": "2.jpg", "size": None, "mtime_ns": None, "error": "missing: x"}],
    "candidates": "md5",
}


def test_listings_without_a_vector_are_remembered(load: Load) -> None:
    """They are kept by key until they are tried again, as this or as a later edit."""
    report = {**REPORT, "failed": {"missing": 1}, "listings_without_vector": [FAILED]}
    waiting = []
    for listing, edited, failures in (
        (2, T0, report),
        (3, T0, REPORT),
        (2, T0.replace(microsecond=0), REPORT),
        (2, T0.replace(microsecond=5), REPORT),
    ):
        receipt = load.run((listing, [1, 0, 0], 1), report=failures, edited_date=edited)
        waiting.append(receipt["waiting"])

    assert [1, 1, 1, 0] == waiting
    assert {} == json.loads((load.folder / "cache/waiting.json").read_text())
