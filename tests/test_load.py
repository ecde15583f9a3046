"""The load: literal vectors into a real pgvector table, and what it refuses."""

import argparse
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import adbc_driver_postgresql.dbapi as adbc
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Database, copy_of, create_tables, new_database, waits_for_a_lock

from pipeline import load as stage
from pipeline.database import connection as connections
from pipeline.database import registry, target
from pipeline.database.registry import MadeBy
from pipeline.encoder.model import identity_of, model_of
from pipeline.stage import parquet
from pipeline.stage.errors import DatabaseError, MixedVectors, SettingsError
from pipeline.stage.settings import Environment, Identity, Settings

T0 = datetime(2026, 1, 1, 12, 0, 0, 1, tzinfo=UTC)
ENCODER = {"weights": "w", "architecture": "a", "transform": "t", "precision": "fp32"}
RECIPE = {"topk": 5, "exclude_stock": True, "exclude_screenshots": True, "projection": ""}
IDENTITY = {"source": "s", "model_rev": "m", "pca_rev": ""}
REGISTRY = "ml.img_vec512_v1_encoders"


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
        recipe: dict[str, Any] = RECIPE,
        without: Sequence[dict[str, Any]] = (),
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
        made_by = {
            "export": {"force": force},
            "select": recipe,
            "encoder": encoder,
            "aggregate": identity,
        }
        files = {name: self.folder / name for name in ("vectors", "listings", "without_vector")}
        for name, schema, values in (
            ("vectors", parquet.listing_vectors(dim), listings),
            ("listings", parquet.LISTINGS, [*listings, *without]),
            ("without_vector", parquet.WITHOUT_VECTOR, without),
        ):
            with parquet.writer(files[name], schema, made_by) as writer:
                keys = [{k: row[k] for k in schema.names} for row in values]
                writer.write_table(pa.Table.from_pylist(keys, schema))
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

    def registered(self) -> list[dict[str, Any]]:
        """The encoder and recipe of each key in the registry."""
        rows = self.database.execute(f"SELECT encoder::text, recipe::text FROM {REGISTRY}")
        return [{"encoder": json.loads(e), "recipe": r and json.loads(r)} for e, r in rows]

    def updates(self) -> dict[int, str]:
        return dict(self.database.vectors("listing_id, updated_at"))


@pytest.fixture(scope="module")
def target_of_three(server: Path) -> Iterator[Database]:
    """A database with a target of three dimensions, to copy."""
    with new_database(server) as database:
        create_tables(database, 3)
        yield database


@pytest.fixture
def load(
    tmp_path: Path, target_of_three: Database, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Load]:
    with copy_of(target_of_three) as database:
        monkeypatch.setenv("PG_DSN", database.dsn)
        yield Load(tmp_path, database)


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
        "recipe": RECIPE,
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
    with pytest.raises(DatabaseError, match=r"NaN not allowed in vector \(staging table\)"):
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


def test_creating_again_changes_nothing(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that are there stay as their owner has set them up, who may be another role."""
    load.database.execute("ALTER TABLE ml.img_vec512_v1 ALTER vec SET STORAGE EXTERNAL")
    target.create_tables(Environment.read({}), 3, inputs=False)
    role = f"other_{os.getpid()}"
    load.database.execute(f"CREATE ROLE {role} LOGIN")
    try:
        load.database.execute(f"GRANT CREATE, USAGE ON SCHEMA ml TO {role}")
        monkeypatch.setenv("PG_DSN", load.database.dsn.replace("postgres@", f"{role}@", 1))
        target.create_tables(Environment.read({}), 3, inputs=False)
    finally:
        load.database.execute(f"DROP OWNED BY {role}")
        load.database.execute(f"DROP ROLE {role}")

    assert [("e",)] == load.database.execute(
        "SELECT attstorage::text FROM pg_attribute WHERE attname = 'vec'"
        " AND attrelid = 'ml.img_vec512_v1'::regclass"
    )


def test_creating_needs_the_extension_and_the_right(load: Load) -> None:
    """Who may do it all gets it all; a role that may not is told what, and nothing is made."""
    load.database.execute("DROP EXTENSION vector CASCADE")
    load.database.execute("DROP SCHEMA ml CASCADE")
    role = f"creator_{os.getpid()}"
    as_role = load.database.dsn.replace("postgres@", f"{role}@", 1)
    steps = [
        "GRANT CONNECT ON DATABASE {database} TO {role}",
        "CREATE EXTENSION vector",
        "CREATE SCHEMA ml",
        "GRANT CREATE, USAGE ON SCHEMA ml TO {role}",
    ]
    (database,) = load.database.execute("SELECT quote_ident(current_database())")[0]
    load.database.execute(f"CREATE ROLE {role} LOGIN")
    told = []
    try:
        for step in steps:
            load.database.execute(step.format(database=database, role=role))
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("PG_DSN", as_role)
                try:
                    target.create_tables(Environment.read({}), 3, inputs=False)
                except DatabaseError as error:
                    told.append(str(error))
        load.database.execute("DROP EXTENSION vector CASCADE")
        load.database.execute("DROP TABLE ml.img_vec512_v1")
        target.create_tables(Environment.read({}), 3, inputs=False)
    finally:
        load.database.execute(f"DROP OWNED BY {role} CASCADE")
        load.database.execute(f"DROP ROLE {role}")

    may_not = 'expected a role that may create tables in schema "ml", found one that may not'
    assert [True, False, False] == ["may not create it" in line for line in told]
    assert [False, True, True] == [line.startswith(may_not) for line in told]
    assert 1 == load.run((1, [1, 0, 0], 1))["inserted"]


def test_the_extension_may_live_in_a_schema_of_its_own(load: Load) -> None:
    """Off the search path its type has another name, and is the same."""
    load.database.execute("CREATE SCHEMA extensions")
    load.database.execute("ALTER EXTENSION vector SET SCHEMA extensions")
    with connections.connect() as connection, connection.cursor() as cursor:
        target.check(cursor, Environment.read({}), 3)
        target.check(cursor, Environment.read({}), None)
        with pytest.raises(DatabaseError, match=r"expected column vec vector\(4\), the dimension"):
            target.check(cursor, Environment.read({}), 4)
        cursor.execute("ALTER TABLE ml.img_vec512_v1 ALTER vec TYPE real[]")
        with pytest.raises(DatabaseError, match=r"vec vector\(N\), .* found real\[\]"):
            target.check(cursor, Environment.read({}), None)


@pytest.mark.parametrize(
    "index",
    ["(listing_id, edited_date, source, model_rev, pca_rev) WHERE n_images > 0",
     "(listing_id, edited_date, source, model_rev, lower(pca_rev))"],
    ids=["partial", "expression"],
)  # fmt: skip
def test_a_key_holds_for_every_row_and_column(load: Load, index: str) -> None:
    """A unique index over some of the rows, or of an expression, is none for the merge."""
    table = "ml.img_vec512_v1"
    load.database.execute(f"ALTER TABLE {table} DROP CONSTRAINT img_vec512_v1_pkey")
    load.database.execute(f"CREATE UNIQUE INDEX ON {table} {index}")
    with pytest.raises(DatabaseError, match="found no unique key"):
        load.run((1, [1, 0, 0], 1))


@pytest.mark.parametrize("dim", [target.WIDEST_IN_ROW, target.WIDEST_IN_ROW + 1, 4096])
def test_any_dimension_loads(load: Load, dim: int) -> None:
    """A vector is stored whole, be it shorter or longer than a page of the database."""
    load.database.execute("DROP TABLE ml.img_vec512_v1")
    target.create_tables(Environment.read({}), dim, inputs=False)
    vec = [i / dim - 0.3 for i in range(dim)]
    [(stored_as,)] = load.database.execute(
        "SELECT attstorage::text FROM pg_attribute WHERE attname = 'vec'"
        " AND attrelid = 'ml.img_vec512_v1'::regclass"
    )

    assert ("p" if dim <= target.WIDEST_IN_ROW else "e") == stored_as
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
    assert [] == load.database.execute("SELECT * FROM " + REGISTRY)


def test_a_load_waits_for_a_lock_that_is_soon_free(load: Load) -> None:
    """lock_timeout_s is seconds: a lock that is held for a moment longer costs no load."""
    waits = "SELECT 1 FROM pg_locks WHERE NOT granted"
    locked, released = threading.Event(), threading.Event()

    def hold() -> None:
        with adbc.connect(load.database.dsn) as connection, connection.cursor() as cursor:
            cursor.execute("LOCK TABLE ml.img_vec512_v1 IN ACCESS EXCLUSIVE MODE")
            locked.set()
            while not load.database.execute(waits) and not released.is_set():
                time.sleep(0.05)
            time.sleep(0.3)
            connection.rollback()

    holder = threading.Thread(target=hold)
    holder.start()
    locked.wait()
    try:
        receipt = load.run((1, [1, 0, 0], 1), lock_timeout_s=60)
    finally:
        released.set()
        holder.join()

    assert (1, 0, 0) == counts(receipt)


# What may not share a key: the part, the load that differs in it, and how a refusal says so.
MIXING: dict[str, tuple[dict[str, Any], str, str]] = {
    part: (
        {"encoder": {**ENCODER, part: "x"}},
        f"another {part}",
        "give the encoder its own model_rev, or overwrite all of them with force",
    )
    for part in ("weights", "architecture", "transform")
} | {
    "topk": (
        {"recipe": {**RECIPE, "topk": 2}},
        "topk 2 instead of 5",
        "leave source empty, so that it follows topk, or overwrite all of them with force",
    ),
    "stock": (
        {"recipe": {**RECIPE, "exclude_stock": False}},
        "exclude_stock false instead of true",
        "give the recipe its own source, or overwrite all of them with force",
    ),
    "screenshots": (
        {"recipe": {**RECIPE, "exclude_screenshots": False}},
        "exclude_screenshots false instead of true",
        "give the recipe its own source, or overwrite all of them with force",
    ),
    "projection": (
        {"recipe": {**RECIPE, "projection": "p"}},
        "another projection",
        "leave pca_rev empty, so that it follows the file of pca, or overwrite all of them with"
        " force",
    ),
    "all": (
        {"encoder": {**ENCODER, "weights": "x", "transform": "x"}, "recipe": {**RECIPE, "topk": 3}},
        "another weights and another transform and topk 3 instead of 5",
        "give the encoder its own model_rev and leave source empty, so that it follows topk, or"
        " overwrite all of them with force",
    ),
}


def test_a_part_that_one_recipe_has_and_another_lacks_tells_them_apart() -> None:
    """Whichever of the two is the newer code's."""
    more, less = MadeBy({}, {"topk": 5, "projection": ""}), MadeBy({}, {"topk": 5})

    assert [["projection"], ["projection"]] == [more.unlike(less), less.unlike(more)]


@pytest.mark.parametrize("part", MIXING)
def test_one_key_never_holds_two_makes(load: Load, part: str) -> None:
    """A load of another encoder or recipe is refused in one line, and nothing is written."""
    load.run((1, [1, 0, 0], 1), (2, [1, 0, 0], 1))
    before, there = load.database.vectors(), load.registered()
    load.receipt.unlink()
    differing, found, hint = MIXING[part]
    with pytest.raises(MixedVectors) as error:
        load.run((1, [0, 1, 0], 1), (3, [0, 1, 0], 1), **differing)

    assert (
        "expected vectors of the encoder and recipe that made (s, m, '') in the table, found"
        f' {found} ("ml"."img_vec512_v1"); hint: {hint}'
    ) == str(error.value)
    assert before == load.database.vectors()
    assert there == load.registered()
    assert not load.receipt.exists()


@pytest.mark.parametrize("part", MIXING)
def test_force_replaces_every_row_of_a_key_or_none(load: Load, part: str) -> None:
    """A forced load of another make goes through only if no row of the key is of the old one."""
    load.run((1, [1, 0, 0], 1), (2, [1, 0, 0], 1))
    load.run((9, [1, 0, 0], 1), pca_rev="p")
    before, there = load.database.vectors(), load.registered()
    differing, found, _ = MIXING[part]
    with pytest.raises(MixedVectors) as error:
        load.run((2, [0, 1, 0], 1), (3, [0, 1, 0], 1), force=True, **differing)
    refused, kept = load.database.vectors(), load.registered()
    receipt = load.run((1, [0, 0, 1], 1), (2, [0, 1, 0], 1), force=True, **differing)

    assert str(error.value).startswith(
        f"expected every row of (s, m, '') to be replaced by {found}, found 1 rows that would stay:"
        " of listings beyond limit_listings, earlier edits, or listings that are gone, spam or"
    )
    assert "hint: raise limit_listings, delete them with python -m pipeline retire" in (
        str(error.value)
    )
    assert (before, there) == (refused, kept)
    assert (0, 2, 0) == counts(receipt)
    assert [(1, "[0,0,1]", ""), (2, "[0,1,0]", ""), (9, "[1,0,0]", "p")] == (
        load.database.vectors("listing_id, vec, pca_rev")
    )
    made_by = {"encoder": ENCODER, "recipe": RECIPE, **differing}
    assert sorted([made_by, {"encoder": ENCODER, "recipe": RECIPE}], key=str) == (
        sorted(load.registered(), key=str)
    )


def test_what_force_changes_under_a_key_is_said(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    """The parts that differ from the last load's, and no others."""
    fp16, topk_2 = {**ENCODER, "precision": "fp16"}, {**RECIPE, "topk": 2}
    for made_by in (
        {},
        {"encoder": fp16},
        {"encoder": fp16, "recipe": topk_2},
        {"encoder": {**fp16, "weights": "x"}},
    ):
        load.run((1, [1, 0, 0], 1), force=True, **made_by)

    assert [
        "this key's encoder or recipe changes in precision",
        "this key's encoder or recipe changes in recipe",
        "this key's encoder or recipe changes in weights, recipe",
    ] == caplog.messages


def test_an_earlier_edit_is_a_row_that_stays(load: Load) -> None:
    """A row is replaced by one of the same listing and edit, to the microsecond, and no other."""
    load.run((1, [1, 0, 0], 1))
    load.run((1, [1, 0, 0], 1), edited_date=T0.replace(microsecond=2))
    with pytest.raises(MixedVectors, match="found 1 rows that would stay"):
        load.run((1, [0, 1, 0], 1), force=True, recipe={**RECIPE, "topk": 2})

    assert [(1, "[1,0,0]"), (1, "[1,0,0]")] == load.database.vectors("listing_id, vec")


def test_a_forced_load_of_the_same_make_may_be_a_part(load: Load) -> None:
    """Force without another encoder or recipe leaves the rows alone that it does not hold."""
    load.run((1, [1, 0, 0], 1), (2, [1, 0, 0], 1))
    load.run((2, [0, 1, 0], 1), force=True, encoder={**ENCODER, "precision": "fp16"})

    assert [(1, "[1,0,0]"), (2, "[0,1,0]")] == load.database.vectors("listing_id, vec")


def test_without_a_vector_nothing_is_claimed(load: Load) -> None:
    """A load of no rows neither refuses nor registers what it would have been made by."""
    load.run((1, [1, 0, 0], 1))
    for force in (False, True):
        load.run(encoder={**ENCODER, "weights": "x"}, force=force)

    assert [{"encoder": ENCODER, "recipe": RECIPE}] == load.registered()


def test_the_last_precision_is_recorded(load: Load) -> None:
    """What may vary under a key loads without force; the registry tells the last load's."""
    load.run((1, [1, 0, 0], 1))
    other = {**ENCODER, "precision": "fp16"}
    load.run((2, [1, 0, 0], 1), encoder=other)

    assert [{"encoder": other, "recipe": RECIPE}] == load.registered()


def test_a_key_from_before_recipes_takes_the_first(load: Load) -> None:
    """Where the recipe is not known, the first that is loaded is it, and the next is refused."""
    load.run((1, [1, 0, 0], 1))
    load.database.execute(f"UPDATE {REGISTRY} SET recipe = NULL")
    topk_2 = {**RECIPE, "topk": 2}
    load.run((2, [1, 0, 0], 1), recipe=topk_2)

    assert [{"encoder": ENCODER, "recipe": topk_2}] == load.registered()
    with pytest.raises(MixedVectors, match="found topk 5 instead of 2"):
        load.run((3, [1, 0, 0], 1))


def test_a_registry_without_recipes_gets_the_column(load: Load) -> None:
    """From whoever owns it: create-table, or the load."""
    load.run((1, [1, 0, 0], 1))
    for create in (
        lambda: target.create_tables(Environment.read({}), 3, inputs=False),
        lambda: load.run((1, [1, 0, 0], 1)),
    ):
        load.database.execute(f"ALTER TABLE {REGISTRY} DROP recipe")
        create()

        assert ENCODER == load.registered()[0]["encoder"]
    assert [{"encoder": ENCODER, "recipe": RECIPE}] == load.registered()


def test_a_registry_that_is_not_there_is_made(load: Load) -> None:
    """By the load itself, where its role may."""
    load.database.execute(f"DROP TABLE {REGISTRY}")
    load.run((1, [1, 0, 0], 1))

    assert [{"encoder": ENCODER, "recipe": RECIPE}] == load.registered()


def test_two_loads_that_make_the_registry_at_once_both_succeed(load: Load) -> None:
    """The second waits for the first, and finds it made."""
    load.database.execute(f"DROP TABLE {REGISTRY}")
    outcome: list[int] = []

    def second() -> None:
        outcome.append(load.run((1, [1, 0, 0], 1))["inserted"])

    with connections.connect() as first:
        with first.cursor() as cursor:
            registry.create(cursor, Environment.read({}))
        thread = threading.Thread(target=second)
        thread.start()
        while thread.is_alive() and not waits_for_a_lock(load.database):
            thread.join(0.01)
        first.commit()
    thread.join(60)

    assert [1] == outcome
    assert [{"encoder": ENCODER, "recipe": RECIPE}] == load.registered()


def test_a_plan_knows_what_the_load_would_refuse(load: Load, encoder: Path) -> None:
    """Before anything is encoded: nothing, a refusal, or with force what is to be replaced."""
    chosen = Settings(model_name=f"local-dir:{encoder}", source="s")
    model, environment = model_of(chosen), Environment.read({})
    made_by = MadeBy.planned(chosen, model)
    topk_2 = chosen.model_copy(update={"topk": 2})
    forced = topk_2.model_copy(update={"force": True})
    with connections.connect() as connection, connection.cursor() as cursor:
        before = registry.displaced(cursor, environment, topk_2, model)
        registry.claim(cursor, environment, identity_of(chosen, model), made_by)
        registered = registry.registered(cursor, environment)
        same, other = (registry.displaced(cursor, environment, s, model) for s in (chosen, forced))
        with pytest.raises(MixedVectors, match="found topk 2 instead of 5"):
            registry.displaced(cursor, environment, topk_2, model)

    assert chosen.recipe == made_by.recipe
    assert {identity_of(chosen, model): made_by} == registered
    assert [None, None, made_by] == [before, same, other]


def test_a_registry_that_may_not_be_read_tells_nothing(load: Load) -> None:
    """To a role without the right, and to all where there is none."""
    load.run((1, [1, 0, 0], 1))
    role = f"reader_{os.getpid()}"
    load.database.execute(f'CREATE ROLE "{role}"')
    found = []
    try:
        load.database.execute(f'GRANT USAGE ON SCHEMA ml TO "{role}"')
        with connections.connect() as connection, connection.cursor() as cursor:
            for statement in (f'SET ROLE "{role}"', "RESET ROLE", f"DROP TABLE {REGISTRY}"):
                cursor.execute(statement)
                found.append(len(registry.registered(cursor, Environment.read({}))))
    finally:
        load.database.execute(f'DROP OWNED BY "{role}"')
        load.database.execute(f'DROP ROLE "{role}"')

    assert [0, 1, 0] == found


@pytest.mark.parametrize(
    ("sql", "warning"),
    [
        (
            f"DROP TABLE {REGISTRY}",
            'no registry of encoders beside "ml"."img_vec512_v1" and no right to make one: models'
            " and recipes are not told apart; hint: python -m pipeline create-table as the owner",
        ),
        (
            f"ALTER TABLE {REGISTRY} DROP recipe",
            'the registry of encoders beside "ml"."img_vec512_v1" has no column for recipes and'
            " this role may not add it: another topk is not told apart; hint: python -m pipeline"
            " create-table as the owner",
        ),
    ],
    ids=["no registry", "no recipes"],
)
def test_what_cannot_be_told_apart_is_a_warning(
    load: Load, sql: str, warning: str,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """A role without the right loads, is warned once, and still tells apart what it can."""
    load.run((1, [1, 0, 0], 1))
    load.database.execute(sql)
    role = f"loader_{os.getpid()}"
    load.database.execute(f'CREATE ROLE "{role}" LOGIN')
    refused = []
    try:
        load.database.execute(f'GRANT USAGE ON SCHEMA ml TO "{role}"')
        load.database.execute(
            f'GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA ml TO "{role}"'
        )
        monkeypatch.setenv("PG_DSN", load.database.dsn.replace("postgres@", f"{role}@", 1))
        load.run((2, [1, 0, 0], 1), recipe={**RECIPE, "topk": 2})
        warned = list(caplog.messages)
        try:
            load.run((3, [1, 0, 0], 1), encoder={**ENCODER, "weights": "x"})
        except MixedVectors as error:
            refused.append(str(error))
    finally:
        load.database.execute(f'DROP OWNED BY "{role}"')
        load.database.execute(f'DROP ROLE "{role}"')

    assert [warning] == warned
    assert ("DROP TABLE" not in sql) == bool(refused)


def test_a_load_keeps_others_from_replacing_what_it_counts_on(load: Load) -> None:
    """A forced load of another make waits for one under way, and sees the rows that it leaves."""
    load.run((1, [1, 0, 0], 1))
    identity = Identity(**IDENTITY)
    outcome: list[str] = []

    def forced() -> None:
        try:
            load.run((1, [0, 1, 0], 1), force=True, encoder={**ENCODER, "weights": "x"})
            outcome.append("loaded")
        except MixedVectors as error:
            outcome.append(str(error))

    with connections.connect() as under_way:
        with under_way.cursor() as cursor:
            made_by = MadeBy(dict(ENCODER), RECIPE)
            registry.claim(cursor, Environment.read({}), identity, made_by)
            cursor.execute(
                "INSERT INTO ml.img_vec512_v1 VALUES (2, now(), 's', 'm', '', '[1,0,0]', 1)"
            )
        thread = threading.Thread(target=forced)
        thread.start()
        while thread.is_alive() and not waits_for_a_lock(load.database):
            thread.join(0.01)
        under_way.commit()
    thread.join(60)

    assert 1 == len(outcome)
    assert "found 1 rows that would stay" in outcome[0]
    assert [(1, "[1,0,0]"), (2, "[1,0,0]")] == load.database.vectors("listing_id, vec")
    assert [{"encoder": ENCODER, "recipe": RECIPE}] == load.registered()


def test_a_load_waits_for_one_that_replaces_the_encoder(load: Load) -> None:
    """A load of the old make that comes during a forced one is refused when that one has ended."""
    load.run((1, [1, 0, 0], 1))
    identity, other = Identity(**IDENTITY), {**ENCODER, "weights": "x"}
    outcome: list[str] = []

    def late() -> None:
        try:
            load.run((2, [1, 0, 0], 1))
            outcome.append("loaded")
        except MixedVectors as error:
            outcome.append(str(error))

    with connections.connect() as forced:
        with forced.cursor() as cursor:
            registry.claim(cursor, Environment.read({}), identity, MadeBy(other, RECIPE))
        thread = threading.Thread(target=late)
        thread.start()
        while thread.is_alive() and not waits_for_a_lock(load.database):
            thread.join(0.01)
        with forced.cursor() as cursor:
            registry.replace(cursor, Environment.read({}), identity, MadeBy(other, RECIPE))
            cursor.execute("UPDATE ml.img_vec512_v1 SET vec = '[0,1,0]'")
        forced.commit()
    thread.join(60)

    assert 1 == len(outcome)
    assert "found another weights" in outcome[0]
    assert [(1, "[0,1,0]")] == load.database.vectors("listing_id, vec")


def test_a_key_that_is_retired_while_a_load_waits_for_it_is_registered_anew(load: Load) -> None:
    """The load comes first under a key whose line went while it waited."""
    load.run((1, [1, 0, 0], 1))
    other = {**ENCODER, "weights": "x"}
    outcome: list[int] = []

    def late() -> None:
        outcome.append(load.run((2, [0, 1, 0], 1), encoder=other)["inserted"])

    with connections.connect() as retiring:
        with retiring.cursor() as cursor:
            cursor.execute(f"SELECT 1 FROM {REGISTRY} FOR UPDATE")
            cursor.fetchall()
        thread = threading.Thread(target=late)
        thread.start()
        while thread.is_alive() and not waits_for_a_lock(load.database):
            thread.join(0.01)
        with retiring.cursor() as cursor:
            cursor.execute("DELETE FROM ml.img_vec512_v1")
            key = Environment.read({}), Identity(**IDENTITY)
            retired = [registry.retire(cursor, *key) for _ in range(2)]
        retiring.commit()
    thread.join(60)

    assert [True, False] == retired
    assert [1] == outcome
    assert [(2, "[0,1,0]")] == load.database.vectors("listing_id, vec")
    assert [{"encoder": other, "recipe": RECIPE}] == load.registered()


def test_the_command(
    load: Load, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each flag has its effect, and the last line says what became of how many rows."""
    load.run((1, [1, 0, 0], 1), (2, [1, 0, 0], 1), without=[failed(5)])
    load.database.execute("UPDATE ml.img_vec512_v1 SET n_images = 7 WHERE listing_id = 1")
    load.database.execute("DELETE FROM ml.img_vec512_v1 WHERE listing_id = 2")
    receipt, cache = load.folder / "again" / "receipt.json", load.folder / "elsewhere"
    words = [
        "--vectors", load.folder / "vectors", "--listings", load.folder / "listings",
        "--without-vector", load.folder / "without_vector", "--receipt", receipt,
        "--cache-dir", cache, "--lock-timeout-s", "7", "--max-image-bytes", "9",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["load", *map(str, words)])
    with caplog.at_level("INFO", "pipeline"):
        stage.main()

    assert (1, 1, 0) == counts(json.loads(receipt.read_text()))
    (ledger,) = cache.glob("waiting-*.parquet")
    (waiting,) = pq.read_table(ledger).to_pylist()
    assert (5, [False, 9]) == (waiting["listing_id"], json.loads(waiting["limits"])[:2])
    assert '1 inserted, 1 updated, 0 unchanged in "ml"."img_vec512_v1"' == caplog.messages[-1]


def test_the_roles_sql_names_the_tables_of_the_environment() -> None:
    """Each schema once, each table by its name, and rights to write the target alone."""
    names = {"LISTINGS_SCHEMA": "a", "ASSETS_SCHEMA": "a", "ML_SCHEMA": "c", "VECTORS_TABLE": "v"}
    sql = target.role_sql(Environment.read(names), "job")

    assert [
        'CREATE ROLE "job" LOGIN;',
        'GRANT USAGE ON SCHEMA "a", "c" TO "job";',
        'GRANT SELECT ON "a"."iphone_listings", "a"."iphone_image_assets",'
        ' "c"."iphone_image_features_v1" TO "job";',
        'GRANT SELECT, INSERT, UPDATE ON "c"."v", "c"."v_encoders" TO "job";',
        'GRANT SELECT ON "c"."v_current" TO "job";',
    ] == [line for line in sql.splitlines() if line.startswith(("CREATE", "GRANT"))]
    with pytest.raises(SettingsError, match="^expected --role: "):
        target.role_sql(Environment.read(names), 'job"')


@pytest.mark.parametrize("flag", ["--vectors", "--listings", "--without-vector", "--receipt"])
def test_the_command_needs_its_files(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without one of them it names the flag, before anything is read or written."""
    flags = {"--vectors": "v", "--listings": "l", "--without-vector": "w", "--receipt": "r"}
    words = [word for name, value in flags.items() if name != flag for word in (name, value)]
    monkeypatch.setattr("sys.argv", ["load", *words])
    with pytest.raises(SystemExit) as ended:
        stage.main()

    assert 2 == ended.value.code
    assert f"the following arguments are required: {flag}\n" in capsys.readouterr().err


def test_a_failed_load_writes_nothing(load: Load) -> None:
    """All rows or none: one that the table refuses leaves no row and no receipt."""
    load.database.execute("ALTER TABLE ml.img_vec512_v1 ADD CHECK (n_images < 3)")
    with pytest.raises(DatabaseError, match="violates check constraint"):
        load.run((1, [1, 0, 0], 1), (2, [1, 0, 0], 3))

    assert [] == load.table()
    assert [] == load.database.execute("SELECT * FROM " + REGISTRY)
    assert not load.receipt.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("DROP TABLE ml.img_vec512_v1", 'the target table "ml"."img_vec512_v1", found no such'),
        (
            "ALTER TABLE ml.img_vec512_v1 ALTER vec TYPE vector(4)",
            "expected column vec vector(3), the dimension of the vectors, found vector(4)",
        ),
        (
            "ALTER TABLE ml.img_vec512_v1 ALTER vec TYPE real[]",
            "expected column vec vector(3), the dimension of the vectors, found real[]",
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
        (
            "ALTER TABLE ml.img_vec512_v1 DROP COLUMN vec",
            "expected column vec vector(3), the dimension of the vectors, found no such column (",
        ),
        ("DROP EXTENSION vector CASCADE", "the pgvector extension, found none in this database"),
    ],
    ids=["table", "dimension", "type", "no key", "key", "date", "column", "vec", "extension"],
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


def failed(listing: int, edited_date: datetime = T0) -> dict[str, Any]:
    """A row of without_vector.parquet."""
    file = {"storage_path": "2.jpg", "size": None, "mtime_ns": None, "error": "missing: x"}
    key = {"generation": 1, "listing_id": listing, "edited_date": edited_date}
    return {**key, "candidates": "0" * 32, "files": [file]}


def remembered(load: Load) -> list[tuple[int, datetime]]:
    """The listings of the ledger, in its order."""
    (path,) = (load.folder / "cache").glob("waiting-*.parquet")
    return [(row["listing_id"], row["edited_date"]) for row in pq.read_table(path).to_pylist()]


def test_listings_without_a_vector_are_remembered(load: Load) -> None:
    """They are kept by key until they are tried again, as this or as a later edit."""
    earlier, later = T0.replace(microsecond=0), T0.replace(microsecond=5)
    seen = []
    nights: list[tuple[list[Any], list[Any], datetime]] = [
        ([], [failed(2)], T0),
        ([(3, [1, 0, 0], 1)], [failed(4, later)], T0),
        ([(2, [1, 0, 0], 1)], [], earlier),
        ([(2, [1, 0, 0], 1), (4, [1, 0, 0], 1)], [], later),
    ]
    for vectors, without, edited in nights:
        receipt = load.run(*vectors, without=without, edited_date=edited)
        seen.append(remembered(load))
        assert receipt["waiting"] == len(seen[-1])

    assert [[(2, T0)], [(4, later), (2, T0)], [(4, later), (2, T0)], []] == seen


def test_keys_wait_on_their_own(load: Load) -> None:
    """What another key has loaded says nothing of this one."""
    load.run(without=[failed(2)])
    load.run((2, [1, 0, 0], 1), pca_rev="p")

    assert [(2, T0)] == remembered(load)


def test_nobody_waits_nothing_is_written(load: Load) -> None:
    """A load that leaves nobody out makes no ledger."""
    load.run((1, [1, 0, 0], 1))

    assert [] == [path for path in load.folder.glob("cache/*") if path.suffix == ".parquet"]


@pytest.mark.parametrize("ledger", ["a folder", "no Parquet", "other columns"])
def test_a_ledger_in_disorder_costs_no_receipt(
    load: Load, ledger: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The rows are in the table, so the receipt is written whatever becomes of the ledger."""
    load.run(without=[failed(2)])
    (path,) = (load.folder / "cache").glob("waiting-*.parquet")
    path.unlink()
    if ledger == "a folder":
        path.mkdir()
    elif ledger == "no Parquet":
        path.write_bytes(b"PAR1 and no more")
    else:
        pq.write_table(pa.table({"listing_id": [1]}), path)
    receipt = load.run((1, [1, 0, 0], 1), without=[failed(5)])

    assert (1, 0, 0, 1) == (*counts(receipt), receipt["waiting"])
    assert ("cannot be written" in caplog.text) == (ledger == "a folder")
    if ledger != "a folder":
        assert [(5, T0)] == remembered(load)
