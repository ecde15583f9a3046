"""Typical mistakes of a first evening, made in a hurry: each is one line that mends it."""

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import (
    REPOSITORY,
    Workspace,
    create_tables,
    fork_of,
    new_database,
    new_workspace,
)

from pipeline import __main__ as commands
from pipeline.stage.errors import PipelineError

PASSWORD = "right-horse"  # what no line may hold
LISTINGS, IMAGES = '"iPhone".iphone_listings', '"iPhone".iphone_image_assets'
NO_CONFIG = "no config.yaml in this folder: "


@dataclass
class Mistake:
    """What is wrong in a marketplace that is sound otherwise, and the line that tells it.

    {dsn}, {host}, {database}, {folder}, {encoder} and its {size} stand for the marketplace's.
    """

    line: str
    sql: str = ""
    env: dict[str, str] = field(default_factory=dict)
    config: str = ""  # lines in config.yaml, after that of the model
    words: str = "check"
    folder: str = ""  # a shell command, run in the folder


HURRIED = f"postgresql://hurried:{PASSWORD}@/{{database}}?host={{host}}&port=5432"

MISTAKES = {
    "PG_DSN not exported": Mistake(
        "expected PG_DSN in the environment, found nothing; hint: export"
        " PG_DSN=postgresql://user@host/db; where no database is, PG_DSN=none",
        env={"PG_DSN": ""},
        words="snakemake",
    ),
    "SQLAlchemy's URL": Mistake(
        "expected PG_DSN: a URL that begins with postgresql://, found SQLAlchemy's form, which"
        " names a driver; hint: begin it with postgresql:// and leave the rest as it is",
        env={"PG_DSN": f"postgresql+psycopg2://hurried:{PASSWORD}@localhost/market"},
    ),
    "quotation marks from an env file": Mistake(
        "expected PG_DSN: a URL that begins with postgresql://, found one in quotation marks;"
        " hint: they are the shell's, no part of the value",
        env={"PG_DSN": '"{dsn}"'},
    ),
    "wrong port": Mistake(
        "expected a connection to PG_DSN, found nothing that answers; hint: is the server"
        " running, and are host and port right?",
        env={"PG_DSN": "postgresql://postgres@/{database}?host={host}&port=5433"},
    ),
    "wrong password": Mistake(
        "expected a connection to PG_DSN, found a server that refuses the login; hint: check"
        " user, password and pg_hba.conf",
        env={"PG_DSN": HURRIED.replace(PASSWORD, PASSWORD + "-not")},
    ),
    "database of another name": Mistake(
        "expected a connection to PG_DSN, found a server without that database; hint: check the"
        " name, after the last / of the URL; createdb makes one",
        env={"PG_DSN": "postgresql://postgres@/martket?host={host}&port=5432"},
    ),
    "create-table forgotten": Mistake(
        'expected the target table "ml"."img_vec512_v1", found no such table; hint: python -m'
        " pipeline create-table makes one of the right shape (VECTORS_TABLE names it)",
        sql="DROP TABLE ml.img_vec512_v1",
    ),
    "create-table by a role that may not": Mistake(
        "expected the pgvector extension, found none in this database (this role may not create"
        " it); hint: as a superuser, in this database: CREATE EXTENSION vector; then create-table"
        " again",
        sql="DROP EXTENSION vector CASCADE",
        env={"PG_DSN": HURRIED},
        words="create-table",
    ),
    "a role without rights": Mistake(
        'expected a role that has USAGE ON SCHEMA "iPhone" and SELECT ON "iPhone"."iphone_listings"'
        ' and SELECT ON "iPhone"."iphone_image_assets" and USAGE ON SCHEMA "ml" and SELECT ON'
        ' "ml"."iphone_image_features_v1" and SELECT ON "ml"."img_vec512_v1", found hurried, which'
        ' has not; hint: as the owner: GRANT USAGE ON SCHEMA "iPhone" TO hurried; GRANT SELECT ON'
        ' "iPhone"."iphone_listings" TO hurried; GRANT SELECT ON "iPhone"."iphone_image_assets" TO'
        ' hurried; GRANT USAGE ON SCHEMA "ml" TO hurried; GRANT SELECT ON'
        ' "ml"."iphone_image_features_v1" TO hurried; GRANT SELECT ON "ml"."img_vec512_v1" TO'
        " hurried; python -m pipeline role-sql prints all that the job needs",
        env={"PG_DSN": HURRIED},
    ),
    "schema in lower case": Mistake(
        'expected the listings table "iphone"."iphone_listings", found no such table or view;'
        ' hint: there is "iPhone"."iphone_listings": export LISTINGS_SCHEMA=iPhone'
        " LISTINGS_TABLE=iphone_listings",
        env={"LISTINGS_SCHEMA": "iphone"},
    ),
    "a table of another dimension": Mistake(
        "expected column vec vector(512), the dimension of the vectors, found vector(768)"
        ' ("ml"."img_vec512_v1"); hint: choose a model of that dimension, or another'
        " VECTORS_TABLE for this one; a table for several: create-table --dimension any",
        sql="ALTER TABLE ml.img_vec512_v1 ALTER vec TYPE vector(768)",
    ),
    "uuid ids": Mistake(
        "expected column listing_id bigint in the listings table, found listing_id uuid"
        ' ("iPhone"."iphone_listings"); hint: a view with m.listing_id of a mapping table, see'
        " 'Keys that are no bigint' will do; docs/adopting.md has it in full",
        sql=f"ALTER TABLE {LISTINGS} ALTER listing_id TYPE uuid USING gen_random_uuid()",
    ),
    "spam that says no": Mistake(
        "expected column spam NULL where a listing may be embedded, found 'no' or other marks in"
        ' 1 of 1 rows ("iPhone"."iphone_listings"); hint: spam is NULL for what is none; in a'
        " view: nullif(spam, 'no') AS spam; docs/adopting.md has more",
        sql=f"UPDATE {LISTINGS} SET spam = 'no'",
    ),
    "image root one level off": Mistake(
        'expected photos at storage_path of "iPhone"."iphone_image_assets", found none of 2: 2'
        " missing: no such file ({folder}; the first is '1/0.jpg'); hint: export"
        " IMAGE_ROOT_DIR={folder}/listing_images",
        env={"IMAGE_ROOT_DIR": "{folder}"},
    ),
    "URLs for paths": Mistake(
        'expected photos at storage_path of "iPhone"."iphone_image_assets", found none of 2: 2'
        " outside: the storage_path is a URL (listing_images; the first is 's3://photos/1/0.jpg');"
        " hint: regexp_replace(storage_path, '^[a-z0-9+.-]+://[^/]+/', '') AS storage_path in a"
        " view",
        sql=f"UPDATE {IMAGES} SET storage_path = 's3://photos/' || storage_path",
    ),
    "half a download": Mistake(
        "expected {size} bytes of weights, found 9999"
        " ({folder}/half/open_clip_model.safetensors); hint: the copy or download ended early:"
        " fetch the file again",
        folder="cp -r {encoder} half && truncate -s 9999 half/open_clip_model.safetensors",
        words="check --config model_name=local-dir:{folder}/half",
    ),
    "model misspelt": Mistake(
        "expected an open_clip model name, local-dir:FOLDER or hf-hub:OWNER/REPOSITORY, found"
        " 'VIT-B32' (model_name); hint: did you mean ",
        words="check --config model_name=VIT-B32",
    ),
    "tag misspelt": Mistake(
        "expected a pretrained tag of ViT-B-32, or a weights file, found 'laion2b' (pretrained);"
        " hint: one of openai, laion400m_e31, ",
        words="check --config model_name=ViT-B-32 pretrained=laion2b",
    ),
    "setting misspelt": Mistake(
        "expected a known setting, found 'top_k' (config.yaml); hint: did you mean topk?",
        config="top_k: 3",
    ),
    "value of another type": Mistake(
        "expected batch_size: a valid integer, unable to parse string as an integer, found 'big'"
        " (--config); hint: batch_size is: images per forward pass, at most (default 96)",
        words="check --config batch_size=big",
    ),
    "a variable in config.yaml": Mistake(
        "expected a known setting, found 'image_root_dir' (config.yaml); hint: it is a variable"
        " of the environment: export IMAGE_ROOT_DIR=...",
        config="image_root_dir: /data/photos",
    ),
    "no blank after a colon": Mistake(
        "expected YAML, found could not find expected ':' (config.yaml, line 3); hint: a setting"
        " is KEY: VALUE, with a blank after the colon and without tabs",
        config="topk:3",
        words="snakemake",
    ),
    "cache_dir a file": Mistake(
        "expected cache_dir: a folder, made where there is none, found a file (cache); hint: move"
        " it, or name another in config.yaml",
        folder="touch cache",
    ),
    "in another folder": Mistake(
        f"settings are {REPOSITORY}/config.yaml, results go to {{folder}}/results",
        folder="rm config.yaml",
        words="check --config model_name=local-dir:{encoder}",
    ),
}


@pytest.fixture(scope="module")
def market(
    server: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workspace]:
    """A sound marketplace of one listing, on a server where role `hurried` needs a password."""
    with new_database(server) as database:
        create_tables(database)
        space = new_workspace(tmp_path_factory.mktemp("sound") / "work", database, encoder)
        database.add_listing(1, [space.photo("1/0.jpg"), space.photo("1/1.jpg")])
        database.execute(f"CREATE ROLE hurried LOGIN PASSWORD '{PASSWORD}'")
        rules = server / "pg_hba.conf"
        before = rules.read_text()
        rules.write_text(f"local all hurried scram-sha-256\n{before}")
        database.execute("SELECT pg_reload_conf()")
        yield space
        rules.write_text(before)
        database.execute("SELECT pg_reload_conf()")
        database.execute("DROP ROLE hurried")


@pytest.fixture
def copy(market: Workspace, tmp_path: Path) -> Iterator[Workspace]:
    """The sound marketplace, to make a mistake in."""
    with fork_of(market, tmp_path / "work") as workspace:
        yield workspace


def complaints(
    space: Workspace,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> list[str]:
    """The errors that a command prints, run in this process as if in the folder."""
    monkeypatch.chdir(space.folder)
    for name in [name for name in os.environ if name not in space.env]:
        monkeypatch.delenv(name)
    for name, value in space.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["python -m pipeline", *words])
    try:
        commands.main()
    except PipelineError as error:
        return [str(error)]
    except SystemExit:
        pass
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err + printed.out
    return re.findall(rf"^(?:error: |{NO_CONFIG})(.*)$", printed.err, re.M)


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line_that_mends_it(
    copy: Workspace,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What was expected, what was found, where, and what to do: one line, and no password."""
    mistake = MISTAKES[what]
    host, database = re.findall(r"/([^/?]+)\?host=([^&]+)", copy.env["PG_DSN"])[0][::-1]
    names = {"dsn": copy.env["PG_DSN"], "host": host, "database": database}
    names |= {"encoder": str(copy.encoder), "folder": str(copy.folder)}
    names["size"] = str((copy.encoder / "open_clip_model.safetensors").stat().st_size)
    config = [f"model_name: local-dir:{copy.encoder}", mistake.config]
    (copy.folder / "config.yaml").write_text("\n".join(config) + "\n")
    copy.execute(["sh", "-c", mistake.folder.format(**names)], {})
    if mistake.sql:
        copy.database.execute(mistake.sql)
    copy.env |= {name: value.format(**names) for name, value in mistake.env.items()}
    if not copy.env["PG_DSN"]:
        del copy.env["PG_DSN"]
    if mistake.words == "snakemake":
        run = copy.execute(copy.command(), {})
        assert "Traceback" not in run.output
        lines = re.findall("^error: (.*)$", run.output, re.M)
    else:
        lines = complaints(copy, mistake.words.format(**names).split(), monkeypatch, capsys)

    expected = mistake.line.format(**names)

    assert [expected] == [line[: len(expected)] for line in lines]
    assert PASSWORD not in str(lines)


def test_without_a_mistake_there_is_nothing_to_say(
    copy: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The marketplace of the mistakes is sound, and twenty mistakes at least are made in it."""
    (copy.folder / "config.yaml").write_text(f"model_name: local-dir:{copy.encoder}\n")

    assert [] == complaints(copy, ["check"], monkeypatch, capsys)
    assert 20 <= len(MISTAKES)
