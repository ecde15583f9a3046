"""`check` finds in seconds what a night would find: each fault is a line that says the remedy."""

import shutil
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    REPOSITORY,
    Database,
    Workspace,
    create_tables,
    fork_of,
    new_database,
    new_workspace,
)

from pipeline.database import connection as connections
from pipeline.database import rights
from pipeline.database.inputs import check_inputs
from pipeline.encoder.processor import NO_BF16
from pipeline.encoder.weights import check_whole
from pipeline.photos.files import PhotoFolder
from pipeline.stage.errors import DatabaseError, ModelError, StorageError, storage_errors
from pipeline.stage.settings import Environment, Settings
from pipeline.workflow import preflight

LISTINGS = '"iPhone".iphone_listings'
IMAGES = '"iPhone".iphone_image_assets'
FEATURES = "ml.iphone_image_features_v1"


@pytest.fixture(scope="module")
def sound(
    server: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workspace]:
    """A sound marketplace of three listings with two photos each."""
    with new_database(server) as database:
        create_tables(database)
        space = new_workspace(tmp_path_factory.mktemp("sound") / "work", database, encoder)
        for listing in (1, 2, 3):
            database.add_listing(listing, [space.photo(f"{listing}/{n}.jpg") for n in (0, 1)])
        yield space


@pytest.fixture
def market(
    sound: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Workspace]:
    """A copy of the sound marketplace; this process runs in its folder, on its database."""
    with fork_of(sound, tmp_path / "work") as space:
        monkeypatch.chdir(space.folder)
        monkeypatch.setenv("PG_DSN", space.database.dsn)
        yield space


def found(space: Workspace, environ: dict[str, str] | None = None, **settings: Any) -> list[str]:
    """The lines of a check in this process, each behind its level."""
    settings = {"model_name": f"local-dir:{space.encoder}", **settings}
    findings = preflight.check_all(Settings.check(settings), Environment.read(environ or {}))
    return [f"{level} {text}" for level, text in findings]


def faults(space: Workspace, environ: dict[str, str] | None = None, **settings: Any) -> list[str]:
    """The lines of a check that are not 'ok'."""
    return [line for line in found(space, environ, **settings) if not line.startswith("ok ")]


def test_a_check_loads_no_torch(market: Workspace) -> None:
    """Where no device has to be tried: also for weights of a hub, which is asked all the same."""
    code = (
        "import sys\nfrom pipeline.stage.settings import Environment, Settings\n"
        "from pipeline.workflow.preflight import check_all\n"
        "for finding in check_all(Settings(device='cpu'), Environment.read()): print(*finding)\n"
        "print('loaded:', *{'torch', 'open_clip', 'torchvision'} & sys.modules.keys())"
    )
    run = market.python("-c", code, env={"HF_HOME": str(market.folder / "hub")})

    assert "error expected the weights" in run.output
    assert "HF_HUB_OFFLINE is set" in run.output
    assert "loaded:" == run.output.splitlines()[-1].strip()


def test_a_sound_marketplace_is_told_line_by_line(
    market: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every line is ok, and says what was found; nothing is written to the target."""
    monkeypatch.setattr(preflight, "has_bf16", lambda: False)
    assert [
        "ok settings: cpu, fp32",
        "ok database: PG_DSN answers",
        'ok inputs: "iPhone"."iphone_listings", "iPhone"."iphone_image_assets",'
        ' "ml"."iphone_image_features_v1"',
        'ok target: "ml"."img_vec512_v1"',
        "ok listings: 3 rows, 3 pending",
        "ok images: listing_images",
        "ok photos: 6 of 6 that were looked for are there",
    ] == found(market, device="cpu")[:-1]
    assert found(market)[-1].endswith(", 512-d, weights present")
    assert [] == market.database.vectors()


def test_the_precision_that_would_pay_is_told(
    market: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 where the processor has it, fp32 where it has not; nothing where that is chosen."""

    def told(has_bf16: bool, precision: str) -> list[str]:
        monkeypatch.setattr(preflight, "has_bf16", lambda: has_bf16)
        lines = found(market, device="cpu", precision=precision)
        return [line for line in lines if " precision: " in line]

    assert [f"ok precision: {preflight.FAST_BF16}"] == told(True, "auto")
    assert [f"warn precision: {NO_BF16}"] == told(False, "bf16")
    assert [] == told(True, "bf16") == told(False, "fp32")


# A type that the job reads otherwise than it is meant: (change, the line).
TYPES = {
    "uuid listing_id": (
        f"ALTER TABLE {LISTINGS} ALTER listing_id TYPE uuid USING gen_random_uuid()",
        "column listing_id bigint in the listings table, found listing_id uuid"
        ' ("iPhone"."iphone_listings"); hint: a view with m.listing_id of a mapping table, see'
        " 'Keys that are no bigint' will do; docs/adopting.md has it in full",
    ),
    "text generation": (
        f"ALTER TABLE {IMAGES} ALTER generation TYPE text",
        "column generation int in the images table, found generation text"
        ' ("iPhone"."iphone_image_assets"); hint: a view with generation::int AS generation will'
        " do; docs/adopting.md has it in full",
    ),
    "bigint edited_date": (
        f"ALTER TABLE {LISTINGS} ALTER edited_date TYPE bigint"
        " USING extract(epoch FROM edited_date)",
        "column edited_date timestamptz in the listings table, found edited_date bigint"
        ' ("iPhone"."iphone_listings"); hint: a view with to_timestamp(edited_date) AS edited_date'
        " (milliseconds: edited_date / 1000.0) will do; docs/adopting.md has it in full",
    ),
    "date": (
        f"ALTER TABLE {LISTINGS} ALTER edited_date TYPE date",
        "column edited_date timestamptz in the listings table, found edited_date date"
        ' ("iPhone"."iphone_listings"); hint: a view with edited_date::timestamptz AS edited_date'
        " will do; docs/adopting.md has it in full",
    ),
    "boolean spam": (
        f"ALTER TABLE {LISTINGS} ALTER spam TYPE bool USING false",
        'column spam text in the listings table, found spam boolean ("iPhone"."iphone_listings");'
        " hint: a view with CASE WHEN spam THEN 'spam' END AS spam will do; docs/adopting.md has"
        " it in full",
    ),
    "two at once": (
        f"ALTER TABLE {FEATURES} ALTER is_stock_photo TYPE int USING 0,"
        " ALTER photo_quality_level TYPE text",
        "column is_stock_photo bool, photo_quality_level smallint in the features table, found"
        ' is_stock_photo integer, photo_quality_level text ("ml"."iphone_image_features_v1");'
        " hint: a view with is_stock_photo <> 0 AS is_stock_photo,"
        " photo_quality_level::smallint AS photo_quality_level will do; docs/adopting.md has it in"
        " full",
    ),
    "numeric listing_id": (
        f"ALTER TABLE {LISTINGS} ALTER listing_id TYPE numeric",
        "column listing_id bigint in the listings table, found listing_id numeric"
        ' ("iPhone"."iphone_listings"); hint: a view with listing_id::bigint AS listing_id will'
        " do; docs/adopting.md has it in full",
    ),
}


@pytest.mark.parametrize("what", TYPES)
def test_a_wrong_type_names_column_table_and_view(market: Workspace, what: str) -> None:
    """A type that the job would read wrongly is one line, with the expression of a view."""
    change, message = TYPES[what]
    market.database.execute(change)

    assert [f"error expected {message}"] == faults(market)


def test_types_that_cast_without_loss_are_taken(market: Workspace) -> None:
    """Narrow and wide integers, dates without zone, varchar, domains, enums: all are read."""
    for statement in (
        "CREATE DOMAIN number AS bigint",
        "CREATE DOMAIN number_again AS number",
        "CREATE TYPE why AS ENUM ('scam')",
        f"ALTER TABLE {LISTINGS} ALTER listing_id TYPE number_again,"
        " ALTER spam TYPE why USING NULL, ALTER generation TYPE smallint,"
        " ALTER url TYPE varchar(99), ALTER edited_date TYPE timestamp",
        f"ALTER TABLE {IMAGES} ALTER listing_id TYPE int, ALTER image_index TYPE smallint,"
        " ALTER generation TYPE bigint, ALTER storage_path TYPE varchar",
        f"ALTER TABLE {FEATURES} ALTER photo_quality_level TYPE numeric,"
        " ALTER background_clean_level TYPE int",
    ):
        market.database.execute(statement)

    assert [] == faults(market)
    assert "ok listings: 3 rows, 3 pending" in found(market)


def test_a_fault_that_only_the_query_shows(market: Workspace) -> None:
    """A view whose rows cannot be computed fails here as it would in the export."""
    market.database.execute(
        f'CREATE VIEW "iPhone".broken AS SELECT generation, listing_id, edited_date,'
        f" (1 / (generation - 1))::text AS url, spam FROM {LISTINGS}"
    )

    assert ["error expected a statement that Postgres can run, found division by zero"] == faults(
        market, {"LISTINGS_TABLE": "broken"}
    )


def test_every_fault_is_told_at_once(market: Workspace, tmp_path: Path) -> None:
    """Device, database, photos and model are told apart: each says its own first fault."""
    market.database.execute(f"DROP TABLE {LISTINGS}")
    lines = faults(
        market,
        {"IMAGE_ROOT_DIR": str(tmp_path / "nowhere")},
        device="cuda:99",
        model_name="local-dir:no-such-model",
    )

    assert [
        "error expected device cuda:99",
        'error expected the listings table "iPhone"."iphone_listings"',
        "error expected a folder of images at IMAGE_ROOT_DIR",
        "error expected a model folder",
    ] == [line.partition(",")[0] for line in lines]


def test_a_file_where_a_folder_is_meant_is_one_line(market: Workspace) -> None:
    """A cache_dir that is a file ends a plan and a stage run by hand with a line, not a trace."""
    (market.folder / "cache").touch()
    planned = market.snakemake("-n")
    with pytest.raises(StorageError) as by_hand, storage_errors():
        Path("cache/vectors").mkdir(parents=True)
    with (
        pytest.raises(StorageError, match="^expected a folder, found file exists"),
        storage_errors(),
    ):
        Path("cache").mkdir(exist_ok=True)

    line = "expected cache_dir: a folder, made where there is none, found a file (cache)"
    assert f"error: {line}" in planned.output
    assert 1 == planned.code
    assert str(by_hand.value).startswith("expected a folder, found not a directory (cache")


# --- rights


@pytest.fixture
def newcomer(market: Workspace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """A role without any right, as PG_DSN; yields the owner's database, where rights are given."""
    owner = market.database
    role = owner.dsn.rpartition("/test_")[2][:12]
    role = f"newcomer_{role}"
    owner.execute(f"CREATE ROLE {role} LOGIN")
    name = owner.execute("SELECT current_database()::text")[0][0]
    owner.execute(f'REVOKE ALL ON DATABASE "{name}" FROM PUBLIC')
    owner.execute(f'GRANT CONNECT ON DATABASE "{name}" TO {role}')
    monkeypatch.setenv("PG_DSN", owner.dsn.replace("postgres@", f"{role}@"))
    yield owner
    owner.execute(f"DROP OWNED BY {role}")
    owner.execute(f"DROP ROLE {role}")


def grants(line: str) -> list[str]:
    """The statements that a line says to run."""
    return line.partition("as the owner: ")[2].partition("; python -m")[0].split("; ")


def test_the_rights_that_lack_are_named_with_their_grants(
    market: Workspace, newcomer: Database
) -> None:
    """A bare role is told what to grant; with those grants, run as they stand, nothing lacks."""
    reading = faults(market)
    for statement in grants(reading[0]):
        newcomer.execute(statement)
    writing = faults(market)
    for statement in grants(writing[0]):
        newcomer.execute(statement)

    assert 1 == len(reading)
    assert reading[0].startswith(
        'error expected a role that has USAGE ON SCHEMA "iPhone" and SELECT ON'
        ' "iPhone"."iphone_listings" and SELECT ON "iPhone"."iphone_image_assets" and USAGE ON'
        ' SCHEMA "ml" and SELECT ON "ml"."iphone_image_features_v1" and SELECT ON'
        ' "ml"."img_vec512_v1", found newcomer_'
    )
    assert [
        'INSERT, UPDATE ON "ml"."img_vec512_v1"',
        'SELECT, INSERT, UPDATE ON "ml"."img_vec512_v1_encoders"',
        "TEMPORARY ON DATABASE",
    ] == [
        words.removeprefix("GRANT ").partition(" TO ")[0].partition(" test_")[0]
        for words in grants(writing[0])
    ]
    assert [] == faults(market)


def test_rights_on_the_columns_alone_are_enough(market: Workspace, newcomer: Database) -> None:
    """A role that may read only the columns that are read has what it needs to read."""
    role = newcomer.execute("SELECT rolname::text FROM pg_roles WHERE rolname ~ 'newcomer'")[0][0]
    for statement in (
        f'GRANT USAGE ON SCHEMA "iPhone", ml TO {role}',
        f"GRANT SELECT (generation, listing_id, edited_date, url, spam) ON {LISTINGS} TO {role}",
        f"GRANT SELECT ON {IMAGES}, {FEATURES}, ml.img_vec512_v1 TO {role}",
    ):
        newcomer.execute(statement)
    environment = Environment.read({})
    with connections.connect(read_only=True) as connection, connection.cursor() as cursor:
        rights.check_reading(cursor, environment)
        with pytest.raises(DatabaseError, match="has INSERT, UPDATE ON"):
            rights.check_writing(cursor, environment)


def test_a_registry_that_is_not_there_needs_no_right(market: Workspace) -> None:
    """Without a registry nothing is said of it."""
    market.database.execute("DROP TABLE ml.img_vec512_v1_encoders")

    assert [] == faults(market)


@pytest.mark.timeout(120)
def test_a_run_is_refused_before_its_first_image(market: Workspace, newcomer: Database) -> None:
    """Types and rights are asked when the run is planned: nothing is exported, read or encoded.

    A role that may only read is refused the load, and makes vectors all the same.
    """
    market.env["PG_DSN"] = newcomer.dsn.replace("postgres@", f"{_role(newcomer)}@")
    for right in ('USAGE ON SCHEMA "iPhone", ml', 'SELECT ON ALL TABLES IN SCHEMA "iPhone", ml'):
        newcomer.execute(f"GRANT {right} TO {_role(newcomer)}")
    loading = market.snakemake()
    reading = market.snakemake("vectors", "-n")
    newcomer.execute(f"ALTER TABLE {LISTINGS} ALTER generation TYPE text")
    typed = market.snakemake("vectors")

    assert 'error: expected a role that has INSERT, UPDATE ON "ml"."img_vec' in loading.output
    assert (1, [], 0) == (loading.code, loading.rules, reading.code)
    assert "error: expected column generation int in the listings table" in typed.output
    assert (1, []) == (typed.code, typed.rules)
    assert not market.results.exists()


def _role(database: Database) -> str:
    return str(
        database.execute("SELECT rolname::text FROM pg_roles WHERE rolname ~ 'newcomer'")[0][0]
    )


# --- what the rows say


def test_spam_that_is_never_null_is_an_error_with_the_count(market: Workspace) -> None:
    """Where nearly every row has a mark, the usual one is named, and the view that drops it."""
    market.database.execute(f"UPDATE {LISTINGS} SET spam = 'no'")

    assert [
        "error expected column spam NULL where a listing may be embedded, found 'no' or other"
        ' marks in 3 of 3 rows ("iPhone"."iphone_listings"); hint: spam is NULL for what is none;'
        " in a view: nullif(spam, 'no') AS spam; docs/adopting.md has more"
    ] == faults(market)


def test_a_spam_of_no_among_others_is_a_warning(market: Workspace) -> None:
    """Some rows that say 'no' are counted; a mark that says yes is nobody's fault."""
    market.database.execute(f"UPDATE {LISTINGS} SET spam = ' No' WHERE listing_id = 1")
    market.database.execute(f"UPDATE {LISTINGS} SET spam = 'scam' WHERE listing_id = 2")

    assert [
        "warn listings: 1 of 3 rows whose spam is a text like 'no' in"
        ' "iPhone"."iphone_listings" are left out; hint: spam must be NULL there'
    ] == faults(market)


def test_generations_that_are_null_are_counted(market: Workspace) -> None:
    """Some are a warning; nearly all are an error with the view; of the images likewise."""
    market.database.execute(f"ALTER TABLE {LISTINGS} DROP CONSTRAINT iphone_listings_pkey,"
                            " ALTER generation DROP NOT NULL")  # fmt: skip
    market.database.execute(f"ALTER TABLE {IMAGES} DROP CONSTRAINT iphone_image_assets_pkey,"
                            " ALTER generation DROP NOT NULL")  # fmt: skip
    market.database.execute(f"UPDATE {LISTINGS} SET generation = NULL WHERE listing_id = 1")
    market.database.execute(f"UPDATE {IMAGES} SET generation = NULL WHERE listing_id = 1")
    some = faults(market)
    market.database.execute(f"UPDATE {IMAGES} SET generation = NULL")
    images = faults(market)
    market.database.execute(f"UPDATE {LISTINGS} SET generation = NULL")

    where = '"iPhone"."iphone_listings"'
    hint = "hint: in a view of listings and one of images: coalesce(generation, 1) AS generation"
    assert [
        f"warn listings: 1 of 3 rows without a generation in {where} are left out",
        'warn images: 2 of 6 rows without a generation in "iPhone"."iphone_image_assets"',
    ] == some
    assert (
        "error expected column generation a value, found NULL in 6 of 6 rows"
        f' ("iPhone"."iphone_image_assets"); {hint}'
    ) == images[-1]
    assert [
        "error expected column generation a value where a listing may be embedded, found NULL in 3"
        f' of 3 rows ("iPhone"."iphone_listings"); {hint}'
    ] == faults(market)


def test_images_of_other_listings_are_an_error(market: Workspace) -> None:
    """Where no listing has an image row of its own key, that is said, with the key."""
    market.database.execute(f"UPDATE {IMAGES} SET generation = 2")

    assert [
        'error expected listings with an image in "iPhone"."iphone_image_assets", found none of 3'
        ' ("iPhone"."iphone_listings"); hint: generation and listing_id must be equal in both, and'
        " image_index not NULL"
    ] == faults(market)


def test_an_empty_marketplace_is_a_warning(market: Workspace) -> None:
    """Without a row there is nothing to judge, and that is said."""
    market.database.execute(f"DELETE FROM {LISTINGS}")

    assert ['warn listings: no row in "iPhone"."iphone_listings"'] == faults(market)


def test_a_features_table_that_was_named_must_be_there(
    market: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default it may be absent; absent from a chosen schema, a warning; if named, an error."""
    market.database.execute(f"DROP TABLE {FEATURES}")
    by_default = found(market)
    monkeypatch.setenv("ML_SCHEMA", "ml")
    in_a_schema = faults(market, {"ML_SCHEMA": "ml"})
    named = faults(market, {"IMAGE_FEATURES_TABLE": "flags"})

    text = 'features: no "ml"."iphone_image_features_v1", so that nothing is filtered or ranked'
    assert f"ok {text}" in by_default
    assert [f"warn {text}"] == in_a_schema
    assert [
        'error expected the features table "ml"."flags", found no such table or view; hint: unset'
        " IMAGE_FEATURES_TABLE if there is none: then nothing is filtered or ranked"
    ] == named


@pytest.mark.parametrize(
    ("version", "warned"),
    [("0.8.4", False), ("0.8.10", False), ("1.0", False), ("0.8.3", True), ("0.7.4", True)],
)
def test_an_old_pgvector_is_a_warning(market: Workspace, version: str, warned: bool) -> None:
    """Before 0.8.4 its indexes have faults; versions compare by their numbers."""
    market.database.execute(
        "UPDATE pg_extension SET extversion = $1 WHERE extname = 'vector'", version
    )

    assert (
        [
            f"warn pgvector: {version}, whose indexes have faults that 0.8.4 mends; hint: update"
            " the package on the server, then ALTER EXTENSION vector UPDATE"
        ]
        if warned
        else []
    ) == faults(market)


def test_a_table_of_another_case_or_schema_is_pointed_out(market: Workspace) -> None:
    """A name that is there elsewhere is given with the variables to export."""
    lower = faults(market, {"LISTINGS_SCHEMA": "iphone"})
    moved = faults(market, {"ASSETS_SCHEMA": "public", "ASSETS_TABLE": "Iphone_Image_Assets"})

    assert [
        'error expected the listings table "iphone"."iphone_listings", found no such table or view;'
        ' hint: there is "iPhone"."iphone_listings": export LISTINGS_SCHEMA=iPhone'
        " LISTINGS_TABLE=iphone_listings"
    ] == lower
    assert moved[0].endswith(
        'hint: there is "iPhone"."iphone_image_assets": export ASSETS_SCHEMA=iPhone'
        " ASSETS_TABLE=iphone_image_assets"
    )


# --- photos

NONE = 'error expected photos at storage_path of "iPhone"."iphone_image_assets", found none of 6: 6'


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "'/' || storage_path",
            "outside: the storage_path is absolute (listing_images; the first is '/1/0.jpg');"
            " hint: ltrim(storage_path, '/') AS storage_path in a view",
        ),
        (
            "'https://cdn.example.com/' || storage_path",
            "outside: the storage_path is a URL (listing_images; the first is"
            " 'https://cdn.example.com/1/0.jpg'); hint: regexp_replace(storage_path,"
            " '^[a-z0-9+.-]+://[^/]+/', '') AS storage_path in a view",
        ),
        (
            "'photos/' || storage_path",
            "missing: no such file (listing_images; the first is 'photos/1/0.jpg'); hint: export"
            " IMAGE_ROOT_DIR=the folder that the paths start from",
        ),
        (
            "'listing_images/' || storage_path",
            "missing: no such file (listing_images; the first is 'listing_images/1/0.jpg'); hint:"
            " export IMAGE_ROOT_DIR={folder}",
        ),
        (
            "substr(storage_path, 3)",
            "missing: no such file (listing_images; the first is '0.jpg'); hint: export"
            " IMAGE_ROOT_DIR=listing_images/1",
        ),
    ],
    ids=["slash", "URL", "nowhere", "above", "below"],
)
def test_paths_that_lead_to_no_photo_say_how_to_mend_them(
    market: Workspace, path: str, message: str
) -> None:
    """None of the photos is there: one line with the reasons, the first path, and the remedy."""
    market.database.execute(f"UPDATE {IMAGES} SET storage_path = {path}")
    lines = faults(market)
    count = 2 if "3)" in path else 6

    assert [f"{NONE} ".replace("6", str(count)) + message.format(folder=market.folder)] == lines


def test_the_hints_for_paths_are_sql_that_mends_them(market: Workspace) -> None:
    """What is said of a URL, a leading slash and a whole path, put into an UPDATE, finds all."""
    for prefix in ("'s3://bucket/'", "'/'", f"'{market.photos}/'"):
        market.database.execute(f"UPDATE {IMAGES} SET storage_path = {prefix} || storage_path")
        line = faults(market, {"IMAGE_ROOT_DIR": str(market.photos)})[0]
        remedy = line.partition("; hint: ")[2].partition(" AS ")[0]
        market.database.execute(f"UPDATE {IMAGES} SET storage_path = {remedy}")

        assert [] == faults(market), prefix


def test_some_missing_photos_are_no_error(market: Workspace) -> None:
    """A few are told; more than half are a warning; only none at all is an error."""
    shutil.rmtree(market.photos / "1")
    few = [line for line in found(market) if "photos:" in line]
    shutil.rmtree(market.photos / "2")
    text = "photos: {} of 6 that were looked for are there; '1/0.jpg' is missing: no such file"

    assert [f"ok {text.format(4)}"] == few
    assert [f"warn {text.format(2)}"] == faults(market)


def test_photos_are_drawn_from_many_listings(market: Workspace) -> None:
    """Twenty photos are looked for however many there are, and not of the newest listings alone."""
    market.database.execute(
        f"INSERT INTO {LISTINGS} SELECT 1, n, now(), '' FROM generate_series(10, 109) n"
    )
    market.database.execute(
        f"INSERT INTO {IMAGES} SELECT 1, n, 0, n || '.jpg' FROM generate_series(10, 109) n"
    )
    for listing in range(60, 110):
        market.photo(f"{listing}.jpg")
    (line,) = [line for line in found(market) if "photos:" in line]

    assert (
        "warn photos: 10 of 20 that were looked for are there; '10.jpg' is missing: no such file"
        == line
    )


def test_a_photo_that_waits_is_no_wrong_root(market: Workspace) -> None:
    """With all but one listing done, photos of done listings speak for the image root too."""
    market.database.execute(
        "INSERT INTO ml.img_vec512_v1 SELECT listing_id, edited_date, 's', 'm', '',"
        f" array_fill(1, ARRAY[512])::vector, 1 FROM {LISTINGS}"
    )
    market.database.add_listing(4, ["4/later.jpg"])
    lines = found(market, source="s", model_rev="m")

    assert "ok listings: 4 rows, 1 pending" in lines
    assert (
        "ok photos: 6 of 7 that were looked for are there; '4/later.jpg' is missing: no such file"
    ) in lines


@pytest.mark.parametrize("path", ["http://example.com/a.jpg", "s3://bucket/a.jpg", "FILE:///a"])
def test_a_url_is_named_as_one(tmp_path: Path, path: str) -> None:
    """A photo's own error says that its path is a URL, not that a file is missing."""
    folder = PhotoFolder(tmp_path, False, 1000)

    with pytest.raises(Exception, match="^outside: the storage_path is a URL$"):
        folder.stat(path)


# --- weights


def test_truncated_weights_are_told_from_their_header(market: Workspace, tmp_path: Path) -> None:
    """A file that ends before its last tensor does is an error with both sizes."""
    model = shutil.copytree(market.encoder, tmp_path / "model")
    weights = model / "open_clip_model.safetensors"
    whole = weights.stat().st_size
    with weights.open("r+b") as file:
        file.truncate(whole - 1)

    assert [
        f"error expected {whole} bytes of weights, found {whole - 1} ({weights}); hint: the copy or"
        " download ended early: fetch the file again"
    ] == faults(market, model_name=f"local-dir:{model}")


def zipped(path: Path) -> None:
    """A file in the form that torch.save writes, of some kilobytes."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(10_000))


def test_whole_weights_pass_and_cut_ones_do_not(tmp_path: Path) -> None:
    """safetensors and zip are told by header or end; PyTorch's older form has none, and passes."""
    header = b'{"__metadata__":{},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    tensors = struct.pack("<Q", len(header)) + header + bytes(8)
    zipped(tmp_path / "whole.bin")
    archive = (tmp_path / "whole.bin").read_bytes()
    files = {
        "whole.safetensors": (tensors, ""),
        "long.safetensors": (tensors + b"x", "bytes of weights, found"),
        "header.safetensors": (tensors[:20], "found no whole header"),
        "number.safetensors": (tensors[:5], "found no whole header"),
        "empty.safetensors": (b"", "found no whole header"),
        "list.safetensors": (struct.pack("<Q", 2) + b"[]", "found no whole header"),
        "whole.pt": (archive, ""),
        "cut.pt": (archive[:-30], "bytes without end"),
        "empty.pt": (b"", "0 bytes without end"),
        "old.pt": (b"\x80\x02\x8a\x0al\xfc", ""),
        "pointer.bin": (b"version https://git-lfs.github.com/spec/v1", "hint: git lfs pull"),
        "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    }
    said = {}
    for name, (content, _) in files.items():
        (tmp_path / name).write_bytes(content)
        try:
            check_whole(tmp_path / name)
            said[name] = ""
        except ModelError as error:
            said[name] = str(error)

    assert [] == [
        (name, said[name])
        for name, (_, words) in files.items()
        if words not in said[name] or bool(words) != bool(said[name])
    ]


def test_check_inputs_needs_no_right(market: Workspace, newcomer: Database) -> None:
    """The catalog tells the columns of tables that the role may not even name."""
    with connections.connect(read_only=True) as connection, connection.cursor() as cursor:
        check_inputs(cursor, Environment.read({}))


def test_snakemake_takes_the_settings_beside_its_snakefile(
    market: Workspace, tmp_path: Path
) -> None:
    """In a folder without config.yaml the checkout's counts, a line says so; results stay here."""
    checkout = tmp_path / "checkout"
    for name in ("pipeline", "profiles"):
        shutil.copytree(REPOSITORY / name, checkout / name)
    shutil.copy(REPOSITORY / "Snakefile", checkout)
    (checkout / "config.yaml").write_text("source: beside\n")
    (market.folder / "config.yaml").unlink()
    words = market.command("-n", "-p")
    words[words.index(str(REPOSITORY / "Snakefile"))] = str(checkout / "Snakefile")
    run = market.execute(words, {})

    assert 0 == run.code, run.output
    assert (
        f"no config.yaml in this folder: settings are {checkout}/config.yaml,"
        f" results go to {market.folder}/results\n"
    ) in run.output
    assert "--source=beside" in run.output
