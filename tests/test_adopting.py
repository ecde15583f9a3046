"""docs/adopting.md: its blocks make a foreign marketplace ready, as they stand on the page."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, Database, Workspace, new_workspace

from demo import postgres
from pipeline.database import connection as connections
from pipeline.database.catalog import base_types
from pipeline.database.inputs import _MAPPED, COLUMNS, PAGE
from pipeline.database.pending import prepare
from pipeline.stage.settings import Environment, Settings

TEXT = (REPOSITORY / PAGE).read_text()
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.M | re.S)
ONE = "11111111-1111-4111-8111-111111111111"  # whose vectors the page deletes
TWO, SPAM = "22222222-2222-4222-8222-222222222222", "33333333-3333-4333-8333-333333333333"
MARKET = f"""
    INSERT INTO shop.items VALUES
        ('{ONE}', 'https://shop.example/1', false, 1767268800000),
        ('{TWO}', 'https://shop.example/2', false, 1767268800001),
        ('{SPAM}', 'https://shop.example/3', true, 1767268800000);
    INSERT INTO shop.photos VALUES
        ('{ONE}', 0, '/1/a.jpg', '2025-12-01'),
        ('{ONE}', 1, 'https://cdn.example.com/1/b.jpg', '2025-12-01'),
        ('{TWO}', 0, 's3://bucket/2/stock.jpg', '2025-12-01'),
        ('{TWO}', 1, '2/own.jpg', '2025-12-01'),
        ('{SPAM}', 0, '/3/a.jpg', '2025-12-01');
    INSERT INTO shop.photo_checks VALUES ('{TWO}', 0, 1, 'good'), ('{TWO}', 1, 0, NULL)"""


@pytest.fixture
def shop(
    tmp_path: Path, empty_database: Database, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> Workspace:
    """A folder with photos and a short config.yaml, a database with nothing but pgvector."""
    space = new_workspace(tmp_path / "work", empty_database, encoder)
    (space.folder / "config.yaml").write_text(f"model_name: local-dir:{encoder}\nshards: 1\n")
    for name in ("1/a.jpg", "1/b.jpg", "2/stock.jpg", "2/own.jpg", "3/a.jpg"):
        space.photo(name)
    space.env["PATH"] = f"{Path(sys.executable).parent}:{space.env['PATH']}"
    monkeypatch.setenv("PG_DSN", empty_database.dsn)
    return space


def psql(database: Database, block: str) -> list[str]:
    """Run a block as it stands, as a reader would; returns the lines of its rows."""
    done = subprocess.run(
        [str(postgres.binary("psql")), database.dsn, "-v", "ON_ERROR_STOP=1", "-qAtX"],
        input=block, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert 0 == done.returncode, done.stdout
    return done.stdout.splitlines()


def pending(environment: Environment) -> list[int]:
    """The listing_ids that the next run would embed, under the key of the last one."""
    with connections.connect(read_only=True) as connection, connection.cursor() as cursor:
        key = connections.fetch(
            cursor,
            "SELECT DISTINCT source, model_rev FROM listing_vectors.vectors",
        )
        chosen = Settings(source=key[0][0], model_rev=key[0][1])
        queries = prepare(cursor, environment, chosen)
        return [row[1] for row in connections.fetch(cursor, queries.listings)]


@pytest.mark.timeout(120)
def test_the_page_leads_from_foreign_tables_to_vectors(shop: Workspace) -> None:
    """All blocks in order: then check finds no fault, the run embeds, and a later photo counts.

    Spam stays out, a stock photo is left out, and paths of all three kinds are found.
    """
    example, *before, command, back, later, delete = (block for _, block in BLOCKS)
    database = shop.database
    psql(database, example)
    psql(database, MARKET)
    for block in before:
        psql(database, block)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=shop.folder, env=shop.env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    environment = Environment.read(dict(re.findall(r"(\w+)=(\w+)", command)))
    after_run = pending(environment)
    found = sorted(row.partition("|")[0] for row in psql(database, back))
    images = psql(database, "SELECT listing_id, n_images FROM listing_vectors.vectors ORDER BY 1")
    psql(database, f"UPDATE shop.photos SET updated_at = now() WHERE item_id = '{TWO}'")
    replaced = pending(environment)
    psql(database, later)
    seen = pending(environment)
    psql(database, delete)

    assert ["sql"] * 6 + ["sh"] + ["sql"] * 3 == [kind for kind, _ in BLOCKS]
    assert 0 == done.returncode, done.stdout
    assert [] == re.findall("^(?:warn|error).*", done.stdout, re.M)
    assert "ok  listings: 3 rows, 2 pending" in done.stdout
    assert "ok  photos: 3 of 3 that were looked for are there" in done.stdout
    assert [ONE, TWO] == found
    assert [f"{number(database, ONE)}|2", f"{number(database, TWO)}|1"] == images
    assert ([], []) == (after_run, replaced)
    assert [number(database, TWO)] == seen
    assert [number(database, TWO), number(database, ONE)] == pending(environment)


def number(database: Database, item: str) -> int:
    """The listing_id of an item."""
    (row,) = psql(
        database, f"SELECT listing_id FROM listing_vectors.listing_ids WHERE item_id = '{item}'"
    )
    return int(row)


def test_a_number_is_never_given_twice(shop: Workspace) -> None:
    """The trigger numbers new items; a deleted item's number stays taken."""
    example, mapping, fill = (block for _, block in BLOCKS[:3])
    add = "INSERT INTO shop.items VALUES ('{}', '', false, 0)"
    for block in (example, mapping, add.format(ONE), "DELETE FROM shop.items", add.format(TWO)):
        psql(shop.database, block)
    psql(shop.database, fill)

    assert [f"1|{ONE}", f"2|{TWO}"] == psql(
        shop.database, "SELECT * FROM listing_vectors.listing_ids ORDER BY 1"
    )


EXPRESSIONS: list[tuple[str, str, str]] = re.findall(
    r"^\| `(\w+) (\w+)`[^|]* \| `(.*)` \|$", TEXT, re.M
)


def test_the_table_of_expressions_is_true(
    empty_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each expression, in a view over a column of that type, makes the type that the job reads."""
    monkeypatch.setenv("PG_DSN", empty_database.dsn)
    kinds = {column: kind for columns in COLUMNS.values() for column, kind in columns.items()}
    for n, (column, kind, expression) in enumerate(EXPRESSIONS):
        empty_database.execute(f"CREATE TABLE have_{n} ({column} {kind})")
        empty_database.execute(f"CREATE VIEW want_{n} AS SELECT {expression} FROM have_{n}")
    with connections.connect(read_only=True) as connection, connection.cursor() as cursor:
        made = [base_types(cursor, ("public", f"want_{n}")) for n in range(len(EXPRESSIONS))]

    assert 16 == len(EXPRESSIONS)
    assert [column for column, _, _ in EXPRESSIONS] == [
        name for columns in made for name in columns
    ]
    assert [] == [
        columns
        for columns in made
        for name, found in columns.items()
        if not kinds[name].takes(found)
    ]


def test_the_page_has_what_the_errors_refer_to() -> None:
    """The heading that an error names, and the columns of the inputs, are on the page."""
    heading = re.findall("'(.*)'", _MAPPED)[0]
    said = re.findall(r"^\| (\w+)(?: \(optional\))? \| `(generation|feature_version)(.*)` \|$",
                      TEXT, re.M)  # fmt: skip

    assert f"\n## {heading}\n" in TEXT
    assert {
        role: [f"{column} {kind.name}" for column, kind in columns.items()]
        for role, columns in COLUMNS.items()
    } == {role: f"{first}{rest}".split(", ") for role, first, rest in said}
