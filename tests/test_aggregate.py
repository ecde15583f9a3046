"""Listing vectors: literal image vectors in, exact means out."""

import argparse
import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import aggregate as stage
from pipeline.stage import parquet
from pipeline.stage.errors import DataError, WrongImageRoot
from pipeline.stage.settings import Settings

T0 = datetime(2026, 1, 1, 12, 0, 0, 1, tzinfo=UTC)
MADE_BY = {"export": {"force": False}, "select": {"topk": 5}, "encoder": {"weights": "w"}}
IDENTITY = {"source": "s", "model_rev": "m", "pca_rev": "p"}


def image(
    listing: int, rank: int, vec: list[float] | None, error: str | None = None, **key: Any
) -> dict[str, Any]:
    """One row of an encode shard."""
    return {
        "generation": 1,
        "listing_id": listing,
        "edited_date": T0,
        "image_index": rank - 1,
        "storage_path": f"{listing}/{rank - 1}.jpg",
        "score": 0,
        "rank": rank,
        "fallback": False,
        "size": 100,
        "mtime_ns": 7,
        "vec": vec,
        "error": error,
        **key,
    }


class Stage:
    """The files of one aggregate job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def shard(
        self, *rows: dict[str, Any], dim: int = 2, made_by: Any = None, row_group: int = 1000
    ) -> None:
        number = len(list(self.folder.glob("shard*")))
        with parquet.writer(
            self.folder / f"shard{number}.parquet", parquet.encoded(dim), made_by or MADE_BY
        ) as writer:
            table = pa.Table.from_pylist(list(rows), parquet.encoded(dim))
            writer.write_table(table, row_group_size=row_group)

    def run(
        self, *, threads: int = 2, **settings: Any
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The rows of listing_vectors.parquet, and failures.json with those of without_vector."""
        shards = sorted(self.folder.glob("shard*"))
        columns = set(parquet.CANDIDATES.names)
        rows = [row for path in shards for row in pq.read_table(path).to_pylist()]
        flags = {"is_stock_photo": False, "battery_screenshot": False}
        with parquet.writer(self.folder / "images.parquet", parquet.CANDIDATES, MADE_BY) as writer:
            candidates = [{k: v for k, v in row.items() if k in columns} | flags for row in rows]
            writer.write_table(pa.Table.from_pylist(candidates, parquet.CANDIDATES))
        args = argparse.Namespace(
            encoded=shards,
            images=self.folder / "images.parquet",
            output=self.folder / "vectors.parquet",
            failures=self.folder / "failures.json",
            without_vector=self.folder / "without_vector.parquet",
            threads=threads,
        )
        stage.aggregate(args, Settings(**{**IDENTITY, **settings}))
        failures = json.loads(args.failures.read_text())
        without = pq.read_table(args.without_vector).to_pylist()
        assert len(without) == failures["listings_without_vector"]
        return pq.read_table(args.output).to_pylist(), {
            **failures,
            "listings_without_vector": without,
        }


@pytest.fixture
def job(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_the_vector_is_the_normalised_mean(job: Stage) -> None:
    """A listing's vector is the unit vector of the mean of its unit image vectors."""
    job.shard(image(1, 1, [1.0, 0.0]), image(1, 2, [0.0, 1.0]), image(2, 1, [0.6, 0.8]))
    vectors, failures = job.run()
    half = math.sqrt(0.5)

    assert [
        {
            "generation": 1,
            "listing_id": 1,
            "edited_date": T0,
            **IDENTITY,
            "vec": pytest.approx([half, half], abs=1e-7),
            "n_images": 2,
        },
        {
            "generation": 1,
            "listing_id": 2,
            "edited_date": T0,
            **IDENTITY,
            "vec": pytest.approx([0.6, 0.8], abs=1e-7),
            "n_images": 1,
        },
    ] == vectors
    assert {
        "images": 3,
        "failed": {},
        "listings": 2,
        "listings_without_vector": [],
    } == failures


def test_failed_images_are_left_out_of_the_mean(job: Stage) -> None:
    """n_images counts the images in the mean; failures are counted by reason."""
    job.shard(
        image(1, 1, None, "missing: no such file"),
        image(1, 2, [0.0, 1.0]),
        image(1, 3, None, "broken: no image"),
    )
    vectors, failures = job.run()

    assert [([0.0, 1.0], 1)] == [(row["vec"], row["n_images"]) for row in vectors]
    assert {"broken": 1, "missing": 1} == failures["failed"]
    assert [] == failures["listings_without_vector"]


def test_a_listing_with_no_readable_image_gets_no_row(job: Stage, monkeypatch: Any) -> None:
    """It is reported instead, with the state of each file, in UTC whatever this machine's zone."""
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    job.shard(
        image(1, 1, None, "missing: no such file", size=None, mtime_ns=None),
        image(1, 2, None, "broken: no image"),
        image(2, 1, [1.0, 0.0]),
    )
    vectors, failures = job.run()
    (without,) = failures["listings_without_vector"]

    assert [2] == [row["listing_id"] for row in vectors]
    assert 32 == len(without.pop("candidates"))
    assert {
        "generation": 1,
        "listing_id": 1,
        "edited_date": T0,
        "files": [
            {
                "storage_path": "1/0.jpg",
                "size": None,
                "mtime_ns": None,
                "error": "missing: no such file",
            },
            {
                "storage_path": "1/1.jpg",
                "size": 100,
                "mtime_ns": 7,
                "error": "broken: no image",
            },
        ],
    } == without


@pytest.mark.parametrize(
    "vectors",
    [
        ([1.0, 0.0], [-1.0, 0.0]),
        ([1.0, 1e-7], [-1.0, 1e-7]),
        ([math.nan, 0.0],),
        ([math.inf, 0.0],),
        ([0.0, 0.0],),
    ],
)
def test_vectors_without_a_direction_give_no_row(
    job: Stage, vectors: tuple[list[float], ...]
) -> None:
    """Image vectors that cancel out, or are not finite, make no listing vector."""
    unsound = [image(1, rank, vec) for rank, vec in enumerate(vectors, 1)]
    job.shard(*unsound, image(2, 1, [1.0, 0.0]))
    rows, failures = job.run()

    assert [2] == [row["listing_id"] for row in rows]
    assert [(1, [])] == [
        (listing["listing_id"], listing["files"]) for listing in failures["listings_without_vector"]
    ]


def test_a_short_mean_still_has_a_direction(job: Stage) -> None:
    """Two images that nearly cancel out point where the rest of them points."""
    job.shard(image(1, 1, [1.0, 1e-5]), image(1, 2, [-1.0, 1e-5]))
    rows, _ = job.run()

    assert [[0.0, 1.0]] == [row["vec"] for row in rows]


def test_shards_follow_each_other_newest_first_within(job: Stage) -> None:
    """Listings of a shard come newest edit first, then by id; edits and generations stay apart."""
    later = T0 + timedelta(microseconds=1)
    job.shard(image(2, 1, [1.0, 0.0], edited_date=later), image(1, 1, [1.0, 0.0]))
    job.shard(
        image(1, 1, [0.0, 1.0], edited_date=later, generation=2),
        image(3, 1, [1.0, 0.0], edited_date=later),
    )
    vectors, _ = job.run()

    assert [(1, 2, later), (1, 1, T0), (2, 1, later), (1, 3, later)] == [
        (row["generation"], row["listing_id"], row["edited_date"]) for row in vectors
    ]


def test_empty_shards_give_an_empty_file(job: Stage) -> None:
    """No images at all: no rows, the schema of the encoder's dimension, zero counts."""
    job.shard(dim=3)
    vectors, failures = job.run()

    assert [] == vectors
    assert pq.read_schema(job.folder / "vectors.parquet").equals(parquet.listing_vectors(3))
    assert {"images": 0, "failed": {}, "listings": 0, "listings_without_vector": []} == failures
    assert {**MADE_BY, "aggregate": IDENTITY} == parquet.metadata(job.folder / "vectors.parquet")


def test_many_batches_give_the_same_rows(job: Stage, monkeypatch: Any) -> None:
    """A listing is never split between batches, and the same input gives the same bytes."""
    angle = [0.1 * n for n in range(60)]
    rows = [image(n // 3, n % 3 + 1, [math.cos(a), math.sin(a)]) for n, a in enumerate(angle)]
    job.shard(*rows)
    whole, _ = job.run()
    first = (job.folder / "vectors.parquet").read_bytes()
    job.run()
    second = (job.folder / "vectors.parquet").read_bytes()
    monkeypatch.setattr(stage, "BATCH_ROWS", 4)
    split, _ = job.run()
    batches = pq.read_metadata(job.folder / "vectors.parquet").num_row_groups

    assert [(n, 3) for n in range(20)] == [(row["listing_id"], row["n_images"]) for row in whole]
    assert whole == split
    assert 10 < batches
    assert first == second


def test_the_number_of_threads_changes_nothing(job: Stage, monkeypatch: Any) -> None:
    """Shards of many batches, whose listings cross the row groups, give the same bytes."""
    draw = np.random.default_rng(0)
    for shard in range(3):
        rows = [
            image(
                n,
                k,
                draw.normal(size=2).tolist() if (n + k) % 5 else None,
                None if (n + k) % 5 else GONE,
            )
            for n in range(40 * shard, 40 * shard + 40)
            for k in range(1, 2 + n % 4)
        ]
        job.shard(*rows, row_group=3)
    monkeypatch.setattr(stage, "BATCH_ROWS", 7)
    written = {}
    for threads in (1, 2, 5):
        vectors, failures = job.run(threads=threads)
        names = ("vectors.parquet", "without_vector.parquet", "failures.json")
        written[threads] = [(job.folder / name).read_bytes() for name in names]

    assert 120 == len(vectors) + len(failures["listings_without_vector"])
    assert [row["listing_id"] for row in vectors] == sorted(row["listing_id"] for row in vectors)
    assert written[1] == written[2] == written[5]


def test_row_groups_have_a_limit(job: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vectors are written in row groups that a reader can take one by one."""
    monkeypatch.setattr(parquet, "VECTOR_ROW_GROUP", 3)
    job.shard(*[image(n, 1, [1.0, 0.0]) for n in range(7)])
    job.run()
    footer = pq.read_metadata(job.folder / "vectors.parquet")

    assert [3, 3, 1] == [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]


@pytest.mark.parametrize(
    "other",
    [
        {**MADE_BY, "encoder": {"weights": "x"}},
        {**MADE_BY, "export": {"force": True}},
        {**MADE_BY, "select": {"topk": 4}},
    ],
)
def test_shards_of_different_makes_are_refused(job: Stage, other: dict[str, Any]) -> None:
    """Shards of two encoders, selections or exports are an error, and no file is written."""
    job.shard(image(1, 1, [1.0, 0.0]))
    job.shard(image(2, 1, [1.0, 0.0]), made_by=other)

    with pytest.raises(DataError, match="expected shards of one export, one selection and one enc"):
        job.run()
    assert not (job.folder / "vectors.parquet").exists()
    assert not (job.folder / "failures.json").exists()


GONE = "missing: no such file"


def test_a_run_without_one_photo_is_a_wrong_root(job: Stage) -> None:
    """With not one photo of two listings there, nothing is written; encode looks again."""
    job.shard(image(1, 1, None, GONE), image(1, 2, None, GONE))
    job.shard(image(2, 1, None, GONE))
    shards = sorted(job.folder.glob("shard*"))
    with pytest.raises(WrongImageRoot) as error:
        job.run()

    assert (
        "expected one photo at least of the run under IMAGE_ROOT_DIR, found none of 3, of 2"
        " listings (nothing waits, nothing is loaded); hint: check IMAGE_ROOT_DIR; if they are all"
        " to come later: --config max_failed_fraction=1"
    ) == str(error.value)
    assert 2 == len(shards)
    assert ["images.parquet"] == [path.name for path in job.folder.iterdir()]


@pytest.mark.parametrize(
    ("rows", "there", "settings"),
    [
        ([image(1, 1, None, GONE), image(1, 2, None, GONE)], (0,), {}),
        ([image(1, 1, None, GONE), image(2, 1, None, "broken: no image")], (0,), {}),
        ([image(1, 1, None, GONE), image(2, 1, None, GONE)], (0, 1), {}),
        ([image(1, 1, None, GONE), image(2, 1, None, GONE)], (1, 0), {}),
        ([image(1, 1, None, GONE), image(2, 1, None, GONE)], (0,), {"max_failed_fraction": 1}),
    ],
    ids=["one listing", "one file", "another's photo", "another's first", "as announced"],
)
def test_photos_that_are_not_there_wait(
    job: Stage, rows: list[dict[str, Any]], there: tuple[int, ...], settings: dict[str, Any]
) -> None:
    """One listing is no evidence of a wrong root, and one photo under it is evidence against."""
    job.shard(*rows, made_by={**MADE_BY, "witnesses_there": there[0]})
    for seen in there[1:]:
        job.shard(made_by={**MADE_BY, "witnesses_there": seen})
    vectors, failures = job.run(**settings)

    assert [] == vectors
    assert sorted({row["listing_id"] for row in rows}) == sorted(
        row["listing_id"] for row in failures["listings_without_vector"]
    )


def test_the_command(
    job: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each flag has its effect, and the last line says what became of how many images."""
    job.shard(image(1, 1, [1.0, 0.0]), image(1, 2, None, GONE), image(2, 1, None, GONE))
    job.run()
    (job.folder / "shard0.parquet").rename(job.folder / "1-of-1.parquet")
    written = {name: job.folder / "again" / name for name in ("vectors", "without", "failures")}
    key = [f"--{name.replace('_', '-')}={value}" for name, value in IDENTITY.items()]
    words = [
        "--encoded", job.folder, "--shards", 1, "--images", job.folder / "images.parquet",
        "--output", written["vectors"], "--without-vector", written["without"],
        "--failures", written["failures"], *key,
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["aggregate", *map(str, words)])
    with caplog.at_level("INFO", "pipeline"):
        stage.main()

    assert [(1, "s", "m", "p")] == [
        (row["listing_id"], *(row[name] for name in IDENTITY))
        for row in pq.read_table(written["vectors"]).to_pylist()
    ]
    assert [2] == pq.read_table(written["without"])["listing_id"].to_pylist()
    assert 3 == json.loads(written["failures"].read_text())["images"]
    assert f"1 listings from 3 images, 2 failed -> {written['vectors']}" == caplog.messages[-1]


@pytest.mark.parametrize(
    "flag", ["--encoded", "--shards", "--images", "--output", "--without-vector", "--failures",
             "--source", "--model-rev"],
)  # fmt: skip
def test_the_command_needs_its_files_and_the_key(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without one of them it names the flag, before anything is read or written."""
    flags = {
        "--encoded": "e", "--shards": "1", "--images": "i", "--output": "o",
        "--without-vector": "w", "--failures": "f", "--source": "s", "--model-rev": "m",
    }  # fmt: skip
    words = [word for name, value in flags.items() if name != flag for word in (name, value)]
    monkeypatch.setattr("sys.argv", ["aggregate", *words])
    with pytest.raises(SystemExit) as ended:
        stage.main()

    assert 2 == ended.value.code
    assert flag in capsys.readouterr().err.splitlines()[-1]
