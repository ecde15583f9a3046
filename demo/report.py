"""What the demo shows at its end: what happened, who is like whom, and where to look further."""

import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import adbc_driver_postgresql.dbapi as adbc
import numpy as np
from pgvector import Vector

from demo import postgres

PROBES = 5
NEIGHBOURS = 3

# The vectors of the encoder that loaded last, of listings as they are now.
_CURRENT = """
current_vectors as (
    select l.listing_id, l.title, v.vec, v.n_images
    from "iPhone".iphone_listings l
    join ml.img_vec512_v1 v using (listing_id, edited_date)
    where (source, model_rev, pca_rev) = (
        select source, model_rev, pca_rev from ml.img_vec512_v1
        order by updated_at desc, source, model_rev, pca_rev limit 1)
)"""

_HAPPENED = f"""
with {_CURRENT},
listings as (
    select l.*, exists (
        select from "iPhone".iphone_image_assets a
        where (a.generation, a.listing_id) = (l.generation, l.listing_id)) as has_images
    from "iPhone".iphone_listings l
)
select 'listings', count(*) from listings
union all select '  spam', count(*) from listings where spam is not null
union all select '  without a url', count(*) from listings where url is null
union all select '  without a date', count(*) from listings where edited_date is null
union all select '  without an image', count(*) from listings where not has_images
union all select 'listings with a vector', count(*) from current_vectors
union all select '  images in their means', coalesce(sum(n_images), 0) from current_vectors
"""

_NEAREST = f"""
with {_CURRENT},
titles as (
    select distinct on (title) * from current_vectors order by title, listing_id
),
probes as (
    select distinct on (part) * from (
        select *, ntile({PROBES}) over (order by listing_id) as part from titles
    ) parts
    order by part, listing_id
)
select p.listing_id, p.title, n.title, 1 - n.distance
from probes p cross join lateral (
    select c.listing_id, c.title, c.vec <=> p.vec as distance from current_vectors c
    where c.listing_id <> p.listing_id
    order by distance, c.listing_id limit {NEIGHBOURS}
) n
order by p.listing_id, n.distance, n.listing_id
"""

_VECTORS = f"with {_CURRENT} select title, vec from current_vectors order by listing_id"


def print_report(dsn: str, folder: Path, image_root: str, snakemake: str, *, made_up: bool) -> None:
    """Print the whole report about the database at `dsn`."""
    with adbc.connect(dsn) as connection, connection.cursor() as cursor:
        _print_happened(_rows(cursor, _HAPPENED))
        nearest = _rows(cursor, _NEAREST)
        _print_nearest(nearest)
        if made_up:
            offered, found = _same_phone(_rows(cursor, _VECTORS))
            print(
                f"\n{offered} of the listings offer a phone that others offer too, with other "
                f"photos.\nFor {found} of them the nearest neighbour is such an offer."
            )
    probe = nearest[0][0] if nearest else 0
    _print_further(dsn, folder, image_root, snakemake, probe)


def _same_phone(rows: Sequence[tuple[Any, ...]]) -> tuple[int, int]:
    """How many listings offer a phone that others offer too, and whose neighbour is such an offer.

    In the made-up marketplace listings with one title offer one phone, with photos of their own.
    The vectors have unit length, so that inner products are cosines.
    """
    if not rows:
        return 0, 0
    titles = [title for title, _ in rows]
    vectors = np.array([Vector.from_binary(vec).to_numpy() for _, vec in rows])
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -np.inf)
    offers = Counter(titles)
    again = [row for row, title in enumerate(titles) if offers[title] > 1]
    return len(again), sum(titles[cosines[row].argmax()] == titles[row] for row in again)


def _rows(cursor: Any, query: str) -> list[tuple[Any, ...]]:
    cursor.execute(query)
    return list(cursor.fetchall())


def _print_happened(rows: Sequence[tuple[Any, ...]]) -> None:
    print("\nWhat happened\n")
    for label, count in rows:
        if count or not label.startswith(" "):
            print(f"  {label:<26}{int(count):>7}")


def _print_nearest(rows: Sequence[tuple[Any, ...]]) -> None:
    print("\nNearest neighbours, and the cosine of the angle to them\n")
    width = max((len(row[1]) for row in rows), default=0)
    probe = None
    for listing_id, title, neighbour, cosine in rows:
        print(f"  {title if listing_id != probe else '':<{width}}  {cosine:6.3f}  {neighbour}")
        probe = listing_id


def _print_further(dsn: str, folder: Path, image_root: str, snakemake: str, probe: int) -> None:
    python = shlex.quote(_typed(sys.executable))
    psql = shlex.quote(_typed(str(postgres.binary("psql"))))
    touch = (
        'update "iPhone".iphone_listings set edited_date = now() where listing_id = '
        "(select min(listing_id) from ml.img_vec512_v1_current)"
    )
    typed = _typed(str(folder))
    stop = "" if typed == "demo/data" else f" --folder {shlex.quote(typed)}"
    model = snakemake.partition("--config ")[2]
    print(f"""
Look further

  The report, in a browser: results/report/index.html

  export PG_DSN={shlex.quote(dsn)}
  export IMAGE_ROOT_DIR={shlex.quote(image_root)}
  What is like a listing, as a sheet of photos:
    {python} -m pipeline search {probe} --format html --out sheet.html --config {model}
  Edit a listing and run again: only that one is pending, and its images come from the cache:
    {psql} "$PG_DSN" -c {shlex.quote(touch)}
    {_typed_words(snakemake)}
  Stop the Postgres, which keeps running:
    {python} -m demo stop{stop}""")


def _typed_words(snakemake: str) -> str:
    return f"{shlex.quote(_typed(sys.executable))} -m {snakemake}"


def _typed(path: str) -> str:
    """A path below the working folder without it."""
    return (
        str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else path
    )
