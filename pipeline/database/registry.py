"""The registry beside the target: which encoder and recipe made the vectors of each key.

All vectors of a key are of one encoder and one recipe, so that their distances mean something. A
load of another is refused, or with force replaces every one of them.
"""

import json
import logging
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from adbc_driver_manager.dbapi import Cursor

from pipeline.database.catalog import columns
from pipeline.database.connection import fetch, quoted, run_script
from pipeline.encoder.model import NEVER_MIXED, Model, identity_of, planned_fingerprint
from pipeline.stage.errors import MixedVectors
from pipeline.stage.settings import Environment, Identity, Settings

log = logging.getLogger("pipeline")

_OF_KEY = "source = $1 AND model_rev = $2 AND pca_rev = $3"
_ASK_THE_OWNER = "python -m pipeline create-table as the owner"


@dataclass(frozen=True)
class MadeBy:
    """What made vectors: an encoder (a Fingerprint's fields) and a recipe (Settings.recipe).

    In the registry, NEVER_MIXED of the encoder and the recipe hold for every row of the key;
    precision, decode and apply_exif_orientation are those of the last load. `recipe` is None
    where it was not kept.
    """

    encoder: dict[str, Any]
    recipe: dict[str, Any] | None

    @classmethod
    def planned(cls, chosen: Settings, model: Model) -> "MadeBy":
        """What the settings ask for; see planned_fingerprint."""
        digest = model.projection.digest if model.projection else ""
        recipe = {**chosen.recipe, "projection": digest}
        return cls(planned_fingerprint(chosen, model).as_dict(), recipe)

    def unlike(self, other: "MadeBy") -> list[str]:
        """The parts in which these vectors differ from `other`'s so that no key may have both."""
        parts = [p for p in NEVER_MIXED if self.encoder.get(p) != other.encoder.get(p)]
        if self.recipe is None or other.recipe is None:
            return parts
        every = sorted(self.recipe.keys() | other.recipe.keys())
        return parts + [p for p in every if self.recipe.get(p) != other.recipe.get(p)]


def registered(cursor: Cursor, environment: Environment) -> dict[Identity, MadeBy]:
    """All that is registered; nothing where there is no registry, or one that may not be read."""
    where = quoted(environment.registry)
    readable = fetch(cursor, "SELECT has_table_privilege(to_regclass($1), 'SELECT')", (where,))
    if not readable[0][0]:
        return {}
    recipe = _recipe(columns(cursor, environment.registry))
    rows = fetch(cursor, f"SELECT source, model_rev, pca_rev, encoder::text, {recipe} FROM {where}")
    return {Identity(*row[:3]): _made_by(*row[3:]) for row in rows}


def displaced(
    cursor: Cursor, environment: Environment, chosen: Settings, model: Model
) -> MadeBy | None:
    """What made the rows that a run with these settings must replace to the last; None if none.

    MixedVectors: there are such rows, and nothing is forced. The load asks again, by `claim`.
    """
    identity, made_by = identity_of(chosen, model), MadeBy.planned(chosen, model)
    there = registered(cursor, environment).get(identity)
    if there is None or not made_by.unlike(there):
        return None
    if not chosen.force:
        refuse_mixing(there, made_by, environment, identity)
    return there


def claim(
    cursor: Cursor, environment: Environment, identity: Identity, made_by: MadeBy
) -> MadeBy | None:
    """What is registered under this key; `made_by`, from now on, where there was nothing.

    The key is this transaction's alone until it ends: of two loads that come first, or that would
    replace each other's encoder, one waits for the other and sees what it left. None, and a
    warning, where there is no registry and none may be made.
    """
    kept = _prepared(cursor, environment)
    if not kept:
        return None
    where, values = quoted(environment.registry), _values(kept, made_by)
    names = ", ".join((*Identity._fields, *values))
    placed = ", ".join(f"${number}::text::jsonb" for number, _ in enumerate(values, 4))
    rows: list[tuple[Any, ...]] = []
    while not rows:  # one that was retired between the two statements is registered anew
        fetch(
            cursor,
            f"INSERT INTO {where} ({names}) VALUES ($1, $2, $3, {placed})"
            " ON CONFLICT DO NOTHING RETURNING 1",
            (*identity, *values.values()),
        )
        rows = fetch(
            cursor,
            f"SELECT encoder::text, {_recipe(kept)} FROM {where} WHERE {_OF_KEY} FOR UPDATE",
            identity,
        )
    return _made_by(*rows[0])


def replace(cursor: Cursor, environment: Environment, identity: Identity, made_by: MadeBy) -> None:
    """Put this in the place of what is registered under the claimed key."""
    values = _values(columns(cursor, environment.registry), made_by)
    placed = ", ".join(f"{name} = ${n}::text::jsonb" for n, name in enumerate(values, 4))
    fetch(
        cursor,
        f"UPDATE {quoted(environment.registry)} SET {placed}, updated_at = now()"
        f" WHERE {_OF_KEY} RETURNING 1",
        (*identity, *values.values()),
    )


def retire(cursor: Cursor, environment: Environment, identity: Identity) -> bool:
    """Delete what is registered under the key, once no load holds it; whether there was any."""
    rows = fetch(
        cursor,
        f"DELETE FROM {quoted(environment.registry)} WHERE {_OF_KEY} RETURNING 1",
        identity,
    )
    return bool(rows)


def create(cursor: Cursor, environment: Environment) -> None:
    """Make the registry, or the column that one of before recipes lacks; else change nothing."""
    if "recipe" not in columns(cursor, environment.registry):
        # Of two that both find none, one waits here: CREATE IF NOT EXISTS alone would fail.
        where = quoted(environment.registry)
        fetch(cursor, "SELECT 1 FROM pg_advisory_xact_lock(hashtext($1))", (where,))
        run_script(cursor, "registry.sql", {"registry": where})


def refuse_mixing(
    there: MadeBy, made_by: MadeBy, environment: Environment, identity: Identity
) -> None:
    """MixedVectors if these and the registered vectors may not share the key."""
    parts = made_by.unlike(there)
    if not parts:
        return
    ways = []
    if set(parts) & set(NEVER_MIXED):
        ways.append("give the encoder its own model_rev")
    if "topk" in parts:
        ways.append("leave source empty, so that it follows topk")
    elif set(parts) - {*NEVER_MIXED, "projection"}:
        ways.append("give the recipe its own source")
    if "projection" in parts:
        ways.append("leave pca_rev empty, so that it follows the file of pca")
    raise MixedVectors(
        f"vectors of the encoder and recipe that made {_shown(identity)} in the table",
        _differences(there, made_by),
        quoted(environment.vectors),
        f"{' and '.join(ways)}, or overwrite all of them with force",
    )


def refuse_a_rest(
    rest: int, there: MadeBy, made_by: MadeBy, environment: Environment, identity: Identity
) -> None:
    """MixedVectors if `rest` rows of the key would stay when force replaces what made them."""
    if rest:
        raise MixedVectors(
            f"every row of {_shown(identity)} to be replaced by {_differences(there, made_by)}",
            f"{rest} rows that would stay: of listings beyond limit_listings, earlier edits, or"
            " listings that are gone, spam or without readable files",
            f"{quoted(environment.vectors)}, nothing was written",
            "raise limit_listings, delete them with python -m pipeline retire (--gone,"
            " --superseded or --key), or give another model_rev or source",
        )


def _shown(identity: Identity) -> str:
    return f"({identity.source}, {identity.model_rev}, {identity.pca_rev!r})"


def _differences(there: MadeBy, made_by: MadeBy) -> str:
    """In words: another weights and topk 2 instead of 5; a hash says nothing to anyone."""
    old, new = there.recipe or {}, made_by.recipe or {}
    return " and ".join(
        f"another {part}"
        if part in NEVER_MIXED or part == "projection"
        else f"{part} {json.dumps(new.get(part))} instead of {json.dumps(old.get(part))}"
        for part in made_by.unlike(there)
    )


def _made_by(encoder: str, recipe: str | None) -> MadeBy:
    return MadeBy(json.loads(encoder), None if recipe is None else json.loads(recipe))


def _values(kept: Container[str], made_by: MadeBy) -> dict[str, str]:
    """Column to JSON, of the columns that this registry has."""
    documents = {"encoder": made_by.encoder, "recipe": made_by.recipe}
    return {name: json.dumps(d) for name, d in documents.items() if name in kept}


def _recipe(kept: Container[str]) -> str:
    return "recipe::text" if "recipe" in kept else "NULL::text"


def _prepared(cursor: Cursor, environment: Environment) -> dict[str, str]:
    """The columns of the registry, after what is missing was made, or a warning where it can't."""
    found, where = columns(cursor, environment.registry), quoted(environment.vectors)
    if "recipe" not in found and _may_create(cursor, environment):
        create(cursor, environment)
        return columns(cursor, environment.registry)
    if not found:
        log.warning(
            "no registry of encoders beside %s and no right to make one: models and recipes are"
            " not told apart; hint: %s", where, _ASK_THE_OWNER,
        )  # fmt: skip
    elif "recipe" not in found:
        log.warning(
            "the registry of encoders beside %s has no column for recipes and this role may not"
            " add it: another topk is not told apart; hint: %s", where, _ASK_THE_OWNER,
        )  # fmt: skip
    return found


def _may_create(cursor: Cursor, environment: Environment) -> bool:
    """Whether this role may make the registry, or owns the one that there is."""
    may = fetch(
        cursor,
        "SELECT CASE WHEN to_regclass($2) IS NULL"
        " THEN has_schema_privilege(to_regnamespace($1), 'CREATE')"
        " ELSE pg_has_role((SELECT relowner FROM pg_class WHERE oid = to_regclass($2)), 'USAGE')"
        " END",
        (f'"{environment.registry[0]}"', quoted(environment.registry)),
    )
    return bool(may[0][0])
