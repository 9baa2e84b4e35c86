"""`echolab export` as a shell sees it, and the whole way from a dump to a checked dataset."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from generators import models
from generators.clipsets import TOKENIZER
from test_cli import echolab, refused

from echolab.export.config import TARGETS
from echolab.lab import Lab


def test_it_says_what_went_in_what_was_left_out_and_where_it_is(store, tmp_path):
    out = tmp_path / "clips"
    result = echolab(
        "export", "--clipset", "hard", "--to", "trl-sft", "--where", "step < 2", "--out", out, "--store", store.root
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "export: 6 in, 2 left out (where), 4 out",
        "trl-sft ends every completion with an end token, also a clip that stops midway: --form tokens trains the clip alone",
        f"clips@1: 4 clips as trl-sft, form text, in {out}: train 4",
    ]
    document = json.loads(
        echolab("export", "--clipset", "hard", "--to", "hf", "--out", tmp_path / "b", "--json", store=store.root).stdout
    )
    assert document["splits"] == {"train": 4, "validation": 2} and document["what"] == "clips"
    assert [f["path"] for f in document["files"]][-1] == "README.md"


def test_verify_exits_with_1_and_a_line_for_each_problem(exported, store):
    _, out = exported("replay")
    result = echolab("export", "--verify", out, "--store", store.root)
    assert (result.returncode, result.stdout) == (0, f"{out} is sound: files, counts and clips\n")
    assert "give --store to check the clips too" in echolab("export", "--verify", out).stdout
    (out / "train.parquet").unlink()
    result = echolab("export", "--verify", out)
    assert (result.returncode, result.stdout) == (1, "train.parquet: missing\n")
    found = json.loads(echolab("export", "--verify", out, "--json").stdout)
    assert found == {"sound": False, "problems": ["train.parquet: missing"]}


@pytest.mark.parametrize(
    ("options", "code", "why"),
    [
        (["--to", "trlsft", "--out", "x"], 2, "no format 'trlsft': did you mean trl-sft?"),
        (["--to", "hf"], 2, "Give --to FORMAT and --out DIR"),
        (["--out", "x"], 2, "Give --to FORMAT and --out DIR"),
        (["--to", "replay", "--out", "x"], 2, "which clips? Give --clipset NAME"),
        (["--to", "hf", "--what", "clip", "--out", "x"], 2, "what: Input should be 'clips', 'rollouts' or 'prompts'"),
        (["--verify", "x", "--to", "hf"], 2, "leave out --to"),
        (["--verify", "x"], 1, "x is no export"),
        (["--to", "hf", "--clipset", "hrad", "--out", "x"], 1, "no clip set 'hrad' in this store; there are: hard@1"),
        (
            ["--to", "replay", "--clipset", "hard", "--tokenizer", "f" * 32, "--out", "x"],
            1,
            f"made with tokenizer {TOKENIZER} ",
        ),
    ],
)
def test_refusals_are_one_line(store, tmp_path, monkeypatch, options, code, why):
    monkeypatch.chdir(tmp_path)
    assert why in refused(echolab("export", *options, store=store.root), code)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def mined(tmp_path_factory) -> Path:
    """A store of chats: ingested, scored by a tiny model, mined and curated."""
    pytest.importorskip("torch", reason="scoring needs torch")
    folder = tmp_path_factory.mktemp("mined")
    model = models.model(folder / "model", scale=8.0)
    rows = [
        {
            "messages": [{"role": "user", "content": f"the sum of {g} and two"}],
            "completion": f"let us check x = {g}\nso y is {g + s}\nTherefore \\boxed{{{g + 2}}}",
            "ground_truth": str(g + 2),
            "reward": float(s > 0),
            "sample": s,
            "source": "sums",
        }
        for g in range(12)
        for s in range(4)
    ]
    (folder / "dump.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "bench.jsonl").write_text(json.dumps({"problem": "the sum of 3 and two"}) + "\n")
    store = folder / "store"
    commands = [
        ["ingest", folder / "dump.jsonl", "--run", "r", "--step", "5"],
        ["score", "--model", model, "--where", "success"],
        ["mine", "--name", "hard"],
        [
            "curate",
            "--clipset",
            "hard",
            "--name",
            "curated",
            "--against",
            folder / "bench.jsonl",
            "--dedup",
            "--validation",
            "0.3",
        ],
    ]
    for command in commands:
        result = echolab(*command, "--store", store)
        assert result.returncode == 0, result.stderr
    return store


SOON = ("hf", "trl-sft", "verl", "axolotl", "replay")  # the others have the same way, and are slow together


@pytest.mark.parametrize("to", [t if t in SOON else pytest.param(t, marks=pytest.mark.slow) for t in TARGETS])
def test_from_a_dump_to_every_format(mined, tmp_path, to):
    out = tmp_path / to
    form = ["--form", "tokens"] if to == "axolotl" else []
    result = echolab("export", "--clipset", "curated", "--to", to, *form, "--out", out, "--store", mined)
    assert result.returncode == 0, result.stderr
    checked = echolab("export", "--verify", out, "--store", mined)
    assert checked.stdout.startswith(f"{out} is sound"), checked.stdout
    said = json.loads((out / "provenance.json").read_text())
    assert [c["stage"] for c in said["counts"]] == ["mine, groups", "contaminated", "duplicate", "export"]
    assert said["counts"][0]["out"] == 12 and said["counts"][1]["dropped"] == {"contaminated": 1}
    assert said["counts"][-1]["out"] == 11 and sum(f["rows"] or 0 for f in said["files"]) == 11
    assert [(d["file"], d["ngram"], d["clips"]) for d in said["decontamination"]] == [("bench.jsonl", 8, 1)]
    assert said["selector"]["selector"] == "peak"
    if to == "hf":
        card = (out / "README.md").read_text()
        assert "n-gram decontaminated (n=8) against `bench.jsonl`" in card and "clean" not in card


def test_replayed_clips_decode_to_what_the_rollout_says(mined, tmp_path):
    from echolab.vocab import load_tokenizer

    model = mined.parent / "model"
    out = tmp_path / "replay"
    asked = ("export", "--clipset", "hard", "--to", "replay", "--tokenizer", model, "--out", out, "--store", mined)
    assert echolab(*asked).returncode == 0
    tokenizer = load_tokenizer(model)
    with Lab.open(mined) as lab:
        texts = dict(lab.sql("SELECT clip_id, completion FROM clips JOIN rollouts USING (rollout_id)").rows())
    rows = pq.read_table(out / "train.parquet").to_pylist()
    assert len(rows) == 12
    for row in rows:
        clip = tokenizer.decode(row["clip_ids"], clean_up_tokenization_spaces=False)
        assert texts[row["clip_id"]].startswith(clip) and len(row["clip_mask"]) == len(row["clip_ids"])
        prompt = tokenizer.decode(row["prompt_ids"], clean_up_tokenization_spaces=False)
        assert prompt.startswith("<|user|>the sum of ") and prompt.endswith("<|assistant|>")
        assert (row["weight"], row["step"], row["temperature"]) == (1.0, 5, 1.0)
