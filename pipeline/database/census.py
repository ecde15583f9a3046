"""Where the listings stand: each row in one group, counted in one snapshot."""

from dataclasses import dataclass

from adbc_driver_manager.dbapi import Cursor

from pipeline.database.connection import fetch
from pipeline.database.pending import OTHER_GENERATION, RULES, Pending

REASONS = (*RULES, OTHER_GENERATION)


@dataclass(frozen=True)
class Census:
    """listings = eligible + sum(left_out); eligible = with_vector + pending + waiting."""

    listings: int  # rows of the listings table
    left_out: dict[str, int]  # rows by reason, every one of REASONS
    eligible: int  # listings, an edit of each
    with_vector: int  # under the key that was asked for
    waiting_by_reason: dict[str, int]

    @property
    def waiting(self) -> int:
        return sum(self.waiting_by_reason.values())

    @property
    def pending(self) -> int:
        return self.eligible - self.with_vector - self.waiting


def take(cursor: Cursor, pending: Pending) -> Census:
    """Count all of them."""
    rows, left_out = judge(cursor, pending)
    counted = dict(fetch(cursor, pending.standing))
    eligible, unfinished = counted.pop("eligible"), counted.pop("unfinished")
    return Census(
        listings=rows,
        left_out={**left_out, OTHER_GENERATION: rows - sum(left_out.values()) - eligible},
        eligible=eligible,
        with_vector=eligible - unfinished,
        waiting_by_reason={reason: count for reason, count in counted.items() if count},
    )


def judge(cursor: Cursor, pending: Pending) -> tuple[int, dict[str, int]]:
    """How many rows the listings table has, and how many of them each of RULES leaves out."""
    counted = dict(fetch(cursor, pending.judged))
    return sum(counted.values()), {reason: counted.get(reason, 0) for reason in RULES}
