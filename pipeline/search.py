"""Find the listings that are nearest to a listing, to photos or to words.

Reads: the pgvector table, as it is or as it was; for photos and words, the model. Writes nothing
but what it prints, or --out. Guarantees: vectors of one key only, made by the encoder that makes
the query's; never a listing that is deleted or spam by now; never the listing itself.
"""

import argparse
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from pipeline.database import registry, target
from pipeline.database.connection import connect
from pipeline.database.neighbours import Neighbour, Neighbourhood
from pipeline.database.registry import MadeBy
from pipeline.encode import Decoder
from pipeline.encoder.model import (
    NEVER_MIXED,
    Model,
    key_of,
    model_of,
    resolve_device,
    resolve_precision,
)
from pipeline.photos.files import PhotoError
from pipeline.photos.root import photos_at
from pipeline.select import select_images
from pipeline.stage import command, settings
from pipeline.stage.errors import DataError, ModelError, PipelineError, SettingsError
from pipeline.stage.parquet import replacing
from pipeline.stage.settings import Environment, Identity, Settings

FORMATS = ("table", "json", "html")
THUMBNAIL = 192  # pixels a side: sharp on a screen of two pixels a point

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Found:
    """A neighbour and the photos, by storage_path, that the pipeline would choose of it."""

    neighbour: Neighbour
    photos: list[str]

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "listing_id": self.neighbour.listing_id,
            "edited_date": self.neighbour.edited_date.isoformat(),
            "cosine": round(self.neighbour.cosine, 6),
            "photos": self.photos,
        }


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What is asked, of which vectors, and how the answer looks."""
    parser.add_argument("listing_id", type=command.bigint, nargs="?", metavar="LISTING_ID")
    parser.add_argument("--image", type=Path, nargs="+", default=[], help="photos: their mean")
    parser.add_argument("--text", help="words, where the model has a text tower")
    parser.add_argument("--top", type=int, default=10, help="how many")
    parser.add_argument(
        "--as-of", type=_moment, metavar="DATE", help="as it was then; UTC, 2026-01-31 is midnight"
    )
    parser.add_argument("--source", help="of the key; that of the settings by default")
    parser.add_argument("--model-rev", help="of the key; that of the settings by default")
    parser.add_argument("--pca-rev", help="of the key; that of the settings by default")
    parser.add_argument("--format", choices=FORMATS, default="table", help="html: a contact sheet")
    parser.add_argument("--out", type=Path, help="write there instead of on the screen")


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def main(args: argparse.Namespace) -> None:
    """Ask, and show."""
    asked = [args.listing_id is not None, bool(args.image), args.text is not None]
    if sum(asked) != 1:
        raise SettingsError(
            "one of LISTING_ID, --image and --text", "several" if any(asked) else "none"
        )
    if args.top < 1:
        raise SettingsError("--top, 1 at least", str(args.top))
    if args.format == "html" and not args.out:
        raise SettingsError("--out FILE with --format html", "none")
    chosen, environment = settings.read_config(args.config), Environment.read()
    answer = Search(args, chosen, environment).answer()
    if args.out:
        with replacing(args.out) as temporary:
            temporary.write_text(answer, encoding="utf-8")
        print(args.out)
    else:
        print(answer, end="")


class Search:
    """One question."""

    def __init__(
        self, args: argparse.Namespace, chosen: Settings, environment: Environment
    ) -> None:
        self._args, self._environment = args, environment
        self._chosen = settings.under_key(chosen, args)
        self._by_model = args.listing_id is None

    def answer(self) -> str:
        """The neighbours in the format that was asked for."""
        identity, query = key_of(self._chosen), None
        if self._by_model:
            self._refuse_another_encoder(identity)
            query = self._encoded()
        with connect(read_only=True, repeatable=True) as connection, connection.cursor() as cursor:
            target.check(cursor, self._environment, None if query is None else len(query))
            there = Neighbourhood(cursor, self._environment, identity, self._args.as_of)
            if query is None:
                query = there.vector_of(self._args.listing_id)
            nearest = there.nearest(query, self._args.top, self._args.listing_id)
            photos = self._photos(there, nearest)
            asked = self._photos_of_the_listing(there)
        found = [Found(each, photos.get(each.listing_id, [])) for each in nearest]
        if self._args.format == "json":
            return json.dumps([each.as_dict() for each in found]) + "\n"
        if self._args.format == "html":
            return self._page(found, identity, asked)
        return _table(found)

    @functools.cached_property
    def _model(self) -> Model:
        return model_of(self._chosen)

    def _refuse_another_encoder(self, identity: Identity) -> None:
        """ModelError: the vectors of the key are not known to be made as the query's will be."""
        with connect(read_only=True) as connection, connection.cursor() as cursor:
            there = registry.registered(cursor, self._environment).get(identity)
        ours = MadeBy.planned(self._chosen, self._model)
        found = "none that is registered" if there is None else _unlike(there, ours)
        if found:
            raise ModelError(
                f"the encoder that made the vectors of {identity}", found, self._model.model_rev,
                "set model_name and pretrained, and pca; or --source, --model-rev and --pca-rev",
            )  # fmt: skip

    def _encoded(self) -> Vector:
        """The unit vector of the words, or of the photos' mean, projected as those of the key."""
        query: npt.NDArray[np.floating] = self._mean()
        if self._model.projection:
            query = self._model.projection.apply(query[np.newaxis])[0]
        length = np.linalg.norm(query)
        if not length > 0:
            raise DataError("photos with a direction", "vectors that cancel out or are not finite")
        vector: Vector = (query / length).astype(np.float32)
        return vector

    def _mean(self) -> npt.NDArray[np.floating]:
        """The unit vector of the words, or of the photos' mean, as the encoder has it."""
        if self._args.text is not None:
            from pipeline.encoder.text import encode_text

            return encode_text(self._model, self._args.text)
        files = [_bytes_of(path) for path in self._args.image]
        from pipeline.encoder.tower import load_encoder

        device = resolve_device(self._chosen.device)
        precision = resolve_precision(self._chosen.precision, device)
        encoder = load_encoder(self._model, device, precision, 1, self._chosen.batch_size)
        decode = Decoder(encoder.preprocess, self._chosen)
        pixels = [
            _decoded(data, decode, path) for path, data in zip(self._args.image, files, strict=True)
        ]
        mean = encoder.encode(pixels).mean(axis=0, dtype=np.float64)
        with np.errstate(all="ignore"):  # of photos that cancel out
            unit: npt.NDArray[np.float64] = mean / np.linalg.norm(mean)
        return unit

    def _photos(self, there: Neighbourhood, of: Sequence[Neighbour]) -> dict[int, list[str]]:
        """Of each listing the storage_path of the photos that `select` would take, by rank."""
        candidates = pl.DataFrame(there.candidates([(n.listing_id, n.edited_date) for n in of]))
        chosen = self._chosen
        selected = select_images(
            candidates, chosen.topk, chosen.exclude_stock, chosen.exclude_screenshots
        )
        photos: dict[int, list[str]] = {}
        for row in selected.sort("listing_id", "rank").iter_rows(named=True):
            photos.setdefault(row["listing_id"], []).append(row["storage_path"] or "")
        return photos

    def _photos_of_the_listing(self, there: Neighbourhood) -> list[str]:
        if self._by_model or self._args.format != "html":
            return []
        moment = self._args.as_of or datetime.now(UTC)
        listing = Neighbour(self._args.listing_id, moment, 1.0)
        return self._photos(there, [listing]).get(listing.listing_id, [])

    def _page(self, found: Sequence[Found], identity: Identity, asked: Sequence[str]) -> str:
        from pipeline.pages.template import page

        root = photos_at(self._environment.image_root, self._chosen)

        def shown(paths: Sequence[str]) -> list[dict[str, str]]:
            return [self._shown(path, lambda path=path: root.read(path)[0]) for path in paths]

        query = shown(asked) + [self._shown(p.name, p.read_bytes) for p in self._args.image]
        return page(
            "search.html",
            asked=_asked(self._args),
            key=" · ".join(filter(None, identity)),
            moment=self._args.as_of,
            query=query,
            neighbours=[each.as_dict() | {"photos": shown(each.photos)} for each in found],
        )

    def _shown(self, path: str, read: Any) -> dict[str, str]:
        """A photo for the page, or why there is none."""
        from pipeline.photos.thumbnail import thumbnail

        try:
            image = thumbnail(read(), THUMBNAIL, self._chosen)
        except (PhotoError, PipelineError, OSError) as error:
            return {"path": path, "image": "", "error": str(error)}
        return {"path": path, "image": image, "error": ""}


def _unlike(there: MadeBy, ours: MadeBy) -> str:
    """'another weights and projection', or nothing: what forbids to compare their vectors."""
    parts = [p for p in NEVER_MIXED if there.encoder.get(p) != ours.encoder.get(p)]
    if (there.recipe or {}).get("projection", "") != (ours.recipe or {})["projection"]:
        parts.append("projection")
    return f"another {' and '.join(parts)}" if parts else ""


def _bytes_of(path: Path) -> bytes:
    """One of the user's own files."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError("a photo", (error.strerror or str(error)).lower(), str(path)) from None


def _decoded(data: bytes, decode: Decoder, path: Path) -> Any:
    try:
        return decode(data)
    except PhotoError as error:
        raise DataError("a photo", str(error), str(path)) from None


def _asked(args: argparse.Namespace) -> str:
    if args.text is not None:
        return f"“{args.text}”"
    if args.image:
        return ", ".join(path.name for path in args.image)
    return f"listing {args.listing_id}"


def _table(found: Sequence[Found]) -> str:
    """For people: nearest first."""
    rows = [("cosine", "listing_id", "edited", "photos")]
    for each in found:
        one = each.neighbour
        rows.append(
            (f"{one.cosine:.3f}", str(one.listing_id), f"{one.edited_date:%Y-%m-%d %H:%M}",
             " ".join(each.photos))
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "".join(f"{'  '.join(row).rstrip()}\n" for row in cells)
