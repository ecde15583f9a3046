"""`make commands`: writes docs/commands.md from the commands themselves; a test compares them."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from pipeline import __main__ as commands

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The commands of `python -m pipeline` by name."""
    (subparsers,) = (
        action
        for action in commands.parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return dict(subparsers.choices)


def lines() -> Iterator[str]:
    """The page."""
    yield "# Commands and flags"
    yield ""
    yield "Written by `make commands`. Each takes `--help`, too."
    for name, parser in parsers().items():
        yield ""
        yield f"## python -m pipeline {name}"
        yield ""
        yield f"{(parser.description or '').strip().capitalize()}."
        rows = [row(action) for action in parser._actions if action.dest != "help"]
        if rows:
            yield from ("", "| flag | |", "|---|---|", *rows)


def row(action: argparse.Action) -> str:
    """A flag, what it takes, what it does and what it is without."""
    takes = " ".join(action.choices) if action.choices else action.metavar or ""
    takes = takes if isinstance(takes, str) else " ".join(takes)
    if not takes and action.nargs != 0 and action.option_strings:
        takes = action.dest.upper()
    names = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{takes}`"
    takes = f" `{takes}`" if takes and action.option_strings else ""
    text = re.sub(r"\s*\(default: %\(default\)s\)|%\([a-z]+\)[a-z]", "", action.help or "")
    default = action.default
    if (
        "default" not in text
        and default not in (None, False, True, "", [], argparse.SUPPRESS)
        and not callable(default)
    ):
        text += f"; without it {default}"
    cells = f"{names}{takes}", text.replace("%%", "%")
    return f"| {' | '.join(cell.replace('|', ' or ') for cell in cells)} |"


if __name__ == "__main__":
    PAGE.write_text("\n".join(lines()) + "\n")
