"""Several evaluate.json side by side: `python -m pipeline evaluate --compare A.json B.json`."""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.retrieval import bootstrap
from pipeline.retrieval.bootstrap import said, said_difference
from pipeline.stage.errors import DataError, SettingsError
from pipeline.stage.settings import Identity

COLUMNS = ("", "recall@1", "recall@10", "mrr", "gallery", "images/s", "bytes a vector", "")

Document = dict[str, Any]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The files to compare."""
    parser.add_argument(
        "--compare", type=Path, nargs="+", required=True, metavar="JSON",
        help="evaluate.json of several runs, kept under other names; the first is the baseline",
    )  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    if len(args.compare) < 2:
        raise SettingsError("two files at least", "one", "--compare", "snakemake evaluate makes it")
    print("\n".join(compared(args.compare)))


def compared(paths: Sequence[Path]) -> Iterator[str]:
    """The lines: a row a run, then each against the first on the queries that are the same.

    DataError: no evaluate.json, another seed, or no query in common.
    """
    documents = [read(path) for path in paths]
    first = documents[0]
    for path, other in zip(paths, documents, strict=True):
        if other["seed"] != first["seed"]:
            raise DataError(
                f"seed {first['seed']} as in {paths[0]}", f"seed {other['seed']}", str(path),
                "evaluate both with one --seed",
            )  # fmt: skip
    rows = [COLUMNS, *(_row(*each) for each in zip(paths, documents, strict=True))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(map(str.ljust, row, widths)).rstrip()
    yield ""
    for path, other in zip(paths[1:], documents[1:], strict=True):
        yield from _paired(paths[0], first, path, other)


def read(path: Path) -> Document:
    """An evaluate.json. DataError: it is another file, or none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        figures = [found[name]["value"] for name in bootstrap.FIGURES]
        ranks = [(each["listing_id"], each["halves"], each["rank"]) for each in found["ranks"]]
        Identity(**found["made_by"]["key"])
        known = figures and ranks and {"seed", "gallery"} <= found.keys()
    except OSError as error:
        raise DataError("an evaluate.json", str(error.strerror).lower(), str(path)) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise DataError(
            "an evaluate.json", "another file", str(path), "snakemake evaluate makes one"
        )
    return dict(found)


def _row(path: Path, found: Document) -> tuple[str, ...]:
    rate = found["images_per_second"]
    return (
        str(path),
        said(found["recall_at_1"]),
        said(found["recall_at_10"]),
        said(found["mrr"]),
        f"{found['gallery']:,}",
        f"{rate:.1f}" if rate else "not known",
        f"{found['bytes_per_vector']['vector']:,}",
        str(Identity(**found["made_by"]["key"])),
    )


def _paired(a_path: Path, a: Document, b_path: Path, b: Document) -> Iterator[str]:
    ranks = [
        {(each["listing_id"], each["halves"]): each["rank"] for each in found["ranks"]}
        for found in (a, b)
    ]
    both = sorted(ranks[0].keys() & ranks[1].keys())
    if not both:
        raise DataError(
            f"a listing with the same halves in {a_path} and {b_path}", "none", "",
            "evaluate both on the same listings with the same topk",
        )  # fmt: skip
    mine, other = (np.array([of[query] for query in both]) for of in ranks)
    found = bootstrap.differences(other, mine, a["seed"])
    yield f"{b_path} against {a_path}, {len(both):,} queries with the same halves:"
    for name in bootstrap.FIGURES:
        real = "real" if found[name]["real"] else "may be chance"
        yield f"  {name.replace('_at_', '@'):<10} {said_difference(found[name])}, {real}"
    if a["gallery"] != b["gallery"]:
        yield f"  their galleries differ, {a['gallery']:,} and {b['gallery']:,}: larger is harder"
