"""Measure how good the vectors are: do two halves of a listing's photos find each other?

Reads: the encode shards and images.parquet of the last run; a few photos for the page. Writes:
evaluate.json and index.html. Guarantees: encodes nothing, asks no database, changes no other file;
memory does not grow with the listings; the same files give the same figures. docs/evaluate.md says
how the halves are made and what the figures are not.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.pages import plots
from pipeline.pages.template import page
from pipeline.photos.album import Album
from pipeline.retrieval.bootstrap import said, said_difference
from pipeline.retrieval.choices import BITS, stored_bytes
from pipeline.retrieval.evaluation import Misses, evaluate
from pipeline.retrieval.halves import Halves
from pipeline.retrieval.words import headline, recommendation
from pipeline.stage import command, parquet, settings
from pipeline.stage.command import log
from pipeline.stage.settings import Environment, Identity

SIDE = 112  # pixels of a thumbnail
PHOTOS = 5  # that are shown of a side


def main() -> None:
    parser = command.stage_parser(__doc__)
    parser.add_argument("--encoded", type=Path, required=True, help="folder of the encode shards")
    parser.add_argument("--shards", type=int, required=True, help="N-of-SHARDS.parquet, how many")
    parser.add_argument("--images", type=Path, required=True, help="images.parquet of the export")
    parser.add_argument("--report", type=Path, required=True, help="evaluate.json to write")
    parser.add_argument("--page", type=Path, required=True, help="the page to write")
    parser.add_argument("--seed", type=int, default=0, help="of the halves and the intervals")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU cores to use")
    settings.add_flags(parser, "apply_exif_orientation", "memory_mb", *settings.PHOTO_LIMITS)
    args = parser.parse_args()
    chosen = settings.from_flags(args)
    shards = parquet.shards(args.encoded, args.shards)
    found, misses = report(shards, args.images, args.seed, chosen.memory_mb, args.threads)
    album = Album(chosen, Environment.read())
    text = page_of(found, misses, album)
    parquet.write_json(args.report, found)
    with parquet.replacing(args.page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    log.info("%s -> %s", headline(found), args.report)
    for line in found["recommendation"]:
        log.info("%s", line)


def report(
    shards: Sequence[Path], images: Path, seed: int, memory_mb: int, threads: int
) -> tuple[dict[str, Any], Misses]:
    """The document as evaluate.json has it, and the worst misses."""
    made_by = _made_by(shards)
    dim = parquet.dimension(pq.read_schema(shards[0]))
    with_stock = not made_by["recipe"].get("exclude_stock", True)
    halves = Halves(shards, images if with_stock else None, seed, memory_mb)
    found, misses = evaluate(halves, dim, seed, threads)
    found |= {
        "made_by": made_by,
        "images_per_second": _rate(shards, made_by["key"]["model_rev"]),
        "bytes_per_vector": {kind: stored_bytes(dim, kind) for kind in BITS},
    }
    found["recommendation"] = recommendation(found)
    return found, misses


def _made_by(shards: Sequence[Path]) -> dict[str, Any]:
    """Key, recipe and encoder of the shards. DataError: they are of more than one."""
    made_by = parquet.made_by(shards)
    exported = made_by.get("export", {})
    return {
        "key": {name: exported.get(name, "") for name in Identity._fields},
        "recipe": made_by.get("select", {}),
        "encoder": made_by.get("encoder", {}),
    }


def _rate(shards: Sequence[Path], model_rev: str) -> float | None:
    """Images a second: of these shards as far as they were really encoded, else the benchmark's."""
    stats = [json.loads(path.read_text()) for path in _existing(shards)]
    timed = [each for each in stats if each["images_per_second"]]
    if timed:
        seconds = sum(each["encoded"] / each["images_per_second"] for each in timed)
        return round(float(sum(each["encoded"] for each in timed) / seconds), 2)
    benchmark = shards[0].parents[1] / "benchmark" / "benchmark.json"
    known = json.loads(benchmark.read_text()) if benchmark.exists() else {"settings": {}}
    same = known["settings"].get("model_rev") == model_rev
    return float(known["images_per_second"]) if same else None


def _existing(shards: Sequence[Path]) -> Iterator[Path]:
    for path in shards:
        if path.with_suffix(".json").exists():
            yield path.with_suffix(".json")


def page_of(found: dict[str, Any], misses: Misses, album: Album) -> str:
    """The page as HTML."""
    shown = list(_shown(misses))
    album.make((path or "", SIDE) for miss in shown for side in miss["sides"] for path in side[1])
    for miss in shown:
        miss["sides"] = [
            (title, [_picture(album, path or "") for path in paths])
            for title, paths in miss["sides"]
        ]
    ladder = [choice for choice in found["choices"] if choice["group"] == "photos"]
    points = [(each["name"], each["recall_at_1"]) for each in ladder]
    points.append(("all", found["recall_at_1"]))
    return page(
        "evaluate.html",
        found=found,
        key=str(Identity(**found["made_by"]["key"])),
        figures=[(name.replace("_at_", "@").replace("mrr", "mean reciprocal rank"), found[name])
                 for name in ("recall_at_1", "recall_at_5", "recall_at_10", "mrr")],
        said=said,
        said_difference=said_difference,
        plot=plots.intervals(points, "photos of a side", "recall@1") if ladder else "",
        plot_text=", ".join(f"{name}: {figure['value']:.2f}" for name, figure in points),
        misses=shown,
    )  # fmt: skip


def _shown(misses: Misses) -> Iterator[dict[str, Any]]:
    """The worst misses: who asked, who was found, who should have been."""
    for query in misses.worst:
        asked, right = (side.take_one(query) for side in misses.sides)
        yield {
            "listing": int(asked.listing[0]),
            "rank": int(misses.ranks[query]),
            "sides": [
                ("asked", asked.path.tolist()[:PHOTOS]),
                (f"found: listing {misses.rival[query]}", misses.found[query][:PHOTOS]),
                ("should have been", right.path.tolist()[:PHOTOS]),
            ],
        }


def _picture(album: Album, path: str) -> dict[str, str]:
    image, error = album.thumbnail(path, SIDE)
    return {"path": path, "image": image, "error": error}


if __name__ == "__main__":
    command.run(main, "evaluate")
