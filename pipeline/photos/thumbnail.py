"""Small pictures of photos for pages: decoded as for the encoder, with nothing else of the file."""

import base64
import io

from PIL import Image

from pipeline.photos.pixels import Transform, load_pixels
from pipeline.stage.settings import Settings

QUALITY = 70


def thumbnail(data: bytes, side: int, chosen: Settings) -> str:
    """A photo as a JPEG of `side` x `side` pixels, cropped, in a data URI; no EXIF, no GPS.

    Raises PhotoError where the file cannot be decoded.
    """
    pixels = load_pixels(
        data, Transform(size=(side, side)), "scaled", chosen.apply_exif_orientation,
        chosen.max_image_pixels,
    )  # fmt: skip
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
