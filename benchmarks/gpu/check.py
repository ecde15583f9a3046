"""What the steps of the check share: the device, photos, towers, and how a rate is measured."""

import argparse
import gc
import io
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image, ImageOps

from pipeline.encode import GpuDecoder
from pipeline.encoder.model import full_preprocess
from pipeline.encoder.tower import Encoder
from pipeline.photos.pixels import Transform
from pipeline.stage.settings import Settings

Figures = dict[str, Any]
SIZE = (1600, 1200)  # 2 megapixels
# More than one call of the GPU's decoder takes, upright and not, with odd sides.
OTHER_SIZES = [(4032, 3024), (3024, 4032), (1601, 1199), (333, 500), (3000, 800)]
MODEL = "ViT-B-32"
CHANNELS = 3
NO_LIMIT = 10**9
TOY = {"embed_dim": 64, "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64,
       "head_width": 32, "layers": 2}, "text_cfg": {"context_length": 8, "vocab_size": 64,
       "width": 32, "heads": 2, "layers": 1}}  # fmt: skip


class Check:
    """The device, the photos, and towers that were made once."""

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
        return "toy" if self.args.toy else MODEL

    @property
    def half(self) -> str:
        return "fp16" if self.on_gpu else "fp32"

    @cached_property
    def preprocess(self) -> dict[str, Any]:
        return self.encoder(self.model, "fp32", 4).preprocess

    @cached_property
    def transform(self) -> Transform:
        return Transform.from_preprocess_cfg(self.preprocess)

    def gpu_decoder(self) -> GpuDecoder:
        return GpuDecoder(self.preprocess, Settings(decode="gpu"), self.device)

    @property
    def jpegs(self) -> list[bytes]:
        """2-megapixel JPEGs: real photos fitted to that size, and each fourth drawn; or drawn."""
        return self._photos[0]

    @property
    def others(self) -> list[bytes]:
        """JPEGs of other sizes, large ones among them."""
        return self._photos[1]

    @cached_property
    def _photos(self) -> tuple[list[bytes], list[bytes]]:
        real = [] if self.args.photos is None else sorted(
            p for p in self.args.photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg")
        )  # fmt: skip
        alike = [SIZE] * (8 if self.args.toy else 128)
        others = OTHER_SIZES[2:] if self.args.toy else OTHER_SIZES * 2
        jobs = [
            (number, size, real[number % len(real)] if real and number % 4 else None)
            for number, size in enumerate([*alike, *others])
        ]
        with ThreadPoolExecutor(self.args.threads) as pool:
            made = list(pool.map(_photo, jobs))
        return made[: len(alike)], made[len(alike) :]

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
        """As the function, for the time that each rate gets."""
        return threaded(self.args.seconds, threads, work)

    def synchronise(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def threaded(seconds: float, threads: int, work: Callable[[int], int]) -> float:
    """Items a second of `work(turn)`, which returns how many it did, on many threads."""
    end = time.perf_counter() + seconds

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


def forget(name: str, precision: str) -> None:
    """Let go of a tower, and of all that encoders which are gone had on the GPU."""
    _towers.pop((name, precision))
    collect()


def collect() -> None:
    """Give back what encoders that are gone had on the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def numbered(jpeg: bytes, number: int) -> bytes:
    """The same pixels under other bytes: a comment behind the start of the image."""
    return jpeg[:2] + b"\xff\xfe\x00\x0a" + number.to_bytes(8, "big") + jpeg[2:]


def _photo(job: tuple[int, tuple[int, int], Path | None]) -> bytes:
    """A JPEG of a size, made of a real photo; a drawn one where there is none, or a damaged one."""
    number, size, source = job
    image = None if source is None else _fitted(source, size)
    out = io.BytesIO()
    (image or _drawn(number, size)).save(out, "JPEG", quality=88, subsampling="4:2:0")
    return out.getvalue()


def _fitted(source: Path, size: tuple[int, int]) -> Image.Image | None:
    try:
        with Image.open(source) as opened:
            return ImageOps.fit(opened.convert("RGB"), size, Image.Resampling.LANCZOS)
    except Exception:  # noqa: BLE001  Pillow raises all kinds
        return None


def _drawn(number: int, size: tuple[int, int]) -> Image.Image:
    """Noise on gradients."""
    draw = np.random.default_rng(number)
    coarse = draw.integers(0, 256, (24, 32, CHANNELS), np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    grain = draw.integers(0, 24, (size[1], size[0], CHANNELS), np.uint8)
    return Image.fromarray((np.asarray(image) // 2 + grain).astype(np.uint8))


def random_photos(count: int, size: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, CHANNELS, *size), generator=generator, dtype=torch.uint8)


def cosines(vectors: np.ndarray, expected: np.ndarray) -> Figures:
    each = np.einsum("ij,ij->i", vectors.astype(np.float64), expected.astype(np.float64))
    quantiles = {"p50": np.median(each), "p1": np.percentile(each, 1), "min": each.min()}
    return {name: round(float(value), 7) for name, value in quantiles.items()}


def card() -> str:
    """The GPU in use, as the driver and CUDA_VISIBLE_DEVICES know it."""
    return f"GPU-{torch.cuda.get_device_properties().uuid}"


def smi(field: str) -> str | None:
    """What the driver says of the GPU in use, or of its first; None where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        query.append(f"--id={card()}")
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None
