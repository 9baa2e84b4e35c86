"""Prompt files: which columns are known, how others are named, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from echolab.errors import EcholabError
from echolab.prompts import read

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "benchmarks"


def jsonl(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_columns_are_known_by_the_names_that_others_use(tmp_path):
    verl = {
        "prompt": [{"role": "user", "content": "Q"}],
        "reward_model": {"ground_truth": "4", "style": "rule"},
        "data_source": "d",
    }
    found = list(read(jsonl(tmp_path / "a.jsonl", {"question": "Q", "answer": 4, "level": 2}, verl)))
    assert found == [
        {"prompt": "Q", "ground_truth": "4", "extra": {"level": 2}},
        {"messages": verl["prompt"], "ground_truth": "4", "source": "d", "extra": {}},
    ]


def test_other_columns_are_named_also_inside_others(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", {"task": {"text": "Q"}, "answer": "no", "right": "yes"})
    [row] = read(file, {"prompt": "task.text", "ground_truth": "right"})
    assert (row["prompt"], row["ground_truth"]) == ("Q", "yes")


def test_a_folder_is_all_its_files_in_order(tmp_path):
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"prompt": ["b"]}), tmp_path / "data" / "train-00001.parquet")
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "data" / "train-00000.parquet")
    (tmp_path / "dataset_info.json").write_text("{}")
    assert [r["prompt"] for r in read(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("row", "columns", "said"),
    [
        ({"text": "Q"}, {}, "row 0 has no prompt; its columns are text: name the one with it"),
        ({"prompt": "  "}, {}, "row 0 has no prompt"),
        ({"text": "Q"}, {"prompt": "txt"}, "row 0 has no column txt; its columns are text"),
        ({"text": "Q"}, {"promt": "text"}, "promt is no column of a prompt: use prompt, ground_truth, source"),
    ],
)
def test_what_is_no_prompt_is_said(tmp_path, row, columns, said):
    with pytest.raises(EcholabError, match=said):
        list(read(jsonl(tmp_path / "a.jsonl", row), columns))


def test_a_missing_file_and_an_empty_folder_are_said(tmp_path):
    with pytest.raises(EcholabError, match="No such file"):
        list(read(tmp_path / "none.jsonl"))
    with pytest.raises(EcholabError, match="no .jsonl, .json, .parquet file in it"):
        list(read(tmp_path))


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data not found: real-data test skipped")
@pytest.mark.parametrize(
    ("file", "n", "with_truth"),
    [("gsm8k_test.jsonl", 1319, 1319), ("luffy_valid.all.parquet", 6023, 6023), ("qwen25math_aime24_test.jsonl", 30, 30)],
)
def test_real_benchmarks_are_prompts_as_they_are(file, n, with_truth):
    found = list(read(DATA / file))
    assert len(found) == n and sum(r.get("ground_truth") is not None for r in found) == with_truth
