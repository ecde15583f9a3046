"""Where the listings stand: each row in one group, counted in one snapshot."""

from collections import Counter
from dataclasses import dataclass

from adbc_driver_manager.dbapi import Cursor

from pipeline.database.connection import fetch
from pipeline.database.pending import OTHER_GENERATION, RULES, Pending


@dataclass(frozen=True)
class Standing:
    """eligible = with_vector + pending + waiting."""

    eligible: int  # listings, an edit of each
    with_vector: int  # under the key that was asked for
    waiting_by_reason: dict[str, int]

    @property
    def waiting(self) -> int:
        return sum(self.waiting_by_reason.values())

    @property
    def pending(self) -> int:
        return self.eligible - self.with_vector - self.waiting


@dataclass(frozen=True)
class Census:
    """listings = standing.eligible + sum(left_out)."""

    listings: int  # rows of the listings table
    left_out: dict[str, int]  # rows by reason: RULES and OTHER_GENERATION
    standing: Standing


def take(cursor: Cursor, pending: Pending) -> Census:
    """Count all rows."""
    rows, by_reason, eligible = judged(cursor, pending)
    counted = pending.settled + Counter(dict(fetch(cursor, pending.standing)))
    unfinished = counted.pop("unfinished", 0) + pending.settled.total()
    return Census(rows, by_reason, Standing(eligible, eligible - unfinished, dict(counted)))


def judged(cursor: Cursor, pending: Pending) -> tuple[int, dict[str, int], int]:
    """The rows of the listings table, those that are left out, by reason, and edits of the rest."""
    counted = {reason: (rows, edits) for reason, rows, edits in fetch(cursor, pending.judged)}
    rows, edits = counted.get(None, (0, 0))
    by_reason = {reason: counted.get(reason, (0, 0))[0] for reason in RULES}
    by_reason[OTHER_GENERATION] = rows - edits
    return sum(rows for rows, _ in counted.values()), by_reason, edits
