"""Vectors that stand for nothing any more: which they are, and who may delete them, and how."""

import argparse
import os
import shlex
import threading
from collections.abc import Callable
from typing import Any

import pytest
from conftest import T0, Database, Workspace, waits_for_a_lock

from pipeline.database import connection as connections
from pipeline.database import obsolete, registry
from pipeline.database.registry import MadeBy
from pipeline.stage.errors import DatabaseError, SettingsError
from pipeline.stage.settings import Environment, Identity
from pipeline.workflow import retire

EDITS = [f"2026-01-0{day} 00:00:00.000001+00" for day in range(1, 10)]
KEY = Identity("s", "m", "")
OTHER = Identity("s", "m", "p")
REGISTRY = "ml.img_vec512_v1_encoders"
MADE_BY = MadeBy({"weights": "w"}, {"topk": 5})

Row = tuple[int, str, str]


class Retire:
    """The command on one database; vectors have three dimensions."""

    def __init__(self, database: Database, capsys: pytest.CaptureFixture[str]) -> None:
        self.database = database
        self.capsys = capsys

    def __call__(self, words: str) -> list[str]:
        """Run it; returns what it printed."""
        parser = argparse.ArgumentParser()
        retire.add_flags(parser)
        retire.main(parser.parse_args(shlex.split(words)))
        return self.capsys.readouterr().out.splitlines()

    def vector(self, listing: int, edited: str = EDITS[0], key: Identity = KEY) -> None:
        self.database.execute(
            "INSERT INTO ml.img_vec512_v1 VALUES"
            " ($1, $2::text::timestamptz, $3, $4, $5, '[1,0,0]', 1)",
            listing, edited, *key,
        )  # fmt: skip

    def register(self, key: Identity) -> None:
        with connections.connect() as connection:
            with connection.cursor() as cursor:
                registry.claim(cursor, Environment.read({}), key, MADE_BY)
            connection.commit()

    def rows(self) -> list[Row]:
        """(listing_id, edited_date, pca_rev) of what is in the target."""
        return [(i, d, p) for i, d, p in self.database.vectors("listing_id, edited_date, pca_rev")]

    def keys(self) -> list[tuple[Any, ...]]:
        return self.database.execute(
            f"SELECT source, model_rev, pca_rev FROM {REGISTRY} ORDER BY 3"
        )


@pytest.fixture
def command(
    database: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Retire:
    database.execute("ALTER TABLE ml.img_vec512_v1 ALTER vec TYPE vector(3)")
    monkeypatch.setenv("PG_DSN", database.dsn)
    return Retire(database, capsys)


def market(command: Retire) -> None:
    """Listings 1 to 7, each with another fate, and their vectors under two keys."""
    add = command.database.add_listing
    add(1, edited_date=EDITS[3])
    add(2, edited_date=EDITS[0], spam="spam")
    add(3, edited_date=EDITS[0], spam="")
    add(4, edited_date=EDITS[0], spam="spam")
    add(4, edited_date=EDITS[1], generation=2)
    add(6, edited_date=EDITS[1])
    add(6, edited_date=EDITS[0], generation=2)
    add(7, edited_date=None, url=None)
    for listing, edits in ((1, 3), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2), (7, 1)):
        for edited in EDITS[:edits]:
            command.vector(listing, edited)
    command.vector(1, EDITS[0], OTHER)
    command.vector(5, EDITS[0], OTHER)


# name: (the flags, the rows that go)
RETIRED: dict[str, tuple[str, list[Row]]] = {
    # 2 and 3 are spam, 5 is deleted; 4 has a row that is no spam, 7 cannot be eligible yet
    "gone": (
        "--gone",
        [(2, EDITS[0], ""), (3, EDITS[0], ""), (5, EDITS[0], ""), (5, EDITS[0], "p"),
         (5, EDITS[1], "")],
    ),
    # the newest with a vector stays, 1's under each key; so does 6's elder, a generation's own
    "superseded": (
        "--superseded",
        [(1, EDITS[0], ""), (1, EDITS[1], ""), (4, EDITS[0], ""), (5, EDITS[0], "")],
    ),
    "superseded, two kept": ("--superseded --keep 2", [(1, EDITS[0], "")]),
    "superseded, three kept": ("--superseded --keep 3", []),
    "both": (
        "--gone --superseded",
        [(1, EDITS[0], ""), (1, EDITS[1], ""), (2, EDITS[0], ""), (3, EDITS[0], ""),
         (4, EDITS[0], ""), (5, EDITS[0], ""), (5, EDITS[0], "p"), (5, EDITS[1], "")],
    ),
    "key": ("--key s m p", [(1, EDITS[0], "p"), (5, EDITS[0], "p")]),
}  # fmt: skip


@pytest.mark.parametrize("what", RETIRED)
def test_what_stands_for_nothing_is_deleted(command: Retire, what: str) -> None:
    """With --yes exactly these rows go; without it they are counted and nothing goes."""
    words, expected = RETIRED[what]
    market(command)
    before = command.rows()
    counted = command(words)
    untouched = command.rows()
    deleted = command(f"{words} --yes")
    after = command.rows()

    assert before == untouched
    assert counted[0].startswith(f'{len(expected)} vectors in "ml"."img_vec512_v1": ')
    assert (
        f"nothing was deleted; to delete them: python -m pipeline retire {words} --yes"
        == (counted[1])
    )
    assert counted[0] == deleted[0]
    assert f"{len(expected)} deleted" == deleted[1]
    assert sorted(expected) == sorted(set(before) - set(after))
    assert set() == set(after) - set(before)


def test_each_reason_is_counted(command: Retire) -> None:
    """A vector may have both reasons; it is one vector."""
    market(command)

    assert (
        '8 vectors in "ml"."img_vec512_v1": 5 gone, 4 superseded'
        == (command("--gone --superseded")[0])
    )


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_rows_go_in_batches(command: Retire, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No transaction deletes more than a batch, and all of them together delete all."""
    command.database.add_listing(1)
    for listing in range(1, 9):
        command.vector(listing)
    sizes: list[int] = []
    delete: Callable[..., int] = obsolete.delete

    def counting(*words: Any) -> int:
        sizes.append(delete(*words))
        return sizes[-1]

    monkeypatch.setattr(retire, "BATCH_ROWS", size)
    monkeypatch.setattr(obsolete, "delete", counting)
    command("--gone --yes")

    assert [(1, EDITS[0], "")] == command.rows()
    assert 7 == sum(sizes)
    assert min(size, 7) == max(sizes)


def test_what_was_deleted_before_a_stop_stays_deleted(
    command: Retire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch is committed by itself: after an end in the middle the next run does the rest."""
    command.database.add_listing(1)
    for listing in range(2, 6):
        command.vector(listing)
    delete = obsolete.delete
    left = iter([True])

    def one(*words: Any) -> int:
        if not next(left, False):
            raise KeyboardInterrupt
        return delete(*words)

    monkeypatch.setattr(retire, "BATCH_ROWS", 3)
    monkeypatch.setattr(obsolete, "delete", one)
    with pytest.raises(KeyboardInterrupt):
        command("--gone --yes")
    stopped = len(command.rows())
    monkeypatch.setattr(obsolete, "delete", delete)
    command("--gone --yes")

    assert 1 == stopped
    assert [] == command.rows()


def test_an_infinite_date_is_deleted_like_any_other(command: Retire) -> None:
    """Any date that the column can hold comes through, also one that Python cannot hold."""
    command.database.add_listing(1)
    for edited in ("infinity", "-infinity", "10000-01-01 00:00:00+00"):
        command.vector(2, edited)
    command("--gone --yes")

    assert [] == command.rows()


def test_nothing_that_is_retired_comes_back(workspace: Workspace) -> None:
    """A real run after it finds nothing to do: what went is no longer asked for."""
    database, workspace.knows_photos = workspace.database, True
    for listing in (1, 2, 3):
        database.add_listing(listing, [workspace.photo(f"{listing}.jpg", size=(40, 30 + listing))])
    database.add_listing(3, [workspace.photo("4.jpg")], generation=2, edited_date=EDITS[8])
    workspace.run()
    database.edit(1, EDITS[5])
    database.execute(
        "INSERT INTO ml.img_vec512_v1 SELECT 1, $1::text::timestamptz, source, model_rev, pca_rev,"
        " vec, 1 FROM ml.img_vec512_v1 WHERE listing_id = 1",
        EDITS[5],
    )
    database.execute('DELETE FROM "iPhone".iphone_listings WHERE listing_id = 2')
    before = [row[:2] for row in database.vectors()]
    done = workspace.python("-m", "pipeline", "retire", "--gone", "--superseded", "--yes")
    again = workspace.run()

    assert [(1, T0), (1, EDITS[5]), (2, T0), (3, T0), (3, EDITS[8])] == before
    assert (0, True) == (done.code, "2 deleted" in done.output)
    assert [(1, EDITS[5]), (3, T0), (3, EDITS[8])] == [row[:2] for row in database.vectors()]
    assert [] == again.rules


def test_a_key_goes_with_what_is_registered(command: Retire) -> None:
    """All of its rows and its line in the registry, and nothing of another key."""
    for key in (KEY, OTHER):
        command.register(key)
        command.vector(1, EDITS[0], key)
    command.vector(2)
    said = command("--key s m '' --yes")

    assert [
        "2 vectors in \"ml\".\"img_vec512_v1\": 2 of the key ('s', 'm', '')",
        "2 deleted",
    ] == said
    assert [(1, EDITS[0], "p")] == command.rows()
    assert [OTHER] == command.keys()


def test_a_key_that_is_registered_alone_goes_too(command: Retire) -> None:
    """A key whose rows have gone before is forgotten, so that another encoder may have it."""
    command.register(KEY)
    command("--key s m '' --yes")

    assert [] == command.keys()


def test_a_key_without_a_registry_goes(command: Retire) -> None:
    """A table from before the registry has keys too."""
    command.database.execute(f"DROP TABLE {REGISTRY}")
    command.vector(1)
    command("--key s m '' --yes")

    assert [] == command.rows()


def test_a_key_that_is_loaded_meanwhile_stays_registered(
    command: Retire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for a load that holds the key; what that has put there is no one's without it."""
    command.register(KEY)
    command.vector(1)
    refused: list[str] = []

    def deleting() -> None:
        try:
            command("--key s m '' --yes")
        except DatabaseError as error:
            refused.append(str(error))

    with connections.connect() as load:
        with load.cursor() as cursor:
            registry.claim(cursor, Environment.read({}), KEY, MADE_BY)
            cursor.execute(
                "INSERT INTO ml.img_vec512_v1 VALUES (2, now(), 's', 'm', '', '[1,0,0]', 1)"
            )
        thread = threading.Thread(target=deleting)
        thread.start()
        while thread.is_alive() and not waits_for_a_lock(command.database):
            thread.join(0.01)
        waited = thread.is_alive()
        load.commit()
    thread.join(60)

    assert waited
    assert ["expected a key that nobody loads, found 1 rows that a load has put there meanwhile"
            ' ("ml"."img_vec512_v1"); hint: run it again'] == refused  # fmt: skip
    assert [2] == [row[0] for row in command.rows()]
    assert [KEY] == command.keys()


def test_a_key_that_is_not_there_is_one_line(command: Retire) -> None:
    """A slip of the pen deletes nothing, and the keys that there are are named."""
    command.register(KEY)
    command.vector(1)
    with pytest.raises(DatabaseError) as error:
        command("--key S m '' --yes")

    assert (
        "expected the key ('S', 'm', ''), found no row of it (\"ml\".\"img_vec512_v1\");"
        " hint: registered are: s m ''"
    ) == str(error.value)
    assert [1] == [row[0] for row in command.rows()]


@pytest.mark.parametrize("sql", ["", "UPDATE \"iPhone\".iphone_listings SET spam = 'no'"])
def test_a_market_where_all_is_gone_is_no_reason_to_delete_all(command: Retire, sql: str) -> None:
    """An empty listings table, or one of nothing but spam, is a mistake of another kind."""
    if sql:
        command.database.add_listing(1)
        command.database.execute(sql)
    command.vector(1)
    with pytest.raises(DatabaseError, match="found none, so that every vector would be deleted"):
        command("--gone --yes")

    assert [1] == [row[0] for row in command.rows()]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "expected --gone, --superseded or --key SOURCE MODEL_REV PCA_REV, found none"),
        ("--yes", "expected --gone, --superseded or --key SOURCE MODEL_REV PCA_REV, found none"),
        ("--key s m p --gone", "expected --key alone, found another beside it"),
        ("--key s m p --superseded", "expected --key alone, found another beside it"),
        ("--gone --keep 2", "expected --keep N, 1 at least, with --superseded, found --keep 2"),
        ("--superseded --keep 0", "expected --keep N, 1 at least, with --superseded, found"),
        ("--superseded --keep -1", "expected --keep N, 1 at least, with --superseded, found"),
    ],
)
def test_flags_that_do_not_agree_are_one_line(command: Retire, words: str, message: str) -> None:
    """What is to be deleted must be said, and said once."""
    command.vector(1)
    with pytest.raises(SettingsError) as error:
        command(words)

    assert str(error.value).startswith(message)
    assert [1] == [row[0] for row in command.rows()]


@pytest.mark.parametrize("words", ["--gone", "--superseded", "--key s m ''"])
def test_only_the_owner_deletes(
    command: Retire, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A role that may read can count; to delete it is told whose right it takes."""
    market(command)
    before = command.rows()
    role = f"reader_{os.getpid()}"
    command.database.execute(f'CREATE ROLE "{role}" LOGIN')
    try:
        for schema in ("ml", '"iPhone"'):
            command.database.execute(f'GRANT USAGE ON SCHEMA {schema} TO "{role}"')
        for table in ("ml.img_vec512_v1", '"iPhone".iphone_listings'):
            command.database.execute(f'GRANT SELECT ON {table} TO "{role}"')
        monkeypatch.setenv("PG_DSN", command.database.dsn.replace("postgres@", f"{role}@", 1))
        counted = command(words)
        with pytest.raises(DatabaseError) as error:
            command(f"{words} --yes")
        rights = f'GRANT SELECT, DELETE ON ml.img_vec512_v1, {REGISTRY} TO "{role}"'
        command.database.execute(rights)
        command(f"{words} --yes")
    finally:
        command.database.execute(f'DROP OWNED BY "{role}"')
        command.database.execute(f'DROP ROLE "{role}"')

    assert " vectors in " in counted[0]
    assert (
        f'expected a role that may delete, found {role} ("ml"."img_vec512_v1");'
        " hint: run it as the owner, postgres"
    ) == str(error.value)
    assert len(before) > len(command.rows())


def test_a_table_that_stays_locked_is_one_line(command: Retire) -> None:
    """A row that another session holds is waited for no longer than lock_timeout_s."""
    command.database.add_listing(1)
    command.vector(2)
    with connections.connect() as other, other.cursor() as cursor:
        cursor.execute("UPDATE ml.img_vec512_v1 SET n_images = 2")
        with pytest.raises(DatabaseError, match="expected a lock on the table within"):
            command("--gone --yes --lock-timeout-s 1")

    assert [2] == [row[0] for row in command.rows()]
