"""The three inputs: which columns and types the job reads, and the view that mends another shape.

Only the catalog is asked, so this costs milliseconds, needs no rights, and names column and table
where the export's own query would say 'cannot cast type uuid to bigint'.
"""

from collections.abc import Mapping
from typing import NamedTuple

from adbc_driver_manager.dbapi import Cursor

from pipeline.database.catalog import base_types, namesakes
from pipeline.database.connection import fetch, quoted
from pipeline.stage.errors import DatabaseError
from pipeline.stage.settings import IDENTIFIER, Environment

PAGE = "docs/adopting.md"


class Kind(NamedTuple):
    """A column's type as the documentation has it, and what the queries cast without loss."""

    name: str
    types: frozenset[str] = frozenset()
    categories: str = ""  # letters of pg_type.typcategory

    def takes(self, found: tuple[str, str]) -> bool:
        """Whether a column of this (type, category) is read as it is meant."""
        return found[0] in self.types or found[1] in self.categories


# A numeric or float key may hold fractions that the cast rounds to one listing; a date makes one
# edit of all the edits of a day; a boolean spam is never NULL. Those are refused.
_WHOLE = frozenset({"smallint", "integer", "bigint"})
_TIMES = frozenset({"timestamp with time zone", "timestamp without time zone"})
_INT, _BIGINT = Kind("int", _WHOLE), Kind("bigint", _WHOLE)
_BOOL, _LEVEL = Kind("bool", categories="B"), Kind("smallint", categories="N")
_TEXT, _MARK = Kind("text", categories="S"), Kind("text", categories="SE")

COLUMNS: dict[str, dict[str, Kind]] = {
    "listings": {
        "generation": _INT, "listing_id": _BIGINT, "edited_date": Kind("timestamptz", _TIMES),
        "url": _TEXT, "spam": _MARK,
    },
    "images": {
        "generation": _INT, "listing_id": _BIGINT, "image_index": _INT, "storage_path": _TEXT,
    },
    "features": {
        "feature_version": _INT, "generation": _INT, "listing_id": _BIGINT, "image_index": _INT,
        "is_stock_photo": _BOOL, "battery_screenshot": _BOOL,
        "photo_quality_level": _LEVEL, "background_clean_level": _LEVEL,
    },
}  # fmt: skip

VARIABLES = {
    "listings": ("LISTINGS_SCHEMA", "LISTINGS_TABLE"),
    "images": ("ASSETS_SCHEMA", "ASSETS_TABLE"),
    "features": ("ML_SCHEMA", "IMAGE_FEATURES_TABLE"),
}

# What a view is to say instead, by column and category of the type that was found.
_MAPPED = "m.listing_id of a mapping table, see 'Keys that are no bigint'"
_EXPRESSIONS = {
    ("listing_id", "U"): _MAPPED,
    ("listing_id", "S"): _MAPPED,
    ("edited_date", "N"): "to_timestamp({column}) AS {column} (milliseconds: {column} / 1000.0)",
    ("spam", "B"): "CASE WHEN {column} THEN 'spam' END AS {column}",
    ("spam", "N"): "CASE WHEN {column} <> 0 THEN 'spam' END AS {column}",
    ("is_stock_photo", "N"): "{column} <> 0 AS {column}",
    ("battery_screenshot", "N"): "{column} <> 0 AS {column}",
}
_ABSENT = {
    "generation": "1 AS generation",
    "spam": "NULL::text AS spam",
    "url": "'' AS url",
    "feature_version": "1 AS feature_version",
    "is_stock_photo": "NULL::bool AS is_stock_photo",
    "battery_screenshot": "NULL::bool AS battery_screenshot",
    "photo_quality_level": "NULL::smallint AS photo_quality_level",
    "background_clean_level": "NULL::smallint AS background_clean_level",
}


def check_inputs(cursor: Cursor, environment: Environment) -> None:
    """The input tables or views are there, with columns and types that the job reads.

    DatabaseError names the table, its wrong columns and the view that would help. The features
    may be absent, unless IMAGE_FEATURES_TABLE names them.
    """
    for role, expected in COLUMNS.items():
        name: tuple[str, str] = getattr(environment, role)
        found = base_types(cursor, name)
        if found:
            _check_columns(role, name, expected, found)
        elif role != "features" or environment.features_named:
            raise DatabaseError(
                f"the {role} table {quoted(name)}",
                "no such table or view",
                "",
                _where_it_may_be(cursor, role, name),
            )


def _where_it_may_be(cursor: Cursor, role: str, name: tuple[str, str]) -> str:
    schema_variable, table_variable = VARIABLES[role]
    for schema, table in namesakes(cursor, name[1]):
        if IDENTIFIER.fullmatch(schema) and IDENTIFIER.fullmatch(table):
            return (
                f"there is {quoted((schema, table))}: export {schema_variable}={schema}"
                f" {table_variable}={table}"
            )
    if role == "features":
        return f"unset {table_variable} if there is none: then nothing is filtered or ranked"
    return (
        f"set {schema_variable} and {table_variable}, or python -m pipeline create-table --all"
        " for a trial"
    )


def _check_columns(
    role: str,
    name: tuple[str, str],
    expected: Mapping[str, Kind],
    found: Mapping[str, tuple[str, str]],
) -> None:
    missing = [column for column in expected if column not in found]
    if missing:
        raise DatabaseError(
            f"column {', '.join(missing)} in the {role} table",
            f"columns {', '.join(sorted(found)) or 'none'}",
            quoted(name),
            _view([_ABSENT.get(column, f"your_column AS {column}") for column in missing]),
        )
    wrong = [column for column, kind in expected.items() if not kind.takes(found[column])]
    if wrong:
        raise DatabaseError(
            f"column {', '.join(f'{c} {expected[c].name}' for c in wrong)} in the {role} table",
            ", ".join(f"{column} {found[column][0]}" for column in wrong),
            quoted(name),
            _view([_expression(column, expected[column], found[column][1]) for column in wrong]),
        )


def _expression(column: str, kind: Kind, category: str) -> str:
    wanted = _EXPRESSIONS.get((column, category), f"{{column}}::{kind.name} AS {{column}}")
    return wanted.format(column=column)


def _view(columns: list[str]) -> str:
    return f"a view with {', '.join(columns)} will do; {PAGE} has it in full"


class Tally(NamedTuple):
    """How many rows the listings have, and how many of them a column leaves out."""

    rows: int
    spam: int
    said_no: int  # rows whose spam is a text that means 'no'
    generation: int
    edited_date: int
    url: int


def tally(cursor: Cursor, environment: Environment) -> Tally:
    """Count what the columns of the listings leave out: one scan."""
    counts = fetch(
        cursor,
        f"""
        SELECT count(*), count(spam),
               count(*) FILTER (WHERE lower(btrim(spam::text)) IN
                   ('', '0', 'f', 'false', 'n', 'no', 'none', 'null', 'ham', 'ok')),
               count(*) - count(generation), count(*) - count(edited_date), count(*) - count(url)
        FROM {quoted(environment.listings)}""",
    )
    return Tally(*counts[0])


def usual_mark(cursor: Cursor, environment: Environment) -> str:
    """The most frequent text in the column spam, its first 40 characters."""
    found = fetch(
        cursor,
        f"SELECT left(spam::text, 40) FROM {quoted(environment.listings)} WHERE spam IS NOT NULL"
        " GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT 1",
    )
    return str(found[0][0])


def images_without_generation(
    cursor: Cursor, environment: Environment, rows: int
) -> tuple[int, int]:
    """(rows without a generation, rows looked at) among the first `rows` of the images."""
    found = fetch(
        cursor,
        "SELECT count(*) - count(generation), count(*) FROM"
        f" (SELECT generation FROM {quoted(environment.images)} LIMIT {int(rows)}) t",
    )
    return int(found[0][0]), int(found[0][1])
