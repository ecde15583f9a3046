"""What a run is before it starts: what it exports, how many shards it has, and what it says."""

import hashlib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from adbc_driver_manager.dbapi import Connection
from conftest import REPOSITORY, T0, Database

from pipeline import export
from pipeline.database import registry, waiting
from pipeline.database.connection import connect
from pipeline.database.registry import MadeBy
from pipeline.stage import parquet
from pipeline.stage.settings import Environment, Identity, Settings
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
    split(shards)


def split(shards: int) -> None:
    """What select leaves of the export at hand, without a row."""
    made_by = {"export": parquet.metadata(plan.LISTINGS)["export"]}
    for number in range(1, shards + 1):
        path = plan.SELECTED / f"{number}-of-{shards}.parquet"
        with parquet.writer(path, parquet.SELECTED, made_by):
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
    """The split, the targets and the params are of one moment: one snapshot, and one for rights."""
    fill(database, 2001, 5)
    flow, workflow = Workflow({}), snakemake()
    number = flow.shards(workflow)
    flow.table([])(None)
    flow.export("limit_listings")(None)

    assert 2 == number
    assert {"encode": 2} == workflow.resource_settings.overwrite_scatter
    assert [{"read_only": True, "repeatable": True}, {"read_only": True}] == asked


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


EXPORT = ("limit_listings", "force", *Identity._fields)


def wanted(**config: Any) -> str:
    """The flags of the export that a run with these settings asks for."""
    return Workflow(config).export(*EXPORT)(None)


@pytest.fixture
def exported(
    asked: list[dict[str, Any]], database: Database, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Two listings of two images each; a call exports what is wanted, and gives its flags."""
    fill(database, 2, 2)

    def run(**config: Any) -> str:
        flags = wanted(**config)
        files = ["--listings", plan.LISTINGS, "--images", plan.IMAGES]
        monkeypatch.setattr("sys.argv", ["export", *map(str, files), *shlex.split(flags)])
        export.main()
        return flags

    return run


def done(database: Database, **key: str) -> None:
    """Every listing has a vector, under the default key unless said otherwise."""
    names = {**Workflow({}).identity._asdict(), **key}
    database.execute(
        "INSERT INTO ml.img_vec512_v1 SELECT listing_id, edited_date, $1, $2, $3,"
        ' array_fill(1, ARRAY[512])::vector, 1 FROM "iPhone".iphone_listings',
        *names.values(),
    )


def without_vector(path: Path, file: Path) -> None:
    """What aggregate leaves when the last run did not find the one photo of listing 4."""
    failed = {"storage_path": file.name, "size": None, "mtime_ns": None, "error": "missing: x"}
    row = {"generation": 1, "listing_id": 4, "edited_date": datetime.fromisoformat(T0),
           "candidates": hashlib.md5(f"0|{file.name}|0|0|0".encode()).hexdigest(),
           "files": [failed]}  # fmt: skip
    with parquet.writer(path, parquet.WITHOUT_VECTOR, {}) as writer:
        writer.write_table(pa.Table.from_pylist([row], parquet.WITHOUT_VECTOR))


def loaded(load_id: str) -> None:
    parquet.write_json(plan.RECEIPT, {"load_id": load_id})


def drop_listings(database: Database) -> None:
    database.execute('TRUNCATE "iPhone".iphone_listings')


def rename_photos(database: Database) -> None:
    database.execute("UPDATE \"iPhone\".iphone_image_assets SET storage_path = 'x.jpg'")


@pytest.mark.parametrize(
    ("change", "config", "kept"),
    [
        (lambda database: None, {}, True),
        (lambda database: None, {"limit_listings": 2}, True),
        (lambda database: None, {"limit_listings": 1}, False),
        (lambda database: None, {"force": True}, False),
        *[(lambda database: None, {name: "other"}, False) for name in Identity._fields],
        (lambda database: database.edit(1, T0), {}, False),
        (lambda database: database.add_image(1, 3, "new.jpg"), {}, False),
        (rename_photos, {}, False),
        (lambda database: loaded("1"), {}, False),
        (done, {}, True),
        (lambda database: done(database, source="other"), {"source": "other"}, False),
        (drop_listings, {}, False),
    ],
    ids=["nothing", "a limit that cuts nothing off", "limit", "force", *Identity._fields,
         "edit", "image", "path", "pending after a load", "done", "done under another key", "gone"],
)  # fmt: skip
def test_an_export_is_kept_while_it_is_what_is_pending(
    exported: Callable[..., str], database: Database, asked: list[dict[str, Any]],
    change: Callable[[Database], object], config: dict[str, Any], kept: bool,
) -> None:  # fmt: skip
    """And with nothing pending, while it is of this database and key."""
    flags = exported()
    change(database)

    assert kept == (flags == wanted(**config))
    assert all(how["read_only"] for how in asked)


def test_an_export_says_by_what_it_was_made(exported: Callable[..., str]) -> None:
    """Its flags are what it keeps: settings, the whole key, and the state of the database."""
    loaded("7")
    flags = exported(force=True, pca_rev="p")
    kept = parquet.metadata(plan.LISTINGS)["export"]
    pending = kept["state"].pop("pending")

    assert flags.startswith(
        "--limit-listings=50000 --force=True --source=listing_images_topk5_v1"
        f" --model-rev={kept['model_rev']} --pca-rev=p '--state={{"
    )
    assert {
        "limit_listings": 50_000,
        "force": True,
        "source": "listing_images_topk5_v1",
        "model_rev": Workflow({}).identity.model_rev,
        "pca_rev": "p",
        "state": {"after_load": "7", "changed_files": ""},
    } == kept
    assert pending.startswith("2 listings, 4 images, ") and pending in flags


def test_while_a_load_runs_its_export_is_the_current_one(exported: Callable[..., str]) -> None:
    """Snakemake removes the receipt before the load writes it anew."""
    loaded("1")
    flags = exported()
    plan.RECEIPT.unlink()

    assert flags == wanted()


def test_an_export_made_by_hand_is_made_again(exported: Callable[..., str]) -> None:
    """One that nobody told the state of the database."""
    flags = exported()
    by_hand = {**parquet.metadata(plan.LISTINGS)["export"], "state": {}}
    with parquet.writer(plan.LISTINGS, parquet.LISTINGS, {"export": by_hand}):
        pass

    assert flags == wanted()
    assert '"after_load": ""' in flags


def test_a_file_that_arrives_is_one_more_export(
    exported: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that failed; what was exported for it remains the current one when it has come in."""
    monkeypatch.setenv("IMAGE_ROOT_DIR", str(tmp_path))
    file = tmp_path / "late.jpg"
    without_vector(plan.WITHOUT_VECTOR, file)
    first = exported()
    again = wanted()
    file.write_bytes(b"1")
    second = exported()
    plan.WITHOUT_VECTOR.unlink()

    assert first == again
    assert first != second
    assert second == wanted()


def test_the_target_asks_for_files_while_there_is_work(
    exported: Callable[..., str], database: Database
) -> None:
    """For those of a run, and the receipt; for none where nothing is pending or begun."""
    files = ["a", "b"]
    pending = Workflow({}).table(files)(None)
    done(database)
    nothing = Workflow({}).table(files)(None)
    database.execute("TRUNCATE ml.img_vec512_v1")
    exported()
    done(database)
    begun = Workflow({}).table(files)(None)

    assert [[*files, str(plan.RECEIPT)], []] == [pending, nothing]
    assert pending == begun


def test_what_the_load_could_not_do_is_refused_before(
    exported: Callable[..., str], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another recipe or dimension, no right to write, no database: one line, kept for the end."""
    said: list[str] = []
    monkeypatch.setattr(plan, "refusals", said)
    role, key = f"planner_{os.getpid()}", {"source": "s"}
    flow = Workflow(key)
    made_by = MadeBy.planned(flow.settings.model_copy(update={"topk": 2}), flow.model)
    with connect() as connection, connection.cursor() as cursor:
        registry.claim(cursor, flow.environment, flow.identity, made_by)
        connection.commit()
    done(database, source="s")
    with pytest.raises(SystemExit):
        flow.table([])(None)
    forced = Workflow({**key, "force": True}).table([])(None)
    with pytest.raises(SystemExit):
        Workflow({**key, "force": True, "limit_listings": 1}).table([])(None)
    database.execute(f"CREATE ROLE {role} LOGIN")
    try:
        database.execute(f'GRANT USAGE ON SCHEMA "iPhone", ml TO {role}')
        database.execute(f'GRANT SELECT ON ALL TABLES IN SCHEMA "iPhone", ml TO {role}')
        monkeypatch.setenv("PG_DSN", database.dsn.replace("postgres@", f"{role}@", 1))
        with pytest.raises(SystemExit):
            Workflow({}).table([])(None)
    finally:
        database.execute(f"DROP OWNED BY {role}")
        database.execute(f"DROP ROLE {role}")
    monkeypatch.setenv("PG_DSN", database.dsn)
    database.execute("TRUNCATE ml.img_vec512_v1")
    database.execute("ALTER TABLE ml.img_vec512_v1 ALTER vec TYPE vector(3)")
    with pytest.raises(SystemExit):
        Workflow({}).table([])(None)
    monkeypatch.setenv("PG_DSN", "none")
    with pytest.raises(SystemExit) as last:
        Workflow({}).table([])(None)

    mixed, rest, rights, dimension, none = said
    assert "found topk 5 instead of 2" in mixed
    assert [str(plan.RECEIPT)] == forced
    assert "found 1 rows that would stay" in rest
    assert "INSERT" in rights
    assert "expected column vec vector(512), the dimension of the vectors" in dimension
    assert none == str(last.value) == (
        "error: expected PG_DSN of a database to load into, found none; hint: the target without"
        " is: vectors"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "dsn", "line"),
    [
        ({"topk": 0}, NOBODY, "topk: .*; found 0 .*--config"),
        ({"shards": 0}, NOBODY, "shards: .* found 0 .*a.yaml, b.yaml"),
        ({"cache_dir": "file"}, NOBODY, "expected cache_dir: a folder"),
        ({}, "", "expected .*PG_DSN"),
    ],
)
def test_settings_that_cannot_be_are_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], dsn: str, line: str
) -> None:
    """In one line that says where they stand, before any database is asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PG_DSN", dsn)
    Path("file").touch()
    with pytest.raises(SystemExit, match=line.replace("; ", ".*")):
        Workflow(config, ["a.yaml", Path("b.yaml")], ["topk"])


def test_the_plan_is_said_once(
    exported: Callable[..., str], database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr, by the main process, whichever of target and params is asked for first."""
    parquet.write_json(Path("results/benchmark/benchmark.json"), {"images_per_second": 2})
    told = []
    for main, config in (
        (False, {}),
        (True, {"topk": 1}),
        (True, {"limit_listings": 1, "force": True}),
        (True, {"pca_rev": "p"}),
    ):
        flow = Workflow(config)
        flow.shards(snakemake(main=main))
        ask = [flow.table([]), flow.export("force")]
        for one in (*(ask if "force" in config else reversed(ask)), *ask):
            one(None)
        told.append(capsys.readouterr())
        done(database, pca_rev="p") if config == {"topk": 1} else None

    assert [
        "",
        "2 listings pending: 2 new; 2 photos, 0 cached, about 1 s\n",
        "1 listing pending: 1 new; 2 photos, 0 cached, about 1 s;"
        " 1 more are beyond limit_listings\n",
        "Nothing is pending: the table has a vector of every eligible listing (2)\n",
    ] == [one.err for one in told]
    assert [""] * 4 == [one.out for one in told]


def test_where_the_listings_stand(
    exported: Callable[..., str], database: Database, asked: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Under the whole key, whatever is forced: with a vector, pending, or waiting."""
    flow = Workflow({"force": True})
    before = flow.standing()
    done(database)
    database.add_listing(3, ["3.jpg"])
    database.add_listing(4, ["4.jpg"])
    exported()
    without_vector(plan.WITHOUT_VECTOR, Path("4.jpg"))
    waiting.remember(plan.WITHOUT_VECTOR, plan.LISTINGS, flow.settings, flow.identity)

    assert "the table has a vector of 0 of 2 listings; 2 are pending" == before
    assert (
        "the table has a vector of 2 of 4 listings; 1 are pending;"
        " 1 wait for other files or rows (1 missing)"
    ) == flow.standing()
    assert asked == [{"read_only": True, "repeatable": True}] * len(asked)
    capsys.readouterr()
    unforced = Workflow({})
    unforced.shards(snakemake())
    unforced.table([])(None)
    assert capsys.readouterr().err.startswith("1 listing pending: 1 new;")


def test_the_split_at_hand_is_kept_with_its_export(
    exported: Callable[..., str], database: Database
) -> None:
    """While there is work another number is made where one is asked for; after it, none is."""

    def shards() -> list[int]:
        asked = [(None, {}), (2, {}), (None, {"shards": 2}), (2, {"shards": 4})]
        return [Workflow(config).shards(snakemake(given)) for given, config in asked]

    exported()
    none = shards()
    split(3)
    pending = shards()
    done(database)
    finished = shards()
    drop_listings(database)

    assert [1, 2, 2, 2] == none
    assert [3, 2, 2, 2] == pending
    assert [3, 3, 3, 3] == finished
    assert [1, 2, 2, 2] == shards()


def test_what_is_at_hand_is_split_as_it_needs(
    exported: Callable[..., str], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing pending and no split yet: by its candidates, topk of each listing at most."""
    exported()
    done(database)
    monkeypatch.setattr(plan, "PHOTOS_A_SHARD", 1)
    by_topk = [Workflow({"topk": topk}).shards(snakemake()) for topk in (1, 2, 3)]
    monkeypatch.setattr(plan, "MOST_SHARDS", 3)

    assert [2, 4, 4] == by_topk
    assert 3 == Workflow({}).shards(snakemake())
    drop_listings(database)  # those at hand are of another database
    assert 1 == Workflow({}).shards(snakemake())


def test_half_an_export_is_none(exported: Callable[..., str], database: Database) -> None:
    """As an export leaves it that was killed between its two files."""
    exported()
    done(database)
    plan.IMAGES.unlink()

    assert 1 == Workflow({}).shards(snakemake())


def test_other_splits_stay_as_they_were_asked_for(asked: list[dict[str, Any]]) -> None:
    """--set-scatter of a rule that is not ours is left to Snakemake."""
    workflow = snakemake()
    workflow.resource_settings.overwrite_scatter = {"mine": 4}
    Workflow({}).shards(workflow)

    assert {"mine": 4, "encode": 1} == workflow.resource_settings.overwrite_scatter


def test_the_database_is_named_once_it_was_asked(
    asked: list[dict[str, Any]], database: Database
) -> None:
    """As the server says, without what PG_DSN holds."""
    flow = Workflow({})
    before = flow.database
    flow.shards(snakemake())
    (name,) = database.execute("SELECT current_database()::text")[0]

    assert ["no database", f"{name} at a local socket"] == [before, flow.database]


def test_flags_are_words_of_a_shell(asked: list[dict[str, Any]], encoder: Path) -> None:
    """Each by its name, an empty or spaced value as one word; the key is the whole one."""
    flow = Workflow({"model_name": f"local-dir:{encoder}", "model_rev": "a b", "topk": 3})
    names = ("topk", "model_rev", "pca_rev", "source", "weights")

    assert (
        "--topk=3 '--model-rev=a b' --pca-rev= --source=listing_images_topk3_v1"
        f" --weights={flow.model.weights}"
    ) == flow.flags(*names)(None)
    assert flow.model.weights


def test_without_a_database_the_export_at_hand_goes_on(
    exported: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where the server is gone, and says so; with none at hand that is the end."""
    dsn = os.environ["PG_DSN"]
    monkeypatch.setenv("PG_DSN", NOBODY)
    with pytest.raises(SystemExit, match="^error: expected a connection to PG_DSN"):
        wanted()
    monkeypatch.setenv("PG_DSN", dsn)
    flags = exported()
    monkeypatch.setenv("PG_DSN", NOBODY)
    capsys.readouterr()

    assert flags == wanted()
    said = capsys.readouterr().err
    assert said.startswith("expected a connection to PG_DSN")
    assert said.endswith("; going on with results/export as it is\n")


def test_an_export_without_rows_is_of_any_database(
    exported: Callable[..., str], database: Database
) -> None:
    """What holds no listing cannot be told from another's: it is made anew."""
    drop_listings(database)
    exported()

    assert [] == Workflow({}).table(["a"])(None)


def test_the_config_is_read_before_snakemake_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This folder's, else that of the checkout; what is no YAML is one line."""
    monkeypatch.chdir(tmp_path)
    checkout = plan.config_file()
    Path("config.yaml").write_text("topk: 2\n")
    here = plan.config_file()
    Path("config.yaml").write_text("topk: [2\n")

    assert [str(REPOSITORY / "config.yaml"), "config.yaml"] == [checkout, here]
    with pytest.raises(SystemExit, match=r"^error: .*config\.yaml"):
        plan.config_file()


def test_the_stages_of_a_run_are_of_this_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Python and code come first, and once, whatever stood on either path."""
    python, ours = Path(sys.executable).parent, str(REPOSITORY)
    monkeypatch.setenv("PATH", f"/modules{os.pathsep}{python}{os.pathsep}{os.pathsep}/bin")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("LISTING_VECTORS_RUN", "")
    for others in ([], ["/theirs"]):
        if others:
            monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*others, ours]))
        plan.run_this_checkout()

        assert [ours, *others] == os.environ["PYTHONPATH"].split(os.pathsep)
        assert [str(REPOSITORY / "profiles/slurm/bin"), str(python), "/modules", "/bin"] == (
            os.environ["PATH"].split(os.pathsep)
        )


@pytest.mark.parametrize("spelled", ["{}", "{}/", "{}/../bin", "{}:{}/", "profiles/slurm/bin"])
def test_a_clusters_sbatch_is_handed_no_secret(tmp_path: Path, spelled: str) -> None:
    """Ours finds the one behind it, however PATH names its own folder."""
    ours = REPOSITORY / "profiles/slurm/bin"
    theirs = tmp_path / "sbatch"
    theirs.write_text('#!/bin/sh\necho "$PG_DSN|$PGPASSWORD|$*|$PATH"\n')
    theirs.chmod(0o755)
    env = {"PATH": f"{spelled.format(ours, ours)}:{tmp_path}:/bin", "PG_DSN": "secret"}
    said = subprocess.run(
        ["sbatch", "a b", "c"], cwd=REPOSITORY, env={**env, "PGPASSWORD": "secret"},
        capture_output=True, text=True, timeout=20, check=True,
    ).stdout  # fmt: skip

    assert f"none||a b c|{tmp_path}:/bin\n" == said


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
