"""A photo's bytes to the pixels that an encoder sees: decoded, upright, resized, cropped.

Pure: opens no file, needs no network; any number of threads may call load_pixels at once. Pixels
are what a browser shows, except that colour profiles are ignored, as they were when open_clip's
models were trained.
"""

import functools
import io
import logging
import math
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pillow_heif
import simplejpeg
import torch
from PIL import AvifImagePlugin, Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin
from torchvision.io import decode_webp
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from pipeline.photos.files import PhotoError
from pipeline.stage.errors import ModelError

Decode = Literal["full", "scaled", "gpu"]
Size = tuple[int, int]  # height, width
Pixels = npt.NDArray[np.uint8]  # (height, width, 3), RGB

# The formats that people upload. Never PostScript, PDF or WMF, which run programs. Importing a
# plugin registers it; MPO comes with JPEG.
_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "HEIF", "AVIF", "TIFF"]
_PLUGINS = (AvifImagePlugin, TiffImagePlugin, WebPImagePlugin)
pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)
# One photo, one thread: the caller decodes as many photos at once as there are cores.
pillow_heif.options.DECODE_THREADS = 1
AvifImagePlugin.DEFAULT_MAX_THREADS = 1

# A stranger's file says nothing in our log: what matters of it is in the PhotoError.
warnings.filterwarnings("ignore", module=r"(PIL|pillow_heif)\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

# A few kilobytes of crafted progressive JPEG may ask for minutes of work; cameras write ten scans.
_MAX_SCANS = 500
_START_OF_SCAN = b"\xff\xda"
# Chunks behind a WebP's pixels. Where pixels are cut short, the fast decoder would read on there.
_AFTER_WEBP = {"exif", "xmp"}
# A photo resized to more than this many crops in a row loses its ends before (see _narrowed).
_MAX_CROPS = 32
_JPEG_SCALES = (8, 4, 2)
_NO_MEMORY = "more than there is memory for"
# Fresh pages for each photo's pixels would cost a tenth of its decoding; each thread keeps some.
_KEPT_BYTES = 48 * 2**20
_kept = threading.local()


@dataclass(frozen=True)
class Transform:
    """open_clip's preprocessing: what an encoder expects of its input.

    `size` is (height, width); `mean` and `std` are per channel, of pixels in 0..1, and are for the
    caller: pixels leave this module as uint8.
    """

    size: Size = (224, 224)
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        if self.interpolation not in ("bicubic", "bilinear"):
            raise ModelError("interpolation 'bicubic' or 'bilinear'", repr(self.interpolation))
        if self.resize_mode not in ("shortest", "longest", "squash"):
            raise ModelError(
                "resize_mode 'shortest', 'longest' or 'squash'", repr(self.resize_mode)
            )

    @classmethod
    def from_preprocess_cfg(cls, cfg: Mapping[str, Any]) -> "Transform":
        """From the dict that open_clip keeps with a model (`visual.preprocess_cfg`).

        Missing keys have open_clip's defaults; 'random' interpolation is bicubic, as open_clip
        has it outside of training. Raises ModelError for what this module cannot do.
        """
        if cfg.get("mode", "RGB") != "RGB":
            raise ModelError("a model of RGB images", f"mode {cfg['mode']!r}")
        known = {key: cfg[key] for key in cls.__dataclass_fields__ if cfg.get(key) is not None}
        if "size" in known:
            known["size"] = _pair(known["size"])
        for key in {"mean", "std"} & known.keys():
            known[key] = _triple(known[key])
        if known.get("interpolation") == "random":
            known["interpolation"] = "bicubic"
        return cls(**known)

    def resized(self, size: Size) -> Size:
        """The (height, width) to which an upright photo of `size` is resized before the crop.

        The arithmetic, down to its rounding, is torchvision's Resize and open_clip's
        ResizeKeepRatio (open_clip/transform.py, image_transform).
        """
        height, width = size
        if self.resize_mode == "squash":
            return self.size
        ratios = height / self.size[0], width / self.size[1]
        if self.resize_mode == "longest":
            return _divided(size, max(ratios))
        if self.size[0] != self.size[1]:
            return _divided(size, min(ratios))
        short = self.size[0]
        if width <= height:
            return int(short * height / width), short
        return short, int(short * width / height)

    @property
    def resize_interpolation(self) -> InterpolationMode:
        """How pixels are resized; a size that is no square is always bicubic in open_clip."""
        oblong = self.resize_mode == "shortest" and self.size[0] != self.size[1]
        if self.interpolation == "bilinear" and not oblong:
            return InterpolationMode.BILINEAR
        return InterpolationMode.BICUBIC


def load_pixels(
    data: bytes, transform: Transform, decode: Decode, upright: bool, max_pixels: int
) -> torch.Tensor:
    """The pixels of one photo file: uint8, contiguous, (3, height, width) of `transform.size`.

    `decode='full'` is within three levels of open_clip's own transform, as are with 'gpu' the
    photos that come here (see pipeline.photos.gpu); 'scaled' lets the JPEG decoder shrink by 2, 4
    or 8 as long as twice the resized size remains. `upright` applies the
    EXIF orientation; an unreadable one counts as none, and HEIC and TIFF, whose decoders turn them,
    are upright always. Transparent parts are white, grey of 16 bits is scaled to 8, and only the
    first frame counts. `max_pixels` bounds width times height as the header states them, before
    there is memory for pixels; a process keeps to one such number.

    Raises PhotoError 'broken' or 'too-large', whatever the bytes are, and nothing else.
    """
    with photo_errors(max_pixels):
        return _load(data, transform, decode, upright, max_pixels)


@contextmanager
def photo_errors(max_pixels: int) -> Iterator[None]:
    """Turn whatever a decoder raises into PhotoError, 'broken' or 'too-large'."""
    try:
        yield
    except PhotoError:
        raise
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+ pixels", str(error))
        raise _too_many(found[0] if found else "pixels", max_pixels) from None
    except MemoryError:
        raise PhotoError("too-large", _NO_MEMORY) from None
    except UnidentifiedImageError:
        raise PhotoError("broken", "not an image of a known format") from None
    except Exception as error:  # noqa: BLE001  a decoder may raise anything when a stranger feeds it
        if "can't allocate memory" in str(error):
            raise PhotoError("too-large", _NO_MEMORY) from None
        raise PhotoError("broken", _described(error)) from None


def _load(
    data: bytes, transform: Transform, decode: Decode, upright: bool, max_pixels: int
) -> torch.Tensor:
    with opened(data, max_pixels) as image:
        pixels = None
        if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
            orientation = orientation_of(image) if upright else 1
            size = image.height, image.width
            pixels = _decode_jpeg(image, data, jpeg_scale(size, transform, decode, orientation))
        elif image.format == "WEBP" and image.mode == "RGB" and not image.info.keys() & _AFTER_WEBP:
            orientation = 1
            size = image.height, image.width
            pixels = _decode_webp(data, size)
        if pixels is None:
            # Some plugins know the size and the orientation only now; TIFF turns itself.
            image.load()
            _check_size(image, max_pixels)
            orientation = orientation_of(image) if upright else 1
            size = image.height, image.width
            pixels = np.array(_opaque(image))
    # The strides of height, width, channel are kept under the shape (3, height, width): torch has
    # its fastest kernel for them.
    decoded = torch.from_numpy(pixels).permute(2, 0, 1)
    return fit(decoded, size, orientation, transform)


def opened(data: bytes, max_pixels: int) -> Image.Image:
    """A photo whose header has been read and is within the limit; PhotoError or Pillow's errors."""
    if not data:
        raise PhotoError("broken", "the file is empty")
    _limit_pillow(max_pixels)
    image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
    _check_size(image, max_pixels)
    return image


def _limit_pillow(max_pixels: int) -> None:
    """Make Pillow's own limit agree: it also guards WebP canvases, TIFF tiles and GIF frames.

    Pillow refuses above twice its number and warns (silenced here) above once.
    """
    Image.MAX_IMAGE_PIXELS = math.ceil(max_pixels / 2)


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise PhotoError("broken", f"{width} x {height} pixels")
    if width * height > max_pixels:
        raise _too_many(f"{width * height} pixels", max_pixels)


def _too_many(found: str, max_pixels: int) -> PhotoError:
    return PhotoError("too-large", f"{found}, more than the {max_pixels} allowed")


def _described(error: Exception) -> str:
    if isinstance(error, (OSError, ValueError, SyntaxError, EOFError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}"


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, as Pillow finds it; 1 where there is none that makes sense."""
    try:
        value = image.getexif().get(0x0112)
    except Exception:  # noqa: BLE001  EXIF is a stranger's text too; the pixels may be fine
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def jpeg_scale(size: Size, transform: Transform, decode: Decode, orientation: int) -> int:
    """By how much the decoder shrinks a JPEG of the stored `size`: 8, 4, 2 or 1.

    The largest power of two that leaves at least twice the resized size; 1 unless 'scaled'.
    """
    if decode != "scaled":
        return 1
    target = _stored(transform.resized(_stored(size, orientation)), orientation)
    for scale in _JPEG_SCALES:
        if all(have >= 2 * scale * want for have, want in zip(size, target, strict=True)):
            return scale
    return 1


def _decode_jpeg(image: Image.Image, data: bytes, scale: int) -> Pixels | None:
    """A JPEG's pixels by libjpeg-turbo without the GIL, the same as Pillow's when `scale` is 1.

    None where it warns or refuses: then Pillow decides, on the pixels and on the error.
    """
    if image.info.get("progressive") and data.count(_START_OF_SCAN) > _MAX_SCANS:
        raise PhotoError("broken", f"a progressive JPEG of more than {_MAX_SCANS} scans")
    height, width = -(-image.height // scale), -(-image.width // scale)
    # The buffer is as large as the header says: a decoder that reads another size refuses.
    buffer = _buffer(height, width)
    try:
        decoded = simplejpeg.decode_jpeg(
            data, "RGB", min_height=height, min_width=width, buffer=buffer, strict=True
        )
    except Exception:  # noqa: BLE001  whatever it is, Pillow has the last word
        return None
    return buffer if decoded.shape == buffer.shape else None


def _buffer(height: int, width: int) -> Pixels:
    """Memory for decoded pixels; the same for each photo of a thread, but for very large ones."""
    size = height * width * 3
    if size > _KEPT_BYTES:
        return np.empty((height, width, 3), np.uint8)
    kept: Pixels | None = getattr(_kept, "pixels", None)
    if kept is None or kept.size < size:
        kept = _kept.pixels = np.empty(size, np.uint8)
    return kept[:size].reshape(height, width, 3)


def _decode_webp(data: bytes, size: Size) -> Pixels | None:
    """An opaque still WebP's pixels, the same as Pillow's in half of the time, without the GIL.

    None where it refuses, as all animations: then Pillow decides, on the pixels and on the error.
    """
    try:
        decoded = decode_webp(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    except Exception:  # noqa: BLE001  whatever it is, Pillow has the last word
        return None
    pixels: Pixels = decoded.permute(1, 2, 0).numpy()
    return pixels if pixels.shape == (*size, 3) else None


def _opaque(image: Image.Image) -> Image.Image:
    """A loaded photo as RGB: transparent parts over white, 16 bits scaled to 8."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips at 255, which leaves a 16-bit photo all white.
    grey = np.asarray(image).astype(np.int32).clip(0, 65535)
    scaled = ((grey + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        scaled[grey == transparent] = 255
    return Image.fromarray(scaled)


def fit(pixels: torch.Tensor, size: Size, orientation: int, transform: Transform) -> torch.Tensor:
    """Resize decoded pixels (..., 3, height, width) of photos of the stored `size`, turn and crop.

    The result is (..., 3, height, width) of `transform.size`, in memory of its own. Turning comes
    last because the photo is small then.
    """
    target = _stored(transform.resized(_stored(size, orientation)), orientation)
    pixels, target = _narrowed(pixels, target, transform)
    if orientation >= 5:
        # Resizing goes across first, then down, and rounds between the two. Of a photo on its side
        # that is down first; in the other order, pixels are up to ten levels off.
        pixels = _resized(pixels, (target[0], pixels.shape[-1]), transform)
    small = _resized(pixels, target, transform)
    upright = _cropped(_turned(small, orientation), transform)
    if upright.is_cuda:
        return upright.clone(memory_format=torch.contiguous_format)
    return torch.from_numpy(np.array(upright.numpy(), order="C"))  # in half of torch's time


def _resized(pixels: torch.Tensor, target: Size, transform: Transform) -> torch.Tensor:
    if pixels.is_cuda:
        return resized_by_weights(pixels, target, transform.resize_interpolation)
    resized: torch.Tensor = vision.resize(
        pixels, list(target), interpolation=transform.resize_interpolation, antialias=True
    )
    return resized


def resized_by_weights(
    pixels: torch.Tensor, target: Size, interpolation: InterpolationMode
) -> torch.Tensor:
    """What _resized gives, to within a level, as two products of matrices: for a GPU.

    torch's own kernel takes three times as long there as a ViT-B/32 does with the result. One photo
    (3, height, width) at a time: a product's last bits may depend on its shape.
    """
    values = pixels.to(torch.float16 if pixels.is_cuda else torch.float32)
    for have, want, down in (
        (pixels.shape[-1], target[1], False),
        (pixels.shape[-2], target[0], True),
    ):
        if have != want:
            weights = _weights(have, want, interpolation, values.device, values.dtype)
            if weights.is_cuda:  # another thread may have made them, and let go of them first
                weights.record_stream(torch.cuda.current_stream(weights.device))
            values = weights.T @ values if down else values @ weights
            values.round_().clamp_(0, 255)  # between the two as well, as torch does on a CPU
    return values.to(torch.uint8)


@functools.lru_cache(maxsize=128)
def _weights(
    have: int, want: int, interpolation: InterpolationMode, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """How much each of `have` pixels in a row counts in each of `want`: (have, want).

    They are what torch makes of rows that are dark but for one pixel.
    """
    dots = torch.eye(have, device=device)[None]
    weights: torch.Tensor = vision.resize(
        dots, [have, want], interpolation=interpolation, antialias=True
    )[0].to(dtype)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other threads have other streams
    return weights


def _narrowed(
    pixels: torch.Tensor, target: Size, transform: Transform
) -> tuple[torch.Tensor, Size]:
    """Cut the ends off an extremely long photo before it is resized; the crop drops them anyway.

    A photo of 1 x 30000 would become 224 x 6720000, gigabytes, for the sake of its square middle.
    Cut first, that middle is the same to within half a pixel of the result.
    """
    most = _MAX_CROPS * max(transform.size)
    if max(target) <= most or transform.resize_mode != "shortest":
        return pixels, target
    side = 0 if target[0] > target[1] else 1
    length = pixels.shape[side - 2]
    kept = math.ceil(length * most / target[side])
    kept -= (length - kept) % 2  # the same parity: the middle stays the middle
    cut = round(target[side] * kept / length)
    pixels = pixels.narrow(side - 2, (length - kept) // 2, kept)
    return pixels, (cut, target[1]) if side == 0 else (target[0], cut)


def _turned(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """Upright pixels (..., height, width) of an EXIF orientation 1 to 8."""
    if orientation >= 5:
        pixels = pixels.transpose(-2, -1)
    flips = {2: [-1], 3: [-2, -1], 4: [-2], 6: [-1], 7: [-2, -1], 8: [-2]}.get(orientation)
    return pixels.flip(flips) if flips else pixels


def _cropped(pixels: torch.Tensor, transform: Transform) -> torch.Tensor:
    """The middle of `pixels`, with `fill_color` around what is smaller than the crop."""
    (top, into_top, rows), (left, into_left, columns) = (
        _overlap(have, want) for have, want in zip(pixels.shape[-2:], transform.size, strict=True)
    )
    middle = pixels[..., top : top + rows, left : left + columns]
    if (rows, columns) == transform.size:
        return middle
    result = pixels.new_full((*pixels.shape[:-2], *transform.size), transform.fill_color)
    result[..., into_top : into_top + rows, into_left : into_left + columns] = middle
    return result


def _overlap(have: int, want: int) -> tuple[int, int, int]:
    """Start in the photo, start in the crop, and length; rounded as torchvision's CenterCrop."""
    if have < want:
        return 0, (want - have) // 2, have
    return round((have - want) / 2), 0, want


def _stored(size: Size, orientation: int) -> Size:
    """An upright size as stored, or the other way round: orientations 5 to 8 swap the sides."""
    return (size[1], size[0]) if orientation >= 5 else size


def _divided(size: Size, ratio: float) -> Size:
    return max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))


def _pair(size: Any) -> Size:
    if isinstance(size, int):
        return size, size
    height, width = size if len(size) == 2 else (size[0], size[0])
    return int(height), int(width)


def _triple(value: Any) -> tuple[float, float, float]:
    red, green, blue = value if isinstance(value, (list, tuple)) else (value,) * 3
    return float(red), float(green), float(blue)
