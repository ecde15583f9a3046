"""What the figures say, in words: which choices pay, which cost nothing, and how sure that is."""

from collections.abc import Iterator
from typing import Any

from pipeline.retrieval.bootstrap import said

Document = dict[str, Any]


def headline(found: Document) -> str:
    """One line."""
    return (
        f"recall@1 {said(found['recall_at_1'])}, @5 {found['recall_at_5']['value']:.2f},"
        f" @10 {found['recall_at_10']['value']:.2f} of {found['queries']:,} queries"
        f" among {found['gallery']:,} listings"
    )


def recommendation(found: Document) -> list[str]:
    """A sentence a choice; 'really' is: the interval of the difference leaves out 0."""
    groups: dict[str, list[Document]] = {}
    for choice in found["choices"]:
        groups.setdefault(choice["group"], []).append(choice)
    shown = f"that these {found['queries']:,} queries can show"
    return [
        *_photos(groups.get("photos", []), found["most_photos_of_a_side"], shown),
        *_means(groups.get("mean", []), found["choices"][0]["bytes"], shown),
        *_stock(groups.get("stock", []), shown),
        *_smaller(groups.get("dimensions", []), found["choices"][0]["bytes"], shown),
        *_smaller(groups.get("storage", []), found["choices"][0]["bytes"], shown),
        *_bits(groups.get("bits", []), found["bytes_per_vector"]["bits"], shown),
    ]


def loses(choice: Document) -> bool:
    """Whether recall@1 or the mean reciprocal rank is really lower than ours."""
    of_ours = choice["difference"]
    return any(
        of_ours[name]["real"] and of_ours[name]["value"] < 0 for name in ("recall_at_1", "mrr")
    )


def gains(choice: Document) -> bool:
    """Whether recall@1 is really higher than ours."""
    figure = choice["difference"]["recall_at_1"]
    return bool(figure["real"] and figure["value"] > 0)


def _photos(ladder: list[Document], most: int, shown: str) -> Iterator[str]:
    enough = next((each for each in ladder if not loses(each)), None)
    if not ladder:
        yield "How many photos pay cannot be told: no side has two."
    elif enough is None:
        last = ladder[-1]
        yield (
            f"More photos are worth it: {last['name']} a side is behind all of them, {most} at"
            f" most, by {_by(last)}. A larger topk may find still more."
        )
    else:
        yield (
            f"{enough['name']} a side is enough: more photos, {most} at most, bring nothing"
            f" {shown} ({_by(enough)})."
        )


def _means(others: list[Document], size: int, shown: str) -> Iterator[str]:
    for each in others:
        if gains(each):
            yield (
                f"The {each['name']} finds more than the mean ({_by(each)}); it takes a vector a"
                f" photo, here {each['bytes'] / size:.1f} times the bytes, and a search for each."
            )
        elif loses(each):
            yield f"The mean finds more than the {each['name']} ({_by(each)})."
        else:
            yield f"Between the mean and the {each['name']} is no difference {shown} ({_by(each)})."


def _stock(without: list[Document], shown: str) -> Iterator[str]:
    for each in without:
        if gains(each):
            yield f"Leave stock photos out ({_by(each)})."
        elif loses(each):
            yield f"Keep stock photos ({_by(each)})."
        else:
            yield f"Stock photos make no difference {shown} ({_by(each)})."


def _smaller(choices: list[Document], size: int, shown: str) -> Iterator[str]:
    """The smallest that loses nothing; where each loses, the one that loses least."""
    free = [each for each in choices if not loses(each)]
    if free:
        best = min(free, key=lambda each: float(each["bytes"]))
        yield (
            f"Enough: {best['name']}, {best['bytes']:,} bytes a listing in place of {size:,};"
            f" nothing is lost {shown} ({_by(best)})."
        )
    elif choices:
        best = max(choices, key=lambda each: float(each["recall_at_1"]["value"]))
        yield f"Smaller vectors lose, {best['name']} the least ({_by(best)})."


def _bits(choices: list[Document], size: int, shown: str) -> Iterator[str]:
    for each in choices:
        lose = "loses" if loses(each) else f"loses nothing {shown}:"
        yield (
            f"An index of bits, {size:,} bytes a listing beside the vectors, whose best 100 are"
            f" ranked by cosine, {lose} {_by(each)}."
        )


def _by(choice: Document) -> str:
    figure = choice["difference"]["recall_at_1"]
    return (
        f"recall@1 {figure['value']:+.2f}, between {figure['low']:+.2f} and {figure['high']:+.2f}"
    )
