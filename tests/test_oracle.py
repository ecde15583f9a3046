"""Real photos through the whole job, against a script that shares no code with it.

Needs LISTING_PHOTOS_DIR: a folder with listings/manifest.csv (columns file, source, group).
"""

import csv
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import oracle
import pyarrow.parquet as pq
import pytest
from conftest import Workspace, create_tables, new_database, new_workspace

from demo.encoder import efficientnet_encoder

PHOTOS = os.environ.get("LISTING_PHOTOS_DIR", "")
pytestmark = pytest.mark.skipif(not PHOTOS, reason="LISTING_PHOTOS_DIR is not set")
ROOT = Path(PHOTOS) / "listings"


def marketplace() -> tuple[list[oracle.Photo], dict[int, str]]:
    """Photo rows, and the object of each listing.

    A listing is a phone of phonecat, or every other photo of an object of dreambooth, so that
    each object is offered twice. Flags and levels come from plain arithmetic; one file is missing.
    """
    groups: dict[tuple[str, str, int], list[str]] = {}
    with open(ROOT / "manifest.csv", newline="") as file:
        for row in csv.DictReader(file):
            key = (row["source"], row["group"])
            if key[0] == "dreambooth" or (key[0] == "phonecat" and key[1] < "motorola"):
                seen = sum(len(paths) for name, paths in groups.items() if name[:2] == key)
                half = seen % 2 if row["source"] == "dreambooth" else 0
                groups.setdefault((*key, half), []).append(row["file"])
    photos, objects = [], {}
    for listing, ((source, group, _), paths) in enumerate(sorted(groups.items()), 1):
        if source == "dreambooth":
            objects[listing] = group
        for index, path in enumerate(paths):
            draw = 7 * listing + 5 * index
            photos.append(
                oracle.Photo(
                    listing, index, path, draw % 11 == 0, draw % 13 == 0,
                    None if draw % 4 == 0 else draw % 5, None if draw % 6 == 0 else draw % 4,
                )
            )  # fmt: skip
    last = max(objects)
    photos.append(oracle.Photo(last, 99, "dreambooth/gone.jpg", False, False, 9, 9))
    return photos, objects


@pytest.fixture(scope="module")
def run(
    server: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Workspace, list[oracle.Photo], dict[int, str]]]:
    """A finished run over the marketplace with the trained encoder."""
    folder = tmp_path_factory.mktemp("real")
    photos, objects = marketplace()
    with new_database(server) as database:
        create_tables(database)
        workspace = new_workspace(folder / "work", database, efficientnet_encoder(folder / "enc"))
        workspace.env["IMAGE_ROOT_DIR"] = str(ROOT)
        workspace.config |= {"apply_exif_orientation": False, "batch_size": 16}
        for listing in {photo.listing_id for photo in photos}:
            database.add_listing(listing)
        for photo in photos:
            database.add_image(photo.listing_id, photo.image_index, photo.storage_path)
            database.add_features(
                photo.listing_id, photo.image_index, stock=photo.stock,
                screenshot=photo.screenshot, quality=photo.quality, background=photo.background,
            )  # fmt: skip
        workspace.run()
        yield workspace, photos, objects


Run = tuple[Workspace, list[oracle.Photo], dict[int, str]]


def test_the_job_equals_a_plain_script(run: Run) -> None:
    """The same images, the same n_images, and nearly the same vector for every listing."""
    workspace, photos, _ = run
    expected = oracle.listing_vectors(photos, ROOT, workspace.encoder)
    shard = pq.read_table(workspace.results / "select/1-of-1.parquet").to_pylist()
    images: dict[int, list[str]] = {}
    for row in sorted(shard, key=lambda row: (row["listing_id"], row["rank"])):
        images.setdefault(row["listing_id"], []).append(row["storage_path"])
    rows = workspace.database.vectors("listing_id, n_images, vec")
    vectors = [np.fromstring(vec.strip("[]"), np.float64, sep=",") for _, _, vec in rows]
    cosines = [float(vec @ expected[row[0]].vec) for row, vec in zip(rows, vectors, strict=True)]

    assert {listing: e.images for listing, e in expected.items()} == images
    assert [(listing, e.n_images) for listing, e in expected.items()] == [row[:2] for row in rows]
    assert min(cosines) >= 0.9995
    assert np.median(cosines) >= 0.9999


def test_vectors_are_what_pgvector_computes(run: Run) -> None:
    """Unit length to 1e-6, and equal to l2_normalize(avg(l2_normalize(v))) of the image vectors."""
    workspace, _, _ = run
    database = workspace.database
    database.execute("CREATE TABLE image_vectors (listing_id bigint, vec vector(512))")
    encoded = pq.read_table(workspace.results / "encode/1-of-1.parquet").to_pylist()
    for row in encoded:
        if row["vec"] is not None:
            database.execute(
                "INSERT INTO image_vectors VALUES ($1, $2::text::vector)",
                row["listing_id"], str(row["vec"]),
            )  # fmt: skip
    ((listings, length, difference),) = database.execute(
        "SELECT count(*), max(abs(vector_norm(t.vec) - 1)), max(t.vec <-> m.vec)"
        " FROM ml.img_vec512_v1 t JOIN (SELECT listing_id, l2_normalize(avg(l2_normalize(vec)))"
        " AS vec FROM image_vectors GROUP BY listing_id) m USING (listing_id)"
    )

    assert len(database.vectors("listing_id")) == listings
    assert length <= 1e-6
    assert difference <= 1e-6


def test_neighbours_are_the_same_object(run: Run) -> None:
    """Of the two listings of each object one is the other's nearest neighbour."""
    workspace, _, objects = run
    nearest = workspace.database.execute(
        "SELECT a.listing_id, (SELECT b.listing_id FROM ml.img_vec512_v1 b"
        " WHERE b.listing_id <> a.listing_id ORDER BY a.vec <=> b.vec LIMIT 1)"
        " FROM ml.img_vec512_v1 a ORDER BY 1"
    )
    found = {objects[a]: objects.get(b, "a phone") for a, b in nearest if a in objects}

    assert {name: name for name in objects.values()} == found
