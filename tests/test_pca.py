"""The projection: as numpy alone computes it, under a key of its own, of one encoder's vectors."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import (
    Database,
    Run,
    Workspace,
    create_tables,
    new_database,
    new_listing,
    new_workspace,
)

from pipeline import __main__ as commands
from pipeline import aggregate
from pipeline.database.connection import connect
from pipeline.database.neighbours import Neighbourhood
from pipeline.encoder import projection
from pipeline.stage import parquet
from pipeline.stage.errors import PipelineError
from pipeline.stage.settings import Environment, Identity, Settings
from pipeline.workflow import preflight
from pipeline.workflow.plan import Workflow

OF, DIM, LISTINGS = 16, 4, 300
PHOTOGRAPHED = 9
ENCODER = {"weights": "w", "architecture": "a", "transform": "t", "precision": "fp32"}
IDENTITY = {"source": "s", "model_rev": "m", "pca_rev": ""}
MADE_BY = {
    "export": {"force": False}, "select": {"topk": 5, "projection": ""}, "encoder": ENCODER,
}  # fmt: skip
TABLE = "ml.img_vec512_v1"

Numbers = npt.NDArray[np.float64]


def unit(vectors: npt.NDArray[Any]) -> Numbers:
    made: Numbers = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return made


def drawn(rows: int = LISTINGS, seed: int = 0) -> npt.NDArray[np.float32]:
    """Unit vectors that differ more along some directions than others."""
    spread = np.linspace(1, 0.1, OF)
    return unit(0.5 + np.random.default_rng(seed).normal(size=(rows, OF)) * spread).astype("f4")


def by_svd(vectors: npt.NDArray[Any], dimensions: int = DIM) -> tuple[Numbers, Numbers, Numbers]:
    """Mean, components and explained variance by another way: the SVD of the centred vectors."""
    exact = vectors.astype(float)
    mean = exact.mean(axis=0)
    _, singular, directions = np.linalg.svd(exact - mean, full_matrices=False)
    return mean, directions[:dimensions], singular[:dimensions] ** 2 / (len(exact) - 1)


def aggregated(path: Path, vectors: npt.NDArray[np.float32], **made_by: Any) -> Path:
    """A listing_vectors.parquet of these."""
    rows = len(vectors)
    table = pa.table(
        {
            "generation": np.ones(rows, np.int32),
            "listing_id": np.arange(rows),
            "edited_date": np.zeros(rows, "datetime64[us]"),
            **{name: [value] * rows for name, value in IDENTITY.items()},
            "vec": list(vectors),
            "n_images": np.ones(rows, np.int32),
        },
        schema=parquet.listing_vectors(vectors.shape[1]),
    )
    document = {**MADE_BY, "aggregate": IDENTITY, **made_by}
    with parquet.writer(path, table.schema, document) as writer:
        writer.write_table(table)
    return path


def command(*words: str) -> None:
    """`python -m pipeline` in this process."""
    args = commands.parser().parse_args(words)
    args.action(args)


def refused(*words: str) -> str:
    """The line that says why not."""
    with pytest.raises(PipelineError) as refusal:
        command(*words)
    return str(refusal.value)


@pytest.fixture
def fitted(tmp_path: Path) -> projection.Projection:
    """A projection of 16 to 4 dimensions, in pca.parquet."""
    return projection.write(
        tmp_path / "pca.parquet", projection.fit([drawn()], DIM), ENCODER, {"source": "s"}
    )


# --- the numbers


def test_the_fit_is_that_of_numpy_alone() -> None:
    """Mean, components up to sign, and variances, as an SVD has them, whatever the batches."""
    vectors = drawn()
    mean, components, variance = by_svd(vectors)
    found = projection.fit(np.array_split(vectors, 7), DIM)
    largest = np.abs(found.components).argmax(axis=1)

    np.testing.assert_allclose(found.mean, mean, atol=1e-12)
    np.testing.assert_allclose(found.explained_variance, variance, rtol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(found.components * components, axis=1)), 1, atol=1e-9)
    assert (found.components[range(DIM), largest] > 0).all()
    assert vectors.astype(float).var(axis=0, ddof=1).sum() == pytest.approx(found.total_variance)
    assert LISTINGS == found.rows


def test_aggregate_projects_the_unit_mean_and_normalises(
    tmp_path: Path, fitted: projection.Projection
) -> None:
    """As numpy has it; what is the mean itself has no direction; the recipe has the digest."""
    vectors = drawn(40)
    nowhere = unit(fitted.fit.mean[np.newaxis]).astype("f4")
    centre = projection.Fit(
        nowhere[0].astype(float), fitted.fit.components, fitted.fit.explained_variance, 1, 9
    )
    projecting = projection.write(tmp_path / "centre.parquet", centre, ENCODER, {})
    report = run_aggregate(tmp_path, np.vstack([vectors, nowhere]), projecting)
    made = pq.read_table(tmp_path / "vectors.parquet")
    means = unit(vectors.reshape(-1, 2, OF).mean(axis=1, dtype=float))
    expected = unit((means - centre.mean) @ centre.components.T)

    np.testing.assert_allclose(np.stack(made["vec"].to_numpy()), expected, atol=1e-6)
    assert (20, 1) == (report.vectors, report.without)
    assert {"topk": 5, "projection": projecting.digest} == (
        parquet.metadata(tmp_path / "vectors.parquet")["select"]
    )


def run_aggregate(
    folder: Path, vectors: npt.NDArray[np.float32], projecting: projection.Projection
) -> aggregate.Report:
    """Of an encode shard of these vectors, two a listing."""
    rows = len(vectors)
    keys = {
        "generation": np.ones(rows, np.int32),
        "listing_id": np.arange(rows) // 2,
        "edited_date": np.zeros(rows, "datetime64[us]"),
        "image_index": (np.arange(rows) % 2).astype(np.int32),
        "storage_path": [f"{n}.jpg" for n in range(rows)],
    }
    score = {"score": np.zeros(rows, np.int32)}
    files = {
        "encoded": (parquet.encoded(OF), {
            **keys, **score, "rank": np.ones(rows, np.int8), "fallback": [False] * rows,
            "size": np.ones(rows, int), "mtime_ns": np.ones(rows, int), "vec": list(vectors),
            "error": pa.nulls(rows, pa.string()),
        }),
        "images": (parquet.CANDIDATES, {
            **keys, **score, "is_stock_photo": [False] * rows, "battery_screenshot": [False] * rows,
        }),
    }  # fmt: skip
    for name, (schema, columns) in files.items():
        with parquet.writer(folder / name, schema, MADE_BY) as writer:
            writer.write_table(pa.table(columns, schema=schema))
    args = argparse.Namespace(
        encoded=[folder / "encoded"], images=folder / "images", threads=1,
        output=folder / "vectors.parquet", failures=folder / "failures.json",
        without_vector=folder / "without_vector.parquet",
    )  # fmt: skip
    return aggregate.aggregate(args, Settings(**{**IDENTITY, "pca_rev": "p"}), projecting)


# --- the file


def test_the_same_rows_and_seed_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever the file lies; another seed draws others. The name and the content are the rev."""
    monkeypatch.chdir(tmp_path)
    vectors = aggregated(tmp_path / "vectors.parquet", drawn())
    fit = ("pca", "fit", "--from", str(vectors), "--rows", "50", "--dimensions", "4")
    for output, seed in (("a/p.parquet", "1"), ("b/p.parquet", "1"), ("c/p.parquet", "2")):
        (tmp_path / output).parent.mkdir()
        command(*fit, "--output", output, "--seed", seed)
    first, same, other = (projection.read(Path(f"{name}/p.parquet")) for name in "abc")
    said = capsys.readouterr().out.splitlines()

    assert Path("a/p.parquet").read_bytes() == Path("b/p.parquet").read_bytes()
    assert first.digest != other.digest
    assert f"p/{first.digest[:12]}" == first.rev == same.rev
    assert {"source": "s", "model_rev": "m", "seed": 1} == first.fitted_on
    assert {k: v for k, v in ENCODER.items() if k != "precision"} == first.encoder
    assert (50, OF, DIM) == (first.fit.rows, first.of, first.dimensions)
    assert "a/p.parquet: 16 to 4 dimensions, by 50 vectors of s · m" == said[0]
    assert said[1].startswith(f"of the variance is kept: {first.fit.kept(4):.1%} by 4, ")
    assert "in config.yaml:  pca: a/p.parquet" == said[2]


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "few vectors": (("--from", "few"), "expected more vectors than the 4 dimensions to fit, fou"),
    "more dimensions": (
        ("--from", "sound", "--dimensions", "17"), "expected --dimensions, 16 at most, found 17",
    ),
    "no dimension": (("--from", "sound", "--dimensions", "0"), "expected --dimensions, 1 at least"),
    "two encoders": (
        ("--from", "sound", "other"),
        "expected vectors of one encoder, that of sound, found another weights (other)",
    ),
    "projected": (("--from", "projected"), "expected a key of vectors as they were encoded"),
    "shards": (("--from", "shard"), "expected listing_vectors.parquet of aggregate, found another"),
    "nothing": (("--from", "nothing"), "expected listing_vectors.parquet of aggregate, found no"),
    "not finite": (("--from", "infinite"), "expected finite vectors to fit on, found others"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_fitted_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """And no file is written."""
    monkeypatch.chdir(tmp_path)
    aggregated(Path("sound"), drawn())
    aggregated(Path("few"), drawn(4))
    aggregated(Path("infinite"), np.vstack([drawn(), np.full((1, OF), np.inf)]).astype("f4"))
    aggregated(Path("other"), drawn(), encoder={**ENCODER, "weights": "x"})
    aggregated(Path("projected"), drawn(), select={"projection": "p"})
    with parquet.writer(Path("shard"), parquet.encoded(OF), MADE_BY):
        pass
    words, line = REFUSED[case]

    assert refused("pca", "fit", "--dimensions", "4", *words).startswith(line)
    assert [] == list(tmp_path.glob("pca-*"))


DAMAGE: dict[str, Any] = {
    "missing": lambda path: path.unlink(),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "a byte": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "no Parquet": lambda path: path.write_text("pca"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "another file": lambda path: aggregated(path, drawn(5)),
}


def flipped(data: bytes) -> bytes:
    """One bit of a number of the first component is another."""
    number = projection.fit([drawn()], DIM).components[0][:1].tobytes()
    return data.replace(number, bytes([number[0] ^ 1]) + number[1:])


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_none_is_one_line(
    tmp_path: Path, fitted: projection.Projection, damage: str
) -> None:
    """Missing, damaged by a bit, or something else."""
    path = tmp_path / "pca.parquet"
    DAMAGE[damage](path)
    with pytest.raises(PipelineError, match="expected a projection, made by .* found ") as error:
        projection.read(path)

    assert "\n" not in str(error.value)


def test_a_file_that_changed_since_the_plan_is_refused(
    tmp_path: Path, fitted: projection.Projection
) -> None:
    """aggregate applies what the plan has seen, or nothing."""
    with pytest.raises(PipelineError, match="it changed since the workflow was planned"):
        projection.read(tmp_path / "pca.parquet", "0" * 64)


# --- the workflow, and the table with both keys


@dataclass
class Market:
    """A marketplace in a table of any dimension, run without a projection, then with one, twice."""

    work: Workspace
    runs: list[Run]
    pca: Path
    rev: str

    def vectors(self, pca_rev: str) -> dict[int, Numbers]:
        """Of each listing, under the key with this pca_rev."""
        found = self.work.database.execute(
            f"SELECT listing_id, vec::real[] FROM {TABLE} WHERE pca_rev = $1 ORDER BY 1", pca_rev
        )
        return {listing: np.array(vec) for listing, vec in found}

    def config(self, **more: Any) -> dict[str, Any]:
        model = {"model_name": f"local-dir:{self.work.encoder}"}
        return {**model, "pca": str(self.pca), "shards": 1, **more}

    def words(self, **more: Any) -> list[str]:
        return ["--config", *(f"{key}={value}" for key, value in self.config(**more).items())]


@pytest.fixture(scope="module")
def ran(server: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    with new_database(server) as database, pytest.MonkeyPatch.context() as patch:
        create_tables(database, None)
        work = new_workspace(tmp_path_factory.mktemp("pca") / "work", database, encoder)
        work.knows_photos = True
        for listing in range(1, PHOTOGRAPHED + 1):
            new_listing(work, listing, photos=1 + listing % 2)
        runs = [work.run()]
        patch.chdir(work.folder)
        patch.setenv("PG_DSN", database.dsn)
        model = f"model_name=local-dir:{encoder}"
        command("pca", "fit", "--dimensions", str(DIM), "--output", "p.parquet", "--config", model)
        runs += [work.run(config={"pca": "p.parquet"}) for _ in range(2)]
        path = work.folder / "p.parquet"
        yield Market(work, runs, path, projection.read(path).rev)


@pytest.fixture
def market(ran: Market, monkeypatch: pytest.MonkeyPatch) -> Market:
    monkeypatch.chdir(ran.work.folder)
    for name, value in ran.work.env.items():
        monkeypatch.setenv(name, value)
    return ran


def test_both_keys_stand_side_by_side(market: Market) -> None:
    """The old rows stay; the new ones are the projection of those, and no photo was encoded."""
    plain, projected = market.vectors(""), market.vectors(market.rev)
    mean, components, _ = by_svd(np.stack(list(plain.values())))
    expected = unit((np.stack(list(plain.values())) - mean) @ components.T)
    found = np.stack(list(projected.values()))
    signs = np.sign(np.sum(expected * found, axis=0))
    stats = json.loads((market.work.results / "encode" / "1-of-1.json").read_text())

    assert [*range(1, PHOTOGRAPHED + 1)] == [*plain] == [*projected]
    assert ((PHOTOGRAPHED, 512), (PHOTOGRAPHED, DIM)) == (
        np.stack(list(plain.values())).shape, found.shape,
    )  # fmt: skip
    np.testing.assert_allclose(found, expected * signs, atol=1e-4)
    assert ["aggregate", "encode", "export", "load", "select"] == market.runs[1].rules
    assert (stats["images"], 0) == (sum(stats["saved"].values()), stats["encoded"])


def test_a_second_run_with_it_does_nothing(market: Market) -> None:
    """Nor does one after the file was moved, with another mtime."""
    moved = market.work.folder / "elsewhere" / "p.parquet"
    moved.parent.mkdir(exist_ok=True)
    moved.write_bytes(market.pca.read_bytes())
    here, there = Workflow(market.config()), Workflow(market.config(pca=str(moved)))
    names = (*Identity._fields, "projection")

    assert [] == market.runs[2].rules
    assert "Nothing to be done" in market.runs[2].output
    assert here.flags(*names)(None) == there.flags(*names)(None)
    assert here.export(*Identity._fields)(None) == there.export(*Identity._fields)(None)


def test_pgvector_confirms_the_cosines(market: Market) -> None:
    """Its own arithmetic on the rows, against numpy's on the plain vectors and the file."""
    plain = np.stack(list(market.vectors("").values()))
    projected = unit(projection.read(market.pca).apply(plain))
    rows = market.work.database.execute(
        f"SELECT a.listing_id, b.listing_id, 1 - (a.vec <=> b.vec), -(a.vec <#> b.vec)"
        f" FROM {TABLE} a JOIN {TABLE} b USING (source, model_rev, pca_rev)"
        " WHERE pca_rev = $1 AND a.listing_id < b.listing_id",
        market.rev,
    )
    expected = [float(projected[a - 1] @ projected[b - 1]) for a, b, *_ in rows]

    assert PHOTOGRAPHED * (PHOTOGRAPHED - 1) // 2 == len(rows)
    assert expected == pytest.approx([cosine for *_, cosine, _ in rows], abs=1e-6)
    assert expected == pytest.approx([inner for *_, inner in rows], abs=1e-6)


def asked(market: Market, screen: pytest.CaptureFixture[str], *words: str) -> dict[int, float]:
    """The cosine of each listing that a search finds."""
    screen.readouterr()
    command("search", *words, "--format", "json", "--top", "50", *market.words())
    return {row["listing_id"]: row["cosine"] for row in json.loads(screen.readouterr().out)}


def test_a_search_stays_within_its_key(market: Market, capsys: pytest.CaptureFixture[str]) -> None:
    """A listing, a photo that is projected as the listings were, and the old key by its name."""
    cosines = {}
    for pca_rev in ("", market.rev):
        vectors = market.vectors(pca_rev)
        cosines[pca_rev] = {n: float(vectors[3] @ v) for n, v in vectors.items()}
    others = {n: c for n, c in cosines[market.rev].items() if n != 3}
    plain = {n: c for n, c in cosines[""].items() if n != 3}
    photos = [str(market.work.photos / f"3/{n}.jpg") for n in range(2)]

    assert others == pytest.approx(asked(market, capsys, "3"), abs=1e-5)
    assert plain == pytest.approx(asked(market, capsys, "3", "--pca-rev", ""), abs=1e-5)
    for words, expected in ((["--image", *photos], market.rev), (["--pca-rev", ""], "")):
        words = words if "--image" in words else [*words, "--image", *photos]
        assert cosines[expected] == pytest.approx(asked(market, capsys, *words), abs=1e-4)


@pytest.mark.parametrize("halfvec", ["--halfvec", "--no-halfvec"])
def test_each_key_has_an_index_of_its_own(
    market: Market, capsys: pytest.CaptureFixture[str], halfvec: str
) -> None:
    """On a cast to its dimension, which a search orders by, so that Postgres takes the index."""
    market.work.database.execute(
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET enable_sort = off', current_database());"
        " END $$"
    )
    environment = Environment.read()
    for pca_rev, dim in (("", 512), (market.rev, DIM)):
        capsys.readouterr()
        command("index", "--json", halfvec, "--pca-rev", pca_rev, *market.words())
        report = json.loads(capsys.readouterr().out)
        identity = Identity(report["source"], report["model_rev"], report["pca_rev"])
        with connect(read_only=True) as connection, connection.cursor() as cursor:
            there = Neighbourhood(cursor, environment, identity, None)
            query = there.vector_of(1)

            assert (pca_rev, dim) == (identity.pca_rev, len(query))
            assert report["index"] in there.plan(query, 3)
            assert [1] == [found.listing_id for found in there.nearest(query, 1)]


def planned(config: dict[str, Any]) -> str:
    """The line that ends the plan of a run."""
    with pytest.raises(SystemExit) as end:
        Workflow(config).table([])(None)
    assert "\n" not in str(end.value)
    return str(end.value)


def test_another_fit_under_one_name_is_refused(market: Market, tmp_path: Path) -> None:
    """Before anything runs, with the way out."""
    plain = np.stack(list(market.vectors("").values()))
    encoder = projection.read(market.pca).encoder
    projection.write(tmp_path / "q.parquet", projection.fit([plain[1:]], DIM), encoder, {})
    line = planned(market.config(pca=str(tmp_path / "q.parquet"), pca_rev=market.rev))

    assert f"{market.rev!r}) in the table, found another projection" in line
    assert "hint: leave pca_rev empty, so that it follows the file of pca, or" in line


def test_a_projection_of_another_encoder_is_refused(
    market: Market, tmp_path: Path, fitted: projection.Projection
) -> None:
    """By the plan, by check, by a search, and by aggregate itself, in the same words."""
    config = market.config(pca=str(tmp_path / "pca.parquet"))
    line = "expected the encoder on whose vectors the projection was fitted, found another weights"
    photo = str(market.work.photos / "3/0.jpg")
    found = [f.text for f in preflight.check_all(Settings(**config), Environment.read())]
    with pytest.raises(PipelineError) as error:
        run_aggregate(
            tmp_path, drawn(4), replace(fitted, encoder={**fitted.encoder, "weights": "x"})
        )

    assert planned(config).startswith(f"error: {line} and another architecture and another")
    assert 1 == sum(text.startswith(line) for text in found)
    assert refused("search", "--image", photo, *market.words(pca=config["pca"])).startswith(line)
    assert str(error.value).startswith(line)


def test_a_file_that_is_missing_ends_the_plan_and_the_check(market: Market) -> None:
    """In one line, before anything runs; what else is checked is said."""
    config = market.config(pca="gone.parquet")
    line = "expected a projection, made by python -m pipeline pca fit, found no such file or"
    found = [*preflight.check_all(Settings(**config), Environment.read())]

    assert planned(config).startswith(f"error: {line}")
    assert [line] == [f.text[: len(line)] for f in found if f.level == "error"]
    assert "target" in {f.text.partition(":")[0] for f in found}


def test_check_names_the_projection(market: Market) -> None:
    """With its dimension, which the table has to take."""
    found = [f.text for f in preflight.check_all(Settings(**market.config()), Environment.read())]

    assert f"projection: {market.rev}, to {DIM}-d" in found


def test_a_projection_is_not_fitted_on_projected_vectors(
    market: Market, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With `pca` set, the table's vectors as they were encoded are taken; a tag is refused."""
    again = ("pca", "fit", "--dimensions", str(DIM), "--output", str(tmp_path / "p.parquet"))
    command(*again, *market.words())

    assert market.pca.read_bytes() == (tmp_path / "p.parquet").read_bytes()
    assert refused(*again, *market.words(pca="", pca_rev="x")).startswith(
        "expected a key of vectors as they were encoded, without a projection, found pca_rev 'x'"
    )
    assert refused(*again, *market.words(source="x")).startswith("expected vectors of x")


def test_a_table_of_one_dimension_takes_no_other_until_its_type_is_changed(
    database: Database, market: Market, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """create-table asks for the projection's dimension; its hint is the statement that mends it."""
    monkeypatch.setenv("PG_DSN", database.dsn)
    narrow = refused("create-table", *market.words())
    line = refused("create-table", "--dimension", "any")
    database.execute(line.partition("in a moment: ")[2].partition(" (drop")[0])
    command("create-table", "--dimension", "any")
    command("create-table", *market.words())
    shape = "SELECT format_type(atttypid, atttypmod), attstorage::text FROM pg_attribute"

    assert "expected column vec vector(4), the dimension of the vectors, found vector(5" in narrow
    assert "is there, vec vector, of any dimension" in capsys.readouterr().out
    assert [("vector", "p")] == database.execute(
        f"{shape} WHERE attrelid = '{TABLE}'::regclass AND attname = 'vec'"
    )
    assert "expected --dimension from 1 to 16000, or any, found many" in refused(
        "create-table", "--dimension", "many"
    )
