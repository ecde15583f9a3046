"""What an operator is told: status, why, the plan before a run and the result after it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    REPOSITORY,
    T0,
    Run,
    Workspace,
    create_tables,
    new_database,
    new_listing,
)

from pipeline.workflow.summary import RECORD

LATER = "2026-02-02 12:00:00.000002+00"


def status(workspace: Workspace, *settings: str) -> dict[str, Any]:
    """`status --json`, which is one line."""
    done = command(workspace, "status", "--json", settings=settings)
    lines = [line for line in done.output.splitlines() if line.startswith("{")]
    assert 1 == len(lines), done.output
    found: dict[str, Any] = json.loads(lines[0])
    assert found["listings"] == found["eligible"] + sum(found["left_out"].values())
    assert found["eligible"] == found["with_vector"] + found["pending"] + found["waiting"]
    assert found["waiting"] == sum(found["waiting_by_reason"].values())
    return found


def why(workspace: Workspace, listing: int, *settings: str) -> str:
    """What `why` prints, runs of blanks as one."""
    return re.sub(r" +", " ", command(workspace, "why", str(listing), settings=settings).output)


def command(workspace: Workspace, *words: str, settings: tuple[str, ...] = ()) -> Run:
    """A command of the pipeline with the workspace's settings; it must succeed."""
    config = ("--config", f"model_name=local-dir:{workspace.encoder}", *settings)
    done = workspace.python("-m", "pipeline", *words, *config)
    assert 0 == done.code, done.output
    return done


def reasons(found: dict[str, Any]) -> dict[str, int]:
    """`left_out` without its zeros."""
    return {reason: count for reason, count in found["left_out"].items() if count}


# --- status


def test_each_row_is_left_out_for_one_reason(workspace: Workspace) -> None:
    """listings = eligible + sum(left_out), whatever else a row that is left out lacks."""
    add = workspace.database.add_listing
    add(1, ["1.jpg"])
    add(2, ["2.jpg"], spam="yes", edited_date=None, url=None)
    add(3, ["3.jpg"], edited_date=None, url=None)
    add(4, [], url=None)
    add(5, [])
    add(6, ["6.jpg"], edited_date="infinity")
    add(7, ["7.jpg"], generation=1)
    add(7, ["7.jpg"], generation=2)
    workspace.database.execute(
        'ALTER TABLE "iPhone".iphone_listings DROP CONSTRAINT iphone_listings_pkey,'
        " ALTER COLUMN generation DROP NOT NULL"
    )
    workspace.database.execute(
        "INSERT INTO \"iPhone\".iphone_listings VALUES (NULL, 8, now(), '', NULL)"
    )
    found = status(workspace)

    assert 9 == found["listings"]
    assert {
        "spam": 1, "no_edited_date": 1, "no_url": 1, "no_images": 1, "no_generation": 1,
        "bad_date": 1, "other_generation": 1,
    } == found["left_out"]  # fmt: skip
    assert (2, 0, 2, 0) == tuple(
        found[name] for name in ("eligible", "with_vector", "pending", "waiting")
    )


def test_status_is_that_of_the_live_database(finished: Workspace) -> None:
    """It follows the tables at once: what is new, edited, deleted, spam, loaded, or waits."""
    done = status(finished)
    new_listing(finished, 4)
    new_listing(finished, 5, photos=7)
    finished.database.edit(1, LATER)
    finished.database.execute('DELETE FROM "iPhone".iphone_listings WHERE listing_id = 2')
    changed = status(finished, "limit_listings=2")
    finished.photo("3/1.jpg", "blue")
    arrived = status(finished)

    assert (3, 2, 0, 1) == tuple(
        done[name] for name in ("eligible", "with_vector", "pending", "waiting")
    )
    assert {"missing": 1} == done["waiting_by_reason"]
    assert {"listings": 0, "photos": 0, "cached": 0} == _without_seconds(done["next_run"])
    assert (0, 0, 0) == tuple(done[name] for name in ("gone", "superseded", "beyond_limit"))

    assert (4, 0, 3, 1) == tuple(
        changed[name] for name in ("eligible", "with_vector", "pending", "waiting")
    )
    assert (1, 0, 1) == tuple(changed[name] for name in ("gone", "superseded", "beyond_limit"))
    assert {"listings": 2, "photos": 4, "cached": 2} == _without_seconds(changed["next_run"])

    assert (4, 0) == (arrived["pending"], arrived["waiting"])
    assert {"listings": 4, "photos": 11, "cached": 2} == _without_seconds(arrived["next_run"])


def _without_seconds(next_run: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in next_run.items() if name != "seconds"}


def test_status_counts_the_vectors_of_every_key(finished: Workspace) -> None:
    """Each key with its rows, and the recipe and the encoder that the registry has of it."""
    finished.run(config={"topk": 2})
    finished.database.edit(2, LATER)
    finished.run()
    finished.database.execute(
        "INSERT INTO ml.img_vec512_v1 SELECT 1, edited_date, 'by hand', 'm', '', vec, 1"
        " FROM ml.img_vec512_v1 LIMIT 1"
    )
    found = status(finished)
    keys = {
        key["source"]: (key["rows"], (key["recipe"] or {}).get("topk"), bool(key["encoder"]))
        for key in found["keys"]
    }

    assert {
        "listing_images_topk5_v1": (3, 5, True),
        "listing_images_topk2_v1": (2, 2, True),
        "by hand": (1, None, False),
    } == keys
    assert 1 == found["superseded"]


def test_the_time_of_the_next_run_is_that_of_the_last_rate(finished: Workspace) -> None:
    """Seconds = photos that are not cached / images a second, as kept of the last run."""
    record = finished.folder / RECORD
    kept = json.loads(record.read_text())
    record.write_text(json.dumps({**kept, "images_per_second": 0.5}))
    new_listing(finished, 4, photos=3)
    finished.database.edit(1, LATER)
    known = status(finished)
    record.unlink()
    unknown = status(finished)

    assert {"listings": 2, "photos": 5, "cached": 2, "seconds": 6} == known["next_run"]
    assert {"listings": 2, "photos": 5, "cached": 2, "seconds": None} == unknown["next_run"]


def test_photos_of_the_next_run_are_those_that_are_selected(workspace: Workspace) -> None:
    """Top-K, what is excluded, and the fallback count as in a run."""
    add, features = workspace.database.add_listing, workspace.database.add_features
    add(1, [f"1/{i}.jpg" for i in range(8)])
    add(2, [f"2/{i}.jpg" for i in range(4)])
    features(2, 0, stock=True)
    features(2, 1, screenshot=True)
    add(3, ["3/0.jpg", "3/1.jpg"])
    features(3, 0, stock=True)
    features(3, 1, stock=True)

    assert 5 + 2 + 2 == status(workspace)["next_run"]["photos"]
    assert 5 + 3 + 2 == status(workspace, "exclude_stock=false")["next_run"]["photos"]
    assert 1 + 1 + 1 == status(workspace, "topk=1")["next_run"]["photos"]


def test_the_page_names_every_field(workspace: Workspace) -> None:
    """docs/operating.md has each field of --json, and no other."""
    page = (REPOSITORY / "docs/operating.md").read_text()
    table = page.split("`--json` prints one line")[1].split("\n\n")[1]
    cells = re.findall(r"^\| (`.+?) \|", table, re.M)

    assert status(workspace).keys() == {name for cell in cells for name in re.findall(r"\w+", cell)}


def test_force_changes_the_next_run_alone(finished: Workspace) -> None:
    """Where the listings stand is the same; the next run takes all, up to the limit."""
    plain = status(finished)
    forced = status(finished, "force=true", "limit_listings=2")
    said = command(finished, "status", settings=("force=true", "limit_listings=2")).output

    assert {**plain, "next_run": None} == {**forced, "next_run": None}
    assert {"listings": 2, "photos": 4, "cached": 0} == _without_seconds(forced["next_run"])
    assert "2 listings pending: 2 forced; 4 photos, 0 cached" in said
    assert "1 more are beyond limit_listings" in said


def test_status_for_people_says_the_same(finished: Workspace) -> None:
    """Database, key, counts and the next run, without a secret."""
    new_listing(finished, 4)
    said = re.sub(r" +", " ", command(finished, "status").output)

    assert re.search(r"^test_\w+ at a local socket, \"ml\".\"img_vec512_v1\"$", said, re.M)
    assert "eligible 4\n with vector 2\n pending 1\n waiting 1 1 missing\n" in said
    assert "next run: 1 listing pending: 1 new; 2 photos, 0 cached" in said


# --- the plan and the result of a run


def plan_of(run: Run) -> list[str]:
    """The lines of ours that say what is pending."""
    return re.findall(r"^(?:\d+ listings? pending|Nothing is pending): .*$", run.output, re.M)


def test_a_dry_run_says_why_in_one_line(finished: Workspace) -> None:
    """How many are pending and for which reason, photos, cached ones, and who is left."""
    finished.knows_photos = False
    nothing = plan_of(finished.snakemake("-n"))
    finished.database.edit(1, LATER)
    edited = plan_of(finished.snakemake("-n"))
    new_listing(finished, 4)
    finished.photo("3/0.jpg", "blue")
    more = plan_of(finished.snakemake("-n"))
    limited = plan_of(finished.snakemake("-n", config={"limit_listings": 1}))
    forced = plan_of(finished.snakemake("-n", config={"force": True}))

    assert [
        "Nothing is pending: the table has a vector of 2 of 3 listings;"
        " 1 wait for other files or rows (1 missing)"
    ] == nothing
    assert ["1 listing pending: 1 edited; 2 photos, 2 cached"] == _without_time(edited)
    assert [
        "3 listings pending: 1 new, 1 edited, 1 that waited; 6 photos, 2 cached"
    ] == _without_time(more)
    assert [
        "1 listing pending: 1 edited; 2 photos, 2 cached;"
        " 2 more wait for the next run (limit_listings)"
    ] == _without_time(limited)
    assert ["4 listings pending: 2 new, 1 edited, 1 forced; 8 photos, 0 cached"] == _without_time(
        forced
    )


def _without_time(lines: list[str]) -> list[str]:
    return [re.sub(r", about [^;]+", "", line) for line in lines]


def test_changed_rows_are_told_from_new_listings(finished: Workspace) -> None:
    """A listing that waited and has another candidate now is pending for that reason."""
    finished.database.add_image(3, 2, "3/2.jpg")

    assert ["1 listing pending: 1 that waited; 3 photos, 0 cached"] == _without_time(
        plan_of(finished.snakemake("-n"))
    )


@pytest.mark.parametrize("rows", [0, 2])
def test_nothing_eligible_is_not_called_done(workspace: Workspace, rows: int) -> None:
    """With no eligible listing, no line says that all of them have a vector."""
    for listing in range(rows):
        workspace.database.add_listing(listing, ["a.jpg"], spam="yes")
    run = workspace.run()
    left_out = "; left out: 2 spam" if rows else ""

    assert [f"Nothing is pending: no listing is eligible ({rows} rows{left_out})"] == plan_of(run)
    assert "every eligible listing" not in run.output


def test_all_done_is_said_only_when_it_is(workspace: Workspace) -> None:
    """After a run that a limit cut off, so many have a vector and so many wait for the next."""
    workspace.knows_photos = True
    for listing in (1, 2, 3):
        new_listing(workspace, listing)
    first = workspace.run(config={"limit_listings": 2})
    second = workspace.run(config={"limit_listings": 2})
    third = workspace.run(config={"limit_listings": 2})

    assert (
        "  result     the table has a vector of 2 of 3 listings; 1 are pending"
        in first.output.splitlines()
    )
    every = "the table has a vector of every eligible listing (3)"
    assert f"  result     {every}" in second.output.splitlines()
    assert f"Nothing is pending: {every}" in third.output.splitlines()


def summary(workspace: Workspace) -> dict[str, str]:
    """What `summary` prints: a line's first word to the rest of it."""
    done = workspace.python("-m", "pipeline", "summary")
    return dict(re.findall(r"^ *(\w+) +(.+)$", done.output, re.M))


def test_the_summary_is_that_of_the_last_run(finished: Workspace) -> None:
    """Which database and key, when and how long; what had nothing to do says so; then a no-op."""
    first = summary(finished)
    finished.run(config={"decode": "scaled"})
    again = summary(finished)
    finished.run(config={"decode": "scaled"})
    nothing = summary(finished)

    assert re.fullmatch(r"of \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC, \d+ s", first["run"])
    assert 'a local socket, "ml"."img_vec512_v1"' in first["database"]
    assert first["key"].startswith("listing_images_topk5_v1 · ")
    assert "3 listings, 6 images -> results/export" == first["export"]
    assert "4 images encoded, 2 failed (missing) -> results/encode" == first["encode"]
    assert '2 inserted, 0 updated, 0 unchanged -> "ml"."img_vec512_v1"' == (first["load"])

    assert "nothing to do" == again["export"] == again["select"]
    assert "4 images encoded, 2 failed (missing) -> results/encode" == again["encode"]

    assert {"run", "database", "key", "result"} == nothing.keys()
    assert "nothing to do" == nothing["result"]


def test_the_summary_of_a_refused_run_is_its_error(finished: Workspace) -> None:
    """Refused before its first job, as without a database: not the good run before it."""
    finished.env["PG_DSN"] = "postgresql://nobody@127.0.0.1:1/none"
    run = finished.snakemake()

    assert 0 != run.code
    assert run.output.splitlines()[-1] == summary(finished)["result"]


def test_a_benchmark_says_nothing_of_loads(finished: Workspace) -> None:
    """Its summary has its own figures, and no row of a stage that it does not use."""
    finished.run("benchmark")
    said = summary(finished)

    assert {"run", "database", "key", "benchmark"} == said.keys()
    assert re.fullmatch(
        r"[\d.]+ images/s, bound by \w+ -> results/benchmark/benchmark.json", said["benchmark"]
    )


def test_the_summary_of_a_failed_run_is_its_error(finished: Workspace) -> None:
    """What it did before, what is not finished, and the error; nothing of the run before."""
    new_listing(finished, 4)
    finished.database.execute("ALTER TABLE ml.img_vec512_v1 ADD CHECK (listing_id < 4)")
    run = finished.snakemake()
    said = summary(finished)

    assert 0 != run.code
    assert "1 listings, 2 images -> results/export" == said["export"]
    assert "not finished" == said["load"]
    assert run.output.splitlines()[-1] == said["result"]


def test_the_summary_names_its_own_database(finished: Workspace, server: Path) -> None:
    """In a folder where another database was loaded before, a no-op speaks of this one."""
    with new_database(server) as other:
        create_tables(other)
        finished.env["PG_DSN"] = other.dsn
        run = finished.run()
        said = summary(finished)
        (name,) = other.execute("SELECT current_database()::text")[0]

    assert "Nothing is pending: no listing is eligible (0 rows)" in run.output.splitlines()
    assert said["database"].startswith(f"{name} at ")
    assert "inserted" not in str(said)


# --- why


def test_why_tells_the_way_of_a_listing(finished: Workspace) -> None:
    """Rows, rules, candidates with flags and score, ranks, files, what it waits for, vectors."""
    database = finished.database
    new_listing(finished, 4, photos=3)
    database.add_features(4, 1, stock=True, quality=2)
    database.add_features(4, 2, quality=1, background=1)
    database.add_listing(5, ["5/a.jpg"], spam="scam")
    database.add_listing(6, ["6/a.jpg"], generation=1)
    database.add_listing(6, ["6/a.jpg"], generation=2)
    pending, waits = why(finished, 4), why(finished, 3)
    done, spam, generations = why(finished, 1), why(finished, 5), why(finished, 6)

    assert f"generation 1, edited {T0}: eligible; pending: the next run embeds it\n" in pending
    assert " 0 0 - rank 2 4/0.jpg there, " in pending
    assert " 1 20 is_stock_photo no: stock photo 4/1.jpg\n" in pending
    assert " 2 13 - rank 1 4/2.jpg there, " in pending
    assert 'vectors in "ml"."img_vec512_v1": none\n' in pending

    assert (
        "eligible; waits until one of its files appears or changes, or its rows:"
        " 3/0.jpg (missing: no such file), 3/1.jpg (missing: no such file)\n" in waits
    )
    assert " 0 0 - rank 1 3/0.jpg missing: no such file\n" in waits

    assert f"edited {T0}: eligible; it has a vector\n" in done
    assert " 0 0 - rank 1 1/0.jpg has a vector in results/encode\n" in done
    assert f" edited {T0}: of 2 images, written " in done

    assert "left out, spam: spam is not NULL ('scam')\n" in spam
    assert "generation 1, edited 2026-01-01 12:00:00.000001+00: left out, other_gen" in generations


def test_why_of_the_fallback_and_beyond_the_limit(workspace: Workspace) -> None:
    """Photos that are all excluded are taken as a fallback; who is beyond the limit is told so."""
    new_listing(workspace, 1)
    new_listing(workspace, 2, edited_date=LATER)
    for index in (0, 1):
        workspace.database.add_features(1, index, screenshot=True)
    said = why(workspace, 1, "limit_listings=1", "topk=1")

    assert "eligible; pending, but beyond limit_listings: a later run embeds it\n" in said
    assert " 0 0 battery_screenshot fallback, rank 1 1/0.jpg there, " in said
    assert " 1 0 battery_screenshot no: beyond topk 1 1/1.jpg\n" in said


def test_why_tells_what_was_from_what_is(finished: Workspace) -> None:
    """A photo that has arrived since is not called missing; beyond the limit nobody waits."""
    finished.photo("3/0.jpg", "blue")
    new_listing(finished, 4, edited_date=LATER)
    arrived, beyond = why(finished, 3), why(finished, 3, "limit_listings=1")

    assert "3/0.jpg missing: no such file, in results/encode; now there, " in arrived
    assert "eligible; pending: the next run embeds it\n" in arrived
    assert "eligible; pending, but beyond limit_listings: a later run embeds it\n" in beyond


def test_why_of_a_deleted_listing_and_of_none(finished: Workspace) -> None:
    """A listing without a row still has its vectors; one without either is one line."""
    finished.database.execute('DELETE FROM "iPhone".iphone_listings WHERE listing_id = 1')
    deleted = why(finished, 1)
    nobody = finished.python("-m", "pipeline", "why", "99")

    assert " no row: it is deleted; retire --gone deletes its vectors\n" in deleted
    assert f" edited {T0}: of 2 images, written " in deleted
    assert 0 != nobody.code
    assert [
        "error in pipeline: expected listing 99, found neither a row nor a vector of it"
        ' ("iPhone"."iphone_listings", "ml"."img_vec512_v1")'
    ] == nobody.output.splitlines()


def test_a_listing_edited_twice_shows_every_vector(finished: Workspace) -> None:
    """By edit and key, newest first."""
    finished.database.edit(1, LATER)
    finished.run()
    rows = [line for line in why(finished, 1).splitlines() if line.startswith(" edited ")]

    assert [LATER, T0] == [re.findall(r"edited (.+?): of 2", row)[0] for row in rows]
