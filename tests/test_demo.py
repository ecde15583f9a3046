"""The demo: its photos, its encoders, its Postgres and its marketplace."""

import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import adbc_driver_postgresql.dbapi as adbc
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from demo import encoder, marketplace, postgres, render
from pipeline.database import target
from pipeline.stage.errors import DatabaseError, SettingsError
from pipeline.stage.settings import Environment


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("demo") / "data of postgres"
    with postgres.embedded_postgres(folder):
        yield folder


def _digest(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def _rows(dsn: str, query: str) -> list[tuple[object, ...]]:
    with adbc.connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute(query)
        return list(cursor.fetchall())


def _database(server: Path, name: str) -> str:
    dsn = postgres.create_database(server, name)
    with adbc.connect(dsn) as connection, connection.cursor() as cursor:
        target.create(cursor, Environment.read({}), 512, inputs=True)
        connection.commit()
    return dsn


def test_photos_are_deterministic() -> None:
    """The same arguments give the same pixels, another seed or view gives others."""

    def photo(view: str, seed: int) -> str:
        return _digest(
            render.render_photo("13", "pink", view, "oak desk", size=(96, 128), seed=seed)
        )

    assert photo("back", 1) == photo("back", 1)
    assert len({photo("back", 1), photo("back", 2), photo("front", 1)}) == 3


@pytest.mark.parametrize("size", [(16, 12), (120, 90), (4032, 3024)])
def test_photos_have_any_size(size: tuple[int, int]) -> None:
    """From thumbnails to twelve megapixels, and no part of the frame is left black."""
    photo = render.render_photo("16", "teal", "angle", "marble", size=size, seed=7)

    assert photo.size == size
    assert np.asarray(photo.resize((8, 8), Image.Resampling.BOX)).min() > 10


def test_every_model_colour_and_surface_can_be_drawn() -> None:
    """No entry of the tables is broken, and each gives a photo of its own."""
    phones = {
        _digest(render.render_photo(model, colour, "back", "marble", size=(48, 64), seed=1))
        for model, phone in render.MODELS.items()
        for colour in phone.colours
    }
    surfaces = {
        _digest(render.render_photo("11", "black", "dark", surface, size=(48, 64), seed=1))
        for surface in render.BACKGROUNDS
    }

    assert len(phones) == sum(len(phone.colours) for phone in render.MODELS.values())
    assert len(surfaces) == len(render.BACKGROUNDS)


def test_stock_pictures_are_shared_and_screenshots_are_not() -> None:
    """All listings of a model and colour have one stock picture; a screenshot has its numbers."""
    first = render.render_stock("13", "blue", size=(90, 120))
    shots = {_digest(render.render_screenshot(size=(90, 120), seed=s)) for s in (1, 2)}

    assert _digest(first) == _digest(render.render_stock("13", "blue", size=(90, 120)))
    assert len(shots) == 2


def test_encoder_has_the_same_bytes_each_time_and_loads(tmp_path: Path) -> None:
    """The encoder's folder is a function of nothing but the installed package."""
    first = encoder.efficientnet_encoder(tmp_path / "a")
    second = encoder.efficientnet_encoder(tmp_path / "b")

    for name in (encoder.CONFIG, encoder.WEIGHTS):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{first}")
    with torch.no_grad():
        assert model.eval().encode_image(torch.zeros(1, 3, 224, 224)).shape == (1, 512)


def test_encoder_is_made_once(tmp_path: Path) -> None:
    """A folder that is whole is left alone; one that lacks its configuration is made again."""
    folder = encoder.random_encoder(tmp_path / "tiny", embed_dim=8)
    made = (folder / encoder.WEIGHTS).stat().st_mtime_ns

    encoder.random_encoder(folder, embed_dim=8)
    assert (folder / encoder.WEIGHTS).stat().st_mtime_ns == made
    encoder.random_encoder(folder, embed_dim=8, seed=1)
    assert (folder / encoder.WEIGHTS).stat().st_mtime_ns != made


@pytest.mark.parametrize("dim", [8, 512])
def test_random_encoder_tells_images_apart(tmp_path: Path, dim: int) -> None:
    """The tiny untrained model has the wanted dimension, and its seed decides its vectors."""
    images = torch.from_numpy(np.random.RandomState(0).rand(2, 3, 32, 32).astype(np.float32))
    vectors: list[torch.Tensor] = []
    for seed in (0, 0, 1):
        folder = encoder.random_encoder(tmp_path / str(len(vectors)), embed_dim=dim, seed=seed)
        model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        with torch.no_grad():
            vectors.append(model.eval().encode_image(images, normalize=True))

    assert vectors[0].shape == (2, dim)
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.allclose(vectors[0], vectors[2])
    assert not torch.allclose(vectors[0][0], vectors[0][1], atol=1e-3)


def test_projection_is_exactly_orthonormal() -> None:
    """Its rows have length one and right angles to the last bit."""
    matrix = encoder.orthonormal_rows(512, 1280)

    assert np.array_equal(matrix @ matrix.T, np.eye(512))


def test_postgres_survives_a_kill(tmp_path: Path) -> None:
    """After a SIGKILL the next start brings back what was committed."""
    folder = tmp_path / "p"
    with postgres.embedded_postgres(folder):
        dsn = postgres.create_database(folder, "kept")
        with adbc.connect(dsn) as connection, connection.cursor() as cursor:
            cursor.execute("create table t as select 7 as seven")
            connection.commit()
        os.kill(int((folder / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
        postgres.start(folder, durable=False)
        assert _rows(dsn, "select seven from t") == [(7,)]

    assert not postgres.is_running(folder)


def test_postgres_stops_while_it_recovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose backend has just been killed stops too, and starts again."""
    folder = tmp_path / "p"
    monkeypatch.setattr(postgres, "STOP_S", 1)
    with postgres.embedded_postgres(folder) as dsn, adbc.connect(dsn) as connection:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            os.kill(cursor.fetchall()[0][0], signal.SIGKILL)

        assert postgres.stop(folder)
        assert not postgres.is_running(folder)

    with postgres.embedded_postgres(folder):
        assert postgres.is_running(folder)


def test_postgres_ignores_a_pid_file_with_somebody_elses_number(tmp_path: Path) -> None:
    """A stale file that names another living process neither stops a start nor kills that one."""
    folder = tmp_path / ("long " * 30)
    with postgres.embedded_postgres(folder):
        pass
    (folder / "postmaster.pid").write_text(f"{os.getpid()}\n")

    assert not postgres.is_running(folder)
    assert not postgres.stop(folder)
    with postgres.embedded_postgres(folder) as dsn:
        assert _rows(dsn, "select 1") == [(1,)]


def test_postgres_survives_a_killed_initdb(tmp_path: Path) -> None:
    """Half a data folder is thrown away, not started."""
    half = tmp_path / ".p.new"
    half.mkdir()
    (half / "PG_VERSION").write_text("18\n")

    with postgres.embedded_postgres(tmp_path / "p") as dsn:
        assert _rows(dsn, "select 1") == [(1,)]
    assert not half.exists()


def test_postgres_leaves_a_folder_with_other_files_alone(tmp_path: Path) -> None:
    """Somebody's own folder is refused, not taken over."""
    (tmp_path / "thesis.txt").touch()

    with pytest.raises(DatabaseError, match="other files"):
        postgres.start(tmp_path)


def test_marketplace_has_what_it_promises(server: Path, tmp_path: Path) -> None:
    """Every kind of listing, image and feature row that the job must cope with is there."""
    dsn = _database(server, "promises")
    assert marketplace.is_empty(dsn)

    marketplace.fill(dsn, marketplace.made_up(tmp_path, 240))

    assert not marketplace.is_empty(dsn)
    assert _rows(
        dsn,
        """select count(*), count(distinct generation), count(spam), count(*) - count(url),
           count(*) - count(edited_date) from "iPhone".iphone_listings""",
    ) == [(240, 6, 6, 6, 6)]
    assert _rows(
        dsn,
        """select count(distinct listing_id), count(*), max(image_index)
           from "iPhone".iphone_image_assets""",
    ) == [(234, 972, 6)]
    assert _rows(
        dsn,
        """select count(*), count(*) filter (where is_stock_photo),
           count(*) filter (where battery_screenshot), count(*) - count(photo_quality_level),
           count(*) - count(distinct (listing_id, image_index)),
           count(distinct listing_id) from ml.iphone_image_features_v1""",
    ) == [(972, 30, 12, 59, 24, 228)]


def test_marketplace_files(tmp_path: Path) -> None:
    """One file is cut off, one is missing, two are the same, and a second time makes none."""
    market = marketplace.made_up(tmp_path, 12, size=(96, 128))

    drawn = marketplace.draw_photos(market, workers=1)

    paths = {row["storage_path"] for row in market.images}
    there = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.jpg")}
    assert paths - there == {"1008/1.jpg"}
    assert drawn == len(there) == len(paths) - 1
    assert (tmp_path / "1009/0.jpg").read_bytes() == (tmp_path / "1010/0.jpg").read_bytes()
    assert marketplace.draw_photos(market, workers=1) == 0
    with pytest.raises((OSError, UnidentifiedImageError)):
        Image.open(tmp_path / "1007/0.jpg").load()


def test_filling_again_changes_nothing(server: Path, tmp_path: Path) -> None:
    """The tables hold exactly the marketplace, however often it is written."""
    dsn = _database(server, "twice")
    everything = 'select * from "iPhone".iphone_listings order by listing_id'
    marketplace.fill(dsn, marketplace.made_up(tmp_path, 10))
    first = _rows(dsn, everything)

    marketplace.fill(dsn, marketplace.made_up(tmp_path, 10))

    assert _rows(dsn, everything) == first


def test_each_folder_with_photos_is_a_listing(tmp_path: Path) -> None:
    """Folders at any depth, images in the order of their names, nothing else."""
    for name in ("a/b/2.JPG", "a/b/1.png", "a/notes.txt", "c/x.heic", ".hidden/1.jpg", "c/.1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, ns=(0, 1_700_000_000_123_456_789))

    market = marketplace.from_photos(tmp_path)

    assert [row["title"] for row in market.listings] == ["a/b", "c"]
    assert [row["edited_date"].isoformat() for row in market.listings] == [
        "2023-11-14T22:13:20.123456+00:00"
    ] * 2
    assert [(row["image_index"], row["storage_path"]) for row in market.images] == [
        (0, "a/b/1.png"),
        (1, "a/b/2.JPG"),
        (0, "c/x.heic"),
    ]
    assert market.images[0]["listing_id"] == market.listings[0]["listing_id"]
    assert market.jobs == []


def test_a_folder_without_photos_is_refused(tmp_path: Path) -> None:
    """One line says what was expected."""
    with pytest.raises(SettingsError, match="expected at least one image in a folder"):
        marketplace.from_photos(tmp_path)
    with pytest.raises(SettingsError, match="expected a folder of photos, found none"):
        marketplace.from_photos(tmp_path / "nowhere")
