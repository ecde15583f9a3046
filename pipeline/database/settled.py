"""Days on which none but those who wait are without a vector: what a plan need not tell Postgres.

Very many listings that wait, of whose files none was looked at, are compared day by day instead of
one by one. Where a day's hash is the same in the ledger and in the database, it is settled.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from adbc_driver_manager.dbapi import Cursor

from pipeline.database.connection import fetch
from pipeline.database.waiting import LeftOut

Ints = npt.NDArray[np.int64]

DAY = 86_400_000_000  # microseconds

# Of each day the rows that have a date, in the export's order, as `_hashes` joins them.
_HASHES = f"""
    SELECT us - us % {DAY} AS day,
           md5(string_agg(concat_ws('|', generation, listing_id, us), chr(10)
               ORDER BY us DESC, listing_id))
    FROM {{rows}} GROUP BY 1"""

# Exact in a double, too, which older versions of Postgres extract.
_MICROSECONDS = "(extract(epoch FROM {date}) * 1000000)::bigint"
_LISTED = _MICROSECONDS.format(date="l.edited_date::timestamptz")

# A condition more for a listing `l`; the days are bound.
NOT_SETTLED = f"""
    AND NOT EXISTS (
        SELECT FROM unnest(current_setting('listing_vectors.settled')::bigint[]) AS settled(day)
        WHERE day = {_LISTED} - {_LISTED} % {DAY})"""


class Settled(NamedTuple):
    """Who waits on settled days, and who else waits."""

    days: list[int]  # the first microsecond of each, counted from 1970
    by_reason: Counter[str]
    others: LeftOut


def settle(cursor: Cursor, waiting: LeftOut, unfinished: str) -> Settled:
    """Compare the days of those of whom no file was looked at.

    `unfinished`: the query of the (generation, listing_id, edited_date) that have no vector.
    """
    unseen = waiting.unseen
    if not unseen.num_rows:
        return Settled([], Counter(), waiting)
    rows = f"(SELECT *, {_MICROSECONDS.format(date='edited_date')} AS us FROM ({unfinished}) u) r"
    there = dict(fetch(cursor, _HASHES.format(rows=rows)))
    us = unseen["edited_date"].cast(pa.int64()).to_numpy()
    day_of = us - np.fmod(us, DAY)
    days = [day for day, hashed in _hashes(unseen, day_of) if there.get(day) == hashed]
    settled = pa.array(np.isin(day_of, days))
    reasons = unseen.filter(settled)["reason"].value_counts().to_pylist()
    return Settled(
        days,
        Counter({each["values"]: each["counts"] for each in reasons}),
        waiting._replace(unseen=unseen.filter(pc.invert(settled))),
    )


def _hashes(unseen: pa.Table, day_of: Ints) -> Iterator[tuple[int, str]]:
    """Of each day the hash of its rows; a ledger has them in the export's order."""
    us = unseen["edited_date"].cast(pa.int64())
    columns = (
        column.cast(pa.string()) for column in (unseen["generation"], unseen["listing_id"], us)
    )
    rows = pc.binary_join_element_wise(*columns, "|").combine_chunks()
    starts = np.flatnonzero(np.append(True, day_of[1:] != day_of[:-1]))
    for start, stop in itertools.pairwise([*starts.tolist(), len(rows)]):
        text = "\n".join(rows[start:stop].to_pylist())
        yield int(day_of[start]), hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
