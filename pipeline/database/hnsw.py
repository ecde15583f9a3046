"""The HNSW index on the vectors of one key: what it is, its making, its removal.

It is partial, on the key, so that its neighbours are the query's; of unit vectors the inner product
is the cosine. Its name follows from the key: whoever searches finds it, and so does the next build.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from adbc_driver_manager.dbapi import Cursor

from pipeline.database.catalog import columns
from pipeline.database.connection import fetch, quoted, translated_errors
from pipeline.stage.errors import DatabaseError
from pipeline.stage.settings import Environment, Identity

SOUND_PGVECTOR = (0, 8, 4)
MOST_DIMENSIONS = {False: 2000, True: 4000}  # of an index on vectors, and on halves of them

# A load that adds more than this share of what an index has takes longer than a build anew:
# measured, see 'An index' in docs/operating.md. Below so many rows neither takes long.
REBUILT_SOONER, FEW = 0.15, 5000

# Bytes of a vector in the graph while it is built in memory, beside its numbers: what pgvector
# keeps of it, and 16 bytes for each of its 2 m neighbours and a few more on higher layers.
_ELEMENT, _NEIGHBOUR = 200, 16


@dataclass(frozen=True)
class Definition:
    """What a caller chooses of an index."""

    m: int = 16  # neighbours of a vector on each layer but the lowest, which has twice as many
    ef_construction: int = 64  # candidates looked at for them
    halfvec: bool = False  # 16-bit floats: half the size

    def graph_bytes(self, rows: int, dimension: int) -> int:
        """About how much memory the whole graph takes while it is built."""
        numbers = dimension * (2 if self.halfvec else 4)
        return rows * (numbers + _ELEMENT + int(2.1 * self.m) * _NEIGHBOUR)


@dataclass(frozen=True)
class Index:
    """An index that is there."""

    name: str
    definition: Definition
    valid: bool  # False: its build was cut off; it costs each insert and helps nobody
    bytes: int


@dataclass(frozen=True)
class Progress:
    """How far a build is, as the server says."""

    phase: str
    rows: int


@dataclass(frozen=True)
class Server:
    """What the server says of itself; sizes in bytes."""

    local: bool  # reached through a socket of this machine
    shared_buffers: int
    maintenance_work_mem: int
    workers: int


def name_of(environment: Environment, identity: Identity) -> str:
    """Of the key's index: at most 59 characters, which leaves room for `_new`."""
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:12]
    return f"{environment.vectors[1][:41]}_hnsw_{digest}"


def new_name_of(environment: Environment, identity: Identity) -> str:
    """Of one that is to take its place."""
    return f"{name_of(environment, identity)}_new"


def find(cursor: Cursor, environment: Environment, name: str) -> Index | None:
    """The index of that name on the target."""
    found = fetch(
        cursor,
        "SELECT coalesce(array_to_string(c.reloptions, ' '), ''), o.opcname::text, i.indisvalid,"
        " pg_relation_size(c.oid) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
        " JOIN pg_opclass o ON o.oid = i.indclass[0]"
        " WHERE i.indrelid = to_regclass($1) AND c.relname = $2",
        (quoted(environment.vectors), name),
    )
    if not found:
        return None
    options, opclass, valid, size = found[0]
    chosen = {k: int(v) for k, v in (option.split("=") for option in options.split())}
    return Index(name, Definition(**chosen, halfvec=opclass.startswith("halfvec")), valid, size)


def of_key(cursor: Cursor, environment: Environment, identity: Identity) -> Index | None:
    """The key's index, if there is one that queries may use."""
    there = find(cursor, environment, name_of(environment, identity))
    return there if there and there.valid else None


def met_by_a_load(
    cursor: Cursor, environment: Environment, identity: Identity
) -> tuple[str, int] | None:
    """The largest HNSW index that new rows of this key go into, and about how many rows it has.

    The key's own, or one without a condition, ours or not. It costs one look into the catalog.
    """
    found = fetch(
        cursor,
        "SELECT c.relname::text, greatest(c.reltuples, 0)::bigint FROM pg_index i"
        " JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am a ON a.oid = c.relam"
        " WHERE i.indrelid = to_regclass($1) AND a.amname = 'hnsw' AND i.indisready"
        " AND (i.indpred IS NULL OR c.relname = $2) ORDER BY c.reltuples DESC LIMIT 1",
        (quoted(environment.vectors), name_of(environment, identity)),
    )
    return (quoted((environment.vectors[0], found[0][0])), found[0][1]) if found else None


def is_rebuilt_sooner(rows: int, indexed: int) -> bool:
    """Whether so many new rows take longer in an index of `indexed` than to build it anew."""
    return rows > max(FEW, REBUILT_SOONER * indexed)


def faulty(cursor: Cursor) -> str | None:
    """What is wrong with this pgvector's indexes, and what mends it; None: nothing known."""
    version = fetch(cursor, "SELECT extversion FROM pg_extension WHERE extname = 'vector'")[0][0]
    if tuple(int(part) for part in version.split(".") if part.isdigit()) >= SOUND_PGVECTOR:
        return None
    sound = ".".join(map(str, SOUND_PGVECTOR))
    return (
        f"{version}, whose indexes have faults that {sound} mends; hint: update the package on the"
        " server, then ALTER EXTENSION vector UPDATE"
    )


def refuse_faulty(cursor: Cursor) -> None:
    """DatabaseError for a pgvector whose indexes are known to lose or damage rows."""
    if fault := faulty(cursor):
        found, hint = fault.split("; hint: ")
        raise DatabaseError("a pgvector with sound indexes", found, "", hint)


def refuse_without_right(cursor: Cursor, table: tuple[str, str]) -> None:
    """DatabaseError that names the owner if this role may not make an index on the table."""
    may, role, owner = fetch(
        cursor,
        "SELECT pg_has_role(relowner, 'USAGE') AND has_schema_privilege(relnamespace, 'CREATE'),"
        " current_user::text, pg_get_userbyid(relowner)::text"
        " FROM pg_class WHERE oid = to_regclass($1)",
        (quoted(table),),
    )[0]
    if not may:
        raise DatabaseError(
            "a role that may make an index", role, quoted(table), f"run it as the owner, {owner}"
        )


def refuse_while_building(cursor: Cursor, environment: Environment) -> None:
    """DatabaseError while another session builds an index on the table: it is left alone.

    What runs there under another role cannot be seen; its lock can.
    """
    where = quoted(environment.vectors)
    running = fetch(
        cursor,
        "SELECT pid, phase FROM pg_stat_progress_create_index WHERE relid = to_regclass($1)",
        (where,),
    )
    if running:
        pid, phase = running[0]
        raise DatabaseError(
            "a table on which no index is being built", f"session {pid}, {phase}", where,
            "wait until it has ended, then run it again",
        )  # fmt: skip
    run(cursor, "BEGIN")
    try:
        run(cursor, f"LOCK TABLE {where} IN SHARE UPDATE EXCLUSIVE MODE")
    finally:
        run(cursor, "ROLLBACK")


def is_typed(cursor: Cursor, environment: Environment) -> bool:
    """Whether the table's column has a dimension, so that all keys have the same."""
    return "(" in columns(cursor, environment.vectors)["vec"]


def dimension_of(cursor: Cursor, environment: Environment, identity: Identity) -> int:
    """Of the vectors of a key that has any."""
    if is_typed(cursor, environment):
        return int(columns(cursor, environment.vectors)["vec"].split("(")[1].rstrip(")"))
    found = fetch(
        cursor,
        f"SELECT vector_dims(vec) FROM {quoted(environment.vectors)}"
        " WHERE source = $1 AND model_rev = $2 AND pca_rev = $3 LIMIT 1",
        identity,
    )
    return int(found[0][0])


def server(cursor: Cursor) -> Server:
    """What is known of the machine at the other end."""
    found = fetch(
        cursor,
        "SELECT inet_server_addr() IS NULL, pg_size_bytes(current_setting('shared_buffers')),"
        " pg_size_bytes(current_setting('maintenance_work_mem')),"
        " current_setting('max_parallel_maintenance_workers')::int",
    )
    return Server(*found[0])


def build(
    cursor: Cursor, environment: Environment, identity: Identity, name: str, wanted: Definition
) -> None:
    """CREATE INDEX CONCURRENTLY and its comment; what cuts it off leaves one that is not valid."""
    column, dimension = "vec vector_ip_ops", dimension_of(cursor, environment, identity)
    if wanted.halfvec:
        # Over ::vector, as the view and the function declare it: only so their queries match.
        column = f"(vec::vector::halfvec({dimension:d})) halfvec_ip_ops"
    elif not is_typed(cursor, environment):
        column = f"(vec::vector({dimension:d})) vector_ip_ops"
    source, model_rev, pca_rev, purpose = _literals(
        cursor, [*identity, f"python -m pipeline index: the neighbours of {identity}"]
    )
    run(
        cursor,
        f'CREATE INDEX CONCURRENTLY "{name}" ON {quoted(environment.vectors)} USING hnsw ({column})'
        f" WITH (m = {wanted.m:d}, ef_construction = {wanted.ef_construction:d})"
        f" WHERE source = {source} AND model_rev = {model_rev} AND pca_rev = {pca_rev}",
    )
    run(cursor, f"COMMENT ON INDEX {_quoted(environment, name)} IS {purpose}")


def drop(cursor: Cursor, environment: Environment, name: str) -> None:
    """DROP INDEX CONCURRENTLY: queries and loads go on."""
    run(cursor, f"DROP INDEX CONCURRENTLY {_quoted(environment, name)}")


def rename(cursor: Cursor, environment: Environment, old: str, new: str) -> None:
    """Give the index another name."""
    run(cursor, f'ALTER INDEX {_quoted(environment, old)} RENAME TO "{new}"')


def progress(cursor: Cursor, pid: int) -> Progress | None:
    """Of the build in that session; None before and after it."""
    found = fetch(
        cursor,
        "SELECT phase, tuples_done FROM pg_stat_progress_create_index WHERE pid = $1",
        (pid,),
    )
    return Progress(*found[0]) if found else None


def run(cursor: Cursor, statement: str) -> None:
    """Run a statement without a result."""
    with translated_errors():
        cursor.execute(statement)


def _quoted(environment: Environment, name: str) -> str:
    return quoted((environment.vectors[0], name))


def _literals(cursor: Cursor, texts: Iterable[str]) -> list[str]:
    """The texts as Postgres itself quotes them, since DDL takes no parameters."""
    return [fetch(cursor, "SELECT quote_literal($1::text)", (text,))[0][0] for text in texts]
