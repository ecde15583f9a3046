"""Baseline JPEGs to an encoder's pixels on a GPU: decoded by its JPEG engines, resized there.

Which photos go there depends on their bytes alone, so that a photo's pixels do too. All others,
and those that a GPU refuses, are decoded by the cores as with decode: full.
"""

import functools
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from pipeline.photos.pixels import Size, Transform, fit, opened, orientation_of, photo_errors

_PIXELS = 150_000_000  # of one call's photos at most: half a gigabyte on the GPU
_MOST = 50_000_000  # of a photo; to resize a larger one would take more memory than all the others
_SIDE = 8_192  # the weights of a longer row take too much memory to make
# Samples of luma and chroma that NVIDIA's engines know: 4:4:4, 4:2:2, 4:2:0.
_SAMPLING = {(1, 1), (2, 1), (2, 2)}
_END_OF_IMAGE = b"\xff\xd9"
# What says of the GPU or its driver, or of torchvision, that no photo will do; 5 is no memory.
_NO_PHOTOS_FAULT = re.compile(r"CUDA|not compiled|initialize nvjpeg|to create|: 5\b")


@dataclass(frozen=True)
class Jpeg:
    """A photo that a GPU may decode: its bytes, stored size and EXIF orientation."""

    data: bytes
    size: Size
    orientation: int


def jpeg_for_gpu(data: bytes, upright: bool, max_pixels: int) -> Jpeg | None:
    """What a GPU needs of a whole baseline JPEG; None for all else, which the cores decode.

    Raises PhotoError as load_pixels does.
    """
    with photo_errors(max_pixels), opened(data, max_pixels) as image:
        if not _is_for_gpu(image, data):
            return None
        orientation = orientation_of(image) if upright else 1
        return Jpeg(data, (image.height, image.width), orientation)


def _is_for_gpu(image: Image.Image, data: bytes) -> bool:
    """Eight bits, three channels of YCbCr, one scan, with an end: what the engines are made for.

    Decoders have crashed and leaked on other files. MPO has a second photo behind the first.
    """
    if image.format != "JPEG" or image.mode != "RGB":
        return False
    if max(image.size) > _SIDE or image.width * image.height > _MOST:
        return False
    if image.info.get("progressive") or image.info.get("adobe_transform", 1) != 1:
        return False
    layers = image.layer  # type: ignore[attr-defined]
    if len(layers) != 3:  # of one frame: a decoder might take another's size
        return False
    (_, *luma, _), *chroma = layers
    plain = tuple(luma) in _SAMPLING and all(layer[1:3] == (1, 1) for layer in chroma)
    start_of_scan = image.tile[0].offset  # type: ignore[attr-defined]
    return plain and data.rfind(_END_OF_IMAGE) > start_of_scan


def decode_on_gpu(
    photos: Sequence[Jpeg], transform: Transform, device: str
) -> list[torch.Tensor | None]:
    """Pixels as load_pixels gives them, uint8 (3, height, width), on the GPU, in order.

    None for a photo that the GPU refuses. A photo's pixels do not depend on the others. They are
    done when this returns, for any stream. Raises what torch raises of a device that fails.
    """
    done: list[torch.Tensor | None] = []
    for part in _parts(photos):
        done += [
            None if pixels is None else fit(pixels, photo.size, photo.orientation, transform)
            for photo, pixels in zip(part, _decoded(part, device), strict=True)
        ]
        # nvJPEG writes on a stream of its own, which does not wait for this one: what is resized
        # here must be done before the next part is decoded into the same memory.
        if torch.device(device).type == "cuda":
            torch.cuda.current_stream(device).synchronize()
    return done


def _parts(photos: Sequence[Jpeg]) -> Iterator[list[Jpeg]]:
    """The photos of each call: all together, unless they are large."""
    part: list[Jpeg] = []
    pixels = 0
    for photo in photos:
        area = photo.size[0] * photo.size[1]
        if part and pixels + area > _PIXELS:
            yield part
            part, pixels = [], 0
        part.append(photo)
        pixels += area
    if part:
        yield part


def _decoded(photos: list[Jpeg], device: str) -> list[torch.Tensor | None]:
    """Pixels, uint8 (3, stored height, width); of a call that fails, each photo is asked for alone.

    So that which photos are refused does not depend on what they are decoded with.
    """
    try:
        decoded = _raw(device, *(photo.data for photo in photos))
    except RuntimeError as error:
        first_line = str(error).partition("\n")[0]  # a C++ backtrace may follow
        if _NO_PHOTOS_FAULT.search(first_line):
            raise
        if len(photos) > 1:
            return [pixels for photo in photos for pixels in _decoded([photo], device)]
        _raw(device, _sound())  # raises where it is not the photo
        return [None]
    return [
        pixels if tuple(pixels.shape) == (3, *photo.size) else None
        for pixels, photo in zip(decoded, photos, strict=True)
    ]


def _raw(device: str, *files: bytes) -> list[torch.Tensor]:
    data = [torch.from_numpy(np.frombuffer(bytearray(file), np.uint8)) for file in files]
    decoded: list[torch.Tensor] = decode_jpeg(data, ImageReadMode.RGB, device=device)
    return decoded


@functools.cache
def _sound() -> bytes:
    """A JPEG that every decoder takes."""
    out = io.BytesIO()
    Image.new("RGB", (64, 64)).save(out, "JPEG")
    return out.getvalue()
