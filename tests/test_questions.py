"""docs/questions.md: each of its queries has an answer in the files of a run, and it is right."""

import re
from typing import Any

import duckdb
import pytest
from conftest import REPOSITORY, Workspace

QUESTIONS = re.findall(
    r"\*\*([^*]+)\*\*[^\n]*\n\n```sql\n(.*?)```",
    (REPOSITORY / "docs/questions.md").read_text(),
    re.S,
)

# Of the finished run: listings 1 and 2 have two photos each, the two files of listing 3 are lost.
ANSWERS: dict[str, list[tuple[Any, ...]]] = {
    "Why could photos not be read?": [("missing", 2)],
    "Which listings have no vector, and what was wrong with their files?": [
        (3, ["3/0.jpg: missing: no such file", "3/1.jpg: missing: no such file"])
    ],
    "How many images does a mean rest on?": [(2, 2)],
    "Which listings rest on fewer images than were selected?": [],
    "Which fell back on photos that are excluded?": [],
    "What keeps a photo out?": [(False, False, 6, 6)],
    "Which photos stand in several listings?": [],
    "What did the load do?": [('"ml"."img_vec512_v1"', 2, 0, 0)],
}


def test_there_are_ten() -> None:
    """As the page says, and the answers are to some of them."""
    assert 10 == len(QUESTIONS)
    assert ANSWERS.keys() <= {question for question, _ in QUESTIONS}


@pytest.mark.parametrize(("question", "query"), QUESTIONS, ids=[q for q, _ in QUESTIONS])
def test_a_question_has_its_answer(
    first_run: tuple[Workspace, Any], monkeypatch: pytest.MonkeyPatch, question: str, query: str
) -> None:
    """Through the views of results.sql, in the folder of the run."""
    monkeypatch.chdir(first_run[0].folder)
    with duckdb.connect() as con:
        con.execute((REPOSITORY / "results.sql").read_text())
        found = con.execute(query).fetchall()

    if question in ANSWERS:
        assert ANSWERS[question] == found
    else:
        assert all(0.5 < row[-1] <= 1.001 for row in found)
