"""Any number of vectors with the structure of real ones, made out of those of some hundred photos.

Independent random directions in 512 dimensions mislead: all are equally far from each other, so no
graph leads anywhere. Real vectors lie in clusters, on few components. So each is made of two real
photos that are neighbours of each other, mixed, plus a deviation whose variance along each
principal component is that by which real neighbours differ there; then it gets unit length.
`likeness` puts figures of both side by side.
"""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks import material, measure
from pipeline.encoder.model import find_model
from pipeline.encoder.tower import load_encoder
from pipeline.photos.files import PhotoError
from pipeline.photos.pixels import Transform, load_pixels

Vectors = npt.NDArray[np.float32]

NEIGHBOURS = 5  # of a photo, that it may be mixed with
DEVIATION = 0.7  # of a new vector, as a share of that between real neighbours
RENDERED = 480  # photos, where there are no real ones


def of_photos(folder: Path, threads: int) -> tuple[str, Vectors]:
    """'real' or 'rendered', and unit vectors, float32 (photos, 512), made once.

    Real are the photos below LISTING_PHOTOS_DIR/listings; the encoder is trained.
    """
    root = os.environ.get("LISTING_PHOTOS_DIR")
    name = "real" if root else "rendered"
    kept = folder / f"vectors-{name}.npy"
    if not kept.exists():
        paths = (
            material.own_photos(Path(root) / "listings")
            if root
            else material.photos(folder, "2 MP", RENDERED)
        )
        np.save(kept, _encoded(paths, material.trained(folder), threads))
    vectors: Vectors = np.load(kept)
    return name, vectors


def _encoded(paths: list[Path], model_name: str, threads: int) -> Vectors:
    encoder = load_encoder(find_model(model_name, ""), "cpu", "fp32", threads)
    transform = Transform.from_preprocess_cfg(encoder.preprocess)
    pixels = []
    for path in paths:
        try:
            pixels.append(load_pixels(path.read_bytes(), transform, "scaled", True, 10**9))
        except PhotoError as error:
            measure.say(f"{path} is left out: {error}")
    batches = [encoder.encode(pixels[i : i + 32]) for i in range(0, len(pixels), 32)]
    return unit(np.unique(np.concatenate(batches), axis=0))


def more(real: Vectors, rows: int, seed: int = 0) -> Vectors:
    """Unit vectors, float32 (rows, dim), the same for the same seed."""
    draw = np.random.default_rng(seed)
    near = _neighbours(real)
    between = (real[near] - real[:, None]).reshape(-1, real.shape[1])
    components = np.linalg.svd(between - between.mean(0), full_matrices=False)[2]
    spread = ((between - between.mean(0)) @ components.T).std(0)
    one = draw.integers(0, len(real), rows)
    other = near[one, draw.integers(0, NEIGHBOURS, rows)]
    share = draw.uniform(0, 0.5, (rows, 1)).astype(np.float32)
    mixed = (1 - share) * real[one] + share * real[other]
    deviation = draw.standard_normal((rows, len(spread)), np.float32) * (DEVIATION * spread)
    return unit(mixed + (deviation @ components).astype(np.float32))


def likeness(real: Vectors, made: Vectors) -> dict[str, float]:
    """Of as many made ones as there are real ones: what is to be alike, for both."""
    few = made[np.random.default_rng(1).permutation(len(made))[: len(real)]]
    figures: dict[str, float] = {}
    for name, vectors in (("real", real), ("made", few)):
        cosines = vectors @ vectors.T
        apart = cosines[np.triu_indices(len(vectors), 1)]
        np.fill_diagonal(cosines, -1)
        variances = np.linalg.svd(vectors - vectors.mean(0), compute_uv=False) ** 2
        figures |= {
            f"{name}_nearest_p50": float(np.median(cosines.max(1))),
            f"{name}_random_pair_p50": float(np.median(apart)),
            f"{name}_random_pair_p99": float(np.percentile(apart, 99)),
            f"{name}_variance_in_32_components": float(variances[:32].sum() / variances.sum()),
        }
    return {k: round(v, 3) for k, v in figures.items()}


def unit(vectors: npt.NDArray[np.floating]) -> Vectors:
    """The same directions at length 1."""
    found: Vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return found


def _neighbours(vectors: Vectors) -> npt.NDArray[np.intp]:
    """Of each the NEIGHBOURS nearest others, (rows, NEIGHBOURS)."""
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1)
    found: npt.NDArray[np.intp] = np.argsort(-cosines, axis=1)[:, :NEIGHBOURS]
    return found
