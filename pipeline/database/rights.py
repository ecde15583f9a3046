"""What the role of PG_DSN may do, asked of the catalog before any work is done."""

from collections.abc import Iterator

from adbc_driver_manager.dbapi import Cursor

from pipeline.database.catalog import RELATION, has_table
from pipeline.database.connection import fetch, quoted
from pipeline.database.inputs import COLUMNS
from pipeline.database.key import KEY
from pipeline.stage.errors import DatabaseError
from pipeline.stage.settings import Environment

_WRITTEN = (*KEY, "vec", "n_images")


def check_reading(cursor: Cursor, environment: Environment) -> None:
    """The role may read the inputs and the target, as far as they are there; else DatabaseError."""
    _refuse(cursor, list(_reading(cursor, environment)))


def check_writing(cursor: Cursor, environment: Environment) -> None:
    """The role may stage and merge: TEMPORARY, and INSERT and UPDATE on target and registry.

    A registry that is not there is no fault; DatabaseError names all that is missing.
    """
    missing = list(_writing(cursor, environment))
    if not _asked(cursor, "has_database_privilege(current_database(), 'TEMPORARY')"):
        database = fetch(cursor, "SELECT quote_ident(current_database())")[0][0]
        missing.append(f"TEMPORARY ON DATABASE {database}")
    _refuse(cursor, missing)


def _reading(cursor: Cursor, environment: Environment) -> Iterator[str]:
    tables = {role: tuple(columns) for role, columns in COLUMNS.items()} | {"vectors": _WRITTEN}
    schemas = set()
    for role, columns in tables.items():
        name: tuple[str, str] = getattr(environment, role)
        if not has_table(cursor, name):
            continue
        schema = name[0]
        if schema not in schemas and not _asked(
            cursor, "has_schema_privilege($1, 'USAGE')", (schema,)
        ):
            yield f'USAGE ON SCHEMA "{schema}"'
        schemas.add(schema)
        yield from _on_table(cursor, name, ("SELECT",), columns)


def _writing(cursor: Cursor, environment: Environment) -> Iterator[str]:
    yield from _on_table(cursor, environment.vectors, ("INSERT", "UPDATE"), ("vec", "n_images"))
    privileges = ("SELECT", "INSERT", "UPDATE")
    yield from _on_table(cursor, environment.registry, privileges, ("encoder",))


def _on_table(
    cursor: Cursor, name: tuple[str, str], privileges: tuple[str, ...], columns: tuple[str, ...]
) -> Iterator[str]:
    """What lacks for these columns of a table; nothing where there is no such table.

    Asked column by column, since a right may be granted on the columns alone.
    """
    lacking = [
        privilege
        for privilege in privileges
        if not _asked(
            cursor,
            "coalesce(bool_and(has_column_privilege(a.attrelid, a.attnum, $3)), true)"
            f" FROM pg_attribute a WHERE a.attrelid = ({RELATION})"
            " AND a.attname = ANY (string_to_array($4, ' '))",
            (*name, privilege, " ".join(columns)),
        )
    ]
    if lacking:
        yield f"{', '.join(lacking)} ON {quoted(name)}"


def _asked(cursor: Cursor, expression: str, parameters: tuple[str, ...] = ()) -> bool:
    return bool(fetch(cursor, f"SELECT {expression}", parameters or None)[0][0])


def _refuse(cursor: Cursor, missing: list[str]) -> None:
    if not missing:
        return
    role = fetch(cursor, "SELECT quote_ident(current_user)")[0][0]
    grants = "; ".join(f"GRANT {right} TO {role}" for right in missing)
    raise DatabaseError(
        f"a role that has {' and '.join(missing)}",
        f"{role}, which has not",
        "",
        f"as the owner: {grants}; python -m pipeline role-sql prints all that the job needs",
    )
