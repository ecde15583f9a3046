"""README and docs/ name what there is, and nothing else; what they tell to run runs."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands_page import PAGE, lines, parsers
from conftest import REPOSITORY, Workspace, create_tables, new_database, new_workspace

from demo import marketplace
from pipeline.stage.settings import Settings

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
TEXT = {page.relative_to(REPOSITORY).as_posix(): page.read_text() for page in PAGES}
EVERYTHING = "\n".join(TEXT.values())
OURS = {
    "clean",
    "lint",
    "lock",
    "rulegraph",
    "commands",
    "demo-stop",
    "mutants",
}  # for who works on the code
PATH = re.compile(r"`((?:pipeline|demo|benchmarks|docs|tests|profiles)/[\w./-]+)`")
OUTSIDE = re.compile(r"https?://|mailto:|#")


def code() -> Iterator[str]:
    """The lines of all shell blocks, and all that is in backticks."""
    for text in TEXT.values():
        for block in re.findall(r"```sh[^\n]*\n(.*?)```", text, re.S):
            yield from block.replace("\\\n", " ").splitlines()
        yield from re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))


CODE = list(code())


def words_after(start: str) -> Iterator[list[str]]:
    """The words of each command that begins so, up to a comment."""
    for line in CODE:
        for found in re.finditer(rf"(?:^|[\s;&]){re.escape(start)} ([^#;&|>`]*)", line):
            yield found[1].split()


def test_the_commands_are_those_that_there_are() -> None:
    """Both ways: what is named exists, and what exists is named."""
    named = {words[0] for words in words_after("python -m pipeline") if words}
    named = {name for name in named if not name.startswith("-") and name.islower()}

    assert [] == sorted(named - parsers().keys())
    assert [] == sorted(name for name in parsers() if name not in named)


def test_every_flag_is_named() -> None:
    """With what it does, in a page of its own, as the commands themselves say."""
    assert [*lines()] == PAGE.read_text().splitlines(), "make commands writes it"


def test_flags_in_commands_exist() -> None:
    """Those of `python -m pipeline COMMAND`, wherever one is written out."""
    unknown = [
        (words[0], word)
        for words in words_after("python -m pipeline")
        if words and words[0] in parsers()
        for word in words[1:]
        if word.startswith("--")
        and word.partition("=")[0] not in parsers()[words[0]]._option_string_actions
    ]

    assert [] == unknown


def test_settings_on_command_lines_exist() -> None:
    """Each KEY of --config KEY=VALUE is a setting."""
    keys = {
        key
        for line in CODE
        for given in re.findall(r"--config((?: [a-z_]+=[^\s`]+)+)", line)
        for key in re.findall(r" ([a-z_]+)=", given)
    }

    assert len(keys) > 3
    assert [] == sorted(keys - Settings.model_fields.keys())


def test_every_setting_is_named() -> None:
    """In config.yaml with its unit and effect, where a test of the settings has it too."""
    config = (REPOSITORY / "config.yaml").read_text()

    assert [] == [name for name in Settings.model_fields if f"\n{name}:" not in f"\n{config}"]


def test_targets_are_those_that_there_are() -> None:
    """Of Snakemake and of make; each of them is named."""
    rules = set(re.findall(r"^rule (\w+):", (REPOSITORY / "Snakefile").read_text(), re.M))
    asked = {
        word
        for words in words_after("snakemake --cores all")
        for word in words[:2]
        if word.isalpha() and word.islower()
    }
    makefile = (REPOSITORY / "Makefile").read_text().replace("\\\n", " ")
    made = set(re.findall(r"^\.PHONY: (.*)", makefile, re.M)[0].split())
    named = {words[0] for words in words_after("make") if words and words[0].isascii()}
    stages = {"export", "select", "encode", "aggregate", "load", "all"}

    assert [] == sorted(asked - rules)
    assert [] == sorted(rules - asked - stages)
    assert [] == sorted(
        name for name in named if re.fullmatch(r"[a-z-]+", name) and name not in made
    )
    assert [] == sorted(
        made - named - {"clean", "lint", "lock", "rulegraph", "commands", "demo-stop", "mutants"}
    )


def test_links_and_paths_lead_somewhere() -> None:
    """Files that are linked to or named with a folder of the repository; headings that are, too."""
    lost = []
    for name, text in TEXT.items():
        page = REPOSITORY / name
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, heading = target.partition("#")
            if OUTSIDE.match(target) and path:
                continue
            found = (page.parent / path) if path else page
            if not found.exists() or (heading and heading not in headings(found)):
                lost.append((name, target))
        for path in re.findall(
            r"`((?:pipeline|demo|benchmarks|docs|tests|profiles)/[\w./-]+)`", text
        ):
            if not (REPOSITORY / path).exists() and not path.startswith("demo/data"):
                lost.append((name, path))

    assert [] == lost


def headings(page: Path) -> set[str]:
    """Its anchors, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_every_page_is_linked_from_the_readme() -> None:
    """Nobody finds a page that nothing leads to."""
    assert [] == [
        name for name in TEXT if name.startswith("docs/") and f"({name})" not in TEXT["README.md"]
    ]


# --- what runs


@pytest.fixture(scope="module")
def market(
    server: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workspace]:
    """The demo's marketplace, a small one, embedded."""
    with new_database(server) as database:
        create_tables(database)
        work = new_workspace(tmp_path_factory.mktemp("docs") / "work", database, encoder)
        work.knows_photos = True
        made = marketplace.made_up(work.photos, 20)
        marketplace.draw_photos(made, 2)
        marketplace.fill(database.dsn, made)
        settings = (work.folder / "config.yaml").read_text()
        settings = re.sub(
            r"^model_name: \S+", f"model_name: local-dir:{encoder}", settings, flags=re.M
        )
        (work.folder / "config.yaml").write_text(settings)
        (work.folder / "results.sql").symlink_to(REPOSITORY / "results.sql")
        work.run()
        yield work


# Of a block that is marked so, each line is run; 42 stands for a listing.
MARKED = re.findall(r"<!-- run -->\n+```sh\n(.*?)```", EVERYTHING, re.S)


@pytest.mark.parametrize("line", [line for block in MARKED for line in block.splitlines()])
def test_what_is_marked_as_runnable_runs(market: Workspace, line: str) -> None:
    """On the demo's marketplace, as it is written."""
    words = shlex.split(line.replace("42", str(marketplace.FIRST_ID + 12)), comments=True)

    run = market.python(*words[1:])

    assert ("python", 0) == (words[0], run.code), run.output


def test_some_is_marked() -> None:
    """What an operator does each day, at least."""
    assert len([line for block in MARKED for line in block.splitlines()]) > 8
