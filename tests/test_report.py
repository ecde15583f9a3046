"""The report: one page that is true, bounded and harmless."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Workspace, create_tables, new_database, new_workspace

from pipeline import report
from pipeline.stage.settings import Environment, Settings

COLOURS = ["red", "darkred", "blue", "navy", "green", "white", "black", "gold"]
HOSTILE = '</script><script>document.title="taken"</script>.jpg'
KEY = "listing_images_topk5_v1"


@pytest.fixture(scope="module")
def market(
    server: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workspace]:
    """Eight listings: one has a lost photo named as a script, one is all stock. A ninth is spam."""
    with new_database(server) as database:
        create_tables(database)
        work = new_workspace(tmp_path_factory.mktemp("report") / "work", database, encoder)
        work.knows_photos = True
        for listing, colour in enumerate(COLOURS, 1):
            names = [work.photo(f"{listing}/{i}.jpg", colour, (40 + i, 36)) for i in range(3)]
            database.add_listing(listing, [*names, *([HOSTILE] if listing == 2 else [])])
        for index in range(3):
            database.add_features(3, index, stock=True)
        database.add_listing(9, ["9.jpg"], spam="scam")
        work.run("report")
        yield work


def page_of(work: Workspace) -> str:
    return (work.results / "report" / "index.html").read_text()


def data_of(page: str) -> dict[str, Any]:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    document: dict[str, Any] = json.loads(found[0])
    return document


def test_the_target_makes_the_page_after_the_load(market: Workspace) -> None:
    """And anew each time that it is asked for, with nothing else to do."""
    again = market.run("report")

    assert ["report"] == again.rules
    assert "results/report/index.html" in again.output
    assert 8 == len(data_of(page_of(market))["listings"])


def test_a_listing_has_its_photos_by_rank_and_its_nearest(market: Workspace) -> None:
    """Chosen, fallen back to, failed; and the neighbours of an exact scan with their cosines."""
    rows = market.database.execute("SELECT listing_id, vec::real[] FROM ml.img_vec512_v1")
    vectors = {listing: np.array(vec) for listing, vec in rows}
    for one in data_of(page_of(market))["listings"]:
        exact = sorted(
            ((float(vec @ vectors[one["id"]]), other) for other, vec in vectors.items()
             if other != one["id"]),
            reverse=True,
        )  # fmt: skip

        assert [other for _, other in exact] == [other for other, _ in one["nearest"]]
        assert [c for c, _ in exact] == pytest.approx([c for _, c in one["nearest"]], abs=1e-3)
        assert [1, 2, 3] == [photo["rank"] for photo in one["photos"]][:3]
    photos = {one["id"]: one["photos"] for one in data_of(page_of(market))["listings"]}

    assert ["", "", "", "missing: no such file"] == [photo["said"] for photo in photos[2]]
    assert ["fallback, rank 1", "fallback, rank 2", "fallback, rank 3"] == [
        photo["said"] for photo in photos[3]
    ]


def test_the_funnel_is_that_of_status_and_of_the_run(market: Workspace) -> None:
    """Nine rows, one of them spam; of 25 photos one failed."""
    text = re.sub(r"<[^>]+>", " ", page_of(market).partition('id="time"')[0])
    said = " ".join(text.split())

    for part in ("rows of the listings table 9", "left out 1 1 spam", "with a vector 8",
                 "photos selected 25", "failed 1 1 missing", "loaded 8 8 inserted"):  # fmt: skip
        assert part in said


def test_what_a_stranger_named_is_a_text(market: Workspace) -> None:
    """A path that is a script ends no element and starts none; nothing is fetched."""
    page = page_of(market)

    assert HOSTILE not in page
    assert HOSTILE in [p["path"] for one in data_of(page)["listings"] for p in one["photos"]]
    assert 2 == page.count("<script")  # the data, and the code
    assert [] == re.findall(r'(?:src|href)="(?!#|data:)', page)


def test_a_page_is_a_sample_and_says_so(market: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a table that is larger than the limits; its neighbours are of a part of it."""
    for name, value in (("SAMPLE", 4), ("SEEDS", 1), ("PAGE", 3), ("GALLERY", 4)):
        monkeypatch.setattr(report, name, value)
    monkeypatch.setenv("PG_DSN", market.database.dsn)
    monkeypatch.chdir(market.folder)
    revision = market.database.execute("SELECT model_rev FROM ml.img_vec512_v1 LIMIT 1")[0][0]
    environment = Environment.read({"IMAGE_ROOT_DIR": str(market.photos)})
    page = report.report(Settings(source=KEY, model_rev=revision), environment)

    assert "3 of 8 listings" in page
    assert "one in 2 of the others" in page
    assert 3 == len(data_of(page)["listings"])


def test_thumbnails_keep_nothing_but_pixels(market: Workspace) -> None:
    """No EXIF, and so no GPS, in any of them; they are JPEGs of the size that was asked for."""
    import base64
    import io

    from PIL import Image

    images = [p["image"] for one in data_of(page_of(market))["listings"] for p in one["photos"]]
    for image in filter(None, images):
        opened = Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2])))

        assert ("JPEG", (report.SIDE, report.SIDE)) == (opened.format, opened.size)
        assert {} == dict(opened.getexif())
