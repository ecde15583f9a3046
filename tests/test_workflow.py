"""Whole runs of Snakemake: what runs, what is written, what reruns."""

from conftest import Workspace


def two_listings(workspace: Workspace) -> None:
    for listing, colour in ((1, "red"), (2, "blue")):
        paths = [workspace.photo(f"{listing}/{i}.jpg", colour, (40 + i, 36)) for i in range(2)]
        workspace.database.add_listing(listing, paths)


def test_a_second_run_does_nothing(workspace: Workspace) -> None:
    """The first run embeds every listing; the second starts no job and writes no row."""
    two_listings(workspace)
    first = workspace.run()
    rows = workspace.database.vectors()
    second = workspace.run()

    assert first.rules == ["aggregate", "encode", "export", "load", "select"]
    assert [row[0] for row in rows] == [1, 2]
    assert second.rules == []
    assert "Nothing to be done" in second.output
    assert workspace.database.vectors() == rows
