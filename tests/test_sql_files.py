"""The files of sql/: strict headers, and the page that is generated from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from echolab import EcholabError
from echolab.queries import list_queries, parse_query, sql_folder, view_files
from echolab.sql import check, views_markdown
from echolab.views import VIEWS

GOOD = """-- title: T
-- answers: one
-- answers: two
-- param: k list = 1,8 | values
-- example: echolab query q --param k=1
SELECT $k::INTEGER[] -- not a parameter: $x
"""


def test_a_header_is_read():
    q = parse_query("q", GOOD)
    assert (q.title, q.answers, q.examples) == ("T", "one two", ("echolab query q --param k=1",))
    assert q.bind({}) == {"k": [1, 8]} and q.bind({"k": "[2]"}) == {"k": [2]} and q.bind({"k": 3}) == {"k": [3]}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("-- title: T\n", ""), ("-- title: T\n", "-- title: T\n-- title: U\n"), ("-- answers: one\n-- answers: two\n", ""),
        ("-- title", "-- titel"), ("-- title: T", "--title: T"), ("k list", "k array"), (" | values", ""), ("= 1,8", ""),
        ("query q", "query p"), ("-- example: echolab query q --param k=1\n", ""), ("SELECT $k", "SELECT $j"),
        ("k list = 1,8", "k int = 1,8"),
    ],
)  # fmt: skip
def test_a_malformed_header_is_refused(old, new):
    assert old in GOOD
    with pytest.raises(EcholabError):
        parse_query("q", GOOD.replace(old, new))


def test_every_query_is_one_select_with_a_well_formed_header():
    for q in list_queries():
        check(q.sql)


def test_every_view_file_is_made_and_documents_columns_that_exist():
    assert sorted(view_files()) == sorted(VIEWS)
    page = views_markdown()
    for view in view_files().values():
        for column, doc in view.columns.items():
            assert f"| `{column}` |" in page and doc in page


def test_docs_views_is_generated_from_the_files():
    page = Path(__file__).parent.parent / "docs" / "views.md"
    assert page.read_text("utf-8") == views_markdown(), "write it anew: see `views_markdown` in echolab/sql.py"


def test_the_sql_folder_is_found():
    assert (sql_folder() / "views" / "groups.sql").is_file()
