"""One image vector per marketplace listing: Postgres to pgvector, through Parquet.

The stages are commands too: python -m pipeline.export, .select, .encode, .aggregate, .load and
.benchmark, each with --help. Most people run `snakemake --cores all`, or `run` below.
"""

import argparse
import json
import sys
from pathlib import Path

from pipeline import command, database, preflight, run, settings, summary, target
from pipeline.errors import SettingsError
from pipeline.settings import Environment, Settings


def main() -> None:
    parser = command.parser(__doc__)
    parser.prog = "python -m pipeline"
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add(commands, "run", run.add_flags, run.main)
    _add(commands, "check", _add_config, check)
    _add(commands, "create-table", _add_create, create_table)
    _add(commands, "summary", lambda parser: None, lambda args: summary.main())
    _add(commands, "cache", _add_cache, cache)
    args = parser.parse_args()
    args.action(args)


_HELP = {
    "run": "run the whole job: prints the equal snakemake command and runs it",
    "check": "check settings, database, tables, model, weights and image root, in seconds",
    "create-table": "create the pgvector table (--all: the three input tables too, for a trial)",
    "summary": "say what the last run did and where its files are",
    "cache": "show the size and hit rate of the vector cache, or prune it",
}


def _add(commands, name, add_flags, action) -> None:  # type: ignore[no-untyped-def]
    parser = commands.add_parser(
        name,
        help=_HELP[name],
        description=_HELP[name],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add_flags(parser)
    parser.set_defaults(action=action)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", nargs="*", default=[], metavar="KEY=VALUE", help="as for snakemake --config"
    )


def check(args: argparse.Namespace) -> None:
    """The whole preflight; one line per thing checked."""
    for line in preflight.check_all(settings.read_config(args.config), Environment.read()):
        print(f"ok  {line}")


def _add_create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="the three input tables too")
    parser.add_argument(
        "--dimension", type=int, help="of the vectors; without it, that of the configured model"
    )
    _add_config(parser)


def create_table(args: argparse.Namespace) -> None:
    """Create what is missing; leave alone what is there."""
    environment = Environment.read()
    dimension = args.dimension or preflight.model_of(settings.read_config(args.config)).embed_dim
    if not dimension:
        raise SettingsError("a vector dimension", "a model that does not say", "", "--dimension N")
    with database.connect() as connection:
        with connection.cursor() as cursor:
            target.create(cursor, environment, dimension, inputs=args.all)
        with database.translated_errors():
            connection.commit()
    print(f"{database.quoted(environment.vectors)} is there, vec vector({dimension})")


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["show", "prune"])
    parser.add_argument("--cache-dir", default=Settings().cache_dir, help="folder of the cache")
    parser.add_argument("--max-mb", type=float, help="prune: oldest entries beyond this size")
    parser.add_argument("--older-than-days", type=float, help="prune: entries older than this")


def cache(args: argparse.Namespace) -> None:
    """Show or prune the vector cache."""
    raise SystemExit("not here yet")


if __name__ == "__main__":
    command.run(main, "pipeline")
