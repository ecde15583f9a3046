"""Sentences about where the listings stand and what the next run has to do."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adbc_driver_manager.dbapi import Cursor

from pipeline.database import census
from pipeline.database.census import Census, Standing
from pipeline.database.pending import Digest, Pending
from pipeline.stage.command import clock

if TYPE_CHECKING:
    from pipeline.workflow.outlook import Outlook


def plan(digest: Digest, outlook: "Outlook", force: bool) -> str:
    """'3 listings pending: 2 new, 1 edited; 9 photos, 4 cached, about 12 s; 88 more wait ...'."""
    said = [f"{counted(digest.listings, 'listing')} pending: {listed(why(digest))}"]
    said.append(ahead(outlook))
    if beyond := digest.due - digest.listings:
        limited = "more are beyond limit_listings"
        waiting = "more wait for the next run (limit_listings)"
        said.append(f"{beyond} {limited if force else waiting}")
    return "; ".join(said)


def why(digest: Digest) -> dict[str, int]:
    """How many of the pending listings are pending for which reason."""
    known = {
        "edited": digest.edited,
        "that waited": digest.changed,
        "forced": digest.forced,
    }
    return {"new": digest.listings - sum(known.values()), **known}


def ahead(outlook: "Outlook") -> str:
    """'9 photos, 4 cached, about 12 s'; what is not known is not said."""
    said = counted(outlook.photos, "photo")
    if outlook.cached is not None:
        said += f", {outlook.cached} cached"
    if outlook.seconds:
        said += f", about {clock(outlook.seconds)}"
    return said


def where(cursor: Cursor, pending: Pending) -> str:
    """Where the listings stand under this key: `standing`, or why none is eligible."""
    found = census.take(cursor, pending)
    return standing(found.standing) if found.standing.eligible else nobody(found)


def standing(found: Standing) -> str:
    """Of the eligible listings, how many have a vector, and what the others wait for."""
    if found.with_vector == found.eligible:
        return f"the table has a vector of every eligible listing ({found.eligible})"
    said = [f"the table has a vector of {found.with_vector} of {found.eligible} listings"]
    if found.pending:
        said.append(f"{found.pending} are pending")
    if found.waiting:
        reasons = listed(found.waiting_by_reason)
        said.append(f"{found.waiting} wait for other files or rows ({reasons})")
    return "; ".join(said)


def nobody(found: Census) -> str:
    """Why no listing is eligible."""
    named = listed(found.left_out)
    left_out = f"; left out: {named}" if named else ""
    return f"no listing is eligible ({counted(found.listings, 'row')}{left_out})"


def counted(number: int, noun: str) -> str:
    """'1 photo', '2 photos'."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(counts: Mapping[str, int]) -> str:
    """'2 missing, 1 broken'; zeros are left out."""
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)
