"""The job in one process, to compare with: plain Python, PIL and open_clip's own transform.

It shares no code with the pipeline. `listing_vectors` takes rows as they are in the three input
tables and gives what the target must hold.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from PIL import Image


class Photo(NamedTuple):
    """One image row with its features."""

    listing_id: int
    image_index: int
    storage_path: str
    stock: bool
    screenshot: bool
    quality: int | None
    background: int | None


@dataclass
class Expected:
    """What the target must hold of one listing, and the images behind it, best first."""

    images: list[str]
    n_images: int
    vec: npt.NDArray[np.float64]


def selected(photos: Sequence[Photo], topk: int) -> list[Photo]:
    """The Top-K of one listing; its first K where all are excluded."""
    usable = [photo for photo in photos if not photo.stock and not photo.screenshot]
    if not usable:
        return sorted(photos, key=lambda photo: photo.image_index)[:topk]
    return sorted(usable, key=lambda photo: (-score(photo), photo.image_index))[:topk]


def score(photo: Photo) -> int:
    return 10 * (photo.quality or 0) + 3 * (photo.background or 0)


def listing_vectors(
    photos: Sequence[Photo], root: Path, encoder: Path, topk: int = 5
) -> dict[int, Expected]:
    """The vectors of all listings with a readable image, in fp32, without EXIF orientation."""
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{encoder}")
    model.eval()
    expected = {}
    for listing in sorted({photo.listing_id for photo in photos}):
        best = selected([photo for photo in photos if photo.listing_id == listing], topk)
        pixels = []
        for photo in best:
            with contextlib.suppress(OSError), Image.open(root / photo.storage_path) as image:
                pixels.append(transform(image.convert("RGB")))
        if not pixels:
            continue
        with torch.inference_mode():
            vectors = model.encode_image(torch.stack(pixels)).double().numpy()
        mean = np.mean([vec / np.linalg.norm(vec) for vec in vectors], axis=0)
        paths = [photo.storage_path for photo in best]
        expected[listing] = Expected(paths, len(vectors), mean / np.linalg.norm(mean))
    return expected
