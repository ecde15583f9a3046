"""Nearest listings to a listing, to photos and to words, as people ask for them."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Workspace, create_tables, new_database, new_workspace

from demo.encoder import random_encoder
from pipeline import search
from pipeline.stage.errors import PipelineError


@pytest.fixture(scope="module")
def market(
    server: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workspace]:
    """Six listings with vectors; a seventh is spam and has one too."""
    with new_database(server) as database:
        create_tables(database)
        work = new_workspace(tmp_path_factory.mktemp("search") / "work", database, encoder)
        work.knows_photos = True
        colours = ["red", "darkred", "blue", "navy", "green", "white", "black"]
        for listing, colour in enumerate(colours, 1):
            names = [work.photo(f"{listing}/{i}.jpg", colour, (40 + i, 36)) for i in range(2)]
            database.add_listing(listing, [*names])
        work.run()
        database.execute("UPDATE \"iPhone\".iphone_listings SET spam = 'scam' WHERE listing_id = 7")
        yield work


class Asker:
    """The command in this process, in the folder of a market."""

    def __init__(
        self, work: Workspace, patch: pytest.MonkeyPatch, screen: pytest.CaptureFixture[str]
    ) -> None:
        self.work, self._screen = work, screen
        patch.chdir(work.folder)
        patch.setenv("PG_DSN", work.database.dsn)

    def __call__(self, *words: str, encoder: Path | None = None) -> str:
        """What is printed."""
        parser = argparse.ArgumentParser()
        search.add_flags(parser)
        args = parser.parse_args(words)
        args.config = [f"model_name=local-dir:{encoder or self.work.encoder}"]
        self._screen.readouterr()
        search.main(args)
        return self._screen.readouterr().out

    def refused(self, *words: str, encoder: Path | None = None) -> str:
        """The line that says why there is no answer."""
        with pytest.raises(PipelineError) as refusal:
            self(*words, encoder=encoder)
        return str(refusal.value)

    def rows(self, *words: str) -> list[dict[str, Any]]:
        """The JSON of the answer."""
        found: list[dict[str, Any]] = json.loads(self(*words, "--format", "json"))
        return found


@pytest.fixture
def ask(
    market: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Asker:
    return Asker(market, monkeypatch, capsys)


def exact(work: Workspace, vector: np.ndarray, but: int | None = None) -> list[tuple[int, float]]:
    """The (listing_id, cosine) of the live listings, nearest first, by numpy."""
    rows = work.database.execute(
        "SELECT listing_id, vec::real[] FROM ml.img_vec512_v1 WHERE listing_id <> 7"
    )
    cosines = [(listing, float(np.dot(vec, vector))) for listing, vec in rows if listing != but]
    return sorted(cosines, key=lambda row: -row[1])


def vector_of(work: Workspace, listing: int) -> np.ndarray:
    found = work.database.execute(
        f"SELECT vec::real[] FROM ml.img_vec512_v1 WHERE listing_id = {listing}"
    )
    return np.array(found[0][0])


def test_the_nearest_of_a_listing_are_those_of_an_exact_scan(market: Workspace, ask: Asker) -> None:
    """In order, with their cosine and photos by rank; without itself, and without spam."""
    found = ask.rows("1")
    expected = exact(market, vector_of(market, 1), but=1)

    assert [listing for listing, _ in expected] == [row["listing_id"] for row in found]
    assert [cosine for _, cosine in expected] == pytest.approx(
        [row["cosine"] for row in found], abs=1e-5
    )
    assert {"listing_id", "edited_date", "cosine", "photos"} == set(found[0])
    assert [f"{found[0]['listing_id']}/{i}.jpg" for i in range(2)] == found[0]["photos"]
    assert "2026-01-01T12:00:00.000001+00:00" == found[0]["edited_date"]


def test_a_photo_is_encoded_as_in_the_pipeline(market: Workspace, ask: Asker) -> None:
    """The photos of a listing, all together, have the cosine 1 to it."""
    photos = [str(market.photos / f"3/{i}.jpg") for i in range(2)]
    found = ask.rows("--image", *photos, "--top", "2")

    assert 3 == found[0]["listing_id"]
    assert 1 == pytest.approx(found[0]["cosine"], abs=1e-5)
    assert 2 == len(found)


def test_a_listing_is_found_as_it_was(market: Workspace, ask: Asker) -> None:
    """Before its edit it was nearest to what it then looked like; before its first, it was not."""
    market.database.execute(
        "INSERT INTO ml.img_vec512_v1 SELECT 5, '2025-06-01Z', source, model_rev, pca_rev, vec, 1"
        " FROM ml.img_vec512_v1 WHERE listing_id = 3"
    )
    try:
        market.database.execute(
            "INSERT INTO ml.img_vec512_v1 SELECT 3, '2025-01-01Z', source, model_rev, pca_rev,"
            " vec, 1 FROM ml.img_vec512_v1 WHERE listing_id = 3"
        )
        then = ask.rows("3", "--as-of", "2025-12-31")
        earlier = ask.refused("3", "--as-of", "2024-12-31")
    finally:
        market.database.execute("DELETE FROM ml.img_vec512_v1 WHERE edited_date < '2026-01-01Z'")

    assert [5] == [row["listing_id"] for row in then]
    assert 1 == pytest.approx(then[0]["cosine"], abs=1e-5)
    assert "2025-06-01T00:00:00+00:00" == then[0]["edited_date"]
    assert "expected a vector of listing 3, found none" in earlier


def test_what_people_see_is_a_table(market: Workspace) -> None:
    """A line a listing, nearest first, under a header."""
    run = market.python("-m", "pipeline", "search", "1", "--top", "2", "--config",
                        f"model_name=local-dir:{market.encoder}")  # fmt: skip
    lines = run.output.splitlines()

    assert ["cosine", "listing_id", "edited", "photos"] == lines[0].split()
    assert 3 == len(lines)


def test_the_contact_sheet_shows_photos_and_escapes_what_it_is_given(
    market: Workspace, ask: Asker, tmp_path: Path
) -> None:
    """One file that fetches nothing; a path that is a script is a text, a lost photo a word."""
    hostile = "<script>alert(1)</script>.jpg"
    market.database.execute(
        "UPDATE \"iPhone\".iphone_image_assets SET storage_path = $1"
        " WHERE listing_id = 2 AND image_index = 1", hostile,
    )  # fmt: skip
    out = tmp_path / "sheet.html"
    try:
        assert f"{out}\n" == ask("1", "--format", "html", "--out", str(out))
    finally:
        market.database.execute(
            "UPDATE \"iPhone\".iphone_image_assets SET storage_path = '2/1.jpg'"
            " WHERE listing_id = 2 AND image_index = 1"
        )
    sheet = out.read_text()

    assert "<script" not in sheet
    assert "&lt;script&gt;alert(1)" in sheet
    assert "missing: no such file" in sheet
    assert 2 * 6 - 1 == sheet.count('<img src="data:image/jpeg;base64,')
    assert "http://" not in sheet and "https://" not in sheet


def test_only_the_encoder_of_the_key_may_ask(market: Workspace, ask: Asker, tmp_path: Path) -> None:
    """Another model's photo, under the key's own name, is refused before it is compared."""
    other = random_encoder(tmp_path / "other", seed=2)
    revision = market.database.execute("SELECT model_rev FROM ml.img_vec512_v1 LIMIT 1")[0][0]
    photo = str(market.photos / "1/0.jpg")
    line = ask.refused("--image", photo, "--model-rev", revision, encoder=other)

    assert line.startswith("expected the encoder that made the vectors of")
    assert "found another weights" in line


def test_words_are_compared_by_the_text_tower(
    tmp_path: Path,
    server: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By that of the model which made the vectors: the cosines are open_clip's own."""
    import open_clip
    import torch

    text = {"context_length": 77, "vocab_size": 49408}
    talking = random_encoder(tmp_path / "talking", text_cfg=text, seed=3)
    with new_database(server) as database:
        create_tables(database)
        work = new_workspace(tmp_path / "work", database, talking)
        for listing, colour in enumerate(["red", "blue"], 1):
            database.add_listing(listing, [work.photo(f"{listing}.jpg", colour)])
        work.run()
        found = Asker(work, monkeypatch, capsys).rows("--text", "a blue phone")
        vectors = {n: vector_of(work, n) for n in (1, 2)}
    name = f"local-dir:{talking}"
    clip = open_clip.create_model(name)
    with torch.inference_mode():
        words = clip.encode_text(open_clip.get_tokenizer(name)(["a blue phone"]), normalize=True)

    assert 2 == len(found)
    for row in found:
        assert float(words[0].numpy() @ vectors[row["listing_id"]]) == pytest.approx(
            row["cosine"], abs=1e-5
        )


REFUSED = {
    "no text tower": (["--text", "blue"], "expected a model with a text tower, found one of 64"),
    "nothing asked": ([], "expected one of LISTING_ID, --image and --text, found none"),
    "two things asked": (["1", "--text", "x"], "and --text, found several"),
    "none wanted": (["1", "--top", "0"], "expected --top, 1 at least, found 0"),
    "no file for the sheet": (["1", "--format", "html"], "expected --out FILE with --format html"),
    "spam": (["7"], "expected a vector of listing 7, found none, or a listing that is deleted"),
    "no such file": (["--image", "lost.jpg"], "expected a photo, found no such file"),
    "no photo": (["--image", "config.yaml"], "expected a photo, found broken: "),
    "no such key": (["1", "--source", "x"], "hint: try --source listing_images_topk5_v1 --model"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_answered_is_one_line(ask: Asker, case: str) -> None:
    """It says what was expected and found, and what to do."""
    words, expected = REFUSED[case]

    assert expected in ask.refused(*words)


def test_a_table_without_the_view_says_who_makes_it(market: Workspace, ask: Asker) -> None:
    """One that an earlier version made."""
    market.database.execute("ALTER VIEW ml.img_vec512_v1_current RENAME TO aside")
    try:
        assert "create-table, as the owner, makes it" in ask.refused("1")
    finally:
        market.database.execute("ALTER VIEW ml.aside RENAME TO img_vec512_v1_current")
