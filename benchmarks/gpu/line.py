"""Files to vectors by the encode stage, in one process and in several that share the card."""

import dataclasses
import io
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
from PIL import Image

from benchmarks import measure
from benchmarks.gpu.check import (
    CHANNELS,
    MODEL,
    Check,
    Figures,
    encoder,
    numbered,
    smi,
)
from pipeline.benchmark import NoCache
from pipeline.encode import EncodeJob, Line, Photo, encode
from pipeline.encoder.claim import wait_asleep
from pipeline.encoder.tower import Encoder
from pipeline.stage import parquet
from pipeline.stage.settings import Environment, Settings

PER_LISTING = 4
READY_S = 75  # that processes get to load their model
LONGEST_S = 240  # that processes get for their work
MOST_PROCESSES = 8
FEWER = {"scaled": 2, "ViT-L-14": 4}  # a slower run makes do with one photo in so many


def line(check: Check) -> Figures:
    """Files to vectors by the encode stage, in one process and in several that share the card."""
    found: Figures = {}
    check.files  # noqa: B018  made before any clock starts
    for run in check.args.lines or _lines(check):
        model, mode, processes = run.split(":")
        try:
            figures = _line(check, model, mode, int(processes))
        except RuntimeError as error:  # as many may be too many for a card's memory
            figures = {"error": str(error)}
        found[f"{model}, {mode}, {processes} processes"] = figures
        measure.say(f"  {model}, {mode}, {processes} processes: {figures}")
    return found


def _lines(check: Check) -> list[str]:
    """The runs of the line as MODEL:DECODE:PROCESSES, with four cores and with two for each."""
    if check.args.toy:
        return ["toy:scaled:1"]
    four, two = (min(MOST_PROCESSES, max(1, check.args.threads // cores)) for cores in (4, 2))
    runs = [f"{MODEL}:scaled:{two}"]
    if check.on_gpu:
        runs += [f"{MODEL}:gpu:1", f"{MODEL}:gpu:{four}", f"{MODEL}:gpu:{two}", "ViT-L-14:gpu:2"]
    return list(dict.fromkeys(runs))


def _line(check: Check, model: str, mode: str, processes: int) -> Figures:
    files = check.files[:: max(FEWER.get(model, 1), FEWER.get(mode, 1))]
    share = len(files) // processes
    threads = max(1, check.args.threads // processes)
    shares = [
        (check.folder, files[n * share : (n + 1) * share], model, mode, check.device, check.half,
         threads)
        for n in range(processes)
    ]  # fmt: skip
    samples: list[float] = []
    done = side_by_side(_encode_share, shares, busy(check.on_gpu, samples))
    seconds = max(d["end"] for d in done) - min(d["start"] for d in done)
    return {
        "images_per_second": share * processes / seconds,
        "cores_used": sum(d["cpu_s"] for d in done) / seconds,
        "gpu_busy": round(float(np.mean(samples)), 2) if samples else None,
        "failed": sum(d["failed"] for d in done),
        "seconds": seconds,
    }


def _encode_share(
    folder: Path, paths: list[str], model: str, mode: str, device: str, precision: str,
    threads: int, barrier: Any,
) -> Figures:  # fmt: skip
    """One encode stage over its own shard and cache; the clock starts when all are ready."""
    wait_asleep(device)
    made = encoder(model, device, precision, 4 if device == "cpu" else Settings().batch_size)
    job = job_of(
        folder / "photos", threads, made, device=device, num_workers="auto", decode=mode,
        precision=precision, cache_dir=str(folder / f"cache-{os.getpid()}"),
    )  # fmt: skip
    with Line(job, NoCache(made.dim)) as warm:
        list(warm.done(Photo(path) for path in paths[: min(len(paths), 64)]))
    selected = shard(folder / f"selected-{os.getpid()}.parquet", paths)
    barrier.wait(READY_S)
    start, before = time.time(), os.times()
    stats = encode(selected, folder / f"encoded-{os.getpid()}.parquet", job.chosen, job)
    after = os.times()
    return {
        "start": start,
        "end": time.time(),
        "cpu_s": after.user + after.system - before.user - before.system,
        "failed": sum(stats.failed.values()),
    }


def job_of(root: Path, threads: int, made: Encoder, **changes: Any) -> EncodeJob:
    """A job of an encoder that is made already, and of photos in that encoder's size."""
    photos = Environment.read({"IMAGE_ROOT_DIR": str(root)})
    chosen = Settings(model_name=MODEL, pretrained="openai", **changes)  # a name to be known by
    job = EncodeJob.prepare(chosen, photos, threads)
    model = dataclasses.replace(job.model, embed_dim=made.dim, preprocess=made.preprocess)
    job = dataclasses.replace(job, model=model)
    vars(job)["encoder"] = made
    return job


def shard(path: Path, storage_paths: Sequence[str]) -> Path:
    """A select shard of these photos."""
    rows = len(storage_paths)
    numbers = np.arange(rows)
    columns = {
        "generation": np.ones(rows, np.int32),
        "listing_id": numbers // PER_LISTING,
        "edited_date": pa.array(numbers // PER_LISTING, pa.timestamp("us", tz="UTC")),
        "image_index": (numbers % PER_LISTING).astype(np.int32),
        "storage_path": storage_paths,
        "score": np.zeros(rows, np.int32),
        "rank": (numbers % PER_LISTING + 1).astype(np.int8),
        "fallback": np.zeros(rows, bool),
    }
    table = pa.table(columns, schema=parquet.SELECTED)
    with parquet.writer(path, table.schema, {"export": {"force": False}}) as writer:
        writer.write_table(table)
    return path


@contextmanager
def busy(on_gpu: bool, samples: list[float]) -> Iterator[None]:
    """The share of the time in which a kernel ran on the GPU, sampled by the driver."""
    stop = threading.Event()

    def watch() -> None:
        while on_gpu and not stop.wait(0.3):
            if (said := smi("utilization.gpu") or "").isdigit():
                samples.append(int(said) / 100)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        del samples[:1]  # the driver's first is of the time before, too


def side_by_side(
    work: Callable[..., Any],
    shares: Sequence[tuple[Any, ...]],
    meanwhile: AbstractContextManager[object] | None = None,
) -> list[Any]:
    """What `work(*share, barrier)` returns, of a process for each share.

    `meanwhile` is entered once all are at the barrier. One that fails, dies or hangs ends all
    others, and the step with its words.
    """
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(len(shares) + 1), context.Queue()
    workers = [
        context.Process(target=_work, args=(work, share, barrier, results), daemon=True)
        for share in shares
    ]
    done: list[Any] = []
    try:
        for worker in workers:
            worker.start()
        try:
            barrier.wait(READY_S)
        except threading.BrokenBarrierError:
            raise RuntimeError(_why_broken(results)) from None
        with meanwhile or nullcontext():
            end = time.monotonic() + LONGEST_S
            while len(done) < len(workers):
                done.append(_next(results, workers, end))
        return done
    finally:
        for worker in workers:
            worker.join(5 if len(done) == len(workers) else 0)
            worker.kill()
            worker.join()


def _work(work: Callable[..., Any], share: tuple[Any, ...], barrier: Any, results: Any) -> None:
    try:
        results.put((True, work(*share, barrier)))
    except threading.BrokenBarrierError:
        pass  # another's fault, which that one says
    except Exception as error:  # noqa: BLE001  told to the parent, which raises it
        results.put((False, f"{type(error).__name__}: {error}"))
        barrier.abort()


def _why_broken(results: Any) -> str:
    try:
        return str(results.get(timeout=5)[1])
    except queue.Empty:
        return f"expected all processes to be ready in {READY_S} s"


def _next(results: Any, workers: Sequence[Any], end: float) -> Any:
    """The next result; RuntimeError where a process failed, died without a word, or hangs."""
    while True:
        try:
            well, result = results.get(timeout=2)
        except queue.Empty:
            died = [worker.exitcode for worker in workers if worker.exitcode]
            if died or not any(worker.is_alive() for worker in workers):
                raise RuntimeError(f"a process ended with exit codes {died}") from None
            if time.monotonic() > end:
                raise RuntimeError(f"expected the work to be done in {LONGEST_S} s") from None
            continue
        if not well:
            raise RuntimeError(result)
        return result


def memory(check: Check) -> Figures:
    """Megabytes of this process and of the GPU along a shard of small photos of many sizes."""
    count = 200 if check.args.toy else check.args.small
    root = check.folder / "small"
    root.mkdir(exist_ok=True)
    draw = np.random.default_rng(0)
    for number in range(256):
        size = 4 + number % 13, 5 + number % 17
        block = draw.integers(0, 256, (*size, CHANNELS), np.uint8).repeat(8, 0).repeat(8, 1)
        out = io.BytesIO()
        Image.fromarray(block).save(out, "JPEG")
        for k in range(number, count, 256):
            (root / f"{k}.jpg").write_bytes(numbered(out.getvalue(), k))
    made = check.encoder(check.model, check.half, 96 if check.on_gpu else 4)
    job = job_of(
        root, check.args.threads, made, device=check.device, num_workers=4, precision=check.half,
        decode="gpu" if check.on_gpu else "full",
    )  # fmt: skip
    marks, process = {}, psutil.Process()
    shares = {int(count * share): f"{share:.0%}" for share in (0.1, 0.5, 0.999)}
    start = time.perf_counter()
    with Line(job, NoCache(made.dim)) as small:
        for done, _ in enumerate(small.done(Photo(f"{n}.jpg") for n in range(count))):
            if name := shares.get(done):
                marks[name] = process.memory_info().rss // measure.MB
                if check.on_gpu:
                    free, total = torch.cuda.mem_get_info()
                    marks[f"gpu {name}"] = (total - free) // measure.MB
    return {"images": count, "images_per_second": count / (time.perf_counter() - start)} | marks
