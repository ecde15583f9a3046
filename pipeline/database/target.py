"""The pgvector table: its DDL, the check of its shape, and which of its rows a load replaces."""

from importlib import resources

from adbc_driver_manager.dbapi import Cursor

from pipeline.database import registry
from pipeline.database.catalog import columns, has_table, may_read, may_replace
from pipeline.database.connection import connect, fetch, quoted, run_script, translated_errors
from pipeline.database.key import KEY
from pipeline.stage.errors import DatabaseError, DatabaseUnreachable
from pipeline.stage.settings import Environment, Identity, identifier

MOST_DIMENSIONS = 16000  # of pgvector's type vector
WIDEST_IN_ROW = 1900  # dimensions; a row that is not cut up must fit a page of 8 kB
_TYPES = {
    "listing_id": "bigint",
    "edited_date": "timestamp with time zone",
    **dict.fromkeys(Identity._fields, "text"),
    "n_images": "integer",
    "updated_at": "timestamp with time zone",
}
_HINT = "python -m pipeline create-table makes one of the right shape (VECTORS_TABLE names it)"


def create_tables(environment: Environment, dimension: int | None, *, inputs: bool) -> None:
    """Create in the database of PG_DSN what is missing; what is there stays as it is.

    With None as the dimension, keys may have vectors of different ones.
    """
    with connect() as connection:
        with connection.cursor() as cursor:
            create(cursor, environment, dimension, inputs=inputs)
        with translated_errors():
            connection.commit()


def create(
    cursor: Cursor, environment: Environment, dimension: int | None, *, inputs: bool
) -> None:
    """Create the target, its registry and, where this role may read the listings, their view.

    With `inputs`, the three input tables too, for a trial. DatabaseError: a target is there, and
    has another shape.
    """
    _require_extension(cursor)
    _require_create(cursor, environment)
    there = has_table(cursor, environment.vectors)
    kind, stored = f"vector({dimension})" if dimension else "vector", storage(dimension or 0)
    names = _names(environment) | {"kind": kind, "storage": stored}
    for script, wanted in {"target.sql": not there, "inputs.sql": inputs}.items():
        if wanted:
            run_script(cursor, script, names)
    registry.create(cursor, environment)
    check(cursor, environment, dimension)
    if dimension is None:
        _require_any_dimension(cursor, environment)
    if may_read(cursor, environment.listings) and may_replace(cursor, environment.current):
        run_script(cursor, "current.sql", names)


def _require_extension(cursor: Cursor) -> None:
    """Pgvector is in this database, from now on if it was not; else DatabaseError says who can."""
    if fetch(cursor, "SELECT 1 FROM pg_extension WHERE extname = 'vector'"):
        return
    where, hint = "", "install the server's package, such as postgresql-17-pgvector"
    if fetch(cursor, "SELECT 1 FROM pg_available_extensions WHERE name = 'vector'"):
        where = "this role may not create it"
        hint = "as a superuser, in this database: CREATE EXTENSION vector; then create-table again"
        try:
            with translated_errors():
                cursor.execute("CREATE EXTENSION IF NOT EXISTS vector")
            return
        except DatabaseUnreachable:
            raise
        except DatabaseError:
            pass  # the server's words name neither database nor remedy
    raise DatabaseError("the pgvector extension", "none in this database", where, hint)


def _require_create(cursor: Cursor, environment: Environment) -> None:
    """This role may create tables in the target's schema, or the schema itself."""
    schema = environment.vectors[0]
    allowed = fetch(
        cursor,
        "SELECT coalesce((SELECT has_schema_privilege(oid, 'CREATE') FROM pg_namespace"
        " WHERE nspname = $1), has_database_privilege(current_database(), 'CREATE'))",
        (schema,),
    )
    if not allowed[0][0]:
        raise DatabaseError(
            f'a role that may create tables in schema "{schema}"',
            "one that may not",
            "",
            "run create-table once as the schema's owner, then grant with role-sql",
        )


def _require_any_dimension(cursor: Cursor, environment: Environment) -> None:
    """The column has no dimension; else DatabaseError has the statement that takes it away."""
    kind, where = columns(cursor, environment.vectors)["vec"], quoted(environment.vectors)
    if "(" in kind:
        raise DatabaseError(
            "column vec vector, of any dimension", kind, where,
            f"as the owner, in a moment: ALTER TABLE {where} ALTER vec TYPE vector,"
            f" ALTER vec SET STORAGE {storage(0)} (drop its HNSW indexes before)",
        )  # fmt: skip


def storage(dimension: int) -> str:
    """How Postgres is to store vectors: in their rows (PLAIN), or beside them if too long."""
    return "PLAIN" if dimension <= WIDEST_IN_ROW else "EXTERNAL"


def role_sql(environment: Environment, role: str) -> str:
    """The statements that make a role with the rights that the job needs, and no others."""
    text = resources.files("pipeline.database").joinpath("role.sql").read_text()
    return text.format(role=identifier("--role", role), **_names(environment))


def _names(environment: Environment) -> dict[str, str]:
    """What the SQL files call the tables, quoted."""
    names = {
        "schema": f'"{environment.vectors[0]}"',
        "vectors": quoted(environment.vectors),
        "registry": quoted(environment.registry),
        "current": quoted(environment.current),
        "as_of": quoted(environment.as_of),
        "features_index": f'"{environment.features[1][:59]}_key"',
    }
    for role in ("listings", "images", "features"):
        name: tuple[str, str] = getattr(environment, role)
        names |= {role: quoted(name), f"{role}_schema": f'"{name[0]}"'}
    schemas = [names[f"{role}_schema"] for role in ("listings", "images", "features")]
    return names | {"schemas": ", ".join(dict.fromkeys([*schemas, names["schema"]]))}


def check(cursor: Cursor, environment: Environment, dimension: int | None) -> None:
    """The target has the key, the columns and the vector dimension; else DatabaseError.

    `dimension` is that of the vectors to come; None where only the loaded model would say it. A
    column without one takes any.
    """
    where = quoted(environment.vectors)
    if not fetch(cursor, "SELECT 1 FROM pg_extension WHERE extname = 'vector'"):
        raise DatabaseError(
            "the pgvector extension", "none in this database", "", "CREATE EXTENSION vector"
        )
    found = columns(cursor, environment.vectors)
    if not found:
        raise DatabaseError(f"the target table {where}", "no such table", "", _HINT)
    for column, kind in _TYPES.items():
        if found.get(column) != kind:
            raise DatabaseError(
                f"column {column} {kind}", found.get(column, "no such column"), where, _HINT
            )
    _check_dimension(found.get("vec", "no such column"), dimension, where)
    _check_key(cursor, environment, where)


def _check_dimension(kind: str, dimension: int | None, where: str) -> None:
    plain = kind.split(".")[-1]  # the extension may live in a schema off the search path
    if plain == "vector":
        return
    if not plain.startswith("vector(") or (dimension and plain != f"vector({dimension})"):
        wanted = f"vector({dimension})" if dimension else "vector(N)"
        raise DatabaseError(
            f"column vec {wanted}, the dimension of the vectors",
            kind,
            where,
            "choose a model of that dimension, or another VECTORS_TABLE for this one; a table for"
            " several: create-table --dimension any",
        )


def _check_key(cursor: Cursor, environment: Environment, where: str) -> None:
    keys = fetch(
        cursor,
        "SELECT array_to_string(ARRAY(SELECT attname::text FROM pg_attribute a"
        "  WHERE a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey) ORDER BY attname), ' ')"
        " FROM pg_index i WHERE i.indrelid = to_regclass($1) AND i.indisunique"
        " AND i.indpred IS NULL AND i.indexprs IS NULL",
        (where,),
    )
    if (" ".join(sorted(KEY)),) not in keys:
        raise DatabaseError(
            f"a primary key ({', '.join(KEY)})",
            "; ".join(key[0] for key in keys) or "no unique key",
            where,
            _HINT,
        )
