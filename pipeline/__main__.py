"""One image vector per marketplace listing: Postgres to pgvector, through Parquet.

The stages are commands too: python -m pipeline.export, .select, .encode, .aggregate, .load and
.benchmark, each with --help. Most people run `snakemake --cores all`, or `run` below.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline import index, pca, search
from pipeline.cache import prune
from pipeline.cache.parts import VECTORS
from pipeline.database import target
from pipeline.database.connection import quoted
from pipeline.encoder.model import model_of
from pipeline.photos.files import check_image_root
from pipeline.retrieval import compare
from pipeline.stage import command, settings
from pipeline.stage.errors import SettingsError
from pipeline.stage.settings import Environment, Settings
from pipeline.workflow import preflight, retire, run, status, summary, why


def main() -> None:
    args = parser().parse_args()
    args.action(args)


def parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    parser = command.parser(__doc__)
    parser.prog = "python -m pipeline"
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add(commands, "run", run.add_flags, run.main)
    _add(commands, "check", _add_config, check)
    _add(commands, "status", _and_config(status.add_flags), status.main)
    _add(commands, "why", _and_config(why.add_flags), why.main)
    _add(commands, "search", _and_config(search.add_flags), search.main)
    _add(commands, "index", _and_config(index.add_flags), index.by_hand)
    _add(commands, "pca", _and_config(pca.add_flags), pca.main)
    _add(commands, "evaluate", compare.add_flags, compare.main)
    _add(commands, "create-table", _add_create, create_table)
    _add(commands, "role-sql", _add_role, print_role_sql)
    _add(commands, "retire", retire.add_flags, retire.main)
    _add(commands, "summary", lambda parser: None, lambda args: summary.main())
    _add(commands, "cache", _add_cache, show_or_prune_cache)
    return parser


_HELP = {
    "run": "run the whole job: prints the equal snakemake command and runs it",
    "check": "check settings, database, tables, model, weights and image root, in seconds",
    "status": "count the listings: left out, with a vector, pending, waiting; and the next run",
    "why": "tell one listing's way from its rows to its vector",
    "search": "find the listings nearest to a listing, to photos or to words",
    "index": "build an HNSW index on the vectors of a key, and measure what it brings",
    "pca": "fit a projection of the listing vectors onto fewer dimensions, for the setting pca",
    "evaluate": "compare what `snakemake evaluate` found, of several models or settings",
    "create-table": "create the pgvector table (--all: the three input tables too, for a trial)",
    "role-sql": "print the SQL of a role that can run the job and nothing else",
    "retire": "delete vectors of gone listings, of earlier edits or of a key, as their owner",
    "summary": "say what the last run did and where its files are",
    "cache": "show the size and hit rate of the vector cache, or prune it",
}


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    add_flags: Callable[[argparse.ArgumentParser], None],
    action: Callable[[argparse.Namespace], None],
) -> None:
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


def _and_config(
    add_flags: Callable[[argparse.ArgumentParser], None],
) -> Callable[[argparse.ArgumentParser], None]:
    def add(parser: argparse.ArgumentParser) -> None:
        add_flags(parser)
        _add_config(parser)

    return add


def check(args: argparse.Namespace) -> None:
    """The whole preflight: a line per thing checked, and exit code 1 if there is an error."""
    wrong = False
    for level, text in preflight.check_all(settings.read_config(args.config), Environment.read()):
        wrong |= level == "error"
        if level == "error":
            print(f"error: {text}", file=sys.stderr, flush=True)
        else:
            print(f"{level:<3} {text}", flush=True)
    if wrong:
        sys.exit(1)


def _add_create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="the three input tables too")
    parser.add_argument(
        "--dimension", metavar="N or any",
        help="of the vectors; any: keys of several in one table; without it, that of the configured"
        " model or its projection",
    )  # fmt: skip
    _add_config(parser)


def create_table(args: argparse.Namespace) -> None:
    """Create what is missing; leave alone what is there."""
    environment = Environment.read()
    dimension = _dimension(args)
    target.create_tables(environment, dimension, inputs=args.all)
    kind = f"vector({dimension})" if dimension else "vector, of any dimension"
    print(f"{quoted(environment.vectors)} is there, vec {kind}")


def _dimension(args: argparse.Namespace) -> int | None:
    """Of the column to create; None: any."""
    if args.dimension == "any":
        return None
    if args.dimension is None:
        dimension = model_of(settings.read_config(args.config)).dimension
        if dimension is None:
            raise SettingsError(
                "a vector dimension", "a model that does not say", "", "--dimension N"
            )
        return dimension
    if not args.dimension.isdecimal() or not 1 <= int(args.dimension) <= target.MOST_DIMENSIONS:
        raise SettingsError(
            f"--dimension from 1 to {target.MOST_DIMENSIONS}, or any", args.dimension,
            "command line",
        )  # fmt: skip
    return int(args.dimension)


def _add_role(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--role", default="listing_vectors", metavar="NAME", help="of the new role")


def print_role_sql(args: argparse.Namespace) -> None:
    """Print role.sql with the names of the role and of this environment's tables."""
    print(target.role_sql(Environment.read(), args.role), end="")


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["show", "prune"], help="prune merges small files too")
    parser.add_argument("--cache-dir", default=Settings().cache_dir, help="folder of the cache")
    for flag, what in (
        ("--max-mb", "oldest entries beyond this size"),
        ("--older-than-days", "files written before that"),
    ):
        parser.add_argument(flag, type=float, default=math.inf, help=f"prune: {what}")
    parser.add_argument(
        "--image-root", type=Path, help="prune: entries whose file below this folder has changed"
    )


def show_or_prune_cache(args: argparse.Namespace) -> None:
    """Show or prune the vector cache."""
    folder = Path(args.cache_dir)
    if args.what == "prune":
        if args.image_root:
            check_image_root(args.image_root)  # below what is no folder, every file is gone
        freed = prune.prune(folder, args.max_mb * 1e6, args.older_than_days, args.image_root)
        print(f"{freed / 1e6:.1f} MB freed")
    for encoder in prune.stats(folder):
        made_by = encoder.fingerprint
        print(
            f"{folder / VECTORS / encoder.folder}: {encoder.entries} images"
            f" ({encoder.broken} broken), {encoder.bytes / 1e6:.1f} MB in {encoder.parts} files;"
            f" weights {str(made_by.get('weights', '?'))[:24]}, {made_by.get('precision')},"
            f" {made_by.get('decode')}"
        )
    print(summary.hit_rate())


if __name__ == "__main__":
    command.run(main, "pipeline")
