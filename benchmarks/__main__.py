"""All benchmarks, one after the other, and their Markdown table on stdout.

The JSON lines go to stderr as they come. With `--photos`, a folder of real photos, pixels and
vectors are compared on these, and the decoders on both; without it, photos are rendered.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import material, measure
from pipeline.encoder.processor import cpu_name

Line = dict[str, Any]


def main() -> None:
    parser = material.parser(__doc__)
    parser.add_argument("--photos", type=Path, help="folder of real photos")
    parser.add_argument("--images", type=int, default=128, help="photos of each size")
    parser.add_argument("--listings", type=int, default=1_000_000, help="in the database")
    parser.add_argument("--vectors", type=int, default=200_000, help="to aggregate and to load")
    parser.add_argument("--small", type=int, default=100_000, help="photos in the long shard")
    args = parser.parse_args()
    with material.work_folder(args.work) as folder:
        common = ["--work", str(folder), "--threads", str(args.threads)]
        common += ["--rounds", str(args.rounds)]
        real = ["--photos", str(args.photos)] if args.photos else []
        lines = [
            *run("decode", *common, *real, "--images", str(args.images), "--others", "4"),
            *run("parity", *common, *real),
            *run("precision", *common, *real),
            *run("end_to_end", *common, "--images", str(2 * args.images)),
            *run("cache_hits", *common, "--images", str(args.small)),
            *run("object_store", *common, "--images", str(args.images), "--rounds", "5"),
            *run("memory", *common, "--images", str(args.small)),
            *run("aggregate", *common, "--images", str(args.vectors)),
            *run("evaluate", *common, "--listings", str(args.vectors // 10)),
            *run("load", *common, "--listings", str(args.vectors), "--rounds", "5"),
            *run("export", *common, "--listings", str(args.listings)),
        ]
    print("\n".join(markdown(lines, args.threads)))


def run(name: str, *flags: str) -> list[Line]:
    """The lines of one benchmark, in a process of its own."""
    measure.say(f"--- {name}")
    command = [sys.executable, "-m", f"benchmarks.{name}", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    sys.stderr.write(done.stdout)
    return [json.loads(line) for line in done.stdout.splitlines()]


def markdown(lines: list[Line], threads: int) -> Iterator[str]:
    """The table, headed by the machine."""
    yield (
        f"Measured on {cpu_name()}, {threads} of {os.cpu_count()} cores, {platform.system()},"
        f" Python {platform.python_version()}, torch {version('torch')}; the fastest of a few"
        " rounds; Postgres does not wait for the disk, and there is no index on vec."
    )
    yield ""
    yield "| what | here | the plain way | ratio |"
    yield "|---|---:|---:|---:|"
    for line in lines:
        yield from ROWS[line["benchmark"]](line)


def _row(what: str, here: str, plain: str = "", ratio: str = "") -> str:
    return f"| {what} | {here} | {plain} | {ratio} |"


def _decode(line: Line) -> Iterator[str]:
    what = f"{line['format']} {line['size']}, {line['photos']}, {line['megabytes']:.1f} MB"
    plain = f"{line['plain_images_per_second']:.1f} images/s"
    for mode in ("full", "scaled"):
        if rate := line.get(f"{mode}_images_per_second"):
            here = f"{rate:.1f} images/s"
            if mode == "scaled":
                here += f", the bare decoder {line['bare_images_per_second']:.1f}"
            yield _row(f"decode {what}: {mode}", here, plain, f"{line[f'{mode}_ratio']:.1f}")


def _parity(line: Line) -> Iterator[str]:
    for what in ("image", "listing"):
        yield _row(
            f"cosine of {line[f'{what}s']} {what}s, {line['photos']}: {line['decode']}",
            f"p50 {line[f'{what}_p50']:.5f}, p1 {line[f'{what}_p1']:.5f},"
            f" min {line[f'{what}_min']:.5f}",
        )


def _precision(line: Line) -> Iterator[str]:
    cosines = f"p50 {line['p50']:.5f}, p1 {line['p1']:.5f}, min {line['min']:.5f}"
    yield _row(
        f"{line['model']} in {line['precision']}, {line['images']} images, {line['photos']}",
        f"{line['images_per_second']:.1f} images/s; cosine {cosines}",
        "fp32",
        f"{line['ratio']:.2f}",
    )


def _precision_recall(line: Line) -> Iterator[str]:
    yield _row(
        f"recall@1 of {line['listings']} listings, {line['photos']}: {line['precision']} asks"
        f" {line['gallery']}",
        f"{line['recall_at_1']:.3f}; {line['difference']:+.4f} ({line['low']:+.4f} to"
        f" {line['high']:+.4f}) to fp32",
    )


def _end_to_end(line: Line) -> Iterator[str]:
    yield _row(
        f"files to table, jpg {line['photos']}, rendered, ViT-B-32: {line['decode']}",
        f"{line['images_per_second']:.1f} images/s ({line['share_of_bound']:.0%} of the bound)",
        f"{line['plain_images_per_second']:.1f} images/s",
        f"{line['ratio']:.1f}",
    )


def _cache_hits(line: Line) -> Iterator[str]:
    yield _row(
        "edited listings, photos unchanged",
        f"{line['hits_per_second']:.0f} images/s",
        f"our own encoding {line['encoded_per_second']:.1f} images/s",
        f"{line['ratio']:.0f}",
    )


def _object_store(line: Line) -> Iterator[str]:
    yield _row(
        f"encode from an object store that answers after {line['late_s']} s",
        f"{line['store_images_per_second']:.1f} images/s",
        f"from a folder {line['folder_images_per_second']:.1f} images/s",
        f"{line['ratio']:.2f}",
    )


def _memory(line: Line) -> Iterator[str]:
    marks = ", ".join(f"{mb} at {share}" for share, mb in line["megabytes_at"].items())
    yield _row(f"memory, {line['images']} small photos: {line['what']}", f"peak MB {marks}")


def _aggregate(line: Line) -> Iterator[str]:
    grown = f"{line['megabytes_before']:.0f} to {line['megabytes_peak']:.0f} MB"
    yield _row("aggregate", f"{line['images_per_second']:.0f} images/s, {grown}")


def _evaluate(line: Line) -> Iterator[str]:
    grown = f"{line['megabytes_before']:.0f} to {line['megabytes_peak']:.0f} MB"
    yield _row(
        f"evaluate, {line['queries']} queries, {line['gallery']} listings",
        f"{line['seconds']:.0f} s, {grown}",
    )


def _load(line: Line) -> Iterator[str]:
    yield _row(
        "COPY of listing vectors",
        f"{line['rows_per_second']:.0f} rows/s",
        f"psql `\\copy` {line['psql_rows_per_second']:.0f} rows/s",
        f"{line['share_of_psql']:.2f}",
    )
    yield _row("load: COPY and merge, all new", f"{line['load_rows_per_second']:.0f} rows/s")
    yield _row("load, all unchanged", f"{line['unchanged_rows_per_second']:.0f} rows/s")


def _export(line: Line) -> Iterator[str]:
    yield _row(
        f"export and select, {line['listings']} listings of {line['images_per_listing']} images:"
        f" {line['what']}",
        f"{line['export_seconds']:.1f} s and {line['select_seconds']:.1f} s",
    )


ROWS: dict[str, Callable[[Line], Iterator[str]]] = {
    "decode": _decode,
    "parity": _parity,
    "precision": _precision,
    "precision recall": _precision_recall,
    "end to end": _end_to_end,
    "cache hits": _cache_hits,
    "object store": _object_store,
    "memory": _memory,
    "aggregate": _aggregate,
    "evaluate": _evaluate,
    "load": _load,
    "export and select": _export,
}


if __name__ == "__main__":
    main()
