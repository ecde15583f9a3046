"""How far our pixels and vectors are from those of PIL and open_clip's transform.

With a trained encoder (EfficientNet-Lite0, ImageNet): a random one would not say what matters. A
folder that holds photos is a listing. EXIF orientation is left alone here, as open_clip leaves it.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import material, measure, plain
from pipeline.encoder.model import find_model
from pipeline.encoder.tower import load_encoder
from pipeline.photos.files import PhotoError
from pipeline.photos.pixels import Decode, Transform, load_pixels


def main() -> None:
    parser = material.parser(__doc__)
    parser.add_argument("--photos", type=Path, help="folder of photos; rendered ones if not given")
    parser.add_argument("--images", type=int, default=100_000, help="at most so many")
    args = parser.parse_args()
    with material.work_folder(args.work) as folder:
        paths = (
            material.own_photos(args.photos)
            if args.photos
            else material.photos(folder, "2 MP", min(args.images, 48))
        )
        name = "real" if args.photos else "rendered"
        compare(paths[: args.images], material.trained(folder), name, args.threads)


def compare(paths: list[Path], model_name: str, name: str, threads: int) -> None:
    """One line for each way to decode."""
    encoder = load_encoder(find_model(model_name, ""), "cpu", "fp32", threads)
    transform = Transform.from_preprocess_cfg(encoder.preprocess)
    reference = plain.transform_of({**encoder.preprocess, "mean": [0.0] * 3, "std": [1.0] * 3})
    kept, theirs = [], []
    for path in paths:
        try:
            with Image.open(path) as image:
                theirs.append((reference(image.convert("RGB")) * 255).round().to(torch.uint8))
            kept.append(path)
        except OSError:
            measure.say(f"{path} cannot be read and is left out")
    expected = encoder.encode(torch.stack(theirs))
    listings = np.unique([str(path.parent) for path in kept], return_inverse=True)[1]
    decode: Decode
    for decode in ("full", "scaled"):
        ours = list(_pixels(kept, transform, decode))
        pixels = torch.stack(
            [(a.int() - b.int()).abs().max() for a, b in zip(ours, theirs, strict=True)]
        )
        found = encoder.encode(torch.stack(ours))
        images = np.einsum("ij,ij->i", found, expected)
        means = np.einsum("ij,ij->i", _means(found, listings), _means(expected, listings))
        measure.say(
            f"{decode:<7} {len(kept)} images: cosine p50 {np.median(images):.6f}"
            f" p1 {np.percentile(images, 1):.5f} min {images.min():.5f};"
            f" {len(means)} listings: p1 {np.percentile(means, 1):.5f} min {means.min():.5f}"
        )
        measure.emit(
            "parity", photos=name, decode=decode, images=len(kept), listings=len(means),
            pixel_difference_p50=float(pixels.float().median()),
            pixel_difference_max=int(pixels.max()),
            **{f"image_{k}": v for k, v in quantiles(images).items()},
            **{f"listing_{k}": v for k, v in quantiles(means).items()},
        )  # fmt: skip


def _pixels(paths: list[Path], transform: Transform, decode: Decode) -> Iterator[torch.Tensor]:
    for path in paths:
        try:
            yield load_pixels(path.read_bytes(), transform, decode, False, 10**9)
        except PhotoError as error:
            raise SystemExit(f"{path}: Pillow reads it, we do not: {error}") from None


def _means(vectors: np.ndarray, listings: np.ndarray) -> np.ndarray:
    sums = np.zeros((listings.max() + 1, vectors.shape[1]))
    np.add.at(sums, listings, vectors)
    unit: np.ndarray = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    return unit


def quantiles(cosines: np.ndarray) -> dict[str, float]:
    """Median, first percentile and least. Seven digits: four would make 1 of everything."""
    return {
        "p50": round(float(np.median(cosines)), 7),
        "p1": round(float(np.percentile(cosines, 1)), 7),
        "min": round(float(cosines.min()), 7),
    }


if __name__ == "__main__":
    main()
