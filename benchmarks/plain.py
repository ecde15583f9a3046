"""The plain way: PIL, open_clip's own transform, DataLoader processes, one upsert per listing."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import adbc_driver_postgresql.dbapi as adbc
import numpy as np
import open_clip
import pillow_heif
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

BATCH = 32
UPSERT = """
    INSERT INTO ml.img_vec512_v1 (listing_id, edited_date, source, model_rev, vec, n_images)
    VALUES ($1, now(), 'plain', 'plain', $2::text::vector, $3)
    ON CONFLICT (listing_id, edited_date, source, model_rev, pca_rev)
    DO UPDATE SET vec = excluded.vec, n_images = excluded.n_images, updated_at = now()"""

pillow_heif.register_heif_opener()

Transform = Callable[[Image.Image], torch.Tensor]


class Photos(Dataset[torch.Tensor]):
    """Files as open_clip wants them: float32, normalised."""

    def __init__(self, paths: Sequence[Path], transform: Transform) -> None:
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> torch.Tensor:
        with Image.open(self.paths[row]) as image:
            return self.transform(image.convert("RGB"))


def transform_of(preprocess: dict[str, Any]) -> Transform:
    """open_clip's transform of a model's preprocess_cfg."""
    size = preprocess["size"]
    cfg = open_clip.transform.PreprocessCfg(**{**preprocess, "size": tuple(size)})
    made: Transform = open_clip.transform.image_transform_v2(cfg, is_train=False)
    return made


def loader(paths: Sequence[Path], transform: Transform, workers: int) -> DataLoader[torch.Tensor]:
    """Batches from `workers` processes that stay for another pass.

    Small batches where there are few photos, so that every process has work.
    """
    batch = max(1, min(BATCH, len(paths) // (2 * workers)))
    return DataLoader(Photos(paths, transform), batch, num_workers=workers, persistent_workers=True)


def decode(batches: DataLoader[torch.Tensor]) -> None:
    """Nothing but the pixels."""
    for _ in batches:
        pass


def embed(
    batches: DataLoader[torch.Tensor],
    encode_image: Callable[[torch.Tensor], torch.Tensor],
    listings: Sequence[int],
) -> None:
    """Photos to rows of the table; image i is of listing listings[i], neighbours of one another."""
    connection = adbc.connect(os.environ["PG_DSN"], autocommit=True)
    with connection, connection.cursor() as cursor:
        for listing, vectors in _by_listing(batches, encode_image, listings):
            mean = np.mean(vectors, axis=0)
            mean /= np.linalg.norm(mean)
            text = "[" + ",".join(map(str, mean.tolist())) + "]"
            cursor.execute(UPSERT, (listing, text, len(vectors)))


def _by_listing(
    batches: DataLoader[torch.Tensor],
    encode_image: Callable[[torch.Tensor], torch.Tensor],
    listings: Sequence[int],
) -> Iterator[tuple[int, list[np.ndarray]]]:
    row, vectors = 0, []
    for batch in batches:
        with torch.inference_mode():
            features = torch.nn.functional.normalize(encode_image(batch)).numpy()
        for vec in features:
            vectors.append(vec)
            row += 1
            if row == len(listings) or listings[row] != listings[row - 1]:
                yield listings[row - 1], vectors
                vectors = []
