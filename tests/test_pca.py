"""The projection: as numpy alone computes it, under a key of its own, of one encoder's vectors."""

import argparse
import json
import shutil
from collections.abc import Iterator
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
    new_environment,
    new_listing,
    new_workspace,
)

from pipeline import __main__ as commands
from pipeline import aggregate, index, search
from pipeline.database import hnsw
from pipeline.database.connection import connect
from pipeline.database.neighbours import Neighbourhood
from pipeline.encoder import projection
from pipeline.stage import parquet
from pipeline.stage.errors import DatabaseError, DataError, PipelineError, SettingsError
from pipeline.stage.settings import Environment, Identity, Settings
from pipeline.workflow.plan import Workflow

OF, DIM, LISTINGS = 16, 4, 300
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
    np.testing.assert_allclose(
        np.abs(np.sum(found.components * components, axis=1)), 1, atol=1e-9
    )
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
    assert f"of the variance is kept: {first.fit.kept(4):.1%} by 4, " == said[1][:-24]
    assert "in config.yaml:  pca: a/p.parquet" == said[2]


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "few vectors": (("--from", "few"), "expected more vectors than the 4 dimensions to fit, found 4"),
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
    aggregated(Path("infinite"), np.where(drawn() > 0.9, np.inf, drawn()).astype("f4"))
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
    """One bit amid the vectors, which take most of the file, is another."""
    middle = len(data) // 4
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


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


class Market(Workspace):
    """A marketplace in a table of any dimension: first without, then with a projection."""

    runs: dict[str, Run]
    pca: str

    @property
    def projected(self) -> dict[str, str]:
        return {"pca": self.pca}

    def vectors_of(self, pca_rev: str) -> dict[int, Numbers]:
        found = self.database.execute(
            f"SELECT listing_id, vec::real[] FROM {TABLE} WHERE pca_rev = $1 ORDER BY 1", pca_rev
        )
        return {listing: np.array(vec) for listing, vec in found}
