"""A stranger's file becomes the pixels that open_clip would see, or one short error.

Tests on real photos read the folder LISTING_PHOTOS_DIR and skip without it. LISTING_FUZZ_ROUNDS
says how many mutated files to try.
"""

import io
import os
import random
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from open_clip.transform import image_transform
from PIL import Image, ImageOps

from pipeline.photos import pixels as image_module
from pipeline.photos.files import PhotoError
from pipeline.photos.pixels import Decode, Transform, load_pixels
from pipeline.stage.errors import ModelError

pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("ignore")]

MAX_PIXELS = 50_000_000
ROUNDS = int(os.environ.get("LISTING_FUZZ_ROUNDS", "60"))
PHOTOS = os.environ.get("LISTING_PHOTOS_DIR")
SMALL = Transform(size=(8, 8))
needs_photos = pytest.mark.skipif(not PHOTOS, reason="LISTING_PHOTOS_DIR is not set")


def real(*patterns: str) -> list[Path]:
    """Real photos, in order; none without LISTING_PHOTOS_DIR."""
    ends = {".jpg", ".png", ".gif", ".webp", ".heic", ".avif", ".bmp", ".tif", ".mpo"}
    found = {p for pattern in patterns for p in Path(PHOTOS or "/nowhere").glob(pattern)}
    return sorted(p for p in found if p.suffix in ends)


def scene(width: int = 90, height: int = 60) -> Image.Image:
    """A smooth picture, other in each corner, with a sharp bar."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack(
        [255 * x // max(1, width - 1), 255 * y // max(1, height - 1), 128 + 0 * x], axis=2
    )
    pixels[height // 4 : height // 3, width // 4 : width // 2] = (250, 20, 20)
    return Image.fromarray(pixels.astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def oriented(orientation: Any) -> Image.Exif:
    """EXIF with nothing but an orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def load(
    data: bytes,
    transform: Transform | None = None,
    decode: Decode = "full",
    upright: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> torch.Tensor:
    """load_pixels, with its promise about the tensor checked."""
    transform = transform or Transform()
    pixels = load_pixels(data, transform, decode, upright, max_pixels)
    assert ((3, *transform.size), torch.uint8) == (tuple(pixels.shape), pixels.dtype)
    assert pixels.is_contiguous()
    return pixels


def expected_pixels(image: Image.Image, **cfg: Any) -> torch.Tensor:
    """open_clip's own transform of an upright, opaque RGB image, as levels 0 to 255."""
    size = cfg.pop("size", 224)
    transform = image_transform(size, False, mean=(0, 0, 0), std=(1, 1, 1), **cfg)
    levels: torch.Tensor = (transform(image) * 255).round().to(torch.uint8)
    return levels


def difference(a: torch.Tensor, b: torch.Tensor) -> int:
    """The largest difference of any pixel, in levels."""
    return int((a.int() - b.int()).abs().max())


def opaque(image: Image.Image) -> Image.Image:
    """The upright RGB image over white, by Pillow alone."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "I;16":
        grey = np.asarray(image).astype(float)
        levels = np.round(grey / 257).astype(np.uint8)
        levels[grey == image.info.get("transparency", -1)] = 255
        return Image.fromarray(levels).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# The transform


def test_a_transform_is_what_open_clip_keeps_with_a_model() -> None:
    """Every key of a preprocess_cfg arrives, and others are left alone."""
    cfg = {
        "size": [336, 224],
        "mode": "RGB",
        "mean": [0.5, 0.25, 0.75],
        "std": 0.5,
        "interpolation": "bilinear",
        "resize_mode": "squash",
        "fill_color": 7,
        "unknown": 1,
    }

    expected = Transform((336, 224), "bilinear", "squash", 7, (0.5, 0.25, 0.75), (0.5, 0.5, 0.5))
    assert expected == Transform.from_preprocess_cfg(cfg)


def test_missing_keys_have_open_clips_defaults() -> None:
    """An empty cfg is open_clip's default, and None and 'random' mean the same as there."""
    cfg = {"size": 224, "interpolation": "random", "mean": None}

    assert Transform() == Transform.from_preprocess_cfg({}) == Transform.from_preprocess_cfg(cfg)


@pytest.mark.parametrize(
    "cfg", [{"mode": "L"}, {"interpolation": "nearest"}, {"resize_mode": "widest"}]
)
def test_a_transform_that_cannot_be_done_is_a_model_error(cfg: dict[str, str]) -> None:
    """A model that wants something else is refused, never approximated."""
    with pytest.raises(ModelError, match=next(iter(cfg.values()))):
        Transform.from_preprocess_cfg(cfg)


@pytest.mark.parametrize(
    "cfg",
    [
        {},
        {"interpolation": "bilinear"},
        {"size": 225},
        {"size": (96, 64)},
        {"size": (64, 97), "interpolation": "bilinear"},
        {"resize_mode": "longest", "fill_color": 99},
        {"resize_mode": "longest", "size": (65, 96)},
        {"resize_mode": "squash"},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(640, 427), (427, 640), (31, 47), (224, 224), (1, 1), (999, 90)])
def test_full_is_open_clips_transform_to_three_levels(
    cfg: dict[str, Any], size: tuple[int, int]
) -> None:
    """Each resize mode, interpolation and odd size gives open_clip's pixels."""
    image = scene(*size)

    pixels = load(saved(image, "PNG"), Transform.from_preprocess_cfg(cfg))
    assert 3 >= difference(pixels, expected_pixels(image, **cfg))


@pytest.mark.parametrize(
    ("length", "first", "last"), [(8, 0, 7), (9, 0, 7), (10, 1, 8), (11, 2, 9), (13, 2, 9)]
)
@pytest.mark.parametrize("upright", [True, False])
def test_the_crop_is_the_middle(length: int, first: int, last: int, upright: bool) -> None:
    """An odd row left over is cut where torchvision's CenterCrop cuts it: halves go to even."""
    levels = np.repeat(10 * np.arange(length, dtype=np.uint8)[:, None], 8, axis=1)
    image = Image.fromarray(levels if upright else levels.T).convert("RGB")
    pixels = load(saved(image, "PNG"), SMALL)
    middle = pixels[0, :, 0] if upright else pixels[0, 0]

    assert list(range(10 * first, 10 * last + 1, 10)) == middle.tolist()


@pytest.mark.parametrize(("length", "before", "after"), [(7, 0, 1), (6, 1, 1), (5, 1, 2)])
@pytest.mark.parametrize("upright", [True, False])
def test_what_is_missing_is_filled_evenly(
    length: int, before: int, after: int, upright: bool
) -> None:
    """Around a photo that is smaller than the crop; an odd row of fill comes behind it."""
    image = Image.new("RGB", (8, length) if upright else (length, 8), "white")
    transform = Transform((8, 8), resize_mode="longest", fill_color=7)
    pixels = load(saved(image, "PNG"), transform)

    expected = [7] * before + [255] * length + [7] * after
    assert expected == (pixels[0, :, 0] if upright else pixels[0, 0]).tolist()


# Orientation

CORNERS = {  # of a scene stored as it is: top left, top right, bottom left, bottom right
    1: "abcd", 2: "badc", 3: "dcba", 4: "cdab", 5: "acbd", 6: "cadb", 7: "dbca", 8: "bdac",
}  # fmt: skip
COLOURS = {"a": (250, 0, 0), "b": (0, 250, 0), "c": (0, 0, 250), "d": (250, 250, 250)}


def corners(pixels: torch.Tensor) -> str:
    """The corner letters of a tensor (3, height, width)."""
    found = ""
    for y in (1, -2):
        for x in (1, -2):
            colour = pixels[:, y, x].int()
            found += min(
                COLOURS, key=lambda k: int((colour - torch.tensor(COLOURS[k])).abs().sum())
            )
    return found


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_people_see_photos_upright(orientation: int, kind: str) -> None:
    """Each of the eight orientations puts the corners where EXIF says."""
    image = Image.new("RGB", (64, 64))
    for (x, y), colour in zip([(0, 0), (32, 0), (0, 32), (32, 32)], COLOURS.values(), strict=True):
        image.paste(colour, (x, y, x + 32, y + 32))
    data = saved(image, kind, exif=oriented(orientation))

    assert CORNERS[orientation] == corners(load(data, SMALL))


@pytest.mark.parametrize("decode", ["full", "scaled"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_is_resized_as_if_it_were_upright(orientation: int, decode: Decode) -> None:
    """Resizing before turning gives the pixels of turning before resizing."""
    image = scene(500, 333)
    data = saved(image, "JPEG", quality=95, exif=oriented(orientation))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))

    assert 3 >= difference(load(data, decode=decode), expected_pixels(upright))


@pytest.mark.parametrize("size", [(300, 260), (230, 400)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_is_resized_in_the_order_of_an_upright_one(
    orientation: int, size: tuple[int, int]
) -> None:
    """Across first, then down, as people see it: in the other order noise is 28 levels off."""
    noise = np.random.default_rng(0).integers(0, 2, (size[1], size[0], 3), np.uint8) * 255
    data = saved(Image.fromarray(noise), "PNG", exif=oriented(orientation))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))

    assert 3 >= difference(load(data), expected_pixels(upright))


def test_upright_off_leaves_a_jpeg_as_stored() -> None:
    """Without `upright` the orientation changes nothing."""
    turned, plain = (saved(scene(), "JPEG", exif=oriented(o)) for o in (6, 1))

    assert torch.equal(load(plain), load(turned, upright=False))
    assert not torch.equal(load(plain), load(turned))


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM" * 9])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_that_makes_no_sense_is_no_orientation(exif: bytes, kind: str) -> None:
    """Broken EXIF costs the orientation, not the photo."""
    assert torch.equal(load(saved(scene(), kind)), load(saved(scene(), kind, exif=exif)))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_out_of_range_is_none(orientation: int) -> None:
    """Only 1 to 8 turn a photo."""
    data = saved(scene(), "JPEG", exif=oriented(orientation))

    assert torch.equal(load(saved(scene(), "JPEG")), load(data))


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_a_container_turns_its_photo_once(kind: str) -> None:
    """HEIC and AVIF carry their own rotation; it is not applied twice."""
    image = scene(96, 64)
    data = saved(image, kind, quality=95, exif=oriented(6).tobytes())

    upright = expected_pixels(image.transpose(Image.Transpose.ROTATE_270))
    mean = (load(data).float() - upright.float()).abs().mean()
    assert mean < 6


# Formats


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF"])
def test_every_format_gives_the_pixels_that_pillow_reads(kind: str) -> None:
    """One result for all formats: Pillow's pixels through open_clip's transform."""
    data = saved(scene(300, 260), kind)

    expected = expected_pixels(Image.open(io.BytesIO(data)).convert("RGB"))
    for decode in ("full", "scaled"):
        assert 3 >= difference(load(data, decode=decode), expected)


@pytest.mark.parametrize("kind", ["PPM", "PCX", "TGA", "EPS", "PDF", "ICO", "JPEG2000"])
def test_other_formats_are_refused(kind: str) -> None:
    """No decoder runs that a listing's photo has no need of."""
    with pytest.raises(PhotoError, match="^broken: not an image of a known format$"):
        load(saved(scene(), kind))


def test_transparency_is_white() -> None:
    """Half of red over white is pink, whatever colour lies under full transparency."""
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    image.paste((0, 0, 0, 0), (0, 0, 8, 4))

    pixels = load(saved(image, "PNG"), SMALL)
    assert [255, 255, 255] == pixels[:, 0, 0].tolist()
    assert [255, 127, 127] == pixels[:, 7, 0].tolist()


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGB"])
def test_a_transparent_colour_is_white(mode: str) -> None:
    """A PNG without an alpha channel may name a colour that is transparent."""
    image = Image.new("RGB", (8, 8), "black").convert(mode)
    key = (0, 0, 0) if mode == "RGB" else image.getpixel((0, 0))

    assert 0 == load(saved(image, "PNG"), SMALL).max()
    assert 255 == load(saved(image, "PNG", transparency=key), SMALL).min()


def test_sixteen_bits_are_scaled() -> None:
    """16-bit grey keeps its range; 257 levels become the nearest one."""
    grey = np.repeat(np.array([128, 129, 32896, 65535], np.uint16), 16).reshape(8, 8)

    pixels = load(saved(Image.fromarray(grey), "PNG"), SMALL)
    assert [0, 1, 128, 255] == pixels[0, ::2, 0].tolist()


def test_sixteen_bits_keep_their_transparent_colour() -> None:
    """The transparent level of 16-bit grey is white too."""
    data = saved(Image.fromarray(np.full((8, 8), 1000, np.uint16)), "PNG")
    head, tail = data[:33], data[33:]  # signature and IHDR come first
    chunk = b"tRNS" + struct.pack(">H", 1000)
    trns = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))

    assert 255 == load(head + trns + tail, SMALL).min()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF"])
def test_only_the_first_frame_counts(kind: str) -> None:
    """An animation is its first frame, a stereo photo its first eye."""
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")]

    pixels = load(saved(frames[0], kind, save_all=True, append_images=frames[1:]), SMALL)
    assert all(abs(a - b) < 6 for a, b in zip(pixels[:, 4, 4].tolist(), (255, 0, 0), strict=True))


def test_cmyk_is_pillows() -> None:
    """Ink is left to Pillow, as in training."""
    data = saved(scene(300, 260).convert("CMYK"), "JPEG")

    expected = expected_pixels(Image.open(io.BytesIO(data)).convert("RGB"))
    assert 3 >= difference(load(data, decode="scaled"), expected)


def test_grey_jpeg_has_three_equal_channels() -> None:
    """A JPEG of one component is grey in all three."""
    pixels = load(saved(scene(300, 260).convert("L"), "JPEG"))

    assert torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], pixels[2])


@pytest.mark.parametrize(
    ("kind", "decoder"), [("JPEG", "simplejpeg.decode_jpeg"), ("WEBP", "decode_webp")]
)
def test_what_the_fast_decoder_refuses_is_pillows_to_decide(
    kind: str, decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The photo is the same, pixel by pixel, by the slow decoder."""
    data = saved(scene(300, 260), kind)
    fast = load(data)
    refused: list[object] = []

    def refuse(*args: object, **kwargs: object) -> None:
        refused.append(args)
        raise ValueError("corrupt data")

    monkeypatch.setattr(f"pipeline.photos.pixels.{decoder}", refuse)
    assert torch.equal(fast, load(data))
    assert refused


# Scaled


@pytest.mark.parametrize(
    ("size", "scale"),
    [
        ((447, 600), 1),
        ((895, 1200), 1),
        ((896, 1200), 2),
        ((1791, 2400), 2),
        ((1792, 2400), 4),
        ((3584, 9000), 8),
        ((9000, 3584), 8),
        ((30000, 30000), 8),
    ],
)
def test_scaled_leaves_twice_what_the_resize_needs(size: tuple[int, int], scale: int) -> None:
    """The shorter side of a decoded JPEG is at least 448 for an encoder of 224."""
    for orientation in (1, 6):
        assert scale == image_module.jpeg_scale(size, Transform(), "scaled", orientation)
        assert 1 == image_module.jpeg_scale(size, Transform(), "full", orientation)


def test_scaled_is_close_to_full() -> None:
    """Shrinking in the decoder moves smooth pixels by less than a level."""
    data = saved(scene(2000, 1500), "JPEG", quality=90)

    full, scaled = load(data), load(data, decode="scaled")
    assert 0.5 > (full.float() - scaled.float()).abs().mean()
    assert not torch.equal(full, scaled)


# Bad files


@pytest.mark.parametrize("data", [b"", b"\0", b"GIF89a", b"\xff\xd8\xff", b"{}", b"RIFF", b"%!PS"])
def test_no_photo_is_broken(data: bytes) -> None:
    """Too few bytes, or other ones, are an error of the photo."""
    with pytest.raises(PhotoError, match="^broken: "):
        load(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF"])
def test_half_a_photo_is_broken(kind: str) -> None:
    """A truncated file never counts as a photo that is grey below."""
    data = saved(scene(300, 260), kind)

    with pytest.raises(PhotoError, match="^broken: "):
        load(data[: len(data) // 2])


def test_a_webp_cut_short_before_its_exif_is_broken() -> None:
    """Other bytes behind the pixels do not pass for the rest of them."""
    whole = saved(scene(600, 400), "WEBP", exif=oriented(1).tobytes() + bytes(4000))
    start = whole.index(b"VP8 ")
    length = int.from_bytes(whole[start + 4 : start + 8], "little")
    end = start + 8 + length + length % 2
    kept = length // 4 * 2
    cut = whole[: start + 4] + kept.to_bytes(4, "little") + whole[start + 8 :][:kept] + whole[end:]
    data = cut[:4] + (len(cut) - 8).to_bytes(4, "little") + cut[8:]
    with pytest.raises(PhotoError, match="^broken"):
        load(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF"])
def test_max_pixels_is_the_last_size_allowed(kind: str) -> None:
    """One pixel more than max_pixels is too large, in any format."""
    data = saved(scene(63, 49), kind)

    load(data, max_pixels=63 * 49)
    with pytest.raises(PhotoError, match="^too-large: 3087 pixels, more than the 3086 allowed$"):
        load(data, max_pixels=63 * 49 - 1)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: 9 bytes")])
def test_memory_that_runs_out_is_a_photo_too_large(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A photo that does not fit into memory costs that photo only."""

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("pipeline.photos.pixels.vision.resize", fail)
    with pytest.raises(PhotoError, match="^too-large: more than there is memory for$"):
        load(saved(scene(), "PNG"))


@pytest.mark.parametrize(
    "error", [RecursionError, struct.error, OverflowError, KeyError, SyntaxError]
)
def test_whatever_a_decoder_raises_is_a_broken_photo(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No exception of a plugin ends the job."""
    data = saved(scene().convert("P"), "PNG")

    def fail(*args: object, **kwargs: object) -> None:
        raise error("some\nthing")

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(PhotoError, match="^broken: .*some.*thing"):
        load(data)


def test_a_photo_of_endless_scans_is_broken() -> None:
    """A small progressive JPEG cannot ask for hours of work."""
    data = saved(scene(300, 260), "JPEG", progressive=True)
    start, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")

    load(data)
    with pytest.raises(PhotoError, match="^broken: a progressive JPEG of more than 500 scans$"):
        load(data[:end] + data[start:end] * 600 + data[end:])


@pytest.mark.parametrize("size", [(1, 30000), (30000, 1), (3, 20001), (20001, 2), (40, 20000)])
def test_an_extremely_long_photo_is_its_middle(size: tuple[int, int]) -> None:
    """A photo of 1 x 30000 costs no gigabytes: its middle is resized."""
    pixels = load(saved(scene(*size), "PNG"))

    side = 0 if size[0] > size[1] else 1
    assert 3 >= abs(int(pixels[side, 112, 112]) - 127)


@pytest.mark.parametrize("length", [1000, 1001, 1002, 1003])
@pytest.mark.parametrize("upright", [True, False])
def test_the_middle_of_an_extremely_long_photo_stays_the_middle(length: int, upright: bool) -> None:
    """A photo that is the same from both ends is so after it was cut, be its length odd or even."""
    distance = np.abs(np.arange(length) - (length - 1) / 2).clip(0, 4) * 60
    levels = np.repeat(distance.astype(np.uint8)[:, None], 2, axis=1)
    image = Image.fromarray(levels if upright else levels.T).convert("RGB")
    pixels = load(saved(image, "PNG"), SMALL)[0].int()
    middle = pixels[:, 0] if upright else pixels[0]

    assert 1 >= (middle - middle.flip(0)).abs().max()
    assert 20 <= middle.max() - middle.min()


def in_own_process(code: str) -> list[str]:
    """The printed words of code that runs in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=50
    )
    return done.stdout.split()


def test_a_bomb_costs_no_memory(tmp_path: Path) -> None:
    """Small files that claim gigapixels are refused before there is memory for pixels."""
    huge = struct.pack("<HH", 65535, 65535)
    webp = bytearray(saved(scene(), "WEBP", exif=oriented(1)))  # VP8X: the canvas has own numbers
    webp[24:30] = b"\xff\x3f\0" * 2
    bombs = {
        "gif": b"GIF89a" + huge + b"\0\0\0" + b"," + b"\0\0\0\0" + huge + b"\0\x02\0\0;",
        "webp": bytes(webp),
        "png": _with_png_size(saved(scene(), "PNG"), 60000, 60000),
        "jpg": saved(scene(), "JPEG").replace(struct.pack(">HH", 60, 90), b"\xea\x60\xea\x60"),
    }
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
    bombs_seen = in_own_process(
        "import pathlib, resource, sys\n"
        "from pipeline.photos.pixels import *\n"
        "def rss(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = rss()\n"
        f"for path in pathlib.Path({str(tmp_path)!r}).iterdir():\n"
        "    try: load_pixels(path.read_bytes(), Transform(), 'full', True, 10**8)\n"
        "    except PhotoError as error: print(error.reason)\n"
        "print(rss() - before)"
    )

    assert ["too-large"] * 4 == bombs_seen[:-1]
    assert 32 > int(bombs_seen[-1])


def _with_png_size(data: bytes, width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def test_threads_agree() -> None:
    """Eight threads at once give the pixels of one."""
    files = [saved(scene(300 + 20 * i, 260), kind) for i in range(4) for kind in ("JPEG", "PNG")]
    with ThreadPoolExecutor(8, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        together = list(pool.map(load, files * 4))

    assert all(torch.equal(a, load(b)) for a, b in zip(together, files * 4, strict=True))


# Real photos


@needs_photos
def test_real_photos_are_open_clips_to_three_levels() -> None:
    """Photos of every source and odd format have open_clip's pixels; scaled ones stay near."""
    paths = real("hostile/*/*") + real("listings/*/**/*")[::9]
    seen = 0
    for path in paths:
        data = path.read_bytes()
        try:
            pixels = load(data)
        except PhotoError:
            continue
        expected = expected_pixels(opaque(Image.open(path)))
        assert 3 >= difference(pixels, expected), path
        scaled = load(data, decode="scaled")
        assert 1.5 > (scaled.float() - pixels.float()).abs().mean(), path
        seen += 1

    assert seen > 100


# What is wrong with a file; every other hostile file has pixels.
HOSTILE = {
    "badbitcount.bmp": "broken",
    "broken.png": "broken",
    "corrupt-header.jpg": "broken",
    "crash-0c7e0e8e11ce787078f00b5b0ca409a167f070e0.tif": "broken",
    "zero_width.gif": "broken",
    "decompression_bomb.gif": "too-large",
    "giant-image.jpg": "too-large",
    "reallybig.bmp": "too-large",
    "truncated.png": "broken",
    "truncated_image.png": "broken",
    "truncated_jpeg.jpg": "broken",
    "json_named.jpg": "broken",
}


@needs_photos
def test_hostile_photos_end_soon() -> None:
    """Each hostile file has pixels or its reason, within two seconds."""
    reasons = {}
    for path in real("hostile/*/*"):
        start = time.perf_counter()
        try:
            load(path.read_bytes())
        except PhotoError as error:
            reasons[path.name] = error.reason
        assert 2 > time.perf_counter() - start, path

    assert HOSTILE == reasons


def seeds() -> list[bytes]:
    """Files to damage: small real ones where there are any, else one of each format."""
    paths = [p for p in real("hostile/*/*", "listings/*/*/*") if p.stat().st_size < 60_000]
    made = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF"]
    return [p.read_bytes() for p in paths[:150]] or [saved(scene(), kind) for kind in made]


def damaged(files: list[bytes], source: random.Random) -> bytes:
    """A file with bits flipped, its end cut off, or the end of another file put on."""
    data = bytearray(source.choice(files))
    match source.randrange(4):
        case 0:
            for _ in range(source.choice([1, 4, 32])):
                data[source.randrange(len(data))] ^= 1 << source.randrange(8)
        case 1:
            for _ in range(source.choice([1, 4])):
                data[source.randrange(min(600, len(data)))] = source.choice([0, 1, 127, 128, 255])
        case 2:
            del data[source.randrange(len(data)) :]
        case 3:
            other = source.choice(files)
            data = data[: source.randrange(len(data))] + other[source.randrange(len(other)) :]
    return bytes(data)


SEEDS = seeds()


@settings(
    max_examples=ROUNDS, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
@given(st.randoms(use_true_random=False), st.sampled_from(["full", "scaled"]), st.booleans())
def test_damaged_files_end_in_pixels_or_a_photo_error(
    source: random.Random, decode: Decode, upright: bool
) -> None:
    """Nothing but pixels or a PhotoError with a clean line ever comes out."""
    try:
        load(damaged(SEEDS, source), SMALL, decode, upright)
    except PhotoError as error:
        assert error.reason in ("broken", "too-large")
        assert len(str(error)) <= 200 and str(error).isprintable()
