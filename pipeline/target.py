"""The pgvector table: its DDL, the check of its shape, the merge, and the encoder registry."""

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

from adbc_driver_manager.dbapi import Cursor

from pipeline import database, source
from pipeline.errors import DatabaseError, MixedModels
from pipeline.settings import Environment, identifier

MOST_DIMENSIONS = 16000  # of pgvector's type vector
WIDEST_IN_ROW = 1900  # dimensions; a row that is not cut up must fit a page of 8 kB
KEY = ("listing_id", "edited_date", "source", "model_rev", "pca_rev")
_TYPES = {
    "listing_id": "bigint",
    "edited_date": "timestamp with time zone",
    "source": "text",
    "model_rev": "text",
    "pca_rev": "text",
    "n_images": "integer",
    "updated_at": "timestamp with time zone",
}
_HINT = "python -m pipeline create-table makes one of the right shape (VECTORS_TABLE names it)"


@dataclass(frozen=True)
class Identity:
    """What, beside the listing and its edit, is the key of a vector."""

    source: str
    model_rev: str
    pca_rev: str


def create_tables(environment: Environment, dimension: int, *, inputs: bool) -> None:
    """Create in the database of PG_DSN what is missing; what is there stays as it is."""
    with database.connect() as connection:
        with connection.cursor() as cursor:
            create(cursor, environment, dimension, inputs=inputs)
        with database.translated_errors():
            connection.commit()


def create(cursor: Cursor, environment: Environment, dimension: int, *, inputs: bool) -> None:
    """Create the target and its registry, and with `inputs` the three input tables for a trial.

    DatabaseError: a target is there, and has another shape.
    """
    with database.translated_errors():
        cursor.execute("CREATE EXTENSION IF NOT EXISTS vector")
    there = source.has_table(cursor, environment.vectors)
    names = _names(environment) | {"dimension": str(dimension), "storage": storage(dimension)}
    scripts = {"target.sql": not there, "registry.sql": True, "inputs.sql": inputs}
    for script in (name for name, wanted in scripts.items() if wanted):
        _run_script(cursor, script, names)
    check(cursor, environment, dimension)


def storage(dimension: int) -> str:
    """How Postgres is to store vectors: in their rows (PLAIN), or beside them if too long."""
    return "PLAIN" if dimension <= WIDEST_IN_ROW else "EXTERNAL"


def role_sql(environment: Environment, role: str) -> str:
    """The statements that make a role with the rights that the job needs, and no others."""
    text = resources.files("pipeline").joinpath("role.sql").read_text()
    return text.format(role=identifier("--role", role), **_names(environment))


def _names(environment: Environment) -> dict[str, str]:
    """What the SQL files call the tables, quoted."""
    names = {
        "schema": f'"{environment.vectors[0]}"',
        "vectors": database.quoted(environment.vectors),
        "registry": registry_name(environment),
        "features_index": f'"{environment.features[1][:59]}_key"',
    }
    for role in ("listings", "images", "features"):
        name: tuple[str, str] = getattr(environment, role)
        names |= {role: database.quoted(name), f"{role}_schema": f'"{name[0]}"'}
    schemas = [names[f"{role}_schema"] for role in ("listings", "images", "features")]
    return names | {"schemas": ", ".join(dict.fromkeys([*schemas, names["schema"]]))}


def _run_script(cursor: Cursor, script: str, names: dict[str, str]) -> None:
    text = resources.files("pipeline").joinpath(script).read_text()
    for statement in text.format(**names).split(";\n"):
        if statement.strip():
            with database.translated_errors(script):
                cursor.execute(statement)


def registry_name(environment: Environment) -> str:
    """The quoted name of the encoder registry: `<vectors table>_encoders` in the same schema."""
    schema, table = environment.vectors
    return database.quoted((schema, f"{table[:54]}_encoders"))


def check(cursor: Cursor, environment: Environment, dimension: int | None) -> None:
    """The target has the key, the columns and the vector dimension; else DatabaseError.

    `dimension` is the model's; None where it is not known before the model is loaded.
    """
    where = database.quoted(environment.vectors)
    if not database.fetch(cursor, "SELECT 1 FROM pg_extension WHERE extname = 'vector'"):
        raise DatabaseError(
            "the pgvector extension", "none in this database", "", "CREATE EXTENSION vector"
        )
    found = source.columns(cursor, environment.vectors)
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
    if not plain.startswith("vector(") or (dimension and plain != f"vector({dimension})"):
        wanted = f"vector({dimension})" if dimension else "vector(N)"
        raise DatabaseError(
            f"column vec {wanted}, the model's dimension",
            kind,
            where,
            "choose a model of that dimension, or another VECTORS_TABLE for this one",
        )


def _check_key(cursor: Cursor, environment: Environment, where: str) -> None:
    keys = database.fetch(
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


def claim_key(
    cursor: Cursor, environment: Environment, identity: Identity, encoder: dict[str, Any]
) -> dict[str, Any] | None:
    """The encoder registered under this key; `encoder`, from now on, where there was none.

    The key is this transaction's alone until it ends, so that two loads cannot both be first.
    None where there is no registry and none may be made.
    """
    if not _has_registry(cursor, environment):
        return None
    key = tuple(vars(identity).values())
    database.fetch(
        cursor,
        f"INSERT INTO {registry_name(environment)} (source, model_rev, pca_rev, encoder)"
        " VALUES ($1, $2, $3, $4::text::jsonb) ON CONFLICT DO NOTHING RETURNING 1",
        (*key, json.dumps(encoder, sort_keys=True)),
    )
    rows = database.fetch(
        cursor,
        f"SELECT encoder::text FROM {registry_name(environment)}"
        " WHERE source = $1 AND model_rev = $2 AND pca_rev = $3 FOR UPDATE",
        key,
    )
    return dict(json.loads(rows[0][0]))


def register_encoder(
    cursor: Cursor, environment: Environment, identity: Identity, encoder: dict[str, Any]
) -> None:
    """Put this encoder in the place of the one registered under the key."""
    database.fetch(
        cursor,
        f"UPDATE {registry_name(environment)} SET encoder = $4::text::jsonb, updated_at = now()"
        " WHERE source = $1 AND model_rev = $2 AND pca_rev = $3 RETURNING 1",
        (*vars(identity).values(), json.dumps(encoder, sort_keys=True)),
    )


def _has_registry(cursor: Cursor, environment: Environment) -> bool:
    """Whether there is a registry; makes one where there is none and this role may."""
    schema, table = environment.vectors
    name = (schema, f"{table[:54]}_encoders")
    if source.has_table(cursor, name):
        return True
    allowed = database.fetch(
        cursor, "SELECT has_schema_privilege(to_regnamespace($1), 'CREATE')", (f'"{schema}"',)
    )
    if not allowed[0][0]:
        return False
    # Of two loads that both find none, one waits here: CREATE IF NOT EXISTS alone would fail.
    database.fetch(cursor, "SELECT 1 FROM pg_advisory_xact_lock(hashtext($1))", ("_".join(name),))
    _run_script(cursor, "registry.sql", {"registry": registry_name(environment)})
    return True


def refuse_mixing(
    registered: dict[str, Any], encoder: dict[str, Any], identity: Identity, where: str
) -> None:
    """MixedModels if weights, architecture or transform differ from the registered encoder's."""
    differing = [
        part
        for part in ("weights", "architecture", "transform")
        if registered.get(part) != encoder.get(part)
    ]
    if differing:
        raise MixedModels(
            f"vectors of the encoder that made ({identity.source}, {identity.model_rev},"
            f" {identity.pca_rev!r}) in the table",
            f"another {' and '.join(differing)}",
            where,
            "give the new encoder its own model_rev, or overwrite with force",
        )
