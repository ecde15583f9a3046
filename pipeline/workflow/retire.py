"""Deletes vectors that stand for no listing any more, or all of a key; without --yes it counts.

For the owner of the tables: the job's own role has no right to delete. Each batch is a transaction
of its own, so no lock is held for long, and what was stopped is simply run again.
"""

import argparse
import shlex
from functools import partial

from adbc_driver_manager.dbapi import Cursor

from pipeline.database import obsolete, registry, target
from pipeline.database.catalog import has_table
from pipeline.database.connection import (
    bind,
    connect,
    quoted,
    retrying,
    set_lock_timeout,
    translated_errors,
)
from pipeline.database.inputs import check_inputs
from pipeline.database.key import OF_KEY
from pipeline.stage import settings
from pipeline.stage.command import Progress
from pipeline.stage.errors import DatabaseError, SettingsError
from pipeline.stage.settings import Environment, Identity

BATCH_ROWS = 10_000


def add_flags(parser: argparse.ArgumentParser) -> None:
    """--gone and --superseded go together; --key goes alone."""
    parser.formatter_class = argparse.HelpFormatter
    parser.epilog = "--gone and --superseded go together, --key goes alone."
    parser.add_argument(
        "--gone", action="store_true", help="vectors of listings that are deleted, or spam now"
    )
    parser.add_argument(
        "--superseded", action="store_true",
        help="vectors of earlier edits, unless the listings table still has that edit",
    )  # fmt: skip
    parser.add_argument(
        "--keep", type=int, metavar="N",
        help="with --superseded: keep the newest N edits of each listing and key (1 without it)",
    )  # fmt: skip
    parser.add_argument(
        "--key", nargs=3, metavar=("SOURCE", "MODEL_REV", "PCA_REV"),
        help="all vectors of a key, and its line in the registry",
    )  # fmt: skip
    parser.add_argument("--yes", action="store_true", help="delete; without it, only count")
    settings.add_flags(parser, "lock_timeout_s")


def main(args: argparse.Namespace) -> None:
    """Say how many there are, and with --yes delete them."""
    check_flags(args)
    environment, lock_timeout_s = Environment.read(), settings.from_flags(args).lock_timeout_s
    conditions = conditions_of(args, environment)
    with connect(read_only=True, repeatable=True) as connection:
        with connection.cursor() as cursor:
            check_database(cursor, args, environment)
            if args.key:
                bind(cursor, Identity(*args.key)._asdict())
            total = obsolete.count(cursor, environment, *conditions.values())
            each = [obsolete.count(cursor, environment, c) for c in conditions.values()]
            if args.key and not total:
                refuse_unknown_key(cursor, environment, Identity(*args.key))
        found = ", ".join(f"{n} {what}" for n, what in zip(each, conditions, strict=True))
        print(f"{total} vectors in {quoted(environment.vectors)}: {found}", flush=True)
        if not args.yes:
            print(f"nothing was deleted; to delete them: {shlex.join(words(args))}")
            return
        deleted, progress = 0, Progress(total, "vectors")
        doomed = obsolete.rows(connection, obsolete.keys_sql(environment, conditions.values()))
        for batch in obsolete.batches(doomed, BATCH_ROWS):
            deleted += retrying(partial(obsolete.delete, environment, batch, lock_timeout_s))
            progress.update(deleted)
    if args.key:
        retrying(partial(unregister, environment, Identity(*args.key), lock_timeout_s))
    print(f"{deleted} deleted")


def check_flags(args: argparse.Namespace) -> None:
    """SettingsError unless they say what to delete, and agree."""
    if not (args.gone or args.superseded or args.key):
        raise SettingsError(
            "--gone, --superseded or --key SOURCE MODEL_REV PCA_REV", "none", "command line"
        )
    if args.key and (args.gone or args.superseded):
        raise SettingsError("--key alone", "another beside it", "command line", "run it twice")
    if args.keep is not None and (args.keep < 1 or not args.superseded):
        raise SettingsError(
            "--keep N, 1 at least, with --superseded", f"--keep {args.keep}", "command line"
        )


def conditions_of(args: argparse.Namespace, environment: Environment) -> dict[str, str]:
    """What is to be deleted: its name and its condition."""
    if args.key:
        return {f"of the key {tuple(args.key)}": OF_KEY}
    wanted = {}
    if args.gone:
        wanted["gone"] = obsolete.gone(environment)
    if args.superseded:
        wanted["superseded"] = obsolete.superseded(environment, args.keep or 1)
    return wanted


def check_database(cursor: Cursor, args: argparse.Namespace, environment: Environment) -> None:
    """The tables are as the job needs them, and with --yes this role may delete."""
    target.check(cursor, environment, None)
    if not args.key:
        check_inputs(cursor, environment)
    if args.gone:
        obsolete.refuse_no_listings(cursor, environment)
    if args.yes:
        obsolete.refuse_without_right(cursor, environment.vectors)
        if args.key and has_table(cursor, environment.registry):
            obsolete.refuse_without_right(cursor, environment.registry)


def refuse_unknown_key(cursor: Cursor, environment: Environment, identity: Identity) -> None:
    """DatabaseError for a key that is neither in the table nor in the registry."""
    known = registry.registered(cursor, environment)
    if identity not in known:
        names = "; ".join(shlex.join(key) for key in sorted(known)) or "none"
        raise DatabaseError(
            f"the key {tuple(identity)}", "no row of it", quoted(environment.vectors),
            f"registered are: {names}",
        )  # fmt: skip


def unregister(environment: Environment, identity: Identity, lock_timeout_s: int) -> None:
    """Delete the key's line in the registry; DatabaseError if a load has put rows there again."""
    with connect() as connection:
        with connection.cursor() as cursor:
            if not has_table(cursor, environment.registry):
                return
            set_lock_timeout(cursor, lock_timeout_s)
            registry.retire(cursor, environment, identity)  # waits for a load that holds the key
            bind(cursor, identity._asdict())
            rows = obsolete.count(cursor, environment, OF_KEY)
        if rows:
            raise DatabaseError(
                "a key that nobody loads", f"{rows} rows that a load has put there meanwhile",
                quoted(environment.vectors), "run it again",
            )  # fmt: skip
        with translated_errors():
            connection.commit()


def words(args: argparse.Namespace) -> list[str]:
    """The command that deletes what this one counted."""
    said = ["python", "-m", "pipeline", "retire"]
    said += [f"--{name}" for name in ("gone", "superseded") if getattr(args, name)]
    said += ["--keep", str(args.keep)] if args.keep else []
    said += ["--key", *args.key] if args.key else []
    return [*said, "--yes"]
