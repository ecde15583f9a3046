"""Time reading, decoding and encoding of a sample: each apart, then all together.

Reads: the first images of one select shard, and their files. Writes: benchmark.json and a short
table. Guarantees: never touches the vector cache or the database.

What to expect: together takes as long as the slowest stage where the stages have hardware of their
own (CUDA), and as long as decoding plus encoding where they share the cores (CPU). Where another
way to decode, or another precision, would bring more than a tenth, that is measured, and said; of
each precision that is fast here also what it costs: the cosines of its vectors to those of fp32.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.cache.parts import Entry
from pipeline.cache.vectors import VectorCache
from pipeline.encode import GPU_BATCHES, SETTINGS, EncodeJob, Line, Photo, add_encoder_flags
from pipeline.encoder.model import fast_precisions
from pipeline.encoder.processor import NO_BF16, cpu_name, has_bf16
from pipeline.photos.files import PhotoError
from pipeline.stage import command, parquet, settings
from pipeline.stage.command import log
from pipeline.stage.errors import DataError, DeviceError
from pipeline.stage.settings import Environment, Settings

if TYPE_CHECKING:
    import torch

WORTH = 1.1  # what a setting must bring to be advised
CHUNK = 256  # images held in memory while the stages are timed apart; more on many cores
SAMPLE_S = 2.0  # that the configured precision takes for the photos on which others are compared


class NoCache(VectorCache):
    """Finds nothing and keeps nothing."""

    def __init__(self, dim: int) -> None:
        super().__init__(Path(os.devnull), dim)

    def add(self, entry: Entry) -> None:
        """Forget it."""


def main() -> None:
    parser = command.stage_parser(__doc__)
    parser.add_argument("--selected", type=Path, required=True, help="select shard to read")
    parser.add_argument("--report", type=Path, required=True, help="benchmark.json to write")
    add_encoder_flags(parser)
    settings.add_flags(parser, "benchmark_images")
    args = parser.parse_args()
    chosen = settings.from_flags(args)
    job = EncodeJob.prepare(chosen, Environment.read(), args.threads, args.weights)
    report = benchmark(args.selected, chosen, job)
    parquet.write_json(args.report, report)
    for line in table(report):
        log.info("%s", line)


def benchmark(selected: Path, chosen: Settings, job: EncodeJob) -> dict[str, Any]:
    """The report over the first `benchmark_images` of a select shard."""
    paths = list(islice(_paths(selected), chosen.benchmark_images))
    if not paths:
        raise DataError(
            "selected images to time", "an empty shard", str(selected),
            "nothing is pending: --config force=true selects every eligible listing",
        )  # fmt: skip
    with Line(job, NoCache(job.dim)) as line:
        apart = time_apart(paths, job, line)
        compared = precisions(paths, job, line, apart)
        advised = advice(paths, job, apart, compared)
        start = time.perf_counter()
        done = list(line.done(Photo(path) for path in paths))
        together = time.perf_counter() - start
    failed = sum(photo.error is not None for photo in done)
    if failed == len(done):
        raise DataError("a readable image", str(done[0].error), str(selected), "IMAGE_ROOT_DIR?")
    return {
        "images": len(done),
        "failed": failed,
        "images_per_second": round(len(done) / together, 2),
        "wall_s": round(together, 3),
        **{f"{stage}_s": round(seconds, 3) for stage, seconds in apart.items()},
        "binding_stage": max(apart, key=lambda stage: apart[stage]),
        "bound_images_per_second": round(len(done) / _bound(apart, job), 2),
        "precisions": compared,
        "advice": advised,
        "hardware": hardware(job),
        "settings": chosen.model_dump(include={*SETTINGS, "benchmark_images"})
        | {"device": job.device, "precision": job.precision, "model_rev": job.model.model_rev,
           "model_name": job.model.name if ":" not in job.model.name else "local-dir"},
    }  # fmt: skip


def _bound(apart: dict[str, float], job: EncodeJob) -> float:
    """Seconds that all stages together take at least: cores are shared, a GPU or store is not."""
    if job.device != "cpu":
        return max(apart.values())
    read = apart["read"] if job.photos.readers else 0.0
    return max(read, sum(apart.values()) - read)


def advice(
    paths: list[str | None],
    job: EncodeJob,
    apart: dict[str, float],
    compared: dict[str, dict[str, float]],
) -> dict[str, float]:
    """Settings that would move the bound, with the images/s that it then is, best first.

    Other ways to decode are timed on the first photos; what more threads bring is worked out; the
    precisions are compared already.
    """
    chosen, some = job.chosen, paths[:CHUNK]
    decode_s: dict[str, float] = {}
    for mode in ("scaled", "gpu"):
        if mode == chosen.decode or (mode == "gpu" and job.device == "cpu"):
            continue
        changed = chosen.model_copy(update={"decode": mode})
        other = dataclasses.replace(job, chosen=changed)
        vars(other)["encoder"] = job.encoder
        try:
            with Line(other, NoCache(job.dim)) as line:
                for photos in some[: line.together], some:  # the first make a GPU's decoder start
                    took = time_apart(photos, other, line, only=("read", "decode"))["decode"]
        except DeviceError as error:
            log.warning("decode %s is not compared: %s", mode, error)
            continue
        decode_s[f"decode: {mode}"] = took * len(paths) / len(some)
    if job.workers < job.threads:
        decode_s["num_workers: auto"] = apart["decode"] * job.workers / job.threads
    now = _bound(apart, job)
    bounds = {name: _bound({**apart, "decode": took}, job) for name, took in decode_s.items()}
    for precision, figures in compared.items():
        bounds[f"precision: {precision}"] = len(paths) / figures["bound_images_per_second"]
    return {
        name: round(len(paths) / bound, 2)
        for name, bound in sorted(bounds.items(), key=lambda item: item[1])
        if bound * WORTH < now
    }


def precisions(
    paths: list[str | None], job: EncodeJob, line: Line, apart: dict[str, float]
) -> dict[str, dict[str, float]]:
    """Of the configured precision and the others that are fast here: images/s of encoding, the
    bound with it, and the cosines to fp32 of the vectors of some photos.

    Empty where there is no other, or no photo to compare. One that fails on the device is left
    out, with a warning.
    """
    others = [name for name in fast_precisions(job.device) if name != job.precision]
    pixels = _sample(paths, job, line, len(paths) / apart["encode"]) if others else []
    seconds = {job.precision: apart["encode"]}
    vectors: dict[str, np.ndarray] = {}
    for name in others if pixels else []:
        try:
            mine, theirs = _side_by_side(job, dataclasses.replace(job, precision=name), pixels)
        except DeviceError as error:
            log.warning("precision %s is not compared: %s", name, error)
            continue
        seconds[name] = apart["encode"] * theirs.seconds / mine.seconds
        vectors |= {job.precision: mine.vectors, name: theirs.vectors}
    if "fp32" not in vectors:
        return {}
    sound = np.isfinite(np.sum([*vectors.values()], axis=(0, 2)))
    cosines = {name: (each * vectors["fp32"]).sum(1)[sound] for name, each in vectors.items()}
    return {
        name: {
            "encode_images_per_second": round(len(paths) / seconds[name], 2),
            "bound_images_per_second": round(
                len(paths) / _bound({**apart, "encode": seconds[name]}, job), 2
            ),
            "images_compared": len(each),
            "cosine_p50": round(float(np.median(each)), 6),
            "cosine_p1": round(float(np.percentile(each, 1)), 6),
            "cosine_min": round(float(each.min()), 6),
        }
        for name, each in cosines.items()
        if len(each)
    }


def _sample(
    paths: list[str | None], job: EncodeJob, line: Line, images_per_second: float
) -> "list[torch.Tensor]":
    """The pixels of the first photos: full batches for all threads, of SAMPLE_S or CHUNK."""
    together = job.encoder.batch_rows * (job.workers if job.device == "cpu" else GPU_BATCHES)
    rounds = int(min(CHUNK, SAMPLE_S * images_per_second) / together)
    readers = job.photos.readers or job.workers
    with ThreadPoolExecutor(job.workers) as cores, ThreadPoolExecutor(readers) as reading:
        read = _or_none(lambda path: job.photos.read(path)[0])
        files = reading.map(read, paths[: together * max(1, rounds)])
        readable = [data for data in files if data is not None]
        handfuls = cores.map(line.decoder.many, _chunks(readable, line.together))
        return [each for many in handfuls for each in many if not isinstance(each, PhotoError)]


class Encoded(NamedTuple):
    """What a precision made of the sample."""

    seconds: float
    vectors: np.ndarray


def _side_by_side(one: EncodeJob, other: EncodeJob, pixels: "list[torch.Tensor]") -> list[Encoded]:
    """The sample as both encode it, a few batches by turns, so that both meet the same machine."""
    from pipeline.encoder.tower import device_errors

    encoders = one.encoder, other.encoder  # loads the other, outside of the clock
    rows = encoders[0].batch_rows
    seconds = [0.0, 0.0]
    vectors: list[list[np.ndarray]] = [[], []]
    with ThreadPoolExecutor(one.workers) as pool, device_errors(f"batch_size {rows}"):
        for turn in _chunks(list(_chunks(pixels, rows)), one.workers):
            for which, encoder in enumerate(encoders):
                start = time.perf_counter()
                vectors[which] += pool.map(encoder.encode, turn)
                seconds[which] += time.perf_counter() - start
    return [Encoded(s, np.concatenate(v)) for s, v in zip(seconds, vectors, strict=True)]


def time_apart(
    paths: list[str | None],
    job: EncodeJob,
    line: Line,
    only: tuple[str, ...] = ("read", "decode", "encode"),
) -> dict[str, float]:
    """Seconds of wall time of each stage alone, on all the threads that it would have."""
    seconds = dict.fromkeys(only, 0.0)
    rows = job.encoder.batch_rows  # loads the encoder, outside of the clock
    readers = job.photos.readers or job.workers
    with ThreadPoolExecutor(job.workers) as cores, ThreadPoolExecutor(readers) as reading:

        def timed(stage: str, work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
            pool = reading if stage == "read" else cores
            start = time.perf_counter()
            results = [result for result in pool.map(work, items) if result is not None]
            seconds[stage] += time.perf_counter() - start
            return results

        for chunk in _chunks(paths, max(CHUNK, job.workers * rows)):
            files = timed("read", _or_none(lambda path: job.photos.read(path)[0]), chunk)
            handfuls = timed("decode", line.decoder.many, _chunks(files, line.together))
            if "encode" in only:
                pixels = [p for many in handfuls for p in many if not isinstance(p, PhotoError)]
                timed("encode", line.encode_pixels, _chunks(pixels, rows))
    return seconds


def _or_none(work: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def quiet(item: Any) -> Any:
        try:
            return work(item)
        except PhotoError:
            return None

    return quiet


def _paths(selected: Path) -> Iterator[str | None]:
    for batch in parquet.batches(selected, parquet.ROW_GROUP, ["storage_path"]):
        yield from batch.column(0).to_pylist()


def _chunks(items: list[Any], length: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), length):
        yield items[start : start + length]


def hardware(job: EncodeJob) -> dict[str, Any]:
    """The machine, as far as the figures depend on it."""
    import torch

    gpu = torch.cuda.get_device_name(job.device) if job.device != "cpu" else None
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": job.threads,
        "bf16": has_bf16(),
        "gpu": gpu,
        "torch": version("torch"),
        "open_clip": version("open_clip_torch"),
    }


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report as lines of a table."""
    images = report["images"]
    for stage in ("read", "decode", "encode"):
        seconds = report[f"{stage}_s"]
        binds = "  <- binds" if stage == report["binding_stage"] else ""
        rate = images / seconds if seconds else float("inf")
        yield f"{stage:<9} {seconds:9.2f} s {rate:10.1f} images/s{binds}"
    yield f"{'together':<9} {report['wall_s']:9.2f} s {report['images_per_second']:10.1f} images/s"
    for setting, rate in report["advice"].items():
        bound = report["bound_images_per_second"]
        yield f"{setting} would raise the bound from {bound:.1f} to {rate:.1f} images/s"
    for precision, found in report["precisions"].items():
        yield (
            f"{precision}: {found['encode_images_per_second']:.1f} images/s to encode; cosine to"
            f" fp32 of {found['images_compared']} photos: median {found['cosine_p50']:.5f},"
            f" p1 {found['cosine_p1']:.5f}, lowest {found['cosine_min']:.5f}"
        )
    if report["precisions"]:
        yield "what each finds on photos of yours: snakemake evaluate, as in docs/evaluate.md"
    if report["hardware"]["gpu"] is None and not report["hardware"]["bf16"]:
        yield NO_BF16


if __name__ == "__main__":
    command.run(main, "benchmark")
