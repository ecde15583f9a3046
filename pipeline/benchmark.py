"""Time reading, decoding and encoding of a sample: each apart, then all together.

Reads: the first images of one select shard, and their files. Writes: benchmark.json and a short
table. Guarantees: never touches the vector cache or the database.

What to expect: together takes as long as the slowest stage where the stages have hardware of their
own (CUDA), and as long as decoding plus encoding where they share the cores (CPU). Where another
way to decode would bring more than a tenth, that is measured, and said.
"""

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.cache.vectors import NoCache
from pipeline.encode import SETTINGS, EncodeJob, Line, Photo, add_encoder_flags
from pipeline.photos.files import PhotoError
from pipeline.stage import command, parquet, settings
from pipeline.stage.command import log
from pipeline.stage.errors import DataError
from pipeline.stage.settings import Environment, Settings

WORTH = 1.1  # what a setting must bring to be advised
CHUNK = 256  # images held in memory while the stages are timed apart; more on many cores


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
        advised = advice(paths, job, apart)
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


def advice(paths: list[str | None], job: EncodeJob, apart: dict[str, float]) -> dict[str, float]:
    """Settings that would move the bound, with the images/s that it then is, best first.

    Other ways to decode are timed on the first photos; what more threads bring is worked out.
    """
    chosen, some = job.chosen, paths[:CHUNK]
    decode_s: dict[str, float] = {}
    for mode in ("scaled", "gpu"):
        if mode == chosen.decode or (mode == "gpu" and job.device == "cpu"):
            continue
        changed = chosen.model_copy(update={"decode": mode})
        other = dataclasses.replace(job, chosen=changed)
        vars(other)["encoder"] = job.encoder
        with Line(other, NoCache(job.dim)) as line:
            took = time_apart(some, other, line, only=("read", "decode"))["decode"]
        decode_s[f"decode: {mode}"] = took * len(paths) / len(some)
    if job.workers < job.threads:
        decode_s["num_workers: auto"] = apart["decode"] * job.workers / job.threads
    now = _bound(apart, job)
    bounds = {name: _bound({**apart, "decode": took}, job) for name, took in decode_s.items()}
    return {
        name: round(len(paths) / bound, 2)
        for name, bound in sorted(bounds.items(), key=lambda item: item[1])
        if bound * WORTH < now
    }


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
        "gpu": gpu,
        "torch": version("torch"),
        "open_clip": version("open_clip_torch"),
    }


def cpu_name() -> str:
    """The processor as its maker calls it, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


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


if __name__ == "__main__":
    command.run(main, "benchmark")
