"""Fit a projection of listing vectors onto fewer dimensions, for the setting `pca`.

Reads: the pgvector table, of the key of the settings without a projection the live listings'
vectors; or, with --from, files of aggregate. Writes: one Parquet file. Guarantees: vectors of one
encoder only, which the file names; the same rows and seed, the same bytes on the same machine.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.database import registry, target
from pipeline.database.connection import connect, quoted, sort_in_memory
from pipeline.database.neighbours import Neighbourhood
from pipeline.database.sample import Current
from pipeline.encoder import projection
from pipeline.encoder.model import NEVER_MIXED, key_of
from pipeline.encoder.projection import Projection
from pipeline.stage import command, parquet, settings
from pipeline.stage.errors import DatabaseError, DataError, SettingsError
from pipeline.stage.settings import Environment, Identity, Settings

ROWS = 100_000  # a covariance of 512 dimensions hardly moves beyond

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """Vectors to fit on, a batch (n, dim) at a time."""

    identity: Identity
    encoder: dict[str, Any]  # a Fingerprint's fields
    batches: Iterator[Vectors]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What is fitted, and on which vectors."""
    parser.add_argument("what", choices=["fit"], help="fit: write the file that pca names")
    parser.add_argument("--dimensions", type=int, default=128, metavar="N", help="to project onto")
    parser.add_argument("--output", type=Path, help="file to write (pca-<dimensions>.parquet)")
    parser.add_argument("--rows", type=int, default=ROWS, metavar="N", help="vectors, at most")
    parser.add_argument("--seed", type=command.bigint, default=0, metavar="N", help="of the draw")
    parser.add_argument(
        "--from", dest="files", type=Path, nargs="+", metavar="PARQUET",
        help="listing_vectors.parquet of aggregate; without it, the table's vectors of the key of"
        " the settings",
    )  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Fit, and say what was kept and what to do with it."""
    for name, least in {"dimensions": 1, "rows": 2, "seed": 0}.items():
        if getattr(args, name) < least:
            raise SettingsError(f"--{name}, {least} at least", str(getattr(args, name)))
    chosen = settings.read_config(args.config)
    output = args.output or Path(f"pca-{args.dimensions}.parquet")
    if args.files:
        sampled = of_files(args.files, args.rows, args.seed)
    else:
        sampled = of_table(chosen, Environment.read(), args.rows, args.seed)
    with sampled as sample:
        found = projection.fit(sample.batches, args.dimensions)
    source, model_rev, _ = sample.identity
    fitted_on = {"source": source, "model_rev": model_rev, "seed": args.seed}
    print("\n".join(said(projection.write(output, found, sample.encoder, fitted_on), output)))


def said(made: Projection, output: Path) -> Iterator[str]:
    """For a person: what is kept, also by fewer of the components, and what to do with it."""
    on = f"{made.fitted_on['source']} · {made.fitted_on['model_rev']}"
    yield f"{output}: {made.of} to {made.dimensions} dimensions, by {made.fit.rows} vectors of {on}"
    fewer = [made.dimensions // part for part in (1, 2, 4) if made.dimensions // part]
    kept = ", ".join(f"{made.fit.kept(n):.1%} by {n}" for n in dict.fromkeys(fewer))
    yield f"of the variance is kept: {kept}"
    yield f"in config.yaml:  pca: {output}"
    yield f"the key's pca_rev is then {made.rev}, of vectors of {made.dimensions} dimensions"


@contextmanager
def of_table(chosen: Settings, environment: Environment, rows: int, seed: int) -> Iterator[Sample]:
    """Of the live listings' vectors, `rows` at most. A `pca` of before is left out of the key.

    DatabaseError: the key has none, or it is not registered what made them.
    """
    if chosen.pca:
        chosen = chosen.model_copy(update={"pca": "", "pca_rev": ""})
    identity = key_of(chosen)
    _refuse_projected(identity, {}, "settings")
    with connect(read_only=True, repeatable=True) as connection, connection.cursor() as cursor:
        sort_in_memory(cursor)
        target.check(cursor, environment, None)
        Neighbourhood(cursor, environment, identity, None)  # refuses a key without vectors
        made_by = registry.registered(cursor, environment).get(identity)
        if made_by is None:
            raise DatabaseError(
                f"the encoder that made the vectors of {identity}", "none that is registered",
                quoted(environment.registry), "load them again, with the registry there",
            )  # fmt: skip
        _refuse_projected(identity, made_by.recipe or {}, quoted(environment.vectors))
        drawn = Current(cursor, environment, identity).drawn(rows, seed)
        yield Sample(identity, made_by.encoder, drawn)


@contextmanager
def of_files(files: Sequence[Path], rows: int, seed: int) -> Iterator[Sample]:
    """Of the vectors in files of aggregate, `rows` at most.

    DataError: they are no such files, or of several encoders.
    """
    first: dict[str, Any] = {}
    for file in files:
        if not file.is_file():
            raise DataError("listing_vectors.parquet of aggregate", "no such file", str(file))
        made_by = parquet.metadata(file)
        if "aggregate" not in made_by:
            raise DataError("listing_vectors.parquet of aggregate", "another file", str(file))
        identity = Identity(**made_by["aggregate"])
        _refuse_projected(identity, made_by["select"], str(file))
        first = first or made_by
        unlike = [p for p in NEVER_MIXED if made_by["encoder"].get(p) != first["encoder"].get(p)]
        if unlike:
            raise DataError(
                f"vectors of one encoder, that of {files[0]}", f"another {' and '.join(unlike)}",
                str(file),
            )  # fmt: skip
    yield Sample(Identity(**first["aggregate"]), first["encoder"], _drawn(files, rows, seed))


def _drawn(files: Sequence[Path], rows: int, seed: int) -> Iterator[Vectors]:
    """So many of the rows, by their place in the files, in order."""
    total = parquet.rows(files)
    wanted = np.ones(total, bool)
    if total > rows:
        wanted[:] = False
        wanted[np.random.default_rng(seed).choice(total, rows, replace=False)] = True
    start = 0
    for file in files:
        for batch in parquet.batches(file, parquet.VECTOR_ROW_GROUP, ["vec"]):
            yield parquet.matrix(pa.Table.from_batches([batch]))[wanted[start : start + len(batch)]]
            start += len(batch)


def _refuse_projected(identity: Identity, recipe: dict[str, Any], where: str) -> None:
    """SettingsError for vectors that are projected already, or are said to be."""
    if identity.pca_rev or recipe.get("projection"):
        raise SettingsError(
            "a key of vectors as they were encoded, without a projection",
            f"pca_rev {identity.pca_rev!r}", where, "leave pca_rev empty, or name others by --from",
        )  # fmt: skip
