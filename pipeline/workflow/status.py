"""Where the listings stand, from the live database: for an operator, and for cron as JSON."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from adbc_driver_manager.dbapi import Cursor

from pipeline.database import census, obsolete, registry, target, waiting
from pipeline.database.census import Census
from pipeline.database.connection import connect, described, fetch, quoted
from pipeline.database.inputs import check_inputs
from pipeline.database.pending import Digest, prepare
from pipeline.encoder.model import identity_of, model_of
from pipeline.stage import settings
from pipeline.stage.settings import Environment, Identity, Settings
from pipeline.workflow import words
from pipeline.workflow.outlook import Outlook, foresee
from pipeline.workflow.summary import last_rate


@dataclass(frozen=True)
class Key:
    """A key of the target, with what made its vectors as far as that is registered."""

    identity: Identity
    rows: int
    recipe: dict[str, Any] | None
    encoder: dict[str, Any] | None


@dataclass(frozen=True)
class Status:
    """All of one moment. The census and the digest are of one key, that of the settings."""

    database: str
    table: str
    identity: Identity
    census: Census
    digest: Digest  # without force
    taken: Digest  # by the next run
    force: bool
    gone: int  # vectors of listings that are deleted, or spam now
    superseded: int  # vectors of earlier edits
    keys: list[Key]
    next_run: Outlook

    def as_dict(self) -> dict[str, Any]:
        """The fields of --json."""
        standing = self.census.standing
        return {
            "listings": self.census.listings,
            "left_out": self.census.left_out,
            "eligible": standing.eligible,
            "with_vector": standing.with_vector,
            "pending": standing.pending,
            "beyond_limit": self.digest.due - self.digest.listings,
            "waiting": standing.waiting,
            "waiting_by_reason": standing.waiting_by_reason,
            "gone": self.gone,
            "superseded": self.superseded,
            "keys": [
                {**key.identity._asdict(), "rows": key.rows, "recipe": key.recipe,
                 "encoder": key.encoder}
                for key in self.keys
            ],
            "next_run": asdict(self.next_run),
            "identity": self.identity._asdict(),
            "database": self.database,
            "table": self.table,
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        """For a person."""
        counted, standing = self.census, self.census.standing
        yield f"{self.database}, {self.table}"
        yield f"key {self.identity}"
        yield ""
        yield _line("listings", counted.listings, "rows of the listings table")
        for reason, number in counted.left_out.items():
            if number:
                yield _line(f"  {reason}", number, "left out")
        yield _line("eligible", standing.eligible)
        yield _line("  with vector", standing.with_vector)
        yield _line("  pending", standing.pending, self._pending())
        yield _line("  waiting", standing.waiting, words.listed(standing.waiting_by_reason))
        yield _line("gone", self.gone, "vectors of listings that are deleted, or spam now")
        yield _line("superseded", self.superseded, "vectors of earlier edits")
        yield ""
        for one in self.keys:
            yield _line(str(one.identity), one.rows, _made(one))
        yield f"next run: {self._next()}"

    def _pending(self) -> str:
        beyond = self.digest.due - self.digest.listings
        return f"{beyond} of them beyond limit_listings" if beyond else ""

    def _next(self) -> str:
        if not self.taken.listings:
            standing = self.census.standing
            said = words.standing(standing) if standing.eligible else words.nobody(self.census)
            return f"nothing to do; {said}"
        return words.plan(self.taken, self.next_run, self.force)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """--json, beside the flags that settings have."""
    parser.add_argument("--json", action="store_true", help="one line of JSON, as for cron")


def main(args: argparse.Namespace) -> None:
    """Print it."""
    status = look(settings.read_config(args.config), Environment.read())
    print(json.dumps(status.as_dict()) if args.json else "\n".join(status.lines()))


def look(chosen: Settings, environment: Environment) -> Status:
    """Everything, in one snapshot. DatabaseError: a table is not as the job needs it."""
    model = model_of(chosen)
    identity = identity_of(chosen, model)
    chosen = chosen.model_copy(update=identity._asdict())
    left_out = waiting.left_out(waiting.Files(chosen, environment.image_root), chosen, identity)
    with connect(read_only=True, repeatable=True) as connection, connection.cursor() as cursor:
        check_inputs(cursor, environment)
        target.check(cursor, environment, model.dimension)
        plain = chosen.model_copy(update={"force": False})
        pending = prepare(cursor, environment, plain, left_out)
        counted, digest = census.take(cursor, pending), Digest(*fetch(cursor, pending.digest)[0])
        taken = digest
        if chosen.force:
            pending = prepare(cursor, environment, chosen, left_out)
            taken = Digest(*fetch(cursor, pending.digest)[0])
        return Status(
            database=described(cursor),
            table=quoted(environment.vectors),
            identity=identity,
            census=counted,
            digest=digest,
            taken=taken,
            force=chosen.force,
            gone=obsolete.count(cursor, environment, obsolete.gone(environment)),
            superseded=obsolete.count(cursor, environment, obsolete.superseded(environment)),
            keys=_keys(cursor, environment),
            next_run=foresee(cursor, pending, taken, chosen, environment, model, last_rate()),
        )


def _keys(cursor: Cursor, environment: Environment) -> list[Key]:
    """Every key that has rows, most rows first."""
    made_by = registry.registered(cursor, environment)
    rows = fetch(
        cursor,
        "SELECT source, model_rev, pca_rev, count(*)"
        f" FROM {quoted(environment.vectors)} GROUP BY 1, 2, 3 ORDER BY 4 DESC, 1, 2, 3",
    )
    return [
        Key(
            identity := Identity(*row[:3]),
            row[3],
            getattr(made_by.get(identity), "recipe", None),
            getattr(made_by.get(identity), "encoder", None),
        )
        for row in rows
    ]


def _made(key: Key) -> str:
    """'topk 5, weights 0123456789ab': what tells this key from another at a glance."""
    said = []
    if key.recipe:
        said.append(f"topk {key.recipe.get('topk')}")
    if key.encoder:
        weights = str(key.encoder.get("weights"))  # a hash, or the tag of a model on a hub
        said.append(f"weights {weights if '/' in weights else weights[:12]}")
    return ", ".join(said) or "not registered"


def _line(name: str, number: int, text: str = "") -> str:
    return f"{name:<17} {number:>9}  {text}".rstrip()
