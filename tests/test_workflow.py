"""Whole runs of Snakemake: what runs, what is written, what reruns."""

import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import (
    REPOSITORY,
    T0,
    Run,
    Workspace,
    create_tables,
    fork_of,
    new_database,
    new_listing,
    new_workspace,
)
from test_reliability import stage_of, start_snakemake

from demo.encoder import random_encoder
from pipeline.encoder.processor import has_bf16
from pipeline.stage import parquet
from pipeline.workflow.plan import Workflow

STAGES = ["aggregate", "encode", "export", "load", "select"]
STAGES_IN_ORDER = ["export", "select", "encode", "aggregate", "load"]
AFTER_SELECT = ["aggregate", "encode", "load", "select"]
AFTER_ENCODE = ["aggregate", "encode", "load"]
LATER = "2026-02-02 12:00:00.000002+00"
NOBODY = "postgresql://nobody@127.0.0.1:1/none"


def listings(workspace: Workspace) -> list[tuple[Any, ...]]:
    """(listing_id, edited_date, n_images) of the target's rows."""
    return workspace.database.vectors("listing_id, edited_date, n_images")


def encoded(workspace: Workspace) -> dict[str, int]:
    """What the last encode did with its images, over all shards; zeros left out."""
    total: dict[str, int] = {}
    for path in (workspace.results / "encode").glob("*.json"):
        shard = json.loads(path.read_text())
        for how, count in (
            {"encoded": shard["encoded"]} | shard["saved"] | shard["failed"]
        ).items():
            total[how] = total.get(how, 0) + count
    return {how: count for how, count in total.items() if count}


def receipt(workspace: Workspace) -> dict[str, int]:
    """The counts in the receipt of the last load."""
    document = json.loads((workspace.results / "load/receipt.json").read_text())
    return {name: document[name] for name in ("inserted", "updated", "unchanged", "waiting")}


def ledgers(workspace: Workspace) -> dict[str, bytes]:
    """The files that remember who waits."""
    return {path.name: path.read_bytes() for path in workspace.folder.glob("cache/waiting-*")}


def error_of(run: Run) -> str:
    """The one line with which a failed run said why; no traceback is anywhere in its output.

    It is the last line. A stage's is said twice: by the stage, and after Snakemake's page about it.
    """
    assert run.code != 0, run.output
    assert "Traceback" not in run.output, run.output
    found = re.findall(r"^(error(?: in \w+)?: .*)$", run.output, re.M)
    assert {run.output.splitlines()[-1]} == set(found), run.output
    return re.sub(r"^error(?: in \w+)?: ", "", str(found[0]))


def files(folder: Path) -> dict[str, int]:
    """Every file below a folder, with its mtime."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def unused(
    server: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workspace]:
    """A workspace with one listing to embed, for runs that must not touch it."""
    with new_database(server) as database:
        create_tables(database)
        workspace = new_workspace(tmp_path_factory.mktemp("unused") / "work", database, encoder)
        new_listing(workspace, 1)
        yield workspace


@pytest.fixture
def fresh(unused: Workspace, tmp_path: Path) -> Iterator[Workspace]:
    """A copy of the unused workspace."""
    with fork_of(unused, tmp_path / "work") as workspace:
        workspace.knows_photos = True
        yield workspace


def test_a_run_embeds_every_pending_listing(first_run: tuple[Workspace, Run]) -> None:
    """Each stage runs; every listing with a readable image has its row; the receipt says so."""
    workspace, run = first_run

    assert STAGES == run.rules
    assert [
        (1, "2026-01-01 12:00:00.000001+00", 2),
        (2, "2026-01-01 12:00:00.000001+00", 2),
    ] == listings(workspace)
    assert {"encoded": 4, "missing": 2} == encoded(workspace)
    assert {"inserted": 2, "updated": 0, "unchanged": 0, "waiting": 1} == receipt(workspace)
    assert "load       2 inserted, 0 updated, 0 unchanged -> " in run.output


def test_a_second_run_does_nothing(finished: Workspace) -> None:
    """Nothing pending, or waiting files that are still missing: no job, no row, no file."""
    rows, before = finished.database.vectors(), files(finished.results)
    run = finished.run()

    assert [] == run.rules
    assert "Nothing to be done" in run.output
    assert rows == finished.database.vectors()
    assert before == files(finished.results)


def sql(statement: str) -> Callable[[Workspace], object]:
    return lambda workspace: workspace.database.execute(statement)


@dataclass(frozen=True)
class Change:
    """What is different since the finished run: the data, the words or settings of the command."""

    data: Callable[[Workspace], object] = lambda workspace: None
    words: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


def unloaded(workspace: Workspace) -> None:
    """The folder as the dry run leaves it: nothing was loaded or remembered of its export."""
    workspace.database.execute("TRUNCATE ml.img_vec512_v1, ml.img_vec512_v1_encoders")
    (workspace.results / "load/receipt.json").unlink()
    for name in ledgers(workspace):
        (workspace.folder / "cache" / name).unlink()


# name: (change, the rules that run again)
RERUNS: dict[str, tuple[Change, list[str]]] = {
    "nothing": (Change(), []),
    "new listing": (Change(lambda w: new_listing(w, 4)), STAGES),
    "edited listing": (Change(lambda w: w.database.edit(1, LATER)), STAGES),
    "image row of a waiting listing": (
        Change(lambda w: w.database.add_image(3, 2, "3/2.jpg")), STAGES,
    ),
    "feature row of a waiting listing": (
        Change(lambda w: w.database.add_features(3, 0, quality=1)), STAGES,
    ),
    "image row of a finished listing": (
        Change(lambda w: w.database.add_image(1, 2, "1/2.jpg")), [],
    ),
    "feature row of a finished listing": (
        Change(lambda w: w.database.add_features(1, 0, stock=True)), [],
    ),
    "row deleted from the target": (
        Change(sql("DELETE FROM ml.img_vec512_v1 WHERE listing_id = 2")), STAGES,
    ),
    "missing file arrives": (Change(lambda w: w.photo("3/1.jpg")), STAGES),
    "file of a finished listing": (Change(lambda w: w.photo("1/0.jpg", "blue")), []),
    "topk": (Change(config={"topk": 1}), STAGES),
    "recipe under a source of its own": (
        Change(config={"source": "other", "topk": 1, "exclude_stock": False}), STAGES,
    ),
    "recipe before the first load": (
        Change(unloaded, config={"exclude_stock": False, "exclude_screenshots": False}),
        AFTER_SELECT,
    ),
    "recipe by force": (
        Change(words=("--forcerun", "export"), config={"force": True, "exclude_stock": False}),
        STAGES,
    ),
    "shards": (Change(config={"shards": 3}), []),
    "shards: auto": (Change(config={"shards": "auto"}), []),
    "set-scatter": (Change(words=("--set-scatter", "encode=3")), []),
    "precision": (Change(config={"precision": "bf16"}), AFTER_ENCODE),
    "decode": (Change(config={"decode": "scaled"}), AFTER_ENCODE),
    "orientation": (Change(config={"apply_exif_orientation": False}), AFTER_ENCODE),
    "source": (Change(config={"source": "other"}), STAGES),
    "pca_rev": (Change(config={"pca_rev": "other"}), STAGES),
    "model_rev": (Change(config={"model_rev": "other"}), STAGES),
    "a limit that cuts nothing off": (Change(config={"limit_listings": 1}), []),
    "cores": (Change(words=("--cores", "1")), []),
    "speed settings": (
        Change(config={"batch_size": 1, "num_workers": 1, "device": "cpu", "memory_mb": 999,
                       "lock_timeout_s": 9, "benchmark_images": 9, "max_failed_fraction": 0.9}), [],
    ),
    "force": (Change(words=("--forcerun", "export"), config={"force": True}), STAGES),
}  # fmt: skip


@pytest.fixture(scope="module")
def replanned(
    first_run: tuple[Workspace, Run], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Run]:
    """For each change a dry run in a copy of the finished run, two at a time."""
    folder = tmp_path_factory.mktemp("replanned")

    def plan(name: str) -> Run:
        change, _ = RERUNS[name]
        with fork_of(first_run[0], folder / name) as workspace:
            change.data(workspace)
            return workspace.snakemake("-n", *change.words, config=change.config)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(RERUNS, pool.map(plan, RERUNS), strict=True))


@pytest.mark.parametrize("what", RERUNS)
def test_what_reruns_when(replanned: dict[str, Run], what: str) -> None:
    """A change reruns the first stage that it concerns and those after it, and no other."""
    _, expected = RERUNS[what]

    assert (0, expected) == (replanned[what].code, replanned[what].rules), replanned[what].output


# name: (what else is different, the settings, the start of the error)
MIXING: dict[str, tuple[Callable[[Workspace], object], dict[str, Any], str]] = {
    "exclude_stock": (
        lambda w: None, {"exclude_stock": False},
        "expected vectors of the encoder and recipe that made (listing_images_topk5_v1, KEY, '')"
        " in the table, found exclude_stock false instead of true (\"ml\".\"img_vec512_v1\");"
        " hint: give the recipe its own source, or overwrite all of them with force",
    ),
    "exclude_screenshots": (
        lambda w: None, {"exclude_screenshots": False},
        "expected vectors of the encoder and recipe that made (listing_images_topk5_v1, KEY, '')"
        " in the table, found exclude_screenshots false instead of true",
    ),
    "topk": (
        lambda w: None, {"topk": 1, "source": "listing_images_topk5_v1"},
        "expected vectors of the encoder and recipe that made (listing_images_topk5_v1, KEY, '')"
        " in the table, found topk 1 instead of 5",
    ),
    "weights": (
        sql("UPDATE ml.img_vec512_v1_encoders SET encoder = encoder || '{\"weights\": \"x\"}'"),
        {},
        "expected vectors of the encoder and recipe that made (listing_images_topk5_v1, KEY, '')"
        " in the table, found another weights",
    ),
    "force, an earlier edit": (
        lambda w: w.database.edit(1, LATER), {"exclude_stock": False, "force": True},
        "expected every row of (listing_images_topk5_v1, KEY, '') to be replaced by exclude_stock"
        " false instead of true, found 1 rows that would stay",
    ),
    "force, the limit": (
        lambda w: None, {"exclude_stock": False, "force": True, "limit_listings": 1},
        "expected every row of (listing_images_topk5_v1, KEY, '') to be replaced by exclude_stock"
        " false instead of true, found 1 rows that would stay",
    ),
    "force, a listing that is spam now": (
        sql("UPDATE \"iPhone\".iphone_listings SET spam = 'spam' WHERE listing_id = 1"),
        {"exclude_stock": False, "force": True},
        "expected every row of (listing_images_topk5_v1, KEY, '') to be replaced by exclude_stock"
        " false instead of true, found 1 rows that would stay",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MIXING)
def test_what_would_mix_is_refused_before_the_first_image(
    finished: Workspace, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan ends in one line, in the transaction in which it asks what is pending."""
    change, config, message = MIXING[what]
    change(finished)
    before = finished.database.vectors()
    with planning(finished, monkeypatch, config) as flow, pytest.raises(SystemExit) as error:
        flow.table([])(None)

    said = str(error.value).replace(flow.identity.model_rev, "KEY")
    assert said.startswith(f"error: {message}")
    assert "\n" not in said
    assert before == finished.database.vectors()


@contextmanager
def planning(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> Iterator[Workflow]:
    """What the Snakefile asks for a run with these settings in this folder."""
    for name, value in workspace.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(workspace.folder)
    yield Workflow({"model_name": f"local-dir:{workspace.encoder}", "shards": 1, **config})


@pytest.mark.parametrize(
    "statements",
    [
        ["DROP TABLE ml.img_vec512_v1_encoders"],
        ["ALTER TABLE ml.img_vec512_v1_encoders DROP recipe"],
        ["UPDATE ml.img_vec512_v1_encoders SET recipe = NULL"],
        ["DELETE FROM ml.img_vec512_v1_encoders"],
    ],
    ids=["no registry", "no recipes", "no recipe", "no key"],
)
def test_what_is_not_registered_is_no_obstacle(
    finished: Workspace, statements: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan goes on where the registry does not say what made the rows."""
    for statement in statements:
        finished.database.execute(statement)
    with planning(finished, monkeypatch, {"exclude_stock": False}) as flow:
        assert [] != flow.table([])(None)


def test_a_registry_that_may_not_be_read_is_no_obstacle(
    finished: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A role that may read the inputs and the table alone can plan all but the load."""
    role = f"planner_{uuid.uuid4().hex[:8]}"
    finished.database.execute(f'CREATE ROLE "{role}" LOGIN')
    try:
        for sql in (
            'GRANT USAGE ON SCHEMA ml, "iPhone" TO "{role}"',
            'GRANT SELECT ON ALL TABLES IN SCHEMA ml, "iPhone" TO "{role}"',
            'REVOKE ALL ON ml.img_vec512_v1_encoders FROM "{role}"',
        ):
            finished.database.execute(sql.format(role=role))
        dsn = finished.database.dsn.replace("postgres@", f"{role}@", 1)
        monkeypatch.setitem(finished.env, "PG_DSN", dsn)
        with planning(finished, monkeypatch, {"exclude_stock": False}) as flow:
            planned = flow.export("exclude_stock")(None)
    finally:
        finished.database.execute(f'DROP OWNED BY "{role}"')
        finished.database.execute(f'DROP ROLE "{role}"')

    assert planned.startswith("--exclude-stock=False ")


def test_another_topk_is_another_key(finished: Workspace) -> None:
    """`run --topk 1`: each listing under a name of its own, from the cache; the others stay."""
    before = finished.database.vectors()
    model = f"model_name=local-dir:{finished.encoder}"
    run = finished.python(
        "-m", "pipeline", "run", "--topk", "1", "--cores", "2", "--model-name",
        model.removeprefix("model_name="),
    )  # fmt: skip
    after = finished.database.vectors()
    recipes = finished.database.execute(
        "SELECT source, recipe->>'topk' FROM ml.img_vec512_v1_encoders ORDER BY 1"
    )

    assert 0 == run.code, run.output
    assert before == [row for row in after if row[2] == "listing_images_topk5_v1"]
    assert [(1, "listing_images_topk1_v1", 1), (2, "listing_images_topk1_v1", 1)] == [
        (row[0], row[2], row[6]) for row in after if row not in before
    ]
    assert {"same file": 2, "missing": 1} == encoded(finished)
    assert [("listing_images_topk1_v1", "1"), ("listing_images_topk5_v1", "5")] == recipes


def test_another_recipe_under_the_key_needs_force(finished: Workspace) -> None:
    """A real run is refused in one line before any job; with force it replaces every row."""
    finished.database.add_features(1, 0, stock=True)
    before = listings(finished)
    refused = finished.snakemake(config={"exclude_stock": False, "exclude_screenshots": False})
    untouched = listings(finished)
    recipe = {"exclude_stock": False, "topk": 1, "source": "listing_images_topk5_v1"}
    finished.run("--forcerun", "export", config={"force": True, **recipe})

    assert "found exclude_screenshots false instead of true and exclude_stock false" in (
        error_of(refused)
    )
    assert [] == refused.rules
    assert before == untouched
    assert [(1, 1), (2, 1)] == [(row[0], row[2]) for row in listings(finished)]
    assert [
        ('{"topk": 1, "projection": "", "exclude_stock": false, "exclude_screenshots": true}',)
    ] == (finished.database.execute("SELECT recipe::text FROM ml.img_vec512_v1_encoders"))
    assert [] == finished.run("-n", config=recipe).rules


@pytest.mark.parametrize("stage", ["export", "aggregate"])
def test_a_stage_by_hand_must_be_told_the_source(fresh: Workspace, stage: str) -> None:
    """Where topk is not known an empty source cannot stand for it: one line says so."""
    names = {
        "export": ("--listings", "--images"),
        "aggregate": ("--encoded", "--images", "--output", "--without-vector", "--failures"),
    }
    files_of = [word for name in names[stage] for word in (name, "x")]
    files_of += ["--shards", "1"] if stage == "aggregate" else []
    run = fresh.python("-m", f"pipeline.{stage}", *files_of, "--model-rev", "m")

    assert 2 == run.code
    assert run.output.splitlines()[-1].endswith("error: --source must name the recipe")


def test_check_refuses_what_would_mix(finished: Workspace) -> None:
    """`python -m pipeline check` finds what the load would refuse, in the same words."""
    words = ["-m", "pipeline", "check", "--config", f"model_name=local-dir:{finished.encoder}"]
    bad = finished.python(*words, "exclude_stock=false")
    forced = finished.python(*words, "exclude_stock=false", "force=true")

    assert (1, 1) == (bad.code, bad.output.count("found exclude_stock false instead of true"))
    assert 0 == forced.code, forced.output


def test_another_encoder_reruns_everything(finished: Workspace, tmp_path: Path) -> None:
    """Other weights are another key: all listings are pending; a copied folder is the same one."""
    other = random_encoder(tmp_path / "other", seed=2)
    copy = tmp_path / "copy" / finished.encoder.name
    shutil.copytree(finished.encoder, copy)

    assert STAGES == finished.run("-n", config={"model_name": f"local-dir:{other}"}).rules
    assert "export" not in finished.run("-n", config={"model_name": f"local-dir:{copy}"}).rules


def checkout(folder: Path) -> Path:
    """A copy of the code, with mtimes of now."""
    shutil.copytree(
        REPOSITORY / "pipeline",
        folder / "pipeline",
        ignore=shutil.ignore_patterns("__pycache__"),
        copy_function=shutil.copyfile,
    )
    shutil.copytree(REPOSITORY / "profiles", folder / "profiles")
    for name in ("Snakefile", "environment.yml"):
        shutil.copyfile(REPOSITORY / name, folder / name)
    return folder


def run_of(workspace: Workspace, code: Path, *words: str, dsn: str = "") -> Run:
    """A run with another checkout of the code."""
    here, there = f"{REPOSITORY}/", f"{code}/"
    python, *command = workspace.command(*words)
    command = [w.replace(here, there) if w.startswith(here) else w for w in command]
    env = {"PYTHONPATH": str(code)} | ({"PG_DSN": dsn} if dsn else {})
    return workspace.execute([python, *command], env)


def test_an_edit_to_a_stage_reruns_it(finished: Workspace, tmp_path: Path) -> None:
    """A stage's own code reruns that stage and what follows; other code and mtimes nothing."""
    code = checkout(tmp_path / "code")
    reran = {"": run_of(finished, code, "-n").rules}
    expected = {
        "": [],
        "stage/parquet.py": STAGES,
        "select.py": AFTER_SELECT,
        "encoder/tower.py": AFTER_ENCODE,
        "aggregate.py": ["aggregate", "load"],
        "load.py": ["load"],
        "encoder/model.py": AFTER_ENCODE,
        "database/registry.py": ["load"],
        "database/census.py": [],
        "workflow/summary.py": [],
        "stage/command.py": [],
    }
    for name in list(expected)[1:]:
        file = code / "pipeline" / name
        text = file.read_text()
        file.write_text(text + "\n# an edit\n")
        reran[name] = run_of(finished, code, "-n").rules
        file.write_text(text)

    assert expected == reran


def test_an_edited_listing_is_embedded_again(finished: Workspace) -> None:
    """One edit: one listing under its new date, from the cache; every other row stays as it was."""
    rows = finished.database.vectors()
    finished.database.edit(1, LATER)
    finished.run()
    after = finished.database.vectors()

    assert [(1, LATER), *[row[:2] for row in rows]] == sorted(
        [row[:2] for row in after], key=lambda row: row[1] != LATER
    )
    assert rows == [row for row in after if row[1] != LATER]
    assert {"same file": 2} == encoded(finished)
    assert {"inserted": 1, "updated": 0, "unchanged": 0, "waiting": 1} == receipt(finished)


def test_thousands_of_shards(fresh: Workspace) -> None:
    """More than a process may open, and more names than a command line may hold: 128 KiB."""
    words = fresh.command("selected", "--set-scatter", "encode=4000")
    run = fresh.execute(["sh", "-c", 'ulimit -n 256; exec "$@"', "sh", *words], {})

    assert (0, ["export", "select"]) == (run.code, run.rules), run.output[-2000:]
    assert 4000 == len(list(fresh.results.glob("select/*-of-4000.parquet")))


@pytest.mark.parametrize("stage", ["export", "select", "encode", "aggregate", "load"])
def test_a_stage_that_was_killed_is_run_again(finished: Workspace, stage: str) -> None:
    """Alone, amid a run, as for want of memory: the next run takes up there, and misses nothing.

    Snakemake notes a job that failed as done, and removes its files; what follows is still there.
    """
    finished.database.edit(1, LATER)
    process = start_snakemake(finished)
    stage_of(process, stage).kill()
    process.communicate(timeout=120)
    again = finished.run()

    assert 0 != process.returncode
    assert STAGES_IN_ORDER[STAGES_IN_ORDER.index(stage) :] == sorted(
        again.rules, key=STAGES_IN_ORDER.index
    )
    assert [(1, T0, 2), (1, LATER, 2), (2, T0, 2)] == listings(finished)


def test_a_killed_change_of_settings_is_not_forgotten(finished: Workspace) -> None:
    """With nothing pending, too: what a setting asked for is made by the next run."""
    process = start_snakemake(finished, decode="scaled")
    stage_of(process, "encode").kill()
    process.communicate(timeout=120)
    again = finished.run(config={"decode": "scaled"})

    assert 0 != process.returncode
    assert AFTER_ENCODE == again.rules


def test_a_row_deleted_from_the_table_comes_back(finished: Workspace) -> None:
    """It is pending again, and its vector is the same, from the cache."""
    before = finished.database.vectors("listing_id, vec")
    finished.database.execute("DELETE FROM ml.img_vec512_v1 WHERE listing_id = 2")
    finished.run()

    assert before == finished.database.vectors("listing_id, vec")
    assert {"same file": 2} == encoded(finished)
    assert {"inserted": 1, "updated": 0, "unchanged": 0, "waiting": 1} == receipt(finished)
    assert [] == finished.run("-n").rules


def test_force_embeds_and_writes_all_again(finished: Workspace) -> None:
    """With force each image is encoded and each row written, each time; vectors stay the same."""
    rows = [finished.database.vectors("listing_id, vec, updated_at")]
    for _ in range(2):
        run = finished.run("--forcerun", "export", config={"force": True})
        assert STAGES == run.rules
        assert {"encoded": 4, "missing": 2} == encoded(finished)
        assert {"inserted": 0, "updated": 2, "unchanged": 0, "waiting": 1} == receipt(finished)
        rows.append(finished.database.vectors("listing_id, vec, updated_at"))

    assert rows[0] != rows[1] != rows[2]
    assert [row[:2] for row in rows[0]] == [row[:2] for row in rows[2]]
    assert all(a[2] < b[2] for a, b in zip(rows[1], rows[2], strict=True))


def test_the_dry_run_writes_no_row(finished: Workspace) -> None:
    """`vectors` stops before the load; `all` then has nothing left to do but load."""
    new_listing(finished, 4)
    rows, loaded = finished.database.vectors(), files(finished.results / "load")
    run = finished.run("vectors")

    assert ["aggregate", "encode", "export", "select"] == run.rules
    assert rows == finished.database.vectors()
    assert loaded == files(finished.results / "load")
    assert [4] == (
        pq.read_table(finished.results / "export/listings.parquet")["listing_id"].to_pylist()
    )
    assert ["load"] == finished.run("-n").rules


def test_a_rest_of_another_database_is_not_loaded(finished: Workspace, server: Path) -> None:
    """What a run over another database left unfinished never reaches this one's table."""
    before = finished.database.vectors("listing_id, updated_at")
    with new_database(server) as other:
        create_tables(other)
        other.add_listing(77, ["1/0.jpg"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(finished.env, "PG_DSN", other.dsn)
            finished.run("selected")
        run = finished.run()

    assert [] == run.rules
    assert before == finished.database.vectors("listing_id, updated_at")


def test_another_number_of_shards_leaves_no_stale_file(finished: Workspace) -> None:
    """When 1 shard becomes 3, select and encode hold those 3; the cache is used as before."""
    finished.database.edit(1, LATER)
    finished.run(config={"shards": 3})
    shards = [f"{number}-of-3" for number in (1, 2, 3)]

    assert [f"{shard}.parquet" for shard in shards] == sorted(files(finished.results / "select"))
    assert sorted(f"{shard}.{kind}" for shard in shards for kind in ("json", "parquet")) == sorted(
        files(finished.results / "encode")
    )
    assert {"same file": 2} == encoded(finished)
    assert [] == finished.run("-n", config={"shards": 2}).rules


def test_a_split_is_kept_while_there_is_work(finished: Workspace) -> None:
    """What select has split is encoded as it is, unless another number is asked for."""
    new_listing(finished, 4)
    finished.run("selected", "--set-scatter", "encode=3", config={"shards": "auto"})
    planned = {
        "auto": finished.run("-n", config={"shards": "auto"}),
        "asked": finished.run("-n", "--set-scatter", "encode=2", config={"shards": "auto"}),
        "cut off": finished.run("-n", "vectors", config={"shards": "auto"}),
        "without": run_of(finished, REPOSITORY, "-n", "vectors", dsn="none"),
        "asked without": run_of(
            finished, REPOSITORY, "-n", "vectors", "--set-scatter", "encode=2", dsn="none"
        ),
    }
    finished.run("vectors", config={"shards": "auto"})
    done = run_of(finished, REPOSITORY, "-n", "vectors", "--set-scatter", "encode=2", dsn="none")

    assert {
        "auto": AFTER_ENCODE,
        "asked": AFTER_SELECT,
        "cut off": ["aggregate", "encode"],
        "without": ["aggregate", "encode"],
        "asked without": ["aggregate", "encode", "select"],
    } == {what: run.rules for what, run in planned.items()}
    assert [] == done.rules


def test_a_job_of_its_own_process_has_the_split_of_the_run(finished: Workspace) -> None:
    """As on a cluster: the process of a job gets the number and reads no database for it."""
    finished.config["device"] = "cpu"  # on a cluster, auto means a GPU
    finished.database.edit(1, LATER)
    finished.run("selected", "--set-scatter", "encode=2", config={"shards": "auto"})
    shard = "results/encode/2-of-2.parquet"
    words = [shard, "--force", "--mode", "remote", "--set-scatter", "encode=2"]
    job = run_of(finished, REPOSITORY, *words, dsn=NOBODY)

    assert 0 == job.code, job.output
    assert ["2-of-2.json", "2-of-2.parquet"] == sorted(
        name for name in files(finished.results / "encode") if "of-2" in name
    )


def test_the_benchmark_touches_neither_table_nor_cache(finished: Workspace) -> None:
    """It encodes every image itself, writes its report, and no row, cache entry or result."""
    rows, cache = finished.database.vectors(), files(finished.folder / "cache")
    results = files(finished.results)
    run = finished.run("benchmark", config={"benchmark_images": 3})
    after = files(finished.results)
    report = json.loads((finished.results / "benchmark/benchmark.json").read_text())

    assert ["benchmark"] == run.rules
    assert rows == finished.database.vectors()
    assert cache == files(finished.folder / "cache")
    assert ["benchmark/benchmark.json"] == sorted(after.keys() - results.keys())
    assert results == {name: mtime for name, mtime in after.items() if name in results}
    assert report["images_per_second"] > 0
    assert {"read_s", "decode_s", "encode_s", "binding_stage", "advice"} <= report.keys()


def test_a_file_that_arrives_is_embedded(finished: Workspace) -> None:
    """Of the waiting listing what can be read now makes its vector; nothing else is touched."""
    rows = finished.database.vectors()
    finished.photo("3/1.jpg", "green")
    finished.run()

    assert rows == finished.database.vectors()[:2]
    assert [(3, "2026-01-01 12:00:00.000001+00", 1)] == listings(finished)[2:]
    assert {"same file": 1, "missing": 1} == encoded(finished)
    assert {"inserted": 1, "updated": 0, "unchanged": 0, "waiting": 0} == receipt(finished)
    assert [] == finished.run("-n").rules


def test_a_broken_file_is_tried_again_when_it_is_replaced(finished: Workspace) -> None:
    """A listing of broken files waits; a new file in the place of one ends the wait."""
    finished.database.add_listing(4, ["4/0.jpg"])
    (finished.photos / "4").mkdir()
    (finished.photos / "4/0.jpg").write_bytes(b"no image")
    first = finished.run()
    waits = receipt(finished)
    second = finished.run("-n")
    finished.photo("4/0.jpg")
    finished.run()

    assert STAGES == first.rules
    assert {"inserted": 0, "updated": 0, "unchanged": 0, "waiting": 2} == waits
    assert [] == second.rules
    assert [1, 2, 4] == [row[0] for row in listings(finished)]
    assert {"same file": 1} == encoded(finished)
    assert 1 == receipt(finished)["waiting"]


def test_a_limited_run_leaves_the_rest_to_the_next(finished: Workspace) -> None:
    """Newest first up to limit_listings; the next runs take the rest; who waits takes no place."""
    for listing, edited in ((4, "2026-03-01"), (5, "2026-03-03"), (6, "2026-03-02")):
        new_listing(finished, listing, 1, edited_date=f"{edited} 00:00:00+00")
    embedded = []
    for _ in range(2):
        finished.run(config={"limit_listings": 2})
        embedded.append([row[0] for row in listings(finished)])

    assert [[1, 2, 5, 6], [1, 2, 4, 5, 6]] == embedded
    assert [] == finished.run("-n", config={"limit_listings": 2}).rules


def test_missing_files_hold_nobody_up(finished: Workspace) -> None:
    """However many listings lack their files, the healthy ones are embedded, and those wait."""
    new_listing(finished, 4)
    finished.database.add_listing(5, [f"5/{index}.jpg" for index in range(9)])
    finished.run()
    waits = [receipt(finished)["waiting"]]
    nothing = finished.run("-n").rules
    finished.database.add_listing(6, ["6/0.jpg"])
    finished.database.add_listing(7, ["7/0.jpg"])
    finished.run()
    waits.append(receipt(finished)["waiting"])
    shutil.rmtree(finished.folder / "cache")
    new_listing(finished, 8, 1)
    finished.run()
    waits.append(receipt(finished)["waiting"])

    assert [1, 2, 4, 8] == [row[0] for row in listings(finished)]
    assert [] == nothing
    assert [2, 4, 4] == waits
    assert [] == finished.run("-n").rules


def test_a_wrong_image_root_stops_before_the_first_image(
    finished: Workspace, tmp_path: Path
) -> None:
    """Photos of listings in the table are gone: one line, nothing is written, nobody waits."""
    new_listing(finished, 4)
    new_listing(finished, 5)
    before = finished.database.vectors(), ledgers(finished)
    wrong_root = tmp_path / "wrong"
    shutil.copytree(finished.photos / "4", wrong_root / "4")  # some of the new ones are there
    wrong = finished.snakemake(env={"IMAGE_ROOT_DIR": str(wrong_root)})
    after = finished.database.vectors(), ledgers(finished)
    right = finished.run()

    assert (
        "expected at most 50% of the listings that have a vector to have lost their photos"
        f" (max_failed_fraction), found 2 of the 2 newest ({wrong_root}); hint: check"
        " IMAGE_ROOT_DIR; if the photos were removed on purpose: --config max_failed_fraction=1"
    ) == error_of(wrong)
    assert ["encode", "export", "select"] == wrong.rules
    assert before == after
    assert AFTER_ENCODE == right.rules
    assert [(1, 2), (2, 2), (4, 2), (5, 2)] == [(row[0], row[2]) for row in listings(finished)]


def test_a_first_run_with_a_wrong_image_root(fresh: Workspace, tmp_path: Path) -> None:
    """Nothing is in the table yet and not one photo is there: one line, and nobody waits."""
    new_listing(fresh, 2)
    new_listing(fresh, 3)
    (tmp_path / "empty").mkdir()
    config = {"shards": 3}
    wrong = fresh.snakemake(config=config, env={"IMAGE_ROOT_DIR": str(tmp_path / "empty")})
    waits = ledgers(fresh)
    right = fresh.run(config=config)

    assert (
        "expected one photo at least of the run under IMAGE_ROOT_DIR, found none of 6, of 3"
        " listings (nothing waits, nothing is loaded); hint: check IMAGE_ROOT_DIR; if they are"
        " all to come later: --config max_failed_fraction=1"
    ) == error_of(wrong)
    assert {} == waits
    assert AFTER_ENCODE == right.rules
    assert [(1, 2), (2, 2), (3, 2)] == [(row[0], row[2]) for row in listings(fresh)]


def test_photos_removed_on_purpose_are_no_wrong_root(finished: Workspace) -> None:
    """Where embedded listings lost their photos, max_failed_fraction=1 lets the others through."""
    new_listing(finished, 4)
    for listing in ("1", "2"):
        shutil.rmtree(finished.photos / listing)
    refused = finished.snakemake()
    finished.run(config={"max_failed_fraction": 1})

    assert "expected at most 50% of the listings that have a vector" in error_of(refused)
    assert [1, 2, 4] == [row[0] for row in listings(finished)]


def test_an_image_root_that_is_not_there_is_one_line(finished: Workspace) -> None:
    """A missing folder is refused before any image is read, and nothing is written."""
    new_listing(finished, 4)
    run = finished.snakemake(env={"IMAGE_ROOT_DIR": "nowhere"})

    assert (
        "expected a folder of images at IMAGE_ROOT_DIR, found none (nowhere);"
        " hint: export IMAGE_ROOT_DIR=/path/to/images"
    ) == error_of(run)
    assert [1, 2] == [row[0] for row in listings(finished)]


@pytest.mark.parametrize("night", ["first", "second"])
def test_two_stages_on_two_machines(
    first_run: tuple[Workspace, Run], finished: Workspace, tmp_path: Path, night: str
) -> None:
    """Selected at home, encoded where no database is, loaded at home: the same table, no rerun."""
    home, direct = finished, first_run[0].database.vectors("listing_id, edited_date, vec, n_images")
    if night == "first":
        for name in ("results", ".snakemake", "cache"):
            shutil.rmtree(home.folder / name)
        home.database.execute("TRUNCATE ml.img_vec512_v1")
    else:
        home.database.execute("DELETE FROM ml.img_vec512_v1 WHERE listing_id = 2")
    selected = home.run("selected")

    away = Workspace(tmp_path / "away", home.database, home.encoder, home.env, home.config)
    shutil.copytree(home.results, away.results)
    shutil.copytree(home.photos, away.photos)
    shutil.copy(home.folder / "config.yaml", away.folder)
    code = checkout(tmp_path / "code")  # its files are newer than the results
    planned = run_of(away, code, "-n", "vectors", dsn=NOBODY)
    encoded_away = run_of(away, code, "vectors", dsn="none")
    again = run_of(away, code, "-n", "vectors", dsn="none")

    shutil.copytree(away.results, home.results, dirs_exist_ok=True)
    loaded = home.run()

    assert ["export", "select"] == selected.rules
    assert (0, ["aggregate", "encode"]) == (planned.code, planned.rules), planned.output
    assert (0, ["aggregate", "encode"]) == (encoded_away.code, encoded_away.rules)
    assert [] == again.rules
    assert ["load"] == loaded.rules
    assert direct == home.database.vectors("listing_id, edited_date, vec, n_images")
    assert [] == home.run("-n").rules


def test_the_load_needs_a_database(finished: Workspace) -> None:
    """Where PG_DSN is none the target `all` is refused with the name of the one that works."""
    assert (
        "expected PG_DSN of a database to load into, found none;"
        " hint: the target without is: vectors"
    ) == error_of(finished.snakemake(env={"PG_DSN": "none"}))


def test_an_empty_database_is_nothing_to_do(fresh: Workspace) -> None:
    """No listings, or none with an image: `all` runs no job; `vectors` makes files without rows."""
    fresh.database.execute('TRUNCATE "iPhone".iphone_listings, "iPhone".iphone_image_assets')
    fresh.database.add_listing(1)
    everything = fresh.run()
    vectors = fresh.run("vectors", config={"shards": 2})
    paths = sorted(fresh.results.rglob("*.parquet"))

    assert [] == everything.rules
    assert "Nothing is pending" in everything.output
    assert ["aggregate", "encode", "export", "select"] == vectors.rules
    assert 8 == len(paths)
    assert 0 == parquet.rows(paths)
    assert [] == fresh.database.vectors()


def test_one_listing_in_many_shards(fresh: Workspace) -> None:
    """A single listing goes through more shards than it can fill, and then nothing is left."""
    run = fresh.run(config={"shards": 3})

    assert STAGES == run.rules
    assert [(1, "2026-01-01 12:00:00.000001+00", 2)] == listings(fresh)
    assert [] == fresh.run("-n", config={"shards": 3}).rules


def test_a_single_listing_without_files_waits(fresh: Workspace) -> None:
    """One listing alone is no reason to stop: no row, a receipt, and nothing to do afterwards."""
    shutil.rmtree(fresh.photos / "1")
    fresh.run()

    assert {"inserted": 0, "updated": 0, "unchanged": 0, "waiting": 1} == receipt(fresh)
    assert [] == fresh.database.vectors()
    assert [] == fresh.run("-n").rules


def test_a_table_that_is_full_already_needs_no_run(finished: Workspace, tmp_path: Path) -> None:
    """In a new folder, with every listing in the table, there is nothing to do."""
    new = new_workspace(tmp_path / "new", finished.database, finished.encoder)
    finished.database.execute('DELETE FROM "iPhone".iphone_listings WHERE listing_id = 3')
    run = new.run()

    assert [] == run.rules
    assert "Nothing is pending" in run.output
    assert "Nothing to be done" in run.output
    assert not new.results.exists()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no answer": (
        {"env": {"PG_DSN": NOBODY}},
        "expected a connection to PG_DSN, found nothing that answers;"
        " hint: is the server running, and are host and port right?",
    ),
    "no DSN": ({"env": {"PG_DSN": ""}}, "expected PG_DSN in the environment, found nothing;"),
    "malformed DSN": (
        {"env": {"PG_DSN": "postgres//secret"}},
        "expected PG_DSN: a Postgres connection string, URL or keyword=value form, found",
    ),
    "table": (
        {"sql": 'DROP TABLE "iPhone".iphone_listings'},
        'expected the listings table "iPhone"."iphone_listings", found no such table or view;',
    ),
    "column": (
        {"sql": 'ALTER TABLE "iPhone".iphone_listings DROP COLUMN spam'},
        "expected column spam in the listings table, found columns",
    ),
    "target": (
        {"env": {"VECTORS_TABLE": "other"}},
        'expected the target table "ml"."other", found no such table;',
    ),
    "extension": (
        {"sql": "DROP EXTENSION vector CASCADE"},
        "expected the pgvector extension, found none in this database;",
    ),
    "dimension": (
        {"sql": "ALTER TABLE ml.img_vec512_v1 ALTER vec TYPE vector(768)"},
        "expected column vec vector(512), the dimension of the vectors, found vector(768)",
    ),
    "key": (
        {"sql": "ALTER TABLE ml.img_vec512_v1 DROP CONSTRAINT img_vec512_v1_pkey"},
        "expected a primary key (listing_id, edited_date, source, model_rev, pca_rev), found",
    ),
    "model": (
        {"config": {"model_name": "ViT-B-23"}},
        "expected an open_clip model name, local-dir:FOLDER or hf-hub:OWNER/REPOSITORY, found"
        " 'ViT-B-23' (model_name); hint: did you mean ViT-B-32",
    ),
    "pretrained": (
        {"config": {"model_name": "ViT-B-32", "pretrained": "nobody"}},
        "expected a pretrained tag of ViT-B-32, or a weights file, found 'nobody' (pretrained);",
    ),
    "model folder": (
        {"config": {"model_name": "local-dir:nowhere"}},
        "expected a model folder, found none (nowhere);",
    ),
    "identifier": (
        {"env": {"LISTINGS_TABLE": 'x"; DROP TABLE y; --'}},
        "expected LISTINGS_TABLE: a name of letters, digits and _ that starts with no digit, 63",
    ),
    "key of config": (
        {"config": {"topq": 3}},
        "expected a known setting, found 'topq' (--config); hint: did you mean topk?",
    ),
    "value": (
        {"config": {"topk": 0}},
        "expected topk: greater than or equal to 1, found 0 (--config); hint: topk is: images",
    ),
    "type": (
        {"config": {"force": "perhaps"}},
        "expected force: a valid boolean, unable to interpret input, found 'perhaps'",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def refused(
    unused: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Run, list[tuple[str, int]]]]:
    """For each bad input a run in a copy of the unused workspace, and the files that it made."""
    folder = tmp_path_factory.mktemp("refused")

    def refuse(name: str) -> tuple[Run, list[tuple[str, int]]]:
        given, _ = BAD[name]
        with fork_of(unused, folder / name) as workspace:
            if "sql" in given:
                workspace.database.execute(given["sql"])
            before = files(workspace.folder)
            run = workspace.snakemake(config=given.get("config", {}), env=given.get("env", {}))
            return run, sorted(files(workspace.folder).items() - before.items())

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(BAD, pool.map(refuse, BAD), strict=True))


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(
    refused: dict[str, tuple[Run, list[tuple[str, int]]]], what: str
) -> None:
    """What was expected, what was found, where, a hint; no traceback, and nothing is written."""
    run, made = refused[what]

    assert error_of(run).startswith(BAD[what][1]), run.output
    assert "secret" not in run.output
    assert [] == run.rules
    assert [] == [name for name, _ in made if not name.startswith((".snakemake/", "cache/"))]


def test_check_says_what_is_right(fresh: Workspace) -> None:
    """`python -m pipeline check` prints a line for each thing that is right and writes no row."""
    config = f"model_name=local-dir:{fresh.encoder}"
    good = fresh.python("-m", "pipeline", "check", "--config", config)
    bad = fresh.python("-m", "pipeline", "check", "--config", config, env={"PG_DSN": NOBODY})
    right = re.findall(r"^ok  (\w+):", good.output, re.M)

    assert 0 == good.code, good.output
    assert [
        "settings", *(["precision"] if has_bf16() else []), "database", "inputs", "target",
        "listings", "images", "photos", "model",
    ] == right  # fmt: skip
    assert 1 == bad.code
    assert "\nerror: expected a connection to PG_DSN, found nothing that answers;" in bad.output
    assert not fresh.results.exists()
