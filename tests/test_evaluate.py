"""`evaluate`: its figures against a script of its own, what lowers them, the target, the page."""

import html
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import Run, Workspace, create_tables, new_database, new_workspace
from halves_script import evaluate as by_script

from demo.encoder import efficientnet_encoder, random_encoder
from pipeline import evaluate as stage
from pipeline.encoder.model import find_model
from pipeline.encoder.tower import Encoder, load_encoder
from pipeline.photos.pixels import Transform, load_pixels
from pipeline.retrieval import choices, evaluation, halves
from pipeline.stage import parquet
from pipeline.stage.errors import DataError

T0 = datetime(2026, 1, 1, 12, tzinfo=UTC)
FIGURES = ("recall_at_1", "recall_at_5", "recall_at_10", "mrr")
HOSTILE = '"><script>document.title="taken"</script>.jpg'
Row = dict[str, Any]


def row(listing: int, index: int, vec: Any, **more: Any) -> Row:
    """Of an encode shard; a vector is made a unit vector."""
    if vec is not None:
        vec = np.asarray(vec, np.float32) / np.float32(np.linalg.norm(vec))
    return {
        "generation": 1, "listing_id": listing, "edited_date": T0, "image_index": index,
        "storage_path": f"{listing}/{index}.jpg", "score": 0, "rank": index + 1, "fallback": False,
        "size": 1, "mtime_ns": 1, "vec": vec, "error": None if vec is not None else "missing: x",
        **more,
    }  # fmt: skip


def write(path: Path, rows: Sequence[Row], dim: int, **made_by: Any) -> Path:
    """An encode shard."""
    document = {"export": {"source": "s", "model_rev": "m", "pca_rev": ""}, "encoder": {"w": "1"}}
    with parquet.writer(path, parquet.encoded(dim), document | made_by) as writer:
        writer.write_table(pa.Table.from_pylist(list(rows), parquet.encoded(dim)))
    return path


def found(folder: Path, *shards: Sequence[Row], seed: int = 0, **made_by: Any) -> dict[str, Any]:
    """evaluate.json of these rows."""
    dim = next(len(r["vec"]) for rows in shards for r in rows if r["vec"] is not None)
    paths = [
        write(folder / f"{n}-of-{len(shards)}.parquet", rows, dim, **made_by)
        for n, rows in enumerate(shards, 1)
    ]
    return stage.report(paths, folder / "images.parquet", seed, 256, 2)[0]


def sides(folder: Path, rows: Sequence[Row], dim: int) -> dict[tuple[int, int], int]:
    """Of each photo, by listing and index, the side that it is put on."""
    path = write(folder / "1-of-1.parquet", rows, dim)
    return {
        (int(listing), int(index)): int(side)
        for split in halves.Halves([path], None, 0, 256).splits()
        for listing, index, side in zip(
            np.repeat(split.photos.listing, split.photos.size), split.photos.index, split.side,
            strict=True,
        )
    }  # fmt: skip


def of(figures: dict[str, Any]) -> list[float]:
    return [figures[name]["value"] for name in FIGURES]


def made_up(seed: int, listings: int = 60, dim: int = 24) -> list[Row]:
    """Listings of up to seven photos; some are nearly the same, shared, unreadable or edited."""
    draw = np.random.default_rng(seed)
    stock = draw.standard_normal((4, dim))
    stock[1] = stock[0] + 0.02 * stock[1]  # nearly the same as another that is shared
    rows: list[Row] = []
    for listing in range(1, listings + 1):
        centre = draw.standard_normal(dim)
        photos = [centre + draw.standard_normal(dim) for _ in range(draw.integers(1, 8))]
        if listing % 4 == 0:
            photos += [photos[0] + 0.05 * draw.standard_normal(dim)]
        if listing % 5 == 0:
            photos += [*stock[draw.permutation(4)[:2]]]
        edited = [T0, T0 + timedelta(days=1)] if listing % 6 == 0 else [T0]
        for when in edited:
            some = photos[: 1 + len(photos) // 2] if when == T0 and len(edited) > 1 else photos
            rows += [
                row(listing, i, None if (listing + i) % 9 == 0 else vec, edited_date=when)
                for i, vec in enumerate(some)
            ]
    return rows


# --- the figures


@pytest.mark.parametrize("seed", [0, 1])
def test_every_figure_is_that_of_the_script(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of made-up listings in two shards: each choice, each rank and the near-duplicates."""
    monkeypatch.setattr(evaluation, "DIMENSIONS", (8, 4, 2))
    rows = made_up(seed)
    half = next(i for i, r in enumerate(rows) if r["listing_id"] == 31)
    ours = found(tmp_path, rows[:half], rows[half:], seed=seed)
    script = by_script(rows, seed, fits=(8, 4, 2))

    assert (script["queries"], script["gallery"]) == (ours["queries"], ours["gallery"])
    assert script["ranks"] == [each["rank"] for each in ours["ranks"]]
    near = ours["rival_is_near_duplicate"]
    assert script["rival_is_near_duplicate"] == pytest.approx(near, abs=1e-6)
    assert 12 == len(ours["choices"])
    for choice in ours["choices"]:
        of_script = script[choice["name"] if choice["group"] else ""]
        assert of_script == pytest.approx(of(choice), abs=1e-6), choice["name"]


def test_blocks_and_portions_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches of a few photos and chunks of a few queries the document is the same."""
    rows = made_up(2)
    whole = found(tmp_path, rows)
    monkeypatch.setattr(halves, "BATCH_ROWS", 16)
    monkeypatch.setattr(choices, "CHUNK", 7)
    monkeypatch.setattr(choices, "FEW", 3)
    monkeypatch.setattr(parquet, "ROW_GROUP", 16)

    assert whole == found(tmp_path, rows)


def test_of_many_listings_a_seeded_part_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the smallest hashes, in the gallery of all; the document says of how many."""
    rows = made_up(3)
    everyone = found(tmp_path, rows)
    monkeypatch.setattr(evaluation, "MOST_QUERIES", 9)
    monkeypatch.setattr(halves, "BATCH_ROWS", 16)
    few = found(tmp_path, rows)

    assert everyone["ranks"][:9] == few["ranks"]
    assert (9, everyone["queries"]) == (few["queries"], few["asked_of"])
    assert everyone["gallery"] == few["gallery"]


def test_an_encoder_to_which_all_is_the_same_finds_nothing(tmp_path: Path) -> None:
    """A tie loses: with one vector of two photos everywhere, each query ranks last."""
    a, b = np.eye(4)[:2]
    rows = [row(i, j, v + 1e-8 * i) for i in range(1, 21) for j, v in enumerate((a, b))]
    shared = found(tmp_path, rows)
    asked = [each["rank"] for each in shared["ranks"]] if shared["queries"] else []

    assert [0.0] * 3 == of(shared)[:3]
    assert {20} == set(asked)


def test_nearly_the_same_photos_stay_on_one_side(tmp_path: Path) -> None:
    """By way of others too; a listing of nothing else is no query, but is in the gallery."""
    turned = [np.array([np.cos(t), np.sin(t), 0]) for t in (0, 0.15, 0.3)]
    rows = [row(1, i, vec) for i, vec in enumerate(turned)]
    rows += [row(2, i, vec) for i, vec in enumerate([[0, 0, 1], *turned])]
    found_on = sides(tmp_path, rows, 3)

    assert 0.98 > turned[0] @ turned[2]
    assert {halves.ALL} == {found_on[1, i] for i in range(3)}
    assert 1 == len({found_on[2, i] for i in (1, 2, 3)})
    assert {halves.A, halves.B} == {found_on[2, i] for i in range(4)}


def test_one_photo_of_many_listings_has_one_side(tmp_path: Path) -> None:
    """Two that a third listing shows to be nearly the same are together everywhere."""
    draw = np.random.default_rng(0)
    one, *others = draw.standard_normal((40, 8))
    two = one + 0.02 * others.pop()
    rows = [row(i, 0, (one, two)[i % 2]) for i in range(1, 30)]
    rows += [row(30, 0, one), row(30, 1, two)]
    rows += [row(i, 2, others.pop()) for i in range(1, 31)]
    rows.sort(key=lambda r: (r["listing_id"], r["image_index"]))
    found_on = sides(tmp_path, rows, 8)

    assert 1 == len({side for (_, index), side in found_on.items() if index < 2})
    assert halves.ALL not in found_on.values()


def test_another_model_has_the_same_halves(tmp_path: Path) -> None:
    """As long as it finds none other nearly the same: sides are hashes of numbers, not vectors."""
    rows = [r for r in made_up(4) if r["listing_id"] % 4 and r["listing_id"] % 5]
    draw = np.random.default_rng(9)
    other = [r if r["vec"] is None else r | {"vec": draw.standard_normal(24)} for r in rows]
    digests = [
        {each["listing_id"]: each["halves"] for each in found(tmp_path, of_one)["ranks"]}
        for of_one in (rows, [r | {"vec": _unit(r["vec"])} for r in other])
    ]

    assert digests[0] == digests[1]


def _unit(vec: Any) -> Any:
    return None if vec is None else (vec / np.linalg.norm(vec)).astype(np.float32)


def test_stock_photos_are_a_choice_where_they_were_encoded(tmp_path: Path) -> None:
    """One and the same stock photo hides what the others tell; without it, all are found."""
    stock, *own = np.random.default_rng(1).standard_normal((21, 16))
    rows, images = [], []
    for listing, vec in enumerate(own, 1):
        for index in range(5):
            noise = np.random.default_rng(9 * listing + index).standard_normal(16)
            is_stock = index > 2
            shown = 4 * stock + 2 * noise if is_stock else vec + 0.4 * noise
            rows.append(row(listing, index, shown))
            images.append({
                **{name: rows[-1][name] for name in parquet.CANDIDATES.names if name in rows[-1]},
                "is_stock_photo": is_stock, "battery_screenshot": False,
            })  # fmt: skip
    with parquet.writer(tmp_path / "images.parquet", parquet.CANDIDATES, {}) as writer:
        writer.write_table(pa.Table.from_pylist(images, parquet.CANDIDATES))
    encoded = found(tmp_path, rows, select={"exclude_stock": False})
    left_out = found(tmp_path, rows, select={"exclude_stock": True})
    (choice,) = [each for each in encoded["choices"] if each["group"] == "stock"]

    assert choice["difference"]["mrr"]["real"] and choice["difference"]["mrr"]["value"] > 0
    assert any("stock photos" in sentence for sentence in encoded["recommendation"])
    assert "stock" not in {each["group"] for each in left_out["choices"]}


def test_nothing_to_ask_is_one_line(tmp_path: Path) -> None:
    """Listings of one photo each: what was expected, what is there, what to do."""
    with pytest.raises(DataError, match=r"found none among 3 .*--config source=trial"):
        found(tmp_path, [row(i, 0, np.eye(3)[i]) for i in range(3)])


def test_shards_of_two_encoders_are_refused(tmp_path: Path) -> None:
    """One line names the shard."""
    paths = [write(tmp_path / f"{n}.parquet", [], 3, encoder={"w": n}) for n in "12"]

    with pytest.raises(DataError, match=r"one encoder.*2\.parquet"):
        stage.report(paths, tmp_path, 0, 256, 1)


# --- what lowers them


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Real photos encoded once: their listings, vectors, and vectors of what is broken."""
    root = os.environ.get("LISTING_PHOTOS_DIR")
    if not root:
        pytest.skip("no real photos: LISTING_PHOTOS_DIR names none")
    folder = tmp_path_factory.mktemp("real")
    paths = [
        path
        for name in ("dreambooth", "magento", "phonecat", "clothing")
        for path in sorted((Path(root) / "listings" / name).glob("*/*.*"))
    ][:384]  # four batches: 95 of clothing
    trained = _load(efficientnet_encoder(folder / "trained"))
    pixels = _pixels(paths, trained)
    vectors = trained.encode(pixels)
    trained._mean, trained._std = torch.zeros(3, 1, 1), torch.full((3, 1, 1), 1 / 255)
    some = vectors.copy()
    some[1::4] = trained.encode(pixels[1::4])
    other = _load(random_encoder(folder / "other", seed=3))
    listings: dict[str, int] = {}
    names = [
        p.name if "clothing" in p.parts else p.parent.name for p in paths
    ]  # a photo of clothing is a listing
    encoded = {
        "listing": [listings.setdefault(name, len(listings)) for name in names],
        "path": [str(path.relative_to(root)) for path in paths],
        "right": vectors,
        "no normalisation of every fourth photo": some,
        "another model's weights": other.encode(_pixels(paths, other)),
        "photos shuffled between listings": np.random.default_rng(0).permutation(vectors),
    }
    return encoded | {"figures": found(folder, rows_of(encoded, vectors))}


def _load(folder: Path) -> Encoder:
    return load_encoder(find_model(f"local-dir:{folder}", ""), "cpu", "fp32", 2)


def _pixels(paths: Sequence[Path], encoder: Encoder) -> torch.Tensor:
    transform = Transform.from_preprocess_cfg(encoder.preprocess)
    with ThreadPoolExecutor(2) as pool:
        files = (path.read_bytes() for path in paths)
        done = pool.map(lambda data: load_pixels(data, transform, "scaled", True, 10**9), files)
        return torch.stack([*done])


def rows_of(photos: dict[str, Any], vectors: Any) -> list[Row]:
    """Encode rows of these photos with such vectors."""
    place: dict[int, int] = {}
    rows = []
    for listing, path, vec in zip(photos["listing"], photos["path"], vectors, strict=True):
        index = place[listing] = place.get(listing, -1) + 1
        rows.append(row(listing, index, vec, storage_path=path))
    return rows


def test_on_real_photos_every_figure_is_that_of_the_script(photos: dict[str, Any]) -> None:
    """With the demo's trained encoder: phones, things, clothes; single photos as distractors."""
    ours, script = photos["figures"], by_script(rows_of(photos, photos["right"]))

    assert (62, 95) == (ours["queries"], ours["distractors"])
    assert script["ranks"] == [each["rank"] for each in ours["ranks"]]
    for choice in ours["choices"]:
        of_script = script[choice["name"] if choice["group"] else ""]
        assert of_script == pytest.approx(of(choice), abs=1e-6), choice["name"]


@pytest.mark.parametrize(
    "fault",
    ["photos shuffled between listings", "no normalisation of every fourth photo",
     "another model's weights"],
)  # fmt: skip
def test_a_fault_lowers_the_figures_beyond_their_intervals(
    photos: dict[str, Any], tmp_path: Path, fault: str
) -> None:
    """Of real photos: recall and the mean reciprocal rank both."""
    right = photos["figures"]
    wrong = found(tmp_path, rows_of(photos, photos[fault]))

    assert wrong["recall_at_1"]["value"] < right["recall_at_1"]["low"]
    assert wrong["mrr"]["value"] < right["mrr"]["low"]


def test_swapped_channels_lower_the_figures_beyond_their_intervals(
    encoder: Path, tmp_path: Path
) -> None:
    """In one of two decoders, of things that are told by their colour alone."""
    draw, colours = np.random.default_rng(0), _load(encoder)
    colour = draw.integers(0, 256, (60, 1, 3, 1, 1))
    noise = draw.integers(-40, 40, (60, 4, 3, 32, 32))
    pixels = torch.from_numpy(np.clip(colour + noise, 0, 255).astype(np.uint8)).flatten(0, 1)
    swapped = pixels.clone()
    swapped[1::2] = swapped[1::2].flip(1)
    things = {"listing": np.repeat(np.arange(60), 4).tolist(), "path": ["a.jpg"] * 240}
    right, wrong = (
        found(tmp_path, rows_of(things, colours.encode(each))) for each in (pixels, swapped)
    )

    assert wrong["recall_at_1"]["value"] < right["recall_at_1"]["low"]
    assert wrong["mrr"]["value"] < right["mrr"]["low"]


# --- the target, the page, the command


@pytest.fixture(scope="module")
def market(
    server: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Workspace, list[Run]]]:
    """Twelve listings in the table; then the evaluation of the last run, and of a trial key."""
    with new_database(server) as database:
        create_tables(database)
        work = new_workspace(tmp_path_factory.mktemp("evaluate") / "work", database, encoder)
        work.knows_photos = True
        draw = np.random.default_rng(5)
        for listing in range(1, 13):
            names = [f"{listing}/{index}.jpg" for index in range(3)]
            if listing == 2:
                names[1] = f"2/{HOSTILE.replace('/', '_')}"
            names = [work.noise(name, draw) for name in names]
            database.add_listing(listing, names)
        work.run()
        first = work.run("evaluate")
        shutil.copytree(work.results / "evaluate", work.folder / "first")
        work.database.edit(1, "2026-02-01 00:00:00+00")
        yield work, [first, work.run("evaluate", config={"source": "trial"})]


def test_the_target_reads_the_last_run(market: tuple[Workspace, list[Run]]) -> None:
    """With nothing pending nothing else runs; the last lines say the figure."""
    work, (first, _) = market
    document = json.loads((work.folder / "first" / "evaluate.json").read_text())

    assert ["evaluate"] == first.rules
    assert (12, 12) == (document["queries"], document["gallery"])
    assert document["images_per_second"] is None or document["images_per_second"] > 0
    assert {"vector": 2056, "halfvec": 1032, "bits": 72} == document["bytes_per_vector"]
    assert re.search(r"evaluate +recall@1 [\d.]+ \([\d.]+ to [\d.]+\), 12 queries", first.output)


def test_a_trial_key_evaluates_all_and_loads_nothing(market: tuple[Workspace, list[Run]]) -> None:
    """Every listing is pending under it, every vector comes from the cache, no row is written."""
    work, (_, trial) = market
    stats = json.loads((work.results / "encode" / "1-of-1.json").read_text())
    document = json.loads((work.results / "evaluate" / "evaluate.json").read_text())

    assert ["encode", "evaluate", "export", "select"] == trial.rules
    assert (36, 0) == (stats["images"], stats["encoded"])
    assert ("trial", 12) == (document["made_by"]["key"]["source"], document["gallery"])
    assert [("listing_images_topk5_v1", 12)] == work.database.execute(
        "SELECT source, count(*) FROM ml.img_vec512_v1 GROUP BY 1"
    )


def test_the_page_shows_the_misses_and_fetches_nothing(
    market: tuple[Workspace, list[Run]],
) -> None:
    """Three rows of pictures a miss, texts of strangers as texts, and what the figure is not."""
    work, _ = market
    page = (work.results / "evaluate" / "index.html").read_text()
    document = json.loads((work.results / "evaluate" / "evaluate.json").read_text())
    missed = [each for each in document["ranks"] if each["rank"] > 1]

    assert len(missed[:12]) == page.count("should have been") == page.count("found: listing")
    assert HOSTILE.replace("/", "_") not in page and "<script" not in page
    assert [] == re.findall(r'(?:src|href)="(?!#|data:)', page)
    assert page.count("<img") == len(re.findall(r'<img [^>]*alt="[^"]+"', page)) > 0
    for said in ("identity, not taste", "falls as the gallery grows", *document["recommendation"]):
        assert said in html.unescape(page)


def compare(work: Workspace, *files: Any) -> Run:
    return work.python("-m", "pipeline", "evaluate", "--compare", *map(str, files))


def test_runs_are_compared_in_pairs(market: tuple[Workspace, list[Run]]) -> None:
    """A row a run with its cost, then the differences on the queries whose halves are the same."""
    work, _ = market
    run = compare(work, "first/evaluate.json", "results/evaluate/evaluate.json")

    assert 0 == run.code, run.output
    assert "12 queries with the same halves" in run.output
    assert "recall@1   +0.00 (+0.00 to +0.00), may be chance" in run.output
    assert "2,056" in run.output and "trial · " in run.output


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, "expected an evaluate.json, found no such file or directory"),
        ("[]", "expected an evaluate.json, found another file"),
        ({"seed": 1}, "expected seed 0 as in first/evaluate.json, found seed 1"),
        ({"ranks": [{"listing_id": 1, "rank": 1, "halves": "x"}]}, "the same halves in"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    market: tuple[Workspace, list[Run]], change: Any, said: str
) -> None:
    """Another file, another seed, no query in common."""
    work, _ = market
    other = work.folder / "other.json"
    other.unlink(missing_ok=True)
    if change is not None:
        document = json.loads((work.folder / "first" / "evaluate.json").read_text())
        other.write_text(change if isinstance(change, str) else json.dumps(document | change))
    run = compare(work, "first/evaluate.json", "other.json")

    assert 1 == run.code
    assert said in run.output.splitlines()[-1]
    assert "Traceback" not in run.output
