"""Which tables there are, and their columns: asked of the catalog, which needs no rights."""

from adbc_driver_manager.dbapi import Cursor

from pipeline.database.connection import fetch

# A relation by schema and name. to_regclass would refuse a role without USAGE on the schema.
RELATION = """
    SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'v', 'm', 'f', 'p')"""


def has_table(cursor: Cursor, name: tuple[str, str]) -> bool:
    """Whether a table or view of that name exists."""
    return bool(fetch(cursor, RELATION, name))


def may_replace(cursor: Cursor, name: tuple[str, str]) -> bool:
    """Whether there is no table or view of that name, or this role owns it."""
    owner = f"SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = ({RELATION})"
    return all(may for (may,) in fetch(cursor, owner, name))


def may_read(cursor: Cursor, name: tuple[str, str]) -> bool:
    """Whether there is a table or view of that name, and this role may SELECT from it."""
    right = (
        "SELECT has_schema_privilege(relnamespace, 'USAGE') AND has_table_privilege(oid, 'SELECT')"
        f" FROM pg_class WHERE oid = ({RELATION})"
    )
    return [(True,)] == fetch(cursor, right, name)


def columns(cursor: Cursor, name: tuple[str, str]) -> dict[str, str]:
    """Column name to formatted type, of a table or view."""
    rows = fetch(
        cursor,
        "SELECT attname::text, format_type(atttypid, atttypmod) FROM pg_attribute"
        f" WHERE attrelid = ({RELATION}) AND attnum > 0 AND NOT attisdropped",
        name,
    )
    return dict(rows)


def base_types(cursor: Cursor, name: tuple[str, str]) -> dict[str, tuple[str, str]]:
    """Column name to (type, category) of a table or view; a domain is the type beneath it.

    The type is without its length; the category is pg_type's letter, such as S for texts.
    """
    rows = fetch(
        cursor,
        f"""
        WITH RECURSIVE type_of AS (
            SELECT a.attname::text AS name, t.oid, t.typtype, t.typbasetype, t.typcategory
            FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
            WHERE a.attrelid = ({RELATION}) AND a.attnum > 0 AND NOT a.attisdropped
            UNION ALL
            SELECT d.name, t.oid, t.typtype, t.typbasetype, t.typcategory
            FROM type_of d JOIN pg_type t ON t.oid = d.typbasetype WHERE d.typtype = 'd')
        SELECT name, format_type(oid, NULL), typcategory::text FROM type_of WHERE typtype <> 'd'""",
        name,
    )
    return {column: (kind, category) for column, kind, category in rows}


def namesakes(cursor: Cursor, table: str) -> list[tuple[str, str]]:
    """(schema, name) of three tables or views at most with that name, in any case."""
    rows = fetch(
        cursor,
        "SELECT n.nspname::text, c.relname::text"
        " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE lower(c.relname) = lower($1) AND c.relkind IN ('r', 'v', 'm', 'f', 'p')"
        " AND n.nspname !~ '^(pg_|information_schema)' ORDER BY 1, 2 LIMIT 3",
        (table,),
    )
    return [(schema, name) for schema, name in rows]
