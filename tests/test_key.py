"""The rows of a key: joins with them that Postgres plans well before it knows the table."""

import pytest
from conftest import Database

from pipeline.database.connection import connect, fetch
from pipeline.database.pending import prepare
from pipeline.stage.settings import Environment, Settings

LISTINGS = 2000
EXPLAIN = """
    CREATE FUNCTION pg_temp.explained(query text) RETURNS SETOF text LANGUAGE plpgsql AS $$
    BEGIN RETURN QUERY EXECUTE 'EXPLAIN ' || query; END $$"""


@pytest.mark.parametrize("query", ["listings", "digest", "standing", "rest"])
def test_no_row_is_compared_with_each(
    database: Database, monkeypatch: pytest.MonkeyPatch, query: str
) -> None:
    """Right after the first load, when the table was not analysed yet, who is done is hashed."""
    monkeypatch.setenv("PG_DSN", database.dsn)
    database.execute(
        "INSERT INTO \"iPhone\".iphone_listings SELECT 1, i, now() - i * interval '1 s',"
        f" 'https://example.com', NULL FROM generate_series(1, {LISTINGS}) i"
    )
    database.execute(
        "INSERT INTO \"iPhone\".iphone_image_assets SELECT 1, i, 0, i || '.jpg'"
        f" FROM generate_series(1, {LISTINGS}) i"
    )
    database.execute('ANALYZE "iPhone".iphone_listings')
    database.execute('ANALYZE "iPhone".iphone_image_assets')
    database.execute(
        "INSERT INTO ml.img_vec512_v1 SELECT listing_id, edited_date, 's', 'm', '',"
        ' array_fill(0.04::real, ARRAY[512])::vector, 1 FROM "iPhone".iphone_listings'
    )
    with connect() as connection, connection.cursor() as cursor:
        chosen = Settings(source="s", model_rev="m")
        pending = prepare(cursor, Environment.read({}), chosen)
        cursor.execute(EXPLAIN)
        sql = getattr(pending, query)
        plan = [row[0] for row in fetch(cursor, "SELECT pg_temp.explained($1)", (sql,))]

    assert 5 < len(plan)
    assert [] == [line for line in plan if "Nested Loop Anti Join" in line]
