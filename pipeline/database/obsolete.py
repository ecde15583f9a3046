"""Vectors that stand for no listing any more: which they are, and their deletion in batches.

A condition is SQL about a row `v` of the target. It needs SELECT on the target and the listings,
and stands alone in a WHERE: there Postgres makes a join of it, which is four times as fast as
testing row by row, as it does in a FILTER or beside an OR.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from adbc_driver_manager.dbapi import Connection, Cursor

from pipeline.database.connection import (
    connect,
    fetch,
    quoted,
    set_lock_timeout,
    translated_errors,
)
from pipeline.database.key import KEY
from pipeline.stage.errors import DatabaseError
from pipeline.stage.settings import Environment

Row = dict[str, Any]  # a row of the target by its key, edited_date as text

_ROW_TYPES = "listing_id bigint, edited_date timestamptz, source text, model_rev text, pca_rev text"


def gone(environment: Environment) -> str:
    """The listing is deleted, or every row of it is marked as spam."""
    return (
        f"NOT EXISTS (SELECT FROM {quoted(environment.listings)} l"
        " WHERE l.listing_id = v.listing_id AND l.spam IS NULL)"
    )


def superseded(environment: Environment, keep: int = 1) -> str:
    """An earlier edit: its key has vectors of `keep` newer edits of the listing, at least.

    Not one that the listings still have, as a listing with several generations may: without its
    vector it would be pending, and made again by the next run.
    """
    offset = f" OFFSET {keep - 1:d}" if keep > 1 else ""  # even OFFSET 0 would rule out a join
    return (
        f"EXISTS (SELECT FROM {quoted(environment.vectors)} n WHERE n.listing_id = v.listing_id"
        " AND (n.source, n.model_rev, n.pca_rev) = (v.source, v.model_rev, v.pca_rev)"
        f" AND n.edited_date > v.edited_date{offset})"
        f" AND NOT EXISTS (SELECT FROM {quoted(environment.listings)} l"
        " WHERE l.listing_id = v.listing_id AND l.edited_date::timestamptz = v.edited_date"
        " AND l.spam IS NULL)"
    )


def keys_sql(environment: Environment, conditions: Iterable[str]) -> str:
    """The rows of the target that meet any of the conditions, by their key; dates as text."""
    names = ", ".join("edited_date::text" if n == "edited_date" else n for n in KEY)
    return " UNION ".join(
        f"SELECT {names} FROM {quoted(environment.vectors)} v WHERE {condition}"
        for condition in conditions
    )


def count(cursor: Cursor, environment: Environment, *conditions: str) -> int:
    """How many rows of the target meet any of the conditions."""
    sql = f"SELECT count(*) FROM ({keys_sql(environment, conditions)}) rows"
    return int(fetch(cursor, sql)[0][0])


def refuse_no_listings(cursor: Cursor, environment: Environment) -> None:
    """DatabaseError if every listing is gone: that is a wrong table, or one being filled."""
    where = quoted(environment.listings)
    if not fetch(cursor, f"SELECT EXISTS (SELECT FROM {where} WHERE spam IS NULL)")[0][0]:
        raise DatabaseError(
            "a listing without a spam mark", "none, so that every vector would be deleted", where,
            "LISTINGS_TABLE names the table; spam is NULL where a listing is none; --key deletes"
            " all vectors of a key",
        )  # fmt: skip


def refuse_without_right(cursor: Cursor, table: tuple[str, str]) -> None:
    """DatabaseError that names the owner if this role may not delete from the table."""
    may, role, owner = fetch(
        cursor,
        "SELECT has_table_privilege(oid, 'DELETE'), current_user::text,"
        " pg_get_userbyid(relowner)::text FROM pg_class WHERE oid = to_regclass($1)",
        (quoted(table),),
    )[0]
    if not may:
        raise DatabaseError(
            "a role that may delete", role, quoted(table), f"run it as the owner, {owner}"
        )


def rows(connection: Connection, sql: str) -> Iterator[Row]:
    """The rows of `keys_sql` as they arrive, never all of them."""
    with translated_errors(), connection.cursor() as cursor:
        cursor.execute(sql)
        for batch in cursor.fetch_record_batch():
            yield from batch.to_pylist()


def batches(of: Iterator[Row], size: int) -> Iterator[list[Row]]:
    """The rows in lists of at most `size`."""
    while batch := list(islice(of, size)):
        yield batch


def delete(environment: Environment, batch: list[Row], lock_timeout_s: int) -> int:
    """Delete these rows of the target in a transaction of their own; returns how many there were.

    DatabaseError: the right is missing, or a lock was not to be had.
    """
    with connect() as connection:
        with connection.cursor() as cursor:
            set_lock_timeout(cursor, lock_timeout_s)
            same = " AND ".join(f"v.{name} = d.{name}" for name in KEY)
            deleted = fetch(
                cursor,
                f"WITH deleted AS (DELETE FROM {quoted(environment.vectors)} v"
                f" USING jsonb_to_recordset($1::text::jsonb) AS d({_ROW_TYPES})"
                f" WHERE {same} RETURNING 1) SELECT count(*) FROM deleted",
                (json.dumps(batch),),
            )[0][0]
        with translated_errors():
            connection.commit()
    return int(deleted)
