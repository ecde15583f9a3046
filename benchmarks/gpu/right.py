"""Is the GPU right: its tests, its vectors and pixels beside a processor's, a card that is full."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import numpy as np
import psutil
import torch

from benchmarks import measure
from benchmarks.gpu.check import (
    NO_LIMIT,
    Check,
    Figures,
    card,
    collect,
    cosines,
    encoder,
    random_photos,
    smi,
)
from benchmarks.gpu.line import job_of, shard
from pipeline.encode import encode
from pipeline.encoder.model import find_model
from pipeline.encoder.processor import cpu_name
from pipeline.encoder.tower import device_errors, load_encoder
from pipeline.photos.pixels import Transform, load_pixels
from pipeline.stage.errors import DeviceError


def machine(check: Check) -> Figures:
    """What the figures depend on."""
    found: Figures = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "megabytes": psutil.virtual_memory().total // measure.MB,
        **{name: version(name) for name in ("torch", "torchvision", "open_clip_torch")},
    }
    if check.on_gpu:
        free, total = torch.cuda.mem_get_info()
        found |= {"gpu": torch.cuda.get_device_name(), "gpu_megabytes": total // measure.MB}
        found |= {"gpu_free_megabytes": free // measure.MB, "driver": smi("driver_version")}
    return found


def tests(check: Check) -> Figures:
    """The tests that need a GPU."""
    if check.args.toy or importlib.util.find_spec("pytest") is None:
        return {"skipped": "a toy" if check.args.toy else "no pytest here"}
    command = [
        sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider",
        "--noconftest", "-rf", "tests/test_tower.py", "tests/test_gpu.py", "-k", "gpu or cuda",
    ]  # fmt: skip
    other = {} if check.device in ("cpu", "cuda:0") else {"CUDA_VISIBLE_DEVICES": card()}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=150, env={**os.environ, **other}
    )
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
    some = [*check.jpegs[: 8 if check.args.toy else 64], *check.others]
    pixels = [load_pixels(jpeg, check.transform, "full", True, NO_LIMIT) for jpeg in some]
    expected = encoder(check.model, "cpu", "fp32", 8).encode(pixels)
    found: Figures = {"photos": len(some)}
    for precision in ("fp32", "bf16", *(["fp16"] if check.on_gpu else [])):
        vectors = check.encoder(check.model, precision, 32).encode(pixels)
        found[precision] = cosines(vectors, expected)
    if check.on_gpu:
        exact = check.encoder(check.model, "fp32", 32)
        both = [
            (there, here)
            for there, here in zip(check.gpu_decoder().many(some), pixels, strict=True)
            if isinstance(there, torch.Tensor) and there.is_cuda
        ]
        if not both:
            raise RuntimeError(f"expected {len(some)} photos decoded by the GPU, found none")
        differences = [int((there.cpu().int() - here.int()).abs().max()) for there, here in both]
        found["decode_gpu"] = {
            "asked": len(some),
            "decoded": len(both),
            "largest_pixel_difference": max(differences),
            **cosines(exact.encode([t for t, _ in both]), exact.encode([h for _, h in both])),
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


def same_bits(check: Check) -> Figures:
    """The largest difference of a photo's vector by order, mates, padding, threads, batch size.

    And of its pixels as the GPU decodes them, alone and beside others, while others decode.
    """
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
    if check.on_gpu:
        found["decode_gpu"] = decoded_differences(
            check.gpu_decoder().many, [*check.jpegs[:64], *check.others]
        )
    return found


def decoded_differences(
    many: Callable[[Sequence[bytes]], Sequence[object]], files: list[bytes]
) -> Figures:
    """The largest difference of a photo's pixels when it is decoded alone, and beside others.

    Beside others: all of them, in forty orders, on four threads.
    """
    alone = [_on_cpu(many([file])[0]) for file in files]

    def differs(turn: int) -> float:
        order = np.random.default_rng(turn).permutation(len(files))
        together = many([files[row] for row in order])
        return max(
            float((_on_cpu(pixels) - alone[row]).abs().max())
            for row, pixels in zip(order, together, strict=True)
        )

    with ThreadPoolExecutor(4) as pool:
        return {"mates": max(pool.map(differs, range(40)))}


def _on_cpu(pixels: object) -> torch.Tensor:
    if not isinstance(pixels, torch.Tensor):
        raise RuntimeError(f"expected a photo's pixels, found {pixels}")
    return pixels.cpu().int()


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())


def out_of_memory(check: Check) -> Figures:
    """A card that is full ends in one line, for a model and for a shard, which goes through then.

    The lines, and how many photos the shard has when there is memory again.
    """
    if not check.on_gpu:
        return {"skipped": "no CUDA"}
    few = check.files[:512]
    job = job_of(
        check.folder / "photos", check.args.threads, check.encoder(check.model, check.half, 96),
        device=check.device, num_workers=4, precision=check.half, decode="gpu",
        cache_dir=str(check.folder / "full-cache"),
    )  # fmt: skip
    selected = shard(check.folder / "full.parquet", few)

    def run() -> Figures:
        stats = encode(selected, check.folder / "full-encoded.parquet", job.chosen, job)
        return stats.as_dict()

    return {
        "model": _without_memory(lambda: check.encoder(check.model, "fp32", 4096)),
        "shard": _without_memory(run),
        "images": len(few),
        "failed": sum(run()["failed"].values()),
    }


def _without_memory(work: Callable[[], object]) -> str:
    """The line that a work ends with where torch may have 32 MB more than it holds."""
    collect()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**25) / total)
    try:
        with device_errors("batch_size 4096"):
            work()
    except DeviceError as error:
        return str(error)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    raise RuntimeError("expected memory to run out, and it did not")
