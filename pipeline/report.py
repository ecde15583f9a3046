"""Make the report: where the listings stand, how good their vectors are, where the time went.

Reads: the database as it is, the files and logs of the last run as far as they are at hand, photos.
Writes: index.html, one file that fetches nothing. Guarantees: memory and the page's size do not
grow with the table: what is shown is a sample, and the page says so; texts of strangers are
escaped; of photos only pixels are kept.
"""

import heapq
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from adbc_driver_manager.dbapi import Cursor
from markupsafe import Markup

from pipeline.database import census, target, waiting
from pipeline.database.connection import connect, described, quoted
from pipeline.database.neighbours import Neighbourhood
from pipeline.database.pending import prepare
from pipeline.database.sample import Current, Embedded
from pipeline.pages import plots
from pipeline.pages.template import page
from pipeline.photos.album import Album
from pipeline.retrieval.photos import NEAR as TWINS
from pipeline.select import select_images, why_not
from pipeline.stage import command, parquet, settings
from pipeline.stage.command import log
from pipeline.stage.settings import Environment, Identity, Settings

SAMPLE = 1500  # listings whose neighbours are looked for, among all
GALLERY = 200_000  # vectors that they are compared with; of more, one in so many
PAGE = 300  # listings in the explorer, with their photos
SEEDS = 12  # of each kind
NEAREST = 8
PHOTOS = 10  # of a listing
SIDE, DOT_SIDE = 112, 48  # pixels of a thumbnail
ROWS = 20  # of a list

RESULTS, LOGS = Path("results"), Path("logs")
JOBS = Path(".snakemake/metadata")
RECORD = Path(".snakemake/last-run.json")
CHAIN = ("export", "select", "encode", "aggregate", "load")

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


def main() -> None:
    parser = command.stage_parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the page to write")
    settings.add_flags(
        parser, "topk", "exclude_stock", "exclude_screenshots", "apply_exif_orientation",
        "cache_dir", *settings.PHOTO_LIMITS, *Identity._fields,
    )  # fmt: skip
    args = parser.parse_args()
    chosen, environment = settings.from_flags(args), Environment.read()
    text = report(chosen, environment)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with parquet.replacing(args.output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    log.info("%.1f MB -> %s", len(text.encode()) / 1e6, args.output)


def report(chosen: Settings, environment: Environment) -> str:
    """The page as HTML."""
    with connect(read_only=True, repeatable=True) as connection, connection.cursor() as cursor:
        target.check(cursor, environment, None)
        database = described(cursor)
        left_out = waiting.left_out(
            waiting.Files(chosen, environment.image_root), chosen, chosen.identity
        )
        standing = census.take(cursor, prepare(cursor, environment, chosen, left_out))
        there = Neighbourhood(cursor, environment, chosen.identity, None)
        sample = _sampled(cursor, environment, chosen, there)
    album = Album(chosen, environment)
    album.make(sample.pictures())
    shown = {one.listing_id: sample.listing(one, album) for one in sample.on_page}
    dots = sample.map(album)
    run = _last_run()
    stages, rates, encoded = _seconds(), list(_rates()), _encode_stats()
    strangers = _strangers()
    shared = _shared()

    def link(listing: int) -> Markup:
        text = f"listing {listing}"
        return (
            Markup('<a href="#listing-{}">{}</a>').format(listing, text)
            if (listing in shown)
            else Markup.escape(text)
        )

    data = {
        "listings": list(shown.values()),
        "seeds": [(title, [i for i in ids if i in shown]) for title, ids in sample.seeds.items()],
        "map": dots,
    }
    binding = max(stages, key=lambda name: stages[name], default="")
    return page(
        "report.html",
        database=database,
        table=quoted(environment.vectors),
        key=str(chosen.identity),
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        run=run,
        funnel=list(_funnel(standing, encoded if run else [])),
        stages=stages,
        stages_plot=stages and plots.bars(stages, "seconds"),
        stages_text=", ".join(f"{name} {seconds:.1f} s" for name, seconds in stages.items()),
        binding=f"Most went into {binding}." if binding else "",
        rate_plot=plots.line(rates, "minutes", "images/s") if len(rates) > 2 else "",
        rate_text=f"Between {min(r for _, r in rates):.0f} and {max(r for _, r in rates):.0f}"
        " images a second" if rates else "",
        hits=_hits(encoded),
        explorer_note=sample.note(len(shown)),
        cosines_plot=sample.random_pairs and plots.histogram(
            {"random pairs": sample.random_pairs, "nearest": sample.nearest_cosines}, "cosine"
        ),
        cosines_text="Median cosine of random pairs"
        f" {np.median(sample.random_pairs or [0]):.2f},"
        f" to the nearest {np.median(sample.nearest_cosines or [0]):.2f}",
        sampled=f"{len(sample.sampled):,}",
        twins=sample.twins()[:ROWS],
        twin_cosine=TWINS,
        shared=shared,
        strangers=strangers,
        map_note=f"{len(dots):,} listings by the two directions in which they differ most"
        " (PCA). Near each other here may still be far apart; far apart here is far apart.",
        link=link,
        data=Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")),
    )  # fmt: skip


# --- the sample and its neighbours


@dataclass
class Sample:
    """Listings with their neighbours among all, and those that have a place on the page."""

    total: int
    share: int  # one in so many vectors is compared with
    sampled: list[Embedded]
    vectors: Vectors
    nearest: dict[int, list[tuple[int, float]]]  # by listing, nearest first
    candidates: pl.DataFrame
    selected: pl.DataFrame
    chosen: Settings
    seeds: dict[str, list[int]] = field(default_factory=dict)
    on_page: list[Embedded] = field(default_factory=list)

    @property
    def nearest_cosines(self) -> list[float]:
        sampled = {one.listing_id for one in self.sampled}
        return [n[0][1] for i, n in self.nearest.items() if n and i in sampled]

    @property
    def random_pairs(self) -> list[float]:
        """Cosines of pairs that a fixed seed draws."""
        number = len(self.vectors)
        if number < 3:
            return []
        a, b = np.random.default_rng(0).integers(0, number, (2, 5000))
        cosines = np.einsum("ij,ij->i", self.vectors[a[a != b]], self.vectors[b[a != b]])
        return [float(cosine) for cosine in cosines]

    def twins(self) -> list[tuple[int, int, float]]:
        """Pairs that are nearly the same, the nearest first."""
        pairs = {
            (min(a, b), max(a, b)): cosine
            for a, near in self.nearest.items()
            for b, cosine in near
            if cosine >= TWINS
        }
        return sorted(((a, b, c) for (a, b), c in pairs.items()), key=lambda row: (-row[2], row[0]))

    def note(self, shown: int) -> str:
        """How much of the table this is."""
        if self.total == shown and self.share == 1:
            return f"All {self.total:,} listings."
        compared = "all" if self.share == 1 else f"one in {self.share} of the"
        return (
            f"{shown:,} of {self.total:,} listings: the newest, random ones, odd ones, and their"
            f" neighbours among {compared} others."
        )

    def listing(self, one: Embedded, album: Album) -> dict[str, Any]:
        """A listing of the explorer: its photos, chosen ones first, and its nearest."""
        of = pl.col("listing_id") == one.listing_id
        candidates, selected = self.candidates.filter(of), self.selected.filter(of)
        ranks = {(r["image_index"], r["storage_path"]): r for r in selected.iter_rows(named=True)}
        fallback = bool(selected["fallback"].any())
        photos: list[dict[str, Any]] = []
        for row in candidates.iter_rows(named=True):
            chosen = ranks.get((row["image_index"], row["storage_path"]))
            said = why_not(row, fallback, self.chosen) if chosen is None else ""
            if chosen and chosen["fallback"]:
                said = f"fallback, rank {chosen['rank']}"
            rank = chosen["rank"] if chosen else 0
            photos.append({"rank": rank, "path": row["storage_path"] or "", "said": said})
        photos.sort(key=lambda photo: photo["rank"] or PHOTOS)
        for photo in photos[:PHOTOS]:
            photo["image"], error = album.thumbnail(photo["path"], SIDE)
            photo["said"] = ", ".join(filter(None, (photo["said"], error)))
        return {
            "id": one.listing_id,
            "edited": f"{one.edited_date:%Y-%m-%d %H:%M} UTC",
            "n_images": one.n_images,
            "photos": photos[:PHOTOS],
            "nearest": [(i, round(cosine, 4)) for i, cosine in self.nearest[one.listing_id]],
        }

    def pictures(self) -> Iterator[tuple[str, int]]:
        """The photos of the page by their path, and their sides in pixels."""
        on_page = pl.col("listing_id").is_in([one.listing_id for one in self.on_page])
        for path in self.candidates.filter(on_page)["storage_path"]:
            yield path or "", SIDE
        for path in self._first().values():
            yield path or "", DOT_SIDE

    def _first(self) -> dict[int, str | None]:
        """Of each listing its photo of rank 1."""
        first = self.selected.filter(pl.col("rank") == 1).select("listing_id", "storage_path")
        return dict(first.rows())

    def map(self, album: Album) -> list[tuple[int, float, float, str]]:
        """(listing, x, y, thumbnail) of the sample, x and y from 0 to 1."""
        if len(self.vectors) < 3:
            return []
        centred = self.vectors - self.vectors.mean(axis=0)
        _, _, directions = np.linalg.svd(centred.T @ centred)
        flat = centred @ directions[:2].T
        flat = (flat - flat.min(axis=0)) / np.maximum(np.ptp(flat, axis=0), 1e-9)
        first = self._first()
        return [
            (one.listing_id, round(float(x), 4), round(float(y), 4),
             album.thumbnail(first.get(one.listing_id) or "", DOT_SIDE)[0])
            for one, (x, y) in zip(self.sampled, flat, strict=True)
        ]  # fmt: skip


def _sampled(
    cursor: Cursor, environment: Environment, chosen: Settings, there: Neighbourhood
) -> Sample:
    current = Current(cursor, environment, chosen.identity)
    total = current.count()
    share = max(1, -(-total // GALLERY))
    newest = [one.listing_id for one in current.newest(SEEDS)]
    drawn = [one.listing_id for one in current.random(SAMPLE - SEEDS)]
    sampled, vectors = current.of(list({*newest, *drawn}))
    nearest = _nearest(current, sampled, vectors, share)
    candidates = pl.DataFrame(there.candidates([(s.listing_id, s.edited_date) for s in sampled]))
    selected = _selected(candidates, chosen)
    seeds = {"Newest": newest, "Random": drawn[:SEEDS], **_odd(sampled, nearest, selected)}
    on_page = _page_of(seeds, nearest)
    others, more = current.of([i for i in on_page if i not in nearest])
    nearest |= _nearest(current, others, more, share)
    candidates = pl.concat(
        [candidates,
         pl.DataFrame(there.candidates([(o.listing_id, o.edited_date) for o in others]))]
    )  # fmt: skip
    known = {one.listing_id: one for one in (*sampled, *others)}
    return Sample(
        total, share, sampled, vectors, nearest, candidates, _selected(candidates, chosen), chosen,
        seeds, [known[i] for i in on_page if i in known],
    )  # fmt: skip


def _selected(candidates: pl.DataFrame, chosen: Settings) -> pl.DataFrame:
    return select_images(candidates, chosen.topk, chosen.exclude_stock, chosen.exclude_screenshots)


def _nearest(
    current: Current, of: Sequence[Embedded], vectors: Vectors, share: int
) -> dict[int, list[tuple[int, float]]]:
    """The NEAREST of each, exact, in one pass over the table in bounded memory."""
    if not of:
        return {}
    ids = np.array([one.listing_id for one in of])
    best = np.full((len(of), NEAREST), -np.inf, np.float32)
    who = np.zeros((len(of), NEAREST), np.int64)
    for others, batch in current.stream(share):
        cosines = vectors @ batch.T
        cosines[ids[:, None] == others[None, :]] = -np.inf
        every = np.concatenate([best, cosines], axis=1)
        whose = np.concatenate([who, np.broadcast_to(others, cosines.shape)], axis=1)
        kept = np.argpartition(-every, NEAREST - 1, axis=1)[:, :NEAREST]
        best, who = np.take_along_axis(every, kept, 1), np.take_along_axis(whose, kept, 1)
    order = np.argsort(-best, axis=1, kind="stable")
    best, who = np.take_along_axis(best, order, 1), np.take_along_axis(who, order, 1)
    return {
        int(i): [(int(w), float(c)) for w, c in zip(row, cosines, strict=True) if c > -np.inf]
        for i, row, cosines in zip(ids, who, best, strict=True)
    }


def _odd(
    sampled: Sequence[Embedded],
    nearest: dict[int, list[tuple[int, float]]],
    selected: pl.DataFrame,
) -> dict[str, list[int]]:
    """What is worth a look, by what is odd about it."""
    wanted = dict(selected.group_by("listing_id").len().rows())
    fallback = set(selected.filter("fallback")["listing_id"])
    cosine = {i: near[0][1] for i, near in nearest.items() if near}
    alone = sorted(cosine, key=lambda i: cosine[i])
    return {
        "Failed photos": [s.listing_id for s in sampled
                          if s.n_images < wanted.get(s.listing_id, 0)][:SEEDS],
        "Fallback": [s.listing_id for s in sampled if s.listing_id in fallback][:SEEDS],
        "One photo": [s.listing_id for s in sampled if s.n_images == 1][:SEEDS],
        "Far from everything": alone[:SEEDS],
        "Nearly the same as another": [i for i in alone[::-1] if cosine[i] >= TWINS][:SEEDS],
    }  # fmt: skip


def _page_of(seeds: dict[str, list[int]], nearest: dict[int, list[tuple[int, float]]]) -> list[int]:
    """Seeds, then neighbours, the nearest first, until the page is full; sampled ones go on."""
    on_page = list(dict.fromkeys(i for ids in seeds.values() for i in ids))
    for listing in on_page:  # grows as it goes
        for other, _ in nearest.get(listing, []):
            if len(on_page) >= PAGE:
                return on_page
            if other not in on_page:
                on_page.append(other)
    return on_page


# --- the last run, from what it left


def _funnel(standing: census.Census, encoded: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    def step(name: str, number: int, reasons: dict[str, int] = {}) -> dict[str, Any]:  # noqa: B006
        said = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
        return {"name": name, "number": number, "reasons": said}

    stands = standing.standing
    yield step("rows of the listings table", standing.listings)
    yield step("left out", sum(standing.left_out.values()), standing.left_out)
    yield step("eligible listings", stands.eligible)
    yield step("with a vector", stands.with_vector)
    yield step("pending", stands.pending)
    yield step("waiting for a file", stands.waiting, stands.waiting_by_reason)
    if not encoded:
        return
    for name, file in (("listings", "listings"), ("candidate photos", "images")):
        path = RESULTS / "export" / f"{file}.parquet"
        if path.exists():
            yield step(f"last run: {name}", parquet.rows([path]))
    how: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for shard in encoded:
        how.update(shard["saved"])
        failed.update(shard["failed"])
    yield step("last run: photos selected", sum(shard["images"] for shard in encoded))
    yield step("last run: encoded", sum(shard["encoded"] for shard in encoded))
    yield step("last run: from the cache", how.total(), how)
    yield step("last run: failed", failed.total(), failed)
    receipt = RESULTS / "load" / "receipt.json"
    if receipt.exists():
        loaded = json.loads(receipt.read_text())
        parts = {name: loaded[name] for name in ("inserted", "updated", "unchanged")}
        yield step("last run: loaded", sum(parts.values()), parts)


def _last_run() -> dict[str, str]:
    """When it was and how it ended; nothing where none has ended in this folder."""
    try:
        kept = json.loads(RECORD.read_text())
        when = f"{datetime.fromtimestamp(kept['began'], UTC):%Y-%m-%d %H:%M} UTC"
        return {"when": when, "outcome": kept["outcome"]}
    except (OSError, ValueError, KeyError):
        return {}


def _seconds() -> dict[str, float]:
    """Of each stage the seconds of its jobs, as Snakemake noted them with each of their files."""
    spans: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for path in JOBS.rglob("*"):
        try:
            job = json.loads(path.read_text())
            span = job["starttime"], job["endtime"]
            spans.setdefault((job["rule"], str(job["log"])), []).append(span)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    seconds: dict[str, float] = dict.fromkeys(CHAIN, 0.0)
    for (rule, _), of_job in spans.items():
        if rule in seconds:
            seconds[rule] += max(end for _, end in of_job) - min(start for start, _ in of_job)
    return {rule: round(each, 1) for rule, each in seconds.items() if each}


def _rates() -> Iterator[tuple[float, float]]:
    """(minutes, images a second) as the shards of the last encode said them, one after another."""
    minutes = 0.0
    for path in sorted((LOGS / "encode").glob("*.log")):
        for said in re.findall(r"images, ([0-9.]+) images/s", path.read_text(errors="replace")):
            minutes += command.Progress.LINE_S / 60
            yield minutes, float(said)


def _encode_stats() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((RESULTS / "encode").glob("*.json"))]


def _hits(encoded: Iterable[dict[str, Any]]) -> str:
    saved: Counter[str] = Counter()
    images = 0
    for shard in encoded:
        saved.update(shard["saved"])
        images += shard["images"]
    if not images:
        return ""
    parts = ", ".join(f"{count:,} {how}" for how, count in saved.items() if count) or "none"
    return f"Of the {images:,} photos of the last run the cache had {saved.total():,}: {parts}."


def _shards() -> list[str]:
    return [str(path) for path in sorted((RESULTS / "encode").glob("*-of-*.parquet"))]


def _query(sql: str) -> list[tuple[Any, ...]]:
    """Rows of a query over the encode shards, in bounded memory; none where there are none."""
    if not _shards():
        return []
    with duckdb.connect(config={"memory_limit": "512MB", "threads": 2}) as con:
        con.read_parquet(_shards()).create_view("encoded")
        return con.execute(sql).fetchall()


def _shared() -> list[tuple[str, int, list[int]]]:
    """(path, listings, the first of them) of photos with one vector in several listings."""
    return _query(
        f"""SELECT min(storage_path), count(DISTINCT listing_id) AS n,
                   list_sort(list(DISTINCT listing_id))[:{NEAREST}]
        FROM encoded WHERE vec IS NOT NULL GROUP BY hash(vec) HAVING n > 1
        ORDER BY n DESC, 1 LIMIT {ROWS}"""
    )


def _strangers() -> list[tuple[int, str, float]]:
    """(listing, path, cosine to the mean) of the images that fit their listings least."""
    worst: list[tuple[float, int, str]] = []
    for path in _shards():
        for rows in parquet.clustered_batches(Path(path)):
            worst = heapq.nsmallest(ROWS, [*worst, *_fits(rows)])
    return [(listing, path, cosine) for cosine, listing, path in worst]


def _fits(rows: pa.Table) -> Iterator[tuple[float, int, str]]:
    """(cosine to the mean, listing, path) of each image that has two others beside it."""
    rows = rows.filter(pc.is_valid(rows["vec"]))
    if not rows.num_rows:
        return
    vectors = parquet.matrix(rows)
    listings = rows["listing_id"].to_numpy()
    starts = np.flatnonzero(np.diff(listings, prepend=listings[0] - 1))
    sizes = np.diff(starts, append=len(listings))
    means = np.add.reduceat(vectors, starts)
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-9)
    cosines = np.einsum("ij,ij->i", vectors, np.repeat(means, sizes, axis=0))
    paths = rows["storage_path"].to_pylist()
    for row in np.flatnonzero(np.repeat(sizes, sizes) > 2).tolist():
        yield float(cosines[row]), int(listings[row]), paths[row]


if __name__ == "__main__":
    command.run(main, "report")
