"""HNSW on the vectors of a key: built, replaced, measured, and used by a search."""

import argparse
import contextlib
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import adbc_driver_postgresql.dbapi as adbc
import numpy as np
import pytest
from conftest import REPOSITORY, Database, Workspace, create_tables, new_database, new_environment
from pgvector import Vector

from pipeline import index
from pipeline.__main__ import main as command_line
from pipeline.database import hnsw
from pipeline.database.connection import connect, fetch
from pipeline.database.neighbours import Neighbour, Neighbourhood
from pipeline.index import MB, Machine, Resources, resources
from pipeline.load import warn_of_an_index
from pipeline.stage.errors import PipelineError
from pipeline.stage.settings import Environment, Identity, Settings

KEY, OTHER = Identity("it's", "m\\1", ""), Identity("other", "m\\1", "")
TABLE = "ml.img_vec512_v1"
DIM = 8
NAME = hnsw.name_of(Environment.read({}), KEY)


class Market(Database):
    """A database of small vectors, and the command on it."""

    environment = Environment.read({})

    def fill(self, rows: int, identity: Identity = KEY) -> None:
        """Listings from 0 on, with random unit vectors."""
        draw = np.random.default_rng(0).standard_normal((rows, DIM))
        self.put(range(rows), draw / np.linalg.norm(draw, axis=1, keepdims=True), identity)

    def put(self, listings: Iterable[int], vectors: Any, identity: Identity = KEY) -> None:
        """Live listings with these vectors."""
        rows = json.dumps(
            [{"id": i, "vec": Vector(v).to_text()} for i, v in zip(listings, vectors, strict=True)]
        )
        given = "jsonb_to_recordset($1::text::jsonb) AS r(id bigint, vec text)"
        self.execute(
            "INSERT INTO \"iPhone\".iphone_listings SELECT 1, id, '2026-01-01Z', 'u'"
            f" FROM {given} ON CONFLICT DO NOTHING",
            rows,
        )
        self.execute(
            f"INSERT INTO {TABLE} SELECT id, '2026-01-01Z', $2, $3, $4, vec::vector, 1"
            f" FROM {given}",
            rows, *identity,
        )  # fmt: skip

    def index(self, *flags: str, identity: Identity = KEY) -> dict[str, Any]:
        """The report."""
        parser = argparse.ArgumentParser()
        index.add_flags(parser)
        args = parser.parse_args(flags)
        return index.index(args, Settings(lock_timeout_s=2), self.environment, identity)

    def refused(self, *flags: str) -> str:
        """The line that says why there is none."""
        with pytest.raises(PipelineError) as refusal:
            self.index(*flags)
        return str(refusal.value)

    def indexes(self) -> dict[str, bool]:
        """Of each HNSW index, whether it is valid."""
        return dict(
            self.execute(
                "SELECT c.relname::text, i.indisvalid FROM pg_index i"
                " JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am a ON a.oid = c.relam"
                " WHERE a.amname = 'hnsw' ORDER BY 1"
            )
        )

    def use_indexes(self) -> None:
        """Rule out sorting from now on, as it is on a large table."""
        name = self.execute("SELECT quote_ident(current_database())")[0][0]
        self.execute(f"ALTER DATABASE {name} SET enable_sort = off")

    def definition(self, name: str = NAME) -> str:
        return str(self.execute(f"SELECT pg_get_indexdef('ml.\"{name}\"'::regclass)")[0][0])

    def oid(self, name: str = NAME) -> int:
        return int(self.execute(f"SELECT 'ml.\"{name}\"'::regclass::oid::bigint")[0][0])


@pytest.fixture
def market(server: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Market]:
    """Forty listings under one key."""
    with new_database(server) as database:
        create_tables(database, DIM)
        monkeypatch.setenv("PG_DSN", database.dsn)
        made = Market(database.dsn)
        made.fill(40)
        yield made


def test_the_index_is_on_the_key_alone(market: Market) -> None:
    """Its name follows from the key, whose values are quoted, and a comment says what it is for."""
    market.fill(7, OTHER)
    report = market.index()
    entries = market.execute(f"SELECT reltuples::int FROM pg_class WHERE relname = '{NAME}'")
    comment = market.execute(f"SELECT obj_description('ml.\"{NAME}\"'::regclass)")

    assert {NAME: True} == market.indexes()
    assert "USING hnsw (vec vector_ip_ops) WITH (m='16', ef_construction='64')" in (
        market.definition()
    )
    assert r"WHERE ((source = 'it''s'::text) AND (model_rev = 'm\1'::text) AND" in (
        market.definition()
    )
    assert [(40,)] == entries
    assert [("python -m pipeline index: the neighbours of it's · m\\1 · ''",)] == comment
    assert 40 == report["build"]["rows"]
    assert NAME == report["index"]


def test_names_are_within_postgres_limit_and_differ_by_key() -> None:
    """Also for a table whose name is as long as names may be, and for keys that run together."""
    environment = Environment.read({"VECTORS_TABLE": "v" * 63})
    names = {
        hnsw.new_name_of(environment, Identity(*key)) for key in (("ab", "c", ""), ("a", "bc", ""))
    }

    assert [63, 63] == [len(name) for name in names]


def test_again_there_is_nothing_to_build(market: Market) -> None:
    """The same index stays, and so does one that was built otherwise when no flag asks for more."""
    market.index("--m", "8", "--halfvec")
    before = market.oid()
    reports = [market.index(), market.index("--m", "8")]

    assert [None, None] == [report["build"] for report in reports]
    assert [8, True] == [reports[0]["m"], reports[0]["halfvec"]]
    assert before == market.oid()


@pytest.mark.parametrize("flag", ["--m=4", "--ef-construction=100", "--halfvec"])
def test_another_definition_replaces_it_when_it_is_whole(market: Market, flag: str) -> None:
    """Built under another name, so that searches are never without; then it gets the name."""
    market.index()
    before = market.oid()
    report = market.index(flag)

    assert {NAME: True} == market.indexes()
    assert before != market.oid()
    assert report["build"]["rows"] == 40


def invalidated(market: Market, name: str) -> None:
    """As a build that was killed leaves it."""
    market.execute(
        f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'ml.\"{name}\"'::regclass"
    )


def test_what_a_killed_build_left_is_replaced(market: Market) -> None:
    """An index that is not valid helps nobody and costs each insert."""
    market.index()
    before = market.oid()
    invalidated(market, NAME)
    report = market.index()

    assert {NAME: True} == market.indexes()
    assert before != market.oid()
    assert report["build"] is not None


def test_a_replacement_that_was_cut_off_leaves_the_old_one(market: Market) -> None:
    """It goes, and what was there is as it was."""
    market.index()
    before = market.oid()
    market.execute(f'CREATE INDEX "{NAME}_new" ON {TABLE} USING hnsw (vec vector_ip_ops)')
    invalidated(market, f"{NAME}_new")
    report = market.index()

    assert {NAME: True} == market.indexes()
    assert (before, None) == (market.oid(), report["build"])


@pytest.mark.parametrize("dropped", [False, True])
def test_a_replacement_that_is_whole_takes_its_place(market: Market, dropped: bool) -> None:
    """One that was cut off between its build and its name is not built a second time."""
    market.index("--m", "4")
    market.execute(f'ALTER INDEX ml."{NAME}" RENAME TO "{NAME}_new"')
    whole = market.oid(f"{NAME}_new")
    if not dropped:
        market.execute(f'CREATE INDEX "{NAME}" ON {TABLE} USING hnsw (vec vector_ip_ops)')
    report = market.index("--m", "4")

    assert {NAME: True} == market.indexes()
    assert (whole, None) == (market.oid(), report["build"])


@contextlib.contextmanager
def open_transaction(market: Market) -> Iterator[None]:
    """One that has written to the table: a build waits for its end."""
    with adbc.connect(market.dsn) as connection, connection.cursor() as cursor:
        cursor.execute(f"UPDATE {TABLE} SET n_images = 2 WHERE listing_id = 1")
        yield


def until(condition: Callable[[], Any]) -> Any:
    """What the condition gives once it gives something; a failure after 30 s."""
    for _ in range(300):
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not come to that")


def builds(market: Market) -> list[tuple[Any, ...]]:
    """The builds that are running."""
    return market.execute(
        "SELECT p.pid, phase FROM pg_stat_progress_create_index p"
        f" WHERE relid = '{TABLE}'::regclass AND phase LIKE 'waiting%'"
    )


def test_a_build_of_another_session_is_not_disturbed(
    market: Market, caplog: pytest.LogCaptureFixture
) -> None:
    """A line names the session; its index, which is not valid yet, is not taken for a leftover."""
    caplog.set_level(logging.INFO, "pipeline")
    with open_transaction(market):
        other = threading.Thread(target=market.index)
        other.start()
        pid = until(lambda: builds(market))[0][0]
        line = market.refused()
        until(lambda: "waiting for writers before build" in caplog.text)  # how far it is
    other.join(30)

    assert line.startswith("expected a table on which no index is being built, found session")
    assert str(pid) in line
    assert {NAME: True} == market.indexes()


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_a_build_ends_with_its_command(
    market: Market, signum: int, code: int, tmp_path: Path
) -> None:
    """Ctrl-C, a signal or a kill: the server stops, and the next call replaces what it left."""
    words = ["--source", KEY.source, "--model-rev", KEY.model_rev]
    with open_transaction(market):
        started = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "index", *words],
            cwd=tmp_path, env=new_environment(market.dsn), text=True, stderr=subprocess.PIPE,
        )  # fmt: skip
        until(lambda: builds(market))
        started.send_signal(signum)
        said = started.communicate(timeout=30)[1]
        until(lambda: not builds(market))
        left = market.indexes()
    report = market.index()

    assert code == started.returncode
    assert ("; hint: Ctrl-C, an administrator" in said) == (signum == signal.SIGINT)
    assert "Traceback" not in said
    assert {NAME: False} == left
    assert {NAME: True} == market.indexes()
    assert report["build"]


def test_the_command_says_what_was_bought(
    market: Market, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table for people, one line of JSON for programs."""
    words = ["pipeline", "index", "--source", KEY.source, "--model-rev", KEY.model_rev]
    said = []
    for more in ([], ["--json"]):
        monkeypatch.setattr("sys.argv", [*words, *more])
        command_line()
        said.append(capsys.readouterr().out.splitlines())
    people, (program,) = said
    report = json.loads(program)

    assert people[0].startswith(f'{NAME} on "ml"."img_vec512_v1": vector, m 16, ')
    assert [["exact"], ["ef_search", "40"], ["ef_search", "100"], ["ef_search", "200"]] == [
        line[:17].split() for line in people[2:6]
    ]
    assert (NAME, None, KEY.source) == (report["index"], report["build"], report["source"])


def test_an_old_pgvector_is_refused(market: Market) -> None:
    """Its indexes lose rows: nothing is built."""
    market.execute("UPDATE pg_extension SET extversion = '0.8.3' WHERE extname = 'vector'")

    assert (
        "expected a pgvector with sound indexes, found 0.8.3, whose indexes have faults that 0.8.4"
        " mends; hint: update the package on the server, then ALTER EXTENSION vector UPDATE"
    ) == market.refused()
    assert {} == market.indexes()


def test_only_the_owner_may(market: Market, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job's role reads and writes; the line names who may do more."""
    market.execute("DROP ROLE IF EXISTS index_reader")
    market.execute("CREATE ROLE index_reader LOGIN")
    market.execute('GRANT USAGE ON SCHEMA ml, "iPhone" TO index_reader')
    for schema in ("ml", '"iPhone"'):
        market.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO index_reader")
    dsn = market.dsn.replace("postgres@", "index_reader@")
    monkeypatch.setenv("PG_DSN", dsn)

    assert (
        'expected a role that may make an index, found index_reader ("ml"."img_vec512_v1"); hint:'
        " run it as the owner, postgres"
    ) == market.refused()


REFUSED = {
    "no such key": (["--sample", "1"], "expected vectors of"),
    "m": (["--m", "1"], "expected --m from 2 to 100, found 1"),
    "ef_construction": (["--m", "40"], "expected --ef-construction, twice --m at least, found 64"),
    "memory": (["--maintenance-work-mem", "0"], "--maintenance-work-mem, 1 at least, found 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built_is_one_line(market: Market, case: str) -> None:
    """It says what was expected and found."""
    flags, expected = REFUSED[case]
    if case == "no such key":
        market.execute(f"DELETE FROM {TABLE}")

    assert expected in market.refused(*flags)
    assert {} == market.indexes()


def test_too_many_dimensions_are_a_matter_for_halves(market: Market) -> None:
    """An index takes 2,000 of vectors and 4,000 of halves of them."""
    market.execute(f"DELETE FROM {TABLE}")
    market.execute(f"ALTER TABLE {TABLE} ALTER vec TYPE vector(2001)")
    market.execute(f"ALTER TABLE {TABLE} ALTER vec SET STORAGE EXTERNAL")
    market.put([1], np.eye(2001)[:1])

    assert "found 2001" in market.refused() and "try --halfvec" in market.refused()
    assert market.index("--halfvec")["build"]


@pytest.mark.parametrize("flag", ["--no-halfvec", "--halfvec"])
def test_a_search_uses_it_and_finds_as_many_as_it_was_asked_for(market: Market, flag: str) -> None:
    """Through the view, also where most of the nearest are spam: the scan goes on behind them."""
    near = np.eye(DIM)[0] + np.random.default_rng(1).normal(0, 0.1, (1500, DIM))
    market.put(range(100, 1600), near / np.linalg.norm(near, axis=1, keepdims=True))
    market.index(flag, "--m", "4", "--ef-construction", "8")
    market.execute(
        "UPDATE \"iPhone\".iphone_listings SET spam = 'x' WHERE listing_id BETWEEN 100 AND 1580"
    )
    query = np.eye(DIM)[0].astype(np.float32)
    market.use_indexes()
    with connect() as connection, connection.cursor() as cursor:
        there = Neighbourhood(cursor, market.environment, KEY, None)
        plan = there.plan(query, 10)
        found = there.nearest(query, 10, but=1590)

    assert NAME in plan
    assert 10 == len({each.listing_id for each in found})
    assert all(each.listing_id > 1580 and each.listing_id != 1590 for each in found)
    assert sorted(found, key=lambda each: -each.cosine) == found


def test_the_query_of_the_readme_uses_it(market: Market) -> None:
    """It names the whole key, and orders by what the index is on."""
    page = (REPOSITORY / "README.md").read_text()
    query = page.split("ask for neighbours")[1].split("```sql\n")[1].split(";\n```")[0]
    named = Identity("listing_images_topk5_v1", "ViT-B-32/laion2b_s34b_b79k", "")
    market.fill(40, named)
    market.index(identity=named)
    market.use_indexes()
    with connect() as connection, connection.cursor() as cursor:
        plan = fetch(cursor, f"EXPLAIN (FORMAT JSON) {query} OFFSET $1", (0,))[0][0]

    assert hnsw.name_of(market.environment, named) in plan


def test_the_report_is_right_where_the_answer_is_known(market: Market) -> None:
    """All are found; the scan is exact, and the smallest ef_search that is good is proposed."""
    market.use_indexes()
    report = market.index("--sample", "15")

    assert 15 == report["sample"]
    assert [(40, 1.0, True), (100, 1.0, True), (200, 1.0, True)] == [
        (each["ef_search"], each["recall"], each["used"]) for each in report["measured"]
    ]
    assert 40 == report["proposed_ef_search"]
    assert report["exact_ms"] > 0 and report["bytes"] > 0
    assert json.loads(json.dumps(report)) == report


def test_recall_counts_neighbours_that_are_as_near(market: Market) -> None:
    """Of equals it is all the same which; one that is farther is none."""

    def near(*cosines: float) -> list[Neighbour]:
        return [Neighbour(n, None, cosine) for n, cosine in enumerate(cosines)]  # type: ignore[arg-type]

    assert 0.75 == index.recall([near(0.9, 0.8), near(0.7, 0.6)], [near(0.8, 0.8), near(0.7, 0.5)])
    assert index.recall([[], []], [[], []]) is None


def test_one_vector_has_no_neighbours(market: Market) -> None:
    """Nothing can be measured, and the table says so."""
    market.execute(f"DELETE FROM {TABLE} WHERE listing_id > 0")
    lines = list(index.table(market.index()))

    assert "too few vectors to measure a search" == lines[1]


def test_a_small_tables_index_is_said_to_be_unused(market: Market) -> None:
    """Where reading all is cheaper, Postgres does so, and the figures are of that."""
    report = market.index()
    lines = list(index.table(report))

    assert [False] * 3 == [each["used"] for each in report["measured"]]
    assert report["proposed_ef_search"] is None
    assert ["not used" in line for line in lines] == [False] * 3 + [True] * 3


GB = 1024 * MB


@pytest.mark.parametrize(
    ("local", "needed", "machine", "expected"),
    [
        (True, 8 * MB, Machine(8 * GB, 8 * GB, 4), Resources(64 * MB, 3)),
        (True, 800 * MB, Machine(8 * GB, 8 * GB, 4), Resources(900 * MB, 3)),
        (True, 8 * GB, Machine(8 * GB, 8 * GB, 64), Resources(2 * GB, 7)),
        (True, 800 * MB, Machine(8 * GB, 64 * MB, 4), Resources(900 * MB, 0)),
        (True, 800 * MB, Machine(8 * GB, 8 * GB, 1), Resources(900 * MB, 0)),
        (False, 80 * MB, Machine(8 * GB, 64 * MB, 1), Resources(90 * MB, 2)),
        (False, 800 * MB, Machine(64 * GB, 64 * GB, 64), Resources(128 * MB, 2)),
    ],
)  # fmt: skip
def test_a_build_takes_what_it_needs_of_what_is_free(
    local: bool, needed: int, machine: Machine, expected: Resources
) -> None:
    """A quarter here, and half of shared_buffers elsewhere; shared memory only where there is."""
    server = hnsw.Server(local, 256 * MB, 64 * MB, 2)

    assert expected == resources(server, needed, machine)


def test_without_shared_memory_one_process_builds(
    market: Market, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a container of a server elsewhere, whose limit is met only by trying."""
    monkeypatch.setattr(index, "resources", lambda *_: Resources(2**40, 2))
    market.execute(f"ALTER TABLE {TABLE} SET (parallel_workers = 2)")
    report = market.index()

    assert "one builds alone" in caplog.text
    assert 0 == report["build"]["workers"]
    assert {NAME: True} == market.indexes()


@pytest.mark.parametrize(
    ("rows", "flags", "identity", "warned"),
    [
        (11, ["--m=8"], KEY, True),
        (10, ["--m=8"], KEY, False),
        (11, ["--m=8"], OTHER, False),
        (11, None, KEY, False),
    ],
)
def test_a_load_into_an_index_warns_where_a_build_is_sooner(
    market: Market,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    rows: int,
    flags: list[str] | None,
    identity: Identity,
    warned: bool,
) -> None:
    """Of many rows for their key's index; one line, which says what to do."""
    monkeypatch.setattr(hnsw, "FEW", 0)
    monkeypatch.setattr(hnsw, "REBUILT_SOONER", 0.25)
    if flags is not None:
        market.index(*flags)
    with connect() as connection, connection.cursor() as cursor:
        warn_of_an_index(cursor, market.environment, identity, rows)

    assert warned == ("an HNSW index of about 40, which takes longer" in caplog.text)


def test_the_target_builds_it_after_the_load(finished: Workspace) -> None:
    """It is asked for by name, is not part of `all`, and with nothing new it is not run again."""
    nothing = finished.run()
    first, again = finished.run("index"), finished.run("index")
    report = json.loads((finished.results / "index" / "index.json").read_text())

    assert ([], ["index"], []) == (nothing.rules, first.rules, again.rules)
    assert 2 == report["build"]["rows"]
    assert "recall" in report["measured"][0]
    assert [(report["index"],)] == finished.database.execute(
        "SELECT relname::text FROM pg_class WHERE relname ~ 'hnsw' AND relkind = 'i'"
    )
