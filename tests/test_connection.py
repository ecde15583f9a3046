"""What the database's errors mean: lost, disturbed, full, or a fault; in one line each."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import Database

from demo import postgres
from pipeline.database.connection import connect, fetch, retrying, translated_errors
from pipeline.export import _stream
from pipeline.stage.errors import DatabaseBusy, DatabaseError, DatabaseUnreachable

MANY_ROWS = "SELECT i, repeat('x', 1000) AS x FROM generate_series(1, 1000000) i"


@pytest.fixture
def dsn(empty_database: Database, monkeypatch: pytest.MonkeyPatch) -> str:
    """PG_DSN of this process."""
    monkeypatch.setenv("PG_DSN", empty_database.dsn)
    return empty_database.dsn


def end(database: Database) -> None:
    """End the job's connections, as an administrator does."""
    database.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'listing-vectors' AND datname = current_database()"
        " AND pid <> pg_backend_pid()"
    )


def amid_a_stream(database: Database) -> None:
    with connect() as link:
        batches = _stream(link, MANY_ROWS)
        next(batches)
        end(database)
        for _ in batches:
            pass


def amid_a_statement(database: Database) -> None:
    with connect() as link, link.cursor() as cursor:
        pid = fetch(cursor, "SELECT pg_backend_pid()")[0][0]
        fetch(cursor, "SELECT pg_terminate_backend($1::int)", (pid,))


def before_a_statement(database: Database) -> None:
    with connect() as link, link.cursor() as cursor:
        end(database)
        fetch(cursor, "SELECT 1")
        fetch(cursor, "SELECT 1")


def before_the_commit(database: Database) -> None:
    with connect() as link:
        end(database)
        with translated_errors():
            link.commit()


def amid_a_copy(database: Database) -> None:
    def batches() -> Any:
        for number in range(200):
            if number == 20:
                end(database)
            yield pa.record_batch([pa.array(range(10_000))], ["i"])

    reader = pa.RecordBatchReader.from_batches(pa.schema([("i", pa.int64())]), batches())
    with connect() as link, translated_errors(), link.cursor() as cursor:
        cursor.execute("CREATE TEMPORARY TABLE s (i bigint)")
        cursor.adbc_ingest("s", reader, mode="append", temporary=True)


@pytest.mark.parametrize(
    "moment",
    [amid_a_stream, amid_a_statement, before_a_statement, before_the_commit, amid_a_copy],
)
def test_a_connection_that_is_cut_is_lost(
    dsn: str, empty_database: Database, moment: Callable[[Database], None]
) -> None:
    """Whenever the server ends the session, with a code or without, the same may work again."""
    with pytest.raises(DatabaseUnreachable, match="expected an answer from the database, found"):
        moment(empty_database)


def test_a_server_that_dies_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is killed while rows stream in leaves nothing but libpq's words."""
    monkeypatch.setattr(postgres, "STOP_S", 1)  # it may still be recovering
    with postgres.embedded_postgres(tmp_path / "postgres"):
        monkeypatch.setenv("PG_DSN", postgres.create_database(tmp_path / "postgres", "dies"))
        with connect() as link, link.cursor() as cursor:
            pid = fetch(cursor, "SELECT pg_backend_pid()")[0][0]
            batches = _stream(link, MANY_ROWS)
            next(batches)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(DatabaseUnreachable, match="server closed the connection"):
                list(batches)


def raised(state: str, message: str = "words of the server") -> type[DatabaseError]:
    """The kind of error that a statement of this SQLSTATE ends with; its line is one."""
    with connect() as link, link.cursor() as cursor, pytest.raises(DatabaseError) as error:
        fetch(cursor, f"DO $$ BEGIN RAISE '{message}' USING ERRCODE = '{state}'; END $$")
    assert f"found {message}" in str(error.value)
    assert "\n" not in str(error.value)
    return error.type


def test_only_a_lost_connection_is_unreachable(dsn: str) -> None:
    """By the server's codes: lost, disturbed by another, or neither."""
    lost = ["08000", "08003", "08006", "57P01", "57P02", "57P03"]
    disturbed = ["40001", "40P01"]
    neither = [
        "08P01", "40002", "42501", "53000", "53100", "53200", "53300", "53400", "57014", "57P04",
        "58030", "XX000", "P0001",
    ]  # fmt: skip

    assert [DatabaseUnreachable] * 6 == [raised(state) for state in lost]
    assert [DatabaseBusy] * 2 == [raised(state) for state in disturbed]
    assert [DatabaseError] * 13 == [raised(state) for state in neither]


def test_a_full_disk_is_the_servers(dsn: str) -> None:
    """It says whose disk is full, and what to do."""
    with connect() as link, link.cursor() as cursor, pytest.raises(DatabaseError) as error:
        fetch(
            cursor,
            "DO $$ BEGIN RAISE 'could not extend file \"base/1\": No space left on device'"
            " USING ERRCODE = '53100', HINT = 'Check free disk space.'; END $$",
        )

    assert (
        "expected free disk space on the database's server, which is not this machine's, found"
        ' could not extend file "base/1": No space left on device; hint: make room there, then run'
        " it again: nothing that was encoded is lost"
    ) == str(error.value)


def test_a_full_disk_amid_a_stream_is_known_by_its_words(dsn: str) -> None:
    """Rows that were on their way have no code for the driver to give."""
    full = (
        "CREATE FUNCTION pg_temp.full_at(n int) RETURNS int LANGUAGE plpgsql AS $$ BEGIN"
        " IF n = 100000 THEN RAISE 'could not write to file: No space left on device'"
        " USING ERRCODE = '53100'; END IF; RETURN n; END $$"
    )
    with connect() as link, link.cursor() as cursor:
        cursor.execute(full)
        batches = _stream(link, f"SELECT pg_temp.full_at(i::int), x FROM ({MANY_ROWS}) rows")
        next(batches)
        with pytest.raises(
            DatabaseError, match="expected free disk space on the database"
        ) as error:
            list(batches)

    assert DatabaseError is error.type


def wrong_column(cursor: Any) -> None:
    cursor.adbc_ingest("t", pa.record_batch([pa.array([1])], ["j"]), mode="append", temporary=True)


def no_type(cursor: Any) -> None:
    cursor.adbc_ingest("t", pa.table({"i": [{"a": 1}]}), mode="append", temporary=True)


def no_data(cursor: Any) -> None:
    cursor.execute("COPY t FROM STDIN")


@pytest.mark.parametrize("fault", [wrong_column, no_type, no_data])
def test_the_drivers_own_errors_are_no_lost_connection(
    dsn: str, fault: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    """An error without a code is tried once, and no one goes on as if there were no database."""
    tries: list[None] = []

    def action() -> None:
        tries.append(None)
        with connect() as link, translated_errors("staging table"), link.cursor() as cursor:
            cursor.execute("CREATE TEMPORARY TABLE t (i int)")
            fault(cursor)

    with pytest.raises(DatabaseError, match=r"\(staging table\)") as error:
        retrying(action)

    assert (DatabaseError, 1) == (error.type, len(tries))
    assert "\n" not in str(error.value)


def test_a_disturbed_transaction_is_tried_again(
    dsn: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A real serialization failure is retried at once, and then goes through."""
    monkeypatch.setattr("pipeline.database.connection.time.sleep", lambda seconds: None)
    with connect() as link, link.cursor() as cursor:
        cursor.execute("CREATE TABLE counted (n int)")
        cursor.execute("INSERT INTO counted VALUES (0)")
        link.commit()
    others = iter([1, 0])

    def count() -> None:
        with connect(repeatable=True) as link, link.cursor() as cursor:
            fetch(cursor, "SELECT n FROM counted")
            if next(others):
                with connect() as other, other.cursor() as quicker:
                    quicker.execute("UPDATE counted SET n = n + 1")
                    other.commit()
            fetch(cursor, "UPDATE counted SET n = n + 1 RETURNING n")
            link.commit()

    retrying(count)
    with connect() as link, link.cursor() as cursor:
        assert [(2,)] == fetch(cursor, "SELECT n FROM counted")
    assert 1 == len(re.findall("could not serialize access .* attempt 1 of 4", caplog.text))


def test_errors_of_files_stay_what_they_are() -> None:
    """A file that cannot be read while rows are sent is no fault of the database."""
    with pytest.raises(OSError, match="Stale file handle"), translated_errors():
        raise OSError(116, "Stale file handle")
    with pytest.raises(pa.ArrowInvalid, match="no Parquet"), translated_errors():
        raise pa.ArrowInvalid("no Parquet")


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited, without the wait."""
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


class Failing:
    """An action that fails some times before it succeeds."""

    def __init__(self, times: int, error: DatabaseError) -> None:
        self.times, self.error = times, error
        self.tried = 0

    def __call__(self) -> str:
        self.tried += 1
        if self.tried <= self.times:
            raise self.error
        return "done"


UNREACHABLE = DatabaseUnreachable("an answer", "none")


@pytest.mark.parametrize(("times", "seconds"), [(0, []), (1, [1]), (2, [1, 2]), (3, [1, 2, 4])])
def test_a_fault_of_the_moment_is_tried_again(
    times: int, seconds: list[float], waited: list[float]
) -> None:
    """Up to four times, each wait twice as long as the one before; then it is done."""
    action = Failing(times, UNREACHABLE)

    assert "done" == retrying(action)
    assert seconds == waited
    assert times + 1 == action.tried


def test_a_lasting_fault_comes_out(waited: list[float]) -> None:
    """The fourth failure is the caller's, as the first is that no retry can help."""
    lasting, final = Failing(9, UNREACHABLE), Failing(9, DatabaseError("a table", "none"))
    with pytest.raises(DatabaseUnreachable):
        retrying(lasting)
    with pytest.raises(DatabaseError, match="expected a table"):
        retrying(final)

    assert [1, 2, 4] == waited
    assert (4, 1) == (lasting.tried, final.tried)


def test_a_socket_that_may_not_be_opened_is_no_fault_of_the_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who runs the job as another user is told which right is missing, not to encode the URL."""
    monkeypatch.setenv("PG_DSN", f"postgresql:///shop?host={tmp_path}")
    with pytest.raises(DatabaseError, match="found nothing that answers"), connect():
        pass
    tmp_path.chmod(0)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root may open everything
    try:
        with pytest.raises(DatabaseError, match="found a socket that this user"), connect():
            pass
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o700)
