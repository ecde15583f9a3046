"""Everything that can be wrong before the first image is read, found in seconds.

Each part says its first fault and the next part goes on, so that one `check` tells all that is to
be mended. Nothing is written, no image is decoded and no weights are loaded.
"""

import functools
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from adbc_driver_manager.dbapi import Cursor

from pipeline.database import hnsw, inputs, registry, rights, target, waiting
from pipeline.database.catalog import has_table
from pipeline.database.connection import connect, fetch, quoted
from pipeline.database.pending import Pending, prepare
from pipeline.encoder.model import (
    Model,
    identity_of,
    model_of,
    resolve_device,
    resolve_precision,
)
from pipeline.encoder.processor import NO_BF16, has_bf16
from pipeline.photos.files import PhotoError
from pipeline.photos.root import photos_at
from pipeline.stage.errors import (
    DatabaseError,
    DataError,
    ModelError,
    PipelineError,
    SettingsError,
    storage_errors,
)
from pipeline.stage.settings import Environment, Settings

NEARLY_ALL = 0.9  # of the rows: what leaves out so many is a misunderstanding, not a marketplace
FAST_BF16 = (
    "fp32; this processor has instructions for bf16, which is 1.7 times as fast with a ViT-B-32:"
    " snakemake benchmark measures it"
)
PHOTOS = 20  # that are looked for
LISTINGS = 1000  # that they are drawn from, lest the newest alone lack theirs for an hour
IMAGE_ROWS = 100_000  # looked at for a generation; their number may be that of all photos


class Finding(NamedTuple):
    """One line of `check`: what is right, what may be wrong, or an error's line."""

    level: Literal["ok", "warn", "error"]
    text: str


def check_cache_dir(chosen: Settings) -> None:
    """SettingsError where cache_dir names something that is no folder."""
    folder = Path(chosen.cache_dir)
    if folder.exists() and not folder.is_dir():
        raise SettingsError(
            "cache_dir: a folder, made where there is none", "a file", str(folder),
            "move it, or name another in config.yaml",
        )  # fmt: skip


def check_all(chosen: Settings, environment: Environment) -> Iterator[Finding]:
    """Yield what is right and what is wrong, in the order in which a run meets it."""
    preflight = Preflight(chosen, environment)
    for part in (preflight.device, preflight.database, preflight.photos, preflight.encoder):
        try:
            with storage_errors():
                yield from part()
        except PipelineError as error:
            yield Finding("error", str(error))


class Preflight:
    """The parts of a check, which share the model and the sampled photos."""

    def __init__(self, chosen: Settings, environment: Environment) -> None:
        self.chosen = chosen
        self.environment = environment
        self.sample: list[str | None] = []  # storage_path of photos that a run would select

    @functools.cached_property
    def model(self) -> Model:
        """The configured model, without its weights; ModelError where there is none."""
        return model_of(self.chosen)

    def device(self) -> Iterator[Finding]:
        """Device, precision, cache folder; a GPU computes."""
        device = resolve_device(self.chosen.device)
        precision = resolve_precision(self.chosen.precision, device)
        check_cache_dir(self.chosen)
        if device != "cpu":
            from pipeline.encoder.tower import probe  # loads torch: seconds

            probe(device)
        yield Finding("ok", f"settings: {device}, {precision}")
        if (device, precision) == ("cpu", "bf16") and not has_bf16():
            yield Finding("warn", f"precision: {NO_BF16}")
        if (device, precision) == ("cpu", "fp32") and has_bf16():
            yield Finding("ok", f"precision: {FAST_BF16}")

    def database(self) -> Iterator[Finding]:
        """The connection, the tables, the rights, and what the rows say."""
        with (
            connect(read_only=True, repeatable=True) as connection,
            connection.cursor() as cursor,
        ):
            yield Finding("ok", "database: PG_DSN answers")
            inputs.check_inputs(cursor, self.environment)
            rights.check_reading(cursor, self.environment)
            yield from self._inputs(cursor)
            target.check(cursor, self.environment, self._dimension())
            if self._dimension():
                registry.displaced(cursor, self.environment, self.chosen, self.model)
            rights.check_writing(cursor, self.environment)
            yield Finding("ok", f"target: {quoted(self.environment.vectors)}")
            if fault := hnsw.faulty(cursor):
                yield Finding("warn", f"pgvector: {fault}")
            yield from self._rows(cursor)

    def photos(self) -> Iterator[Finding]:
        """The image root, and whether the sampled photos are below it."""
        photos = photos_at(self.environment.image_root, self.chosen, patient=False)
        photos.check()
        yield Finding("ok", f"images: {self.environment.image_root}")
        if not self.sample:
            return
        looked_for = zip(self.sample, photos.stats(self.sample), strict=True)
        failed = {path: found for path, found in looked_for if isinstance(found, PhotoError)}
        found = len(self.sample) - len(failed)
        if not found:
            raise self._no_photo(failed)
        text = f"photos: {found} of {len(self.sample)} that were looked for are there"
        if not failed:
            yield Finding("ok", text)
            return
        path, fault = next(iter(failed.items()))
        level: Literal["ok", "warn"] = "ok" if 2 * found > len(self.sample) else "warn"
        yield Finding(level, f"{text}; {path!r} is {fault}")

    def encoder(self) -> Iterator[Finding]:
        """The weights are here, or can be fetched."""
        from pipeline.encoder.weights import weights_present  # loads the hub's client

        model = self.model
        weights_present(model)
        name = self.chosen.model_rev or model.model_rev
        yield Finding("ok", f"model: {name}, {model.embed_dim}-d, weights present")
        if model.projection:
            rev = identity_of(self.chosen, model).pca_rev
            yield Finding("ok", f"projection: {rev}, to {model.projection.dimensions}-d")

    def _dimension(self) -> int | None:
        """Of the vectors, unless there is no such model or projection, which is said elsewhere."""
        try:
            return self.model.dimension
        except ModelError:
            return None

    def _inputs(self, cursor: Cursor) -> Iterator[Finding]:
        names = [self.environment.listings, self.environment.images]
        features = self.environment.features
        if has_table(cursor, features):
            names.append(features)
        yield Finding("ok", f"inputs: {', '.join(map(quoted, names))}")
        if features in names:
            return
        text = f"features: no {quoted(features)}, so that nothing is filtered or ranked"
        yield Finding("warn" if os.environ.get("ML_SCHEMA") else "ok", text)

    def _rows(self, cursor: Cursor) -> Iterator[Finding]:
        """What the rows of the listings say, and a sample of what would be selected."""
        where = quoted(self.environment.listings)
        counted = inputs.tally(cursor, self.environment)
        if not counted.rows:
            yield Finding("warn", f"listings: no row in {where}")
            return
        self._refuse_columns(cursor, counted)
        yield from _left_out(counted, where)
        yield from self._image_generations(cursor)
        pending = self._sampled(cursor, force=False)
        eligible = pending if len(self.sample) >= PHOTOS else self._sampled(cursor, force=True)
        if not eligible:
            raise DatabaseError(
                f"listings with an image in {quoted(self.environment.images)}",
                f"none of {counted.rows}",
                where,
                "generation and listing_id must be equal in both, and image_index not NULL",
            )
        more = " or more" if pending == LISTINGS else ""
        yield Finding("ok", f"listings: {counted.rows} rows, {pending}{more} pending")

    def _refuse_columns(self, cursor: Cursor, counted: inputs.Tally) -> None:
        """DatabaseError where one column alone leaves out nearly all listings."""
        where = quoted(self.environment.listings)
        for column, hint in _LEAVES_OUT.items():
            count = getattr(counted, column)
            if count < NEARLY_ALL * counted.rows:
                continue
            found, kind = f"NULL in {count} of {counted.rows} rows", "a value"
            if column == "spam":
                mark = inputs.usual_mark(cursor, self.environment)
                found, kind = f"{mark!r} or other marks in {count} of {counted.rows} rows", "NULL"
                hint = hint.format(mark=mark.replace("'", "''"))
            raise DatabaseError(
                f"column {column} {kind} where a listing may be embedded", found, where, hint
            )

    def _image_generations(self, cursor: Cursor) -> Iterator[Finding]:
        without, rows = inputs.images_without_generation(cursor, self.environment, IMAGE_ROWS)
        where = quoted(self.environment.images)
        if rows and without >= NEARLY_ALL * rows:
            raise DatabaseError(
                "column generation a value", f"NULL in {without} of {rows} rows", where,
                _LEAVES_OUT["generation"],
            )  # fmt: skip
        if without:
            yield Finding(
                "warn", f"images: {without} of {rows} rows without a generation in {where}"
            )

    def _sampled(self, cursor: Cursor, *, force: bool) -> int:
        """Draw the sample from what is pending, or with `force` eligible; returns its listings."""
        pending = self._pending(cursor, force)
        listings = len(fetch(cursor, pending.listings))
        if listings:
            self.sample = _selected(cursor, pending, self.chosen)
        return listings

    def _pending(self, cursor: Cursor, force: bool) -> Pending:
        """The export's own queries, of few listings."""
        limit = min(LISTINGS, self.chosen.limit_listings)
        identity = self.chosen.identity
        if self._dimension():
            identity = identity_of(self.chosen, self.model)
        chosen = self.chosen.model_copy(
            update={"limit_listings": limit, "force": force, **identity._asdict()}
        )
        files = waiting.Files(chosen, self.environment.image_root)
        left_out = waiting.left_out(files, chosen, chosen.identity)
        return prepare(cursor, self.environment, chosen, left_out)

    def _no_photo(self, failed: dict[str | None, PhotoError]) -> DataError:
        path, fault = next(iter(failed.items()))
        reasons = Counter(str(fault) for fault in failed.values())
        return DataError(
            f"photos at storage_path of {quoted(self.environment.images)}",
            f"none of {len(failed)}: {', '.join(f'{n} {reason}' for reason, n in reasons.items())}",
            f"{self.environment.image_root}; the first is {path!r}",
            _photo_hint(self.environment.image_root, path, fault),
        )


# By column, the view that would help where it leaves out nearly all listings.
_LEAVES_OUT = {
    "spam": "spam is NULL for what is none; in a view: nullif(spam, '{mark}') AS spam;"
    f" {inputs.PAGE} has more",
    "generation": "in a view of listings and one of images: coalesce(generation, 1) AS generation",
    "edited_date": "in a view: coalesce(edited_date, created_at) AS edited_date, or the like",
    "url": "in a view: coalesce(url, '') AS url",
}


def _left_out(counted: inputs.Tally, where: str) -> Iterator[Finding]:
    """What a column leaves out of the listings without being seen."""
    if counted.generation:
        text = f"{counted.generation} of {counted.rows} rows without a generation in {where}"
        yield Finding("warn", f"listings: {text} are left out")
    if counted.said_no:
        text = f"{counted.said_no} of {counted.rows} rows whose spam is a text like 'no' in {where}"
        yield Finding("warn", f"listings: {text} are left out; hint: spam must be NULL there")


def _selected(cursor: Cursor, pending: Pending, chosen: Settings) -> list[str | None]:
    """The photos of the candidates that `select` would take, PHOTOS of them at even distances."""
    from pipeline.workflow.outlook import selected_paths  # loads polars

    paths = list(dict.fromkeys(selected_paths(cursor, pending.candidates, chosen)))
    count = min(PHOTOS, len(paths))
    return [paths[i * len(paths) // count] for i in range(count)]


def _photo_hint(root: Path | str, path: str | None, fault: PhotoError) -> str:
    """How to mend paths none of which leads to a photo, told from the first."""
    column = "AS storage_path in a view"
    said = str(fault)
    if path is None:
        return f"the column that holds the path, {column}"
    whole = f"{os.path.abspath(root) if isinstance(root, Path) else root.rstrip('/')}/"
    if path.startswith(whole):
        return f"substr(storage_path, {len(whole) + 1}) {column}"
    if said.endswith("is a URL"):
        return f"regexp_replace(storage_path, '^[a-z0-9+.-]+://[^/]+/', '') {column}"
    if path.startswith("/"):
        return f"ltrim(storage_path, '/') {column}"
    near = _root_nearby(root, path) if isinstance(root, Path) else None
    return f"export IMAGE_ROOT_DIR={near or 'the folder that the paths start from'}"


def _root_nearby(root: Path, path: str) -> Path | None:
    """A folder one or two levels above or one below `root` from where the path leads to a file."""
    try:
        below = sorted(Path(entry) for entry in os.scandir(root) if entry.is_dir())[:100]
    except OSError:
        below = []
    above = list(Path(os.path.abspath(root)).parents)[:2]
    return next((folder for folder in [*above, *below] if (folder / path).is_file()), None)
