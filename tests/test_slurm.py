"""profiles/slurm on a real SLURM of two nodes; `make test-slurm` installs what it needs."""

import importlib.util
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import (
    REPOSITORY,
    Run,
    Workspace,
    create_tables,
    fork_of,
    new_database,
    new_workspace,
)
from slurm_cluster import NODES, Cluster, cluster_of_two, said, wait_until, why_not
from test_reliability import KEPT, market

lacking = why_not()
if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
    lacking = "expected Snakemake's SLURM executor, found none; hint: make test-slurm"
pytestmark = [pytest.mark.skipif(bool(lacking), reason=lacking), pytest.mark.timeout(1800)]

SECRET = "a-password-that-nobody-else-has"
LISTINGS = 200
SHARDS = 8
RUN_S = 900.0
BATCHES = {"batch_size": 2}  # so that a shard's first vectors come, and are kept, before its last

# While the file `slow` is there, the stages on n1 are slow enough to be killed amid their work.
SLOW = """
import contextlib, os, sys, time

def slowly(read):
    def read_slowly(*words):
        time.sleep(1.6 * os.path.exists("slow"))
        return read(*words)
    return read_slowly

def paused(writer):
    @contextlib.contextmanager
    def opened_and_paused(*words):
        with writer(*words) as file:
            while os.path.exists("slow"):
                time.sleep(0.1)
            yield file
    return opened_and_paused

if os.environ.get("SLURMD_NODENAME") == "n1":
    if "pipeline.encode" in sys.orig_argv:
        from pipeline.photos.files import PhotoFolder
        PhotoFolder.read = slowly(PhotoFolder.read)
    if "pipeline.aggregate" in sys.orig_argv:
        from pipeline.stage import parquet
        parquet.writer = paused(parquet.writer)
"""


@dataclass
class Story:
    """What became of two runs, in each of which a node was killed, and of a third."""

    work: Workspace
    first: Run
    lost_shard: str  # what its second encode said
    second: Run
    third: Run
    vectors: list[tuple[Any, ...]]
    vectors_of_local_runs: list[tuple[Any, ...]]
    secret_in: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster for all tests of this file."""
    with cluster_of_two(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def story(
    cluster: Cluster, server: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Story]:
    """A night with a node killed in encode, another with one killed in aggregate, and a third."""
    folder = tmp_path_factory.mktemp("story")
    with new_database(server) as database:
        create_tables(database)
        work = new_workspace(folder / "work", database, encoder)
        market(work, LISTINGS)
        with fork_of(work, folder / "local") as local:
            local.run(config=BATCHES)
            local.database.edit(7, "2026-02-01")
            local.run(config=BATCHES)
            expected = local.database.vectors(KEPT)
        prepare(work)
        with looking_for(SECRET, cluster.folder, work.folder) as found:
            first, lost_shard = kill_in_encode(cluster, work)
            database.edit(7, "2026-02-01")
            second = kill_in_aggregate(cluster, work)
            third = work.execute(command(work, SHARDS), {})
        yield Story(
            work, first, lost_shard, second, third, database.vectors(KEPT), expected, found
        )  # fmt: skip


def prepare(work: Workspace) -> None:
    """Give the run a secret, and the nodes their slowness."""
    site = work.folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SLOW)
    work.env |= {"PG_DSN": f"{work.database.dsn}&password={SECRET}", "PGPASSWORD": SECRET,
                 "PYTHONPATH": str(site)}  # fmt: skip


def command(work: Workspace, shards: int) -> list[str]:
    """Snakemake with the profile as it is shipped, here without GPUs; it says all it knows."""
    return [
        sys.executable, "-m", "snakemake", "--snakefile", str(REPOSITORY / "Snakefile"),
        "--workflow-profile", str(REPOSITORY / "profiles" / "slurm"),
        "--set-scatter", f"encode={shards}", "--verbose", "--slurm-keep-successful-logs",
        "--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "8",
        "--config", "device=cpu", f"batch_size={BATCHES['batch_size']}",
        f"model_name=local-dir:{work.encoder}",
    ]  # fmt: skip


def kill_in_encode(cluster: Cluster, work: Workspace) -> tuple[Run, str]:
    """A run whose node n1 dies amid a shard; gives what was said of that shard in the end."""
    with started(work, SHARDS) as run:
        wait_until(lambda: all("encode" in job_on(cluster, node) for node in NODES), RUN_S)
        shard = job_on(cluster, "n1").rpartition("_")[2]
        log = work.folder / "logs" / "encode" / f"{shard}.log"
        wait_until(lambda: log.exists() and re.search(r"images, .* left", log.read_text()))
        lose_n1(cluster)
    return run[0], log.read_text()


def kill_in_aggregate(cluster: Cluster, work: Workspace) -> Run:
    """A run whose node n1 dies with half a file written."""
    with started(work, 2) as run:
        wait_until(lambda: list((work.results / "aggregate").glob(".*.tmp")), RUN_S)
        assert "aggregate" in job_on(cluster, "n1")
        lose_n1(cluster)
    return run[0]


def job_on(cluster: Cluster, node: str) -> str:
    return "".join(cluster.running(node)[:1])


def lose_n1(cluster: Cluster) -> None:
    """Kill the node. It is back when its job has been given up."""
    lost = cluster.lost()
    cluster.kill_node("n1")
    wait_until(lambda: cluster.lost() != lost)
    cluster.start_node("n1")


@contextmanager
def started(work: Workspace, shards: int) -> Iterator[list[Run]]:
    """A run, slow on n1 while the block lasts; it is in the list when it is over."""
    slow, output = work.folder / "slow", work.folder / "snakemake.out"
    slow.touch()
    runs: list[Run] = []
    with open(output, "w") as out:
        process = subprocess.Popen(
            command(work, shards), cwd=work.folder, env=work.env, stdout=out, stderr=out
        )
    try:
        yield runs
        slow.unlink()
        runs.append(Run(process.wait(RUN_S), output.read_text()))
    finally:
        process.kill()
        process.wait()


@contextmanager
def looking_for(secret: str, *folders: Path) -> Iterator[set[str]]:
    """Where a text is found while the block runs: in a file, or the environment of a job."""
    found: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.3):
            found.update(path for folder in folders for path in files_with(secret, folder))
            found.update(jobs_with(secret))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def files_with(secret: str, folder: Path) -> Iterator[str]:
    files = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    for path in files:
        with suppress(OSError):  # gone meanwhile
            if path.suffix != ".jpg" and path.is_file() and secret.encode() in path.read_bytes():
                yield str(path)


def jobs_with(secret: str) -> Iterator[str]:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            environment = process.environ()
            if "SLURMD_NODENAME" in environment and secret in str(environment):
                yield " ".join(process.cmdline())


def test_the_search_finds_what_a_job_is_given(cluster: Cluster) -> None:
    """SLURM writes down what a job's environment holds, and the search sees it there."""
    with looking_for("as-good-as-a-secret", cluster.folder) as found:
        subprocess.run(
            ["sbatch", "--output=/dev/null", "--wrap", "sleep 3"],
            env={**os.environ, "PGPASSWORD": "as-good-as-a-secret"},
            check=True,
        )
        wait_until(lambda: any("state" in place for place in found))
        wait_until(lambda: not said("squeue", "-h", "-o", "%i", "-t", "RUNNING,PENDING"))

    assert [] != [place for place in found if "sleep 3" in place]


def test_a_run_recovers_from_a_node_lost_in_encode(story: Story) -> None:
    """The shard goes to another node, which finds in the cache what the lost one had encoded."""
    assert 0 == story.first.code, story.first.output
    assert "Trying to restart job" in story.first.output
    assert re.search(r"\d+ same file", story.lost_shard)


def test_a_run_recovers_from_a_node_lost_in_aggregate(story: Story) -> None:
    """The job is done anew on another node; nothing of the half file remains."""
    assert 0 == story.second.code, story.second.output
    assert "Trying to restart job" in story.second.output
    assert [] == list(story.work.results.rglob("*.tmp"))


def test_the_table_is_that_of_local_runs(story: Story) -> None:
    """Bit for bit, after both runs."""
    assert story.vectors_of_local_runs == story.vectors


def test_no_job_is_given_a_secret(story: Story) -> None:
    """Neither PG_DSN nor PGPASSWORD is in a log, a script, SLURM's spool or a job's environment."""
    assert set() == story.secret_in


def test_another_run_has_nothing_to_do(story: Story) -> None:
    """It says so and submits nothing."""
    assert 0 == story.third.code, story.third.output
    assert [] == story.third.rules
    assert "has been submitted" not in story.third.output
    assert "Nothing to be done" in story.third.output
