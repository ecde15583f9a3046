"""The figures of `snakemake evaluate` anew, from the encode shards and docs/evaluate.md alone.

`python tests/halves_script.py results/encode/*.parquet`: it shares no code with the pipeline, holds
everything in memory, and compares each with each.
"""

import json
import sys
from collections import defaultdict
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def h(data: str) -> int:
    return int.from_bytes(blake2b(data.encode(), digest_size=8).digest(), "big")


def unit(x: Any) -> Any:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def split(rows: list[dict[str, Any]], seed: int) -> tuple[dict[int, Any], dict[int, Any]]:
    """{listing: (A, B)} of those that are split, {listing: photos} of all; photos by rank."""
    newest: dict[int, Any] = {}
    for r in rows:
        key = r["edited_date"], r["generation"]
        newest[r["listing_id"]] = max(newest.get(r["listing_id"], key), key)
    listings: dict[int, Any] = defaultdict(list)
    owners: dict[bytes, set[tuple[int, int]]] = defaultdict(set)
    for r in rows:
        if r["vec"] is not None and (r["edited_date"], r["generation"]) == newest[r["listing_id"]]:
            r["vec"] = np.array(r["vec"], np.float32)
            listings[r["listing_id"]].append(r)
            owners[r["vec"].tobytes()].add((r["listing_id"], r["image_index"]))
    shared = {v: min(o) for v, o in owners.items() if len({listing for listing, _ in o}) > 1}
    groups = {}
    for listing, photos in listings.items():
        label = list(range(len(photos)))
        for i, a in enumerate(photos):
            for j, b in enumerate(photos[:i]):
                if a["vec"] @ b["vec"] >= 0.98:
                    label = [label[j] if k == label[i] else k for k in label]
        groups[listing] = [
            [p for p, k in zip(photos, label, strict=True) if k == g] for g in set(label)
        ]
    for _ in shared:  # until nothing changes: shared photos that a group has together are one
        for group in (g for of in groups.values() for g in of):
            both = [p["vec"].tobytes() for p in group if p["vec"].tobytes() in shared]
            for v in both:
                shared[v] = min(shared[w] for w in both)
    sides = {}
    for listing, of in groups.items():
        side: tuple[list[Any], list[Any]] = ([], [])
        free = []
        for group in of:
            firsts = [shared[p["vec"].tobytes()] for p in group if p["vec"].tobytes() in shared]
            if firsts:
                side[h(f"{seed}/shared/{firsts[0][0]}/{firsts[0][1]}") & 1].extend(group)
            else:
                name = h(f"{seed}/{listing}/{min(p['image_index'] for p in group)}")
                free.append((-len(group), name, group))
        for _, name, group in sorted(free, key=lambda each: each[:2]):
            a, b = map(len, side)
            side[name & 1 if a == b else int(b < a)].extend(group)
        if all(side):
            order = {id(p): n for n, p in enumerate(listings[listing])}
            sides[listing] = tuple(sorted(s, key=lambda p: order[id(p)]) for s in side)
    return sides, listings


def ranks(scores: Any, right: Any) -> Any:
    """Of each row of (queries, gallery) scores that of its right column; a tie loses."""
    mine = scores[np.arange(len(right)), right]
    return (scores >= mine[:, None] - 1e-6).sum(1)


def figures(r: Any) -> list[float]:
    return [*(float(np.mean(r <= k)) for k in (1, 5, 10)), float(np.mean(1 / r))]


def evaluate(rows: Any, seed: int = 0, fits: Any = (256, 128, 64)) -> dict[str, Any]:
    sides, listings = split(rows, seed)
    asks = sorted(sides, key=lambda i: h(f"{seed}/{i}"))[:5_000]
    others = {i: sides[i][1] if i in sides else p for i, p in listings.items()}
    place = {i: n for n, i in enumerate(others)}
    right = np.array([place[i] for i in asks])
    A = [np.stack([p["vec"] for p in sides[i][0]]) for i in asks]
    G = [np.stack([p["vec"] for p in of]) for of in others.values()]

    def mean(of: Any, k: int | None = None) -> Any:
        return unit(np.stack([v[:k].mean(0) for v in of]))

    a, g = mean(A), mean(G)
    ours = a @ g.T
    r = ranks(ours, right)
    found: dict[str, Any] = {
        "": figures(r),
        "queries": len(asks),
        "gallery": len(g),
        "ranks": r.tolist(),
    }
    for k in (1, 2, 3, 4):
        found[f"K = {k}"] = figures(ranks(mean(A, k) @ mean(G, k).T, right))
    best = np.stack([(a @ v.T).max(1) for v in G], 1)
    found["best single photo"] = figures(ranks(best, right))
    pair = np.array([[(v @ w.T).max() for w in G] for v in A])
    found["best pair of photos"] = figures(ranks(pair, right))
    fold = np.array([h(f"{seed}/{i}/fold") & 1 for i in asks])
    of = np.array([h(f"{seed}/{i}/fold") & 1 for i in listings])
    whole = mean([np.stack([p["vec"] for p in photos]) for photos in listings.values()])
    for d in fits:
        if d >= min(len(whole) - of.sum(), of.sum(), whole.shape[1]):
            continue
        got = np.zeros(len(asks), int)
        for f in (0, 1):
            x = whole[of != f].astype(float)
            m = x.mean(0)
            w = np.linalg.svd(x - m, full_matrices=False)[2][:d].T
            scores = unit((a - m) @ w) @ unit((g - m) @ w).T
            got[fold == f] = ranks(scores, right)[fold == f]
        found[f"{d} dimensions"] = figures(got)
    a16, g16 = (unit(x.astype(np.float16).astype(np.float32)) for x in (a, g))
    found["halfvec"] = figures(ranks(a16 @ g16.T, right))
    differ = ((a > 0)[:, None, :] != (g > 0)[None]).sum(2)
    last = np.sort(differ, 1)[:, min(100, len(g)) - 1]
    listed = differ <= last[:, None]
    mine = differ[np.arange(len(right)), right]
    bits = np.where(mine <= last, ranks(np.where(listed, ours, -np.inf), right),
                    ranks(-differ.astype(float), right))  # fmt: skip
    found["bits, the best 100 re-ranked"] = figures(bits)
    ours[np.arange(len(right)), right] = -np.inf
    near = [
        max((np.stack([p["vec"] for p in listings[i]])
             @ np.stack([p["vec"] for p in listings[list(others)[w]]]).T).ravel()) >= 0.98
        for i, w in zip(asks, ours.argmax(1), strict=True)
    ]  # fmt: skip
    return found | {"rival_is_near_duplicate": float(np.mean(near))}


if __name__ == "__main__":
    table = pa.concat_tables([pq.read_table(path) for path in sys.argv[1:]])
    print(json.dumps(evaluate(table.to_pylist())))
