"""The vectors of the listings as they are now, and as they were: the view and the function."""

from collections.abc import Callable

import adbc_driver_postgresql.dbapi as adbc
import pytest
from conftest import Database

from pipeline.database import target
from pipeline.stage.settings import Environment

DAYS = [f"2026-01-0{day} 12:00:00+00" for day in range(1, 10)]
VIEW, AS_OF = "ml.img_vec512_v1_current", "ml.img_vec512_v1_as_of"


def vector(database: Database, listing: int, day: int, source: str = "s") -> None:
    database.execute(
        "INSERT INTO ml.img_vec512_v1 SELECT $1, $2::text::timestamptz, $3, 'm', '',"
        " array_fill(1, ARRAY[512])::vector, 1",
        listing, DAYS[day], source,
    )  # fmt: skip


def found(database: Database, relation: str) -> list[tuple[int, int, str]]:
    """(listing_id, day of edited_date, source) of what it holds."""
    return database.execute(
        "SELECT listing_id, extract(day FROM edited_date)::int - 1, source"
        f" FROM {relation} v ORDER BY 1, 2, 3"
    )


@pytest.fixture
def market(database: Database) -> Database:
    """Listing 1 with three edits under two keys, listing 2 with one."""
    database.add_listing(1, edited_date=DAYS[5])
    database.add_listing(2, edited_date=DAYS[1])
    for day in (1, 3, 5):
        vector(database, 1, day)
    vector(database, 1, 3, source="other")
    vector(database, 2, 1)
    return database


def test_of_each_listing_and_key_the_newest_edit_is_current(market: Database) -> None:
    """Not the newest of all keys: another encoder may not have seen it yet."""
    assert [(1, 3, "other"), (1, 5, "s"), (2, 1, "s")] == found(market, VIEW)


@pytest.mark.parametrize("statement", ["DELETE FROM {}", "UPDATE {} SET spam = 'scam'"])
def test_a_listing_that_is_gone_is_not_current(market: Database, statement: str) -> None:
    """From that moment on, without any run."""
    market.execute(statement.format('"iPhone".iphone_listings') + " WHERE listing_id = 1")

    assert [(2, 1, "s")] == found(market, VIEW)


def test_a_listing_of_several_generations_is_gone_with_the_last(market: Database) -> None:
    """One that is no spam keeps it, as retire has it."""
    market.add_listing(1, generation=2, spam="scam")

    assert 2 == len([row for row in found(market, VIEW) if row[0] == 1])


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        ("2026-01-02 11:59:59.999999+00", []),
        (DAYS[1], [(1, 1, "s"), (2, 1, "s")]),
        (DAYS[4], [(1, 3, "other"), (1, 3, "s"), (2, 1, "s")]),
        ("infinity", [(1, 3, "other"), (1, 5, "s"), (2, 1, "s")]),
    ],
)
def test_as_of_tells_what_was_true_then(
    market: Database, moment: str, expected: list[tuple[int, int, str]]
) -> None:
    """The newest edit at or before the moment; what became of the listing since is no matter."""
    market.execute('DELETE FROM "iPhone".iphone_listings')

    assert expected == found(market, f"{AS_OF}('{moment}')")


@pytest.mark.parametrize("relation", [VIEW, f"{AS_OF}(now())"])
def test_a_filter_and_an_order_reach_the_table(market: Database, relation: str) -> None:
    """The key is tested before anything is joined, and an index on the vectors gives the order."""
    market.execute("CREATE INDEX ON ml.img_vec512_v1 USING hnsw (vec vector_ip_ops)")
    plan = explained(
        market,
        f"SELECT listing_id FROM {relation} v WHERE source = 's' AND model_rev = 'm'"
        " AND pca_rev = '' ORDER BY vec <#> array_fill(1, ARRAY[512])::vector LIMIT 3",
    )

    assert "Subquery Scan" not in plan and "Function Scan" not in plan, plan
    assert "vec_idx on img_vec512_v1 v" in plan, plan


def explained(database: Database, query: str) -> str:
    """Its plan where sorting is out of the question, as it is on a large table."""
    with adbc.connect(database.dsn) as connection, connection.cursor() as cursor:
        cursor.execute("SET enable_sort = off")
        cursor.adbc_statement.set_options(**{"adbc.postgresql.use_copy": "false"})
        cursor.execute(f"EXPLAIN (COSTS OFF) {query}")
        return "\n".join(line for (line,) in cursor.fetchall())


def missing(database: Database) -> None:
    database.execute(f"DROP VIEW {VIEW}")
    database.execute(f"DROP FUNCTION {VIEW}")
    database.execute(f"DROP FUNCTION {AS_OF}")


def older(database: Database) -> None:
    database.execute(
        f"CREATE OR REPLACE FUNCTION {VIEW}() RETURNS TABLE (listing_id bigint, edited_date"
        " timestamptz, source text, model_rev text, pca_rev text, vec vector, n_images int,"
        " updated_at timestamptz) LANGUAGE sql AS 'SELECT * FROM ml.img_vec512_v1'"
    )


@pytest.mark.parametrize("before", [missing, older])
def test_create_table_adds_them_to_a_table_that_is_there(
    market: Database, before: Callable[[Database], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was made by an earlier version has them from then on."""
    monkeypatch.setenv("PG_DSN", market.dsn)
    before(market)
    target.create_tables(Environment.read({}), 512, inputs=False)

    assert [(1, 3, "other"), (1, 5, "s"), (2, 1, "s")] == found(market, VIEW)
    assert 2 == len(found(market, f"{AS_OF}('{DAYS[1]}')"))


@pytest.mark.parametrize(
    "statement",
    [
        'ALTER TABLE "iPhone".iphone_listings ALTER listing_id TYPE int',
        'DROP TABLE "iPhone".iphone_listings',
        "ALTER TABLE ml.img_vec512_v1 ALTER vec TYPE vector(3)",
        "DROP TABLE ml.img_vec512_v1",
    ],
)
def test_they_forbid_nothing_to_the_tables_owner(database: Database, statement: str) -> None:
    """A migration of the marketplace needs not know of them, as it would of a plain view."""
    database.execute(statement)
