"""What a run is before it starts: how many shards it has, and on which device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from adbc_driver_manager.dbapi import Connection
from conftest import Database

from pipeline.database.connection import connect
from pipeline.stage import parquet
from pipeline.stage.settings import Environment, Settings
from pipeline.workflow import plan, preflight
from pipeline.workflow.plan import Workflow

NOBODY = "postgresql://nobody@127.0.0.1:1/none"


@pytest.fixture
def asked(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, Any]]:
    """A folder to plan in; each connection of the plan is counted here."""
    connections: list[dict[str, Any]] = []

    @contextmanager
    def counting(**how: Any) -> Iterator[Connection]:
        connections.append(how)
        with connect(**how) as connection:
            yield connection

    monkeypatch.setattr(plan, "connect", counting)
    monkeypatch.setenv("PG_DSN", database.dsn)
    monkeypatch.chdir(tmp_path)
    return connections


def fill(database: Database, listings: int, images: int) -> None:
    """Listings 1..n with as many images each."""
    database.execute(
        "INSERT INTO \"iPhone\".iphone_listings SELECT 1, i, now() - i * interval '1 s',"
        f" 'https://example.com', NULL FROM generate_series(1, {listings}) i"
    )
    database.execute(
        "INSERT INTO \"iPhone\".iphone_image_assets SELECT 1, i, k, i || '/' || k || '.jpg'"
        f" FROM generate_series(1, {listings}) i, generate_series(1, {images}) k"
    )


def snakemake(given: int | None = None, *, main: bool = True) -> SimpleNamespace:
    """Snakemake's workflow object, as far as it is asked."""
    scatter = {} if given is None else {"encode": given}
    return SimpleNamespace(
        resource_settings=SimpleNamespace(overwrite_scatter=scatter), is_main_process=main
    )


def select(shards: int, of: dict[str, Any]) -> None:
    """What an export of these params and its select leave, without a row."""
    for path, schema in ((plan.LISTINGS, parquet.LISTINGS), (plan.IMAGES, parquet.CANDIDATES)):
        with parquet.writer(path, schema, {"export": of}):
            pass
    for number in range(1, shards + 1):
        path = plan.SELECTED / f"{number}-of-{shards}.parquet"
        with parquet.writer(path, parquet.SELECTED, {"export": of}):
            pass


@pytest.mark.parametrize(
    ("listings", "images", "config", "shards"),
    [
        (0, 0, {}, 1),
        (1, 1, {}, 1),
        (2000, 5, {}, 1),
        (2001, 5, {}, 2),
        (5000, 9, {}, 3),  # at most five of each are selected
        (5000, 9, {"topk": 2}, 1),
        (5000, 9, {"limit_listings": 2100}, 2),
        (5000, 9, {"shards": 7}, 7),
    ],
)
def test_one_shard_for_ten_thousand_photos(
    database: Database,
    asked: list[dict[str, Any]],
    listings: int,
    images: int,
    config: dict[str, Any],
    shards: int,
) -> None:
    """As many as the photos that can be selected need, one at least, or as the setting says."""
    fill(database, listings, images)

    assert shards == Workflow(config).shards(snakemake())


def test_the_database_is_asked_once(database: Database, asked: list[dict[str, Any]]) -> None:
    """The split, the targets and the params are of one moment, and cost one snapshot."""
    fill(database, 2001, 5)
    flow, workflow = Workflow({}), snakemake()
    number = flow.shards(workflow)
    flow.table([])(None)
    flow.export("limit_listings")(None)

    assert 2 == number
    assert {"encode": 2} == workflow.resource_settings.overwrite_scatter
    assert 1 == len([one for one in asked if one.get("repeatable")])


def test_a_job_takes_the_number_that_it_is_given(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process of a job neither asks the database nor looks at the files."""
    monkeypatch.setattr(plan, "_split_of", lambda export: pytest.fail("the files were read"))

    assert 5 == Workflow({}).shards(snakemake(5, main=False))
    assert [] == asked


@pytest.mark.parametrize("dsn", [NOBODY, "none"])
def test_without_a_database_the_split_is_that_at_hand(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, dsn: str
) -> None:
    """One shard where nothing is at hand; a number that is given counts until all is aggregated."""
    monkeypatch.setenv("PG_DSN", dsn)
    nothing = Workflow({}).shards(snakemake())
    params = {"state": {"pending": "1"}}
    select(3, params)
    selected = [Workflow({}).shards(snakemake(n)) for n in (None, 2)]
    schema = pa.schema([])
    with parquet.writer(plan.VECTORS, schema, {"export": params}):
        pass
    aggregated = [Workflow({}).shards(snakemake(n)) for n in (None, 2)]

    assert (1, [3, 2], [3, 3]) == (nothing, selected, aggregated)


def remove_one() -> None:
    (plan.SELECTED / "2-of-3.parquet").unlink()


def add_another() -> None:
    (plan.SELECTED / "1-of-1.parquet").write_bytes(b"")


def export_again() -> None:
    for path, schema in ((plan.LISTINGS, parquet.LISTINGS), (plan.IMAGES, parquet.CANDIDATES)):
        with parquet.writer(path, schema, {"export": {"state": {"pending": "2"}}}):
            pass


@pytest.mark.parametrize("change", [remove_one, add_another, export_again])
def test_half_a_split_or_another_exports_is_none(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, change: Callable[[], None]
) -> None:
    """What is kept is whole and of the export at hand."""
    monkeypatch.setenv("PG_DSN", "none")
    select(3, {"state": {"pending": "1"}})
    change()

    assert 1 == Workflow({}).shards(snakemake())


def test_check_sees_a_gpu_that_does_not_compute(
    database: Database, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that is there and has no kernels is found before the night, in one line."""

    def no_kernel(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch, "ones", no_kernel)
    monkeypatch.setattr(preflight, "resolve_device", lambda device: "cuda")
    monkeypatch.setenv("PG_DSN", database.dsn)
    chosen = Settings(model_name=f"local-dir:{encoder}", cache_dir=str(tmp_path / "cache"))
    environment = Environment.read({"IMAGE_ROOT_DIR": str(tmp_path)})

    first = next(iter(preflight.check_all(chosen, environment)))

    assert "error" == first.level
    assert first.text.startswith("expected a torch that is built for this GPU")
