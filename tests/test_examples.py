"""The examples in docstrings of the public API run, on the store of the cookbook."""

from __future__ import annotations

import doctest
import shutil
from pathlib import Path

import pytest
from generators import cookbook

import echolab
from echolab.lab import Lab

EXAMPLES = {
    test.name: test
    for found in (echolab, Lab)
    for test in doctest.DocTestFinder(recurse=found is Lab).find(found)
    if test.examples
} | {t.name: t for t in doctest.DocTestFinder().find(echolab.open) if t.examples}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    with echolab.open(folder / "store", create=True) as lab:
        cookbook.fill(lab, folder)
    return folder


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_the_example_prints_what_it_says(name, folder, tmp_path, monkeypatch):
    pytest.importorskip("altair")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    test, said = EXAMPLES[name], []
    with echolab.open("store") as lab:
        test.globs = {"echolab": echolab, "lab": lab}
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert not said, "".join(said)


def test_what_a_lab_does_with_a_store_has_an_example():
    without = {"watch", "generate", "score", "reader", "session", "info", "close", "open", "snapshot", "validate", "store"}
    public = {name for name in vars(Lab) if not name.startswith("_")}
    assert public - without == {name.rpartition(".")[2] for name in EXAMPLES if name.startswith("Lab.")}
