"""Top-K selection and sharding: literal candidates in, exact rows out."""

import argparse
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY

from pipeline import select as stage
from pipeline.select import select, select_images, shard_of
from pipeline.stage import parquet
from pipeline.stage.errors import DataError
from pipeline.stage.settings import Settings

T0 = datetime(2026, 1, 1, 12, tzinfo=UTC)
EXPORT = {"export": {"force": False}}


def candidate(
    image_index: int,
    score: int = 0,
    *,
    listing: int = 1,
    edited: datetime = T0,
    generation: int = 1,
    path: str | None = None,
    stock: bool = False,
    screenshot: bool = False,
) -> dict[str, Any]:
    """One row of images.parquet."""
    return {
        "generation": generation,
        "listing_id": listing,
        "edited_date": edited,
        "image_index": image_index,
        "storage_path": path or f"{listing}/{image_index}.jpg",
        "score": score,
        "is_stock_photo": stock,
        "battery_screenshot": screenshot,
    }


def frame(*rows: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame(pa.Table.from_pylist(list(rows), parquet.CANDIDATES))


def chosen(
    *rows: dict[str, Any], topk: int = 5, stock: bool = True, screenshots: bool = True
) -> list[tuple[int, int, int, bool]]:
    """(listing_id, image_index, rank, fallback) of the selection."""
    selected = select_images(frame(*rows), topk, stock, screenshots)
    assert pl.DataFrame(parquet.SELECTED.empty_table()).schema == selected.schema
    return selected.select("listing_id", "image_index", "rank", "fallback").rows()


def test_the_best_scores_are_ranked_first() -> None:
    """The K images with the highest score are taken, best first."""
    actual = chosen(candidate(0, 3), candidate(1, 40), candidate(2, 13), topk=2)

    assert [(1, 1, 1, False), (1, 2, 2, False)] == actual


def test_ties_go_to_the_lower_image_index() -> None:
    """Among equal scores the lower image_index comes first, then the storage_path."""
    rows = [candidate(i, 10, path=path) for i, path in ((2, "a"), (0, "c"), (1, "b"))]
    actual = chosen(*rows, candidate(-1, 0), topk=3)
    one_index = [{**candidate(0), "storage_path": path} for path in (None, "b", "a")]
    paths = select_images(frame(*one_index), 3, True, True)["storage_path"].to_list()

    assert [(1, 0, 1, False), (1, 1, 2, False), (1, 2, 3, False)] == actual
    assert ["a", "b", None] == paths


@pytest.mark.parametrize(
    ("stock", "screenshots", "expected"),
    [
        (True, True, [(1, 2, 1, False)]),
        (False, True, [(1, 0, 1, False), (1, 2, 2, False)]),
        (True, False, [(1, 1, 1, False), (1, 2, 2, False)]),
        (False, False, [(1, 0, 1, False), (1, 1, 2, False), (1, 2, 3, False)]),
    ],
)
def test_each_exclusion_is_a_switch_of_its_own(
    stock: bool, screenshots: bool, expected: list[tuple[int, int, int, bool]]
) -> None:
    """exclude_stock and exclude_screenshots each leave out their own kind and no other."""
    rows = (candidate(0, 40, stock=True), candidate(1, 30, screenshot=True), candidate(2, 0))

    assert expected == chosen(*rows, stock=stock, screenshots=screenshots)


def test_a_listing_with_only_excluded_images_falls_back() -> None:
    """With nothing left the first K by image_index are taken, whatever their score, and marked."""
    actual = chosen(
        candidate(0, 0, stock=True),
        candidate(1, 40, screenshot=True),
        candidate(2, 50, stock=True, screenshot=True),
        candidate(0, 0, listing=2),
        topk=2,
    )

    assert [(1, 0, 1, True), (1, 1, 2, True), (2, 0, 1, False)] == actual


def test_a_part_left_over_is_no_fallback() -> None:
    """One usable image is enough: the excluded ones do not fill up the K."""
    actual = chosen(candidate(0, 9, stock=True), candidate(1, 0), candidate(2, 9, stock=True))

    assert [(1, 1, 1, False)] == actual


def test_listings_are_told_apart_by_their_whole_key() -> None:
    """Each generation and each edit of a listing has a Top-K of its own, in the order given."""
    later = T0 + timedelta(microseconds=1)
    actual = select_images(
        frame(
            candidate(0, edited=later, generation=2),
            candidate(1, 10, edited=later, generation=2),
            candidate(0, edited=T0, generation=2),
            candidate(0, edited=T0, generation=1),
        ),
        1, True, True,
    )  # fmt: skip

    assert [(2, later, 1, 1), (2, T0, 0, 1), (1, T0, 0, 1)] == actual.select(
        "generation", "edited_date", "image_index", "rank"
    ).rows()


def test_nothing_is_selected_of_nothing() -> None:
    """No candidates give no rows, of the same types."""
    assert [] == chosen()


def test_a_shard_depends_on_the_listing_alone() -> None:
    """The shard of an id is fixed and within range for any 64-bit id, and ids with gaps spread."""
    ids = pl.DataFrame({"id": [1, 2, 3, 0, -1, 2**63 - 1, -(2**63)]})
    gapped = pl.DataFrame({"id": [1024 * i for i in range(4000)]})
    fixed = ids.select(shard_of(pl.col("id"), 1000))["id"].to_list()
    again = ids.reverse().select(shard_of(pl.col("id"), 1000))["id"].to_list()
    spread = gapped.select(shard_of(pl.col("id"), 4))["id"].value_counts()["count"].to_list()

    assert [884, 121, 6, 0, 763, 587, 824] == fixed
    assert fixed[::-1] == again
    assert 4 == len(spread)
    assert min(spread) > 900


def write_export(folder: Path, rows: list[dict[str, Any]], listings: int) -> None:
    with parquet.writer(folder / "images.parquet", parquet.CANDIDATES, EXPORT) as writer:
        writer.write_table(pa.Table.from_pylist(rows, parquet.CANDIDATES))
    with parquet.writer(folder / "listings.parquet", parquet.LISTINGS, EXPORT) as writer:
        keys = [{**row, "listing_id": n} for n, row in enumerate([candidate(0)] * listings)]
        writer.write_table(pa.Table.from_pylist(keys, parquet.LISTINGS))


def run(folder: Path, shards: int, *prune: Path) -> list[Path]:
    select(arguments(folder, shards, *prune), Settings())
    return parquet.shards(folder / "select", shards)


def arguments(folder: Path, shards: int, *prune: Path) -> argparse.Namespace:
    return argparse.Namespace(
        listings=folder / "listings.parquet",
        images=folder / "images.parquet",
        selected=folder / "select",
        shards=shards,
        prune=list(prune),
    )


def rows_of(paths: list[Path]) -> list[list[tuple[int, int]]]:
    return [
        [(row["listing_id"], row["rank"]) for row in pq.read_table(path).to_pylist()]
        for path in paths
    ]


def test_all_images_of_a_listing_are_in_one_shard(tmp_path: Path) -> None:
    """Every selected image is in exactly one shard, with the other images of its listing."""
    rows = [candidate(i, listing=listing) for listing in (1, 2, 3) for i in (0, 1)]
    write_export(tmp_path, rows, 3)

    assert [
        [(1, 1), (1, 2)],
        [(2, 1), (2, 2)],
        [(3, 1), (3, 2)],
        [],
    ] == rows_of(run(tmp_path, 4))


def test_shards_without_a_listing_are_empty_files(tmp_path: Path) -> None:
    """One listing in fewer shards than there are leaves whole, empty files of the right schema."""
    write_export(tmp_path, [candidate(0)], 1)
    outputs = run(tmp_path, 3)

    assert [[], [], [(1, 1)]] == sorted(rows_of(outputs), key=len)
    assert [True] * 3 == [pq.read_schema(path).equals(parquet.SELECTED) for path in outputs]
    chosen = {
        "topk": 5, "exclude_stock": True, "exclude_screenshots": True, "projection": "",
    }  # fmt: skip
    assert [{**EXPORT, "select": chosen}] * 3 == [parquet.metadata(path) for path in outputs]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [2, 3]),
        ({"exclude_stock": False}, [0, 2, 3]),
        ({"exclude_screenshots": False}, [1, 2, 3]),
        ({"topk": 1}, [2]),
    ],
    ids=str,
)
def test_each_setting_reaches_the_shards(
    tmp_path: Path, settings: dict[str, Any], expected: list[int]
) -> None:
    """topk and the exclusions decide what is written, and the number of it is the answer."""
    rows = [candidate(0, stock=True), candidate(1, screenshot=True), candidate(2), candidate(3)]
    write_export(tmp_path, rows, 1)
    output = tmp_path / "select" / "1-of-1.parquet"
    written = select(arguments(tmp_path, 1), Settings(**settings))

    assert expected == pq.read_table(output)["image_index"].to_pylist()
    assert len(expected) == written


def row_groups(path: Path) -> list[int]:
    """The rows of each row group."""
    footer = pq.read_metadata(path)
    return [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]


def test_images_of_many_batches_are_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many batches there are, each image is written and counted, in export order."""
    monkeypatch.setattr(stage, "BATCH_ROWS", 3)
    write_export(tmp_path, [candidate(i, listing=n) for n in range(7) for i in (0, 1)], 7)
    written = select(arguments(tmp_path, 1), Settings())

    assert 14 == written
    assert [[(n, rank) for n in range(7) for rank in (1, 2)]] == rows_of(
        [tmp_path / "select" / "1-of-1.parquet"]
    )


def test_rows_are_held_back_until_there_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven batches of one row make row groups of three, and of one at the end."""
    monkeypatch.setattr(stage, "BUFFERED_ROWS", 3)
    rows = (select_images(frame(candidate(0, listing=n)), 1, True, True) for n in range(7))
    in_one_shard = (row.with_columns(shard=pl.lit(0, pl.UInt32)) for row in rows)
    written = stage.write(in_one_shard, [tmp_path / "rows"], {})

    assert 7 == written
    assert [3, 3, 1] == row_groups(tmp_path / "rows")
    assert [[(n, 1) for n in range(7)]] == rows_of([tmp_path / "rows"])


def test_the_number_of_open_files_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that take the way through a temporary file come out the same, and it leaves nothing."""
    write_export(tmp_path, [candidate(i, listing=n) for n in range(99) for i in range(3)], 99)
    directly = [path.read_bytes() for path in run(tmp_path, 7)]
    monkeypatch.setattr(stage, "OPEN_FILES", 3)
    parted = [path.read_bytes() for path in run(tmp_path, 7)]
    monkeypatch.setattr(stage, "BATCH_ROWS", 2)
    in_portions = run(tmp_path, 7)

    assert directly == parted
    assert directly == [path.read_bytes() for path in in_portions]
    assert sorted(in_portions) == sorted((tmp_path / "select").iterdir())


def test_more_shards_than_a_process_may_open(tmp_path: Path) -> None:
    """600 shards under the 256 descriptors of macOS: each listing in its shard, empty ones too."""
    write_export(tmp_path, [candidate(0, listing=n) for n in range(2000)], 2000)
    files = {"listings": "listings.parquet", "images": "images.parquet", "selected": "select"}
    words = [word for name, file in files.items() for word in (f"--{name}", tmp_path / file)]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -n 256; exec "$@"', "sh", sys.executable, "-m", "pipeline.select",
         *words, "--shards", "600"],
        cwd=REPOSITORY, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert 0 == done.returncode, done.stderr
    ids = pl.DataFrame({"id": range(2000)}).with_columns(shard=shard_of(pl.col("id"), 600))
    expected = [ids.filter(pl.col("shard") == n)["id"].to_list() for n in range(600)]

    assert [[(n, 1) for n in of_shard] for of_shard in expected] == rows_of(
        parquet.shards(tmp_path / "select", 600)
    )


def test_row_groups_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held back is written in row groups that a reader can take one by one."""
    monkeypatch.setattr(parquet, "ROW_GROUP", 3)
    write_export(tmp_path, [candidate(0, listing=n) for n in range(7)], 7)

    assert [[3, 3, 1]] == [row_groups(path) for path in run(tmp_path, 1)]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    """Selecting twice writes identical files."""
    write_export(tmp_path, [candidate(i, listing=n) for n in range(20) for i in range(3)], 20)
    first = [path.read_bytes() for path in run(tmp_path, 2)]

    assert first == [path.read_bytes() for path in run(tmp_path, 2)]


def test_shards_of_another_split_are_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A new number of shards leaves none of the old ones, here or in encode; all else stays."""
    write_export(tmp_path, [candidate(0)], 1)
    encode = tmp_path / "encode"
    encode.mkdir()
    others = [".1-of-3.parquet.99.tmp", "1-of-2.json", "1-of-2.parquet", "2-of-2.parquet"]
    for name in (*others, "1-of-3.parquet", "notes.txt"):
        (encode / name).touch()
    run(tmp_path, 2)
    with caplog.at_level("INFO", "pipeline"):
        run(tmp_path, 3, encode, tmp_path / "select")

    assert ["1-of-3.parquet", "2-of-3.parquet", "3-of-3.parquet"] == sorted(
        path.name for path in (tmp_path / "select").iterdir()
    )
    assert ["1-of-3.parquet", "notes.txt"] == sorted(path.name for path in encode.iterdir())
    removed = [encode / name for name in others]
    removed += [tmp_path / "select" / f"{n}-of-2.parquet" for n in (1, 2)]
    assert [f"removed {path}, a shard of another split" for path in removed] == caplog.messages


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Each flag has its effect, and the last line says how many images went where."""
    write_export(tmp_path, [candidate(i, stock=i == 0) for i in range(4)], 1)
    (tmp_path / "encode").mkdir()
    (tmp_path / "encode" / "1-of-2.parquet").touch()
    output = tmp_path / "select" / "1-of-1.parquet"
    words = [
        "--listings", tmp_path / "listings.parquet", "--images", tmp_path / "images.parquet",
        "--selected", output.parent, "--shards", 1, "--prune", tmp_path / "encode",
        "--topk", 2, "--exclude-stock", "no", "--exclude-screenshots", "no",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["select", *map(str, words)])
    with caplog.at_level("INFO", "pipeline"):
        stage.main()

    assert [0, 1] == pq.read_table(output)["image_index"].to_pylist()
    recipe = {"topk": 2, "exclude_stock": False, "exclude_screenshots": False, "projection": ""}

    assert recipe == (parquet.metadata(output)["select"])
    assert [] == list((tmp_path / "encode").iterdir())
    assert f"2 images selected -> {tmp_path}/select" == caplog.messages[-1]


@pytest.mark.parametrize("flag", ["--listings", "--images", "--selected", "--shards"])
def test_the_command_needs_its_files(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without one of them it names the flag, before anything is read or written."""
    flags = {"--listings": "l", "--images": "i", "--selected": "s", "--shards": "1"}
    words = [word for name, value in flags.items() if name != flag for word in (name, value)]
    monkeypatch.setattr("sys.argv", ["select", *words])
    with pytest.raises(SystemExit) as ended:
        stage.main()

    assert 2 == ended.value.code
    assert f"the following arguments are required: {flag}\n" in capsys.readouterr().err


def test_a_listing_without_a_candidate_is_refused(tmp_path: Path) -> None:
    """Exports that do not belong together are an error, and no shard is written."""
    write_export(tmp_path, [candidate(0)], 2)

    with pytest.raises(DataError) as error:
        run(tmp_path, 2)
    assert (
        f"expected 2 listings with a selected image, found 1 ({tmp_path}/listings.parquet);"
        " hint: run the export again: --forcerun export"
    ) == str(error.value)
    assert [] == list((tmp_path / "select").iterdir())
