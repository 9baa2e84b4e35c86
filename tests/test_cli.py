"""The command as a shell sees it: exit codes, one-line errors, JSON, formats."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import polars as pl
import pytest

from echolab import __version__
from echolab.named import draft
from echolab.store import Store
from pipelines.cli import main

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "ECHOLAB_STORE"}


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


def echolab(*arguments: object, stdin: str = "", store: Path | None = None) -> Result:
    """What the installed command runs, in this process: a hundred starts of Python would take minutes."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["echolab", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        patch.delenv("ECHOLAB_STORE", raising=False)
        if store:
            patch.setenv("ECHOLAB_STORE", str(store))
        with pytest.raises(SystemExit) as e:
            main()
    return Result(e.value.code or 0, out.getvalue(), err.getvalue())  # type: ignore[arg-type]


def refused(result: Result, code: int = 1) -> str:
    """The one line of a refusal."""
    assert result.returncode == code, result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A store of 3 steps with 4 groups of 4: in step s the first s groups are all right, the others mixed."""
    folder = tmp_path_factory.mktemp("cli")
    for step in (1, 2, 3):
        rows = [
            {"input": f"p{g}", "output": f"text {step} {g} {i}", "gts": "1", "score": float(g < step or i % 2), "step": step}
            for g in range(4)
            for i in range(4)
        ]
        path = folder / "dumps" / f"{step}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert echolab("ingest", folder / "dumps", "--run", "r", "--store", folder / "store").returncode == 0
    return folder / "store"


def test_ingest_says_what_it_found_and_how(store, tmp_path):
    dumps = store.parent / "dumps"
    result = echolab("ingest", dumps, "--run", "again", "--store", tmp_path / "s")
    assert result.returncode == 0
    assert "48 rollouts" in result.stdout and "verl" in result.stdout and "groups by prompt and ground truth" in result.stdout
    again = json.loads(echolab("ingest", dumps, "--run", "again", "--store", tmp_path / "s", "--json").stdout)
    assert again["rows"] == 0 and {f["status"] for f in again["files"]} == {"unchanged"}


def test_quarantined_rows_exit_with_3_and_say_where_they_are(tmp_path):
    dump = tmp_path / "d.jsonl"
    dump.write_text('{"input": "a", "output": "x", "score": 1}\nbroken\n')
    result = echolab("ingest", dump, "--run", "r", "--store", tmp_path / "s")
    assert result.returncode == 3
    assert "1 row in quarantine" in result.stdout and "_quarantine" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["ingest", "nothing.jsonl", "--run", "r", "--store", "{tmp}/s"], 1, "no such file"),
        (["ingest", "x"], 2, "--run"),
        (["ingest", "{store}", "--run", "r", "--role", "teacher", "--store", "{tmp}/s"], 2, "policy"),
        (["ingest", "{store}", "--run", "r", "--format", "bogus", "--store", "{tmp}/s"], 2, "verl"),
        (["ingest", "{store}", "--run", "r", "--group-size", "0", "--store", "{tmp}/s"], 2, "at least 1"),
        (["ingest", "x", "--run", "r"], 1, "ECHOLAB_STORE"),
        (["inges"], 2, "ingest"),
        (["ingest", "x", "--run", "r", "--map", "completion", "--store", "{tmp}/s"], 2, "NAME=VALUE"),
        (["query", "degenerate_by_stepp", "--store", "{store}"], 1, "degenerate_by_step"),
        (["query", "degenerate_by_step", "--param", "rum=r", "--store", "{store}"], 1, "run"),
        (["query", "pass_at_k", "--param", "k=many", "--store", "{store}"], 1, "k"),
        (["query", "--store", "{store}"], 2, "--list"),
        (["sql", "SELECT", "--store", "{store}"], 1, ""),
        (["sql", "SELECT nothing FROM groups", "--store", "{store}"], 1, "nothing"),
        (["sql", "SELECT 1 AS a, 2 AS a", "--json", "--store", "{store}"], 1, "a"),
        (["sql", "SELECT 1", "--store", "{tmp}"], 1, "store init"),
        (["sql", "SELECT 1", "--version", "999", "--store", "{store}"], 1, "history"),
        (["sql", "SELECT 1", "--format", "excel", "--store", "{store}"], 2, "csv"),
        (["sql", "SELECT 1", "--format", "parquet", "--store", "{store}"], 2, "--out"),
        (["sql", "SELECT 1", "--rows", "-1", "--store", "{store}"], 2, "--rows"),
        (["sql", "SELECT 1", "--version", "1", "--at", "2026-01-01", "--store", "{store}"], 2, "not both"),
        (["sql", "SELECT 1", "--store", "{tmp}/nowhere"], 1, "no such folder"),
        (["query", "degenerate_by_step", "--run", "r", "--store", "{store}"], 2, "--param run="),
        (["query", "degenerate_prompts", "-p", "status=foo", "--store", "{store}"], 1, "saturated"),
        (["query", "degenerate_prompts", "-p", "streak=0", "--store", "{store}"], 1, "at least 1"),
        (["query", "advantage_check", "-p", "tolerance=nan", "--store", "{store}"], 1, "a number"),
        (["ingest", "{store}", "--run", "r", "--step", "-1", "--store", "{tmp}/s"], 2, "negative"),
        (["sql", "SELECT 1", "--verifier", "math", "--store", "{store}"], 1, "math"),
        (["store", "schema", "--format", "xml"], 2, "ddl"),
        (["store", "vacuum", "--unpin", "C", "--store", "{store}"], 1, "C"),
        (["store", "info", "--store", "{store}/.."], 1, "did you mean {store}/../store?"),
        (["store", "info", "--store", "{store}/echolab.json"], 1, "a file"),
        (["ingest", "{store}", "--run", "r", "--store", "{tmp}/s"], 1, "a store, not dumps"),
        (["sql", "", "--store", "{store}"], 1, "no query"),
        (["sql", 'SELECT 1 FROM groups WHERE run = "re-1"', "--store", "{store}"], 1, "single quotes: 're-1'"),
        (["sql", "SELECT 1", "--out", "{tmp}/a.xlsx", "--store", "{store}"], 2, ".csv"),
        (["sql", "SELECT 1", "--json", "--format", "csv", "--store", "{store}"], 2, "not both"),
        (["query", "degenerate_by_stepp", "--list"], 1, "degenerate_by_step"),
        (["report", "--out", "{tmp}", "--store", "{store}"], 2, "is a folder"),
        (["profile", "--store", "{store}", "--compare", "a"], 2, "(see `echolab profile --help`)"),
        (["score", "--store", "{store}", "status"], 2, "behind the command: echolab score status"),
    ],
)
def test_errors_are_one_line_with_the_right_exit_code(arguments, code, says, store, tmp_path):
    arguments = [a.format(tmp=tmp_path, store=store) for a in arguments]
    assert says.format(store=store) in refused(echolab(*arguments), code)


def test_info_shows_like_things_as_one_table(store):
    said = echolab("store", "info", "--store", store).stdout
    assert [line.split() for line in said.split("runs:\n")[1].splitlines()[:3:2]] == [
        ["run", "attempts", "readings", "rollouts"],
        ["r", "1", "3", "48"],
    ]


def test_an_empty_answer_says_what_was_never_made(store, tmp_path):
    assert echolab("store", "init", "--store", tmp_path / "s").returncode == 0
    for query, at, says in (
        ("wasted_tokens", tmp_path / "s", "no rollouts: `echolab ingest"),
        ("entropy_by_step", store, "no scores: `echolab score"),
        ("clip_provenance", store, "no clips: `echolab mine"),
        ("verifier_agreement", store, "no verdicts: `echolab verify"),
        ("profile_compare", store, "no profiles: `echolab profile"),
    ):
        result = echolab("query", query, "--json", store=at)
        assert json.loads(result.stdout)["rows"] == [] and says in result.stderr, query
    assert echolab("sql", "SELECT * FROM groups WHERE step > 9", store=store).stderr == ""
    assert "no rollout was there to judge" in echolab("verify", "--verifier", "exact", store=tmp_path / "s").stdout
    assert "holds no rollouts" in refused(echolab("mine", "--name", "c", store=tmp_path / "s"))


@pytest.mark.parametrize(
    "query",
    [
        "COPY (SELECT 1) TO '{tmp}/out.csv'",
        "COPY rollouts TO '{store}/out.parquet'",
        "ATTACH '{tmp}/x.db'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "PRAGMA database_list",
        "SET memory_limit = '1GB'",
        "CREATE TABLE t (a int)",
        "DROP VIEW rollouts",
        "SELECT * FROM read_text('/etc/hosts')",
        "SELECT * FROM read_parquet('{tmp}/other.parquet')",
        "SELECT * FROM glob('/etc/*')",
        "SELECT 1; SELECT 2",
        "SELECT 1; COPY (SELECT 1) TO '{tmp}/out.csv'",
        "CALL pragma_version()",
        "",
    ],
)
def test_sql_that_is_more_than_one_select_of_the_store_is_refused_with_one_line(query, store, tmp_path):
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "other.parquet")
    refused(echolab("sql", "-", "--store", store, stdin=query.format(tmp=tmp_path, store=store)))
    assert not (tmp_path / "out.csv").exists() and not (store / "out.parquet").exists()


def test_a_query_of_ten_megabytes_is_refused_with_one_line(store):
    refused(echolab("sql", "-", "--store", store, stdin="SELECT " + "1+" * 5_000_000 + "1"))


def test_json_has_types_and_says_what_json_cannot(store):
    values = {
        "nan": "'NaN'::DOUBLE",
        "inf": "'-inf'::DOUBLE",
        "big": "9007199254740993",
        "small": "12",
        "raw": "'\\x00\\xFF'::BLOB",
        "none": "NULL",
        "time": "TIMESTAMP '2026-01-02 03:04:05'",
        "list": "[1, 2]",
        "struct": "{'a': 1.5}",
        "flag": "true",
        "map": "MAP {'k': 1.0}",
    }
    query = "SELECT " + ", ".join(f'{value} AS "{name}"' for name, value in values.items())
    document = json.loads(echolab("sql", query, "--json", store=store).stdout)
    (row,) = document["rows"]
    assert (row["nan"], row["inf"], row["none"]) == (None, None, None)
    assert (row["big"], row["small"], row["flag"]) == ("9007199254740993", 12, True)
    assert row["time"].startswith("2026-01-02T03:04:05")
    assert (row["list"], row["struct"], isinstance(row["raw"], str)) == ([1, 2], {"a": 1.5}, True)
    assert [c["name"] for c in document["columns"]] == list(row)


def test_json_has_no_row_limit_and_a_table_says_what_it_leaves_out(store):
    assert len(json.loads(echolab("sql", "SELECT * FROM range(5000)", "--json", store=store).stdout)["rows"]) == 5000
    assert "(5,000 rows, 50 shown" in echolab("sql", "SELECT * FROM range(5000)", store=store).stdout


@pytest.mark.parametrize("format", ["table", "csv", "json", "md", "parquet"])
def test_every_format_carries_the_same_answer(format, store, tmp_path):
    out = tmp_path / "out"
    arguments = ["query", "degenerate_by_step", "--param", "run=r", "--format", format, "--out", out]
    assert echolab(*arguments, store=store).returncode == 0
    if format == "parquet":
        shares = pl.read_parquet(out)["share_degenerate"].to_list()
    elif format == "json":
        shares = [r["share_degenerate"] for r in json.loads(out.read_text())["rows"]]
    elif format == "csv":
        shares = [float(r["share_degenerate"]) for r in csv.DictReader(io.StringIO(out.read_text()))]
    else:
        lines = out.read_text().splitlines()
        names = [c.strip() for c in lines[0].strip("| ").split("|")] if format == "md" else lines[0].split()
        column = names.index("share_degenerate")
        cells = [[c.strip() for c in line.strip("| ").split("|")] if format == "md" else line.split() for line in lines[2:]]
        shares = [float(c[column]) for c in cells]
    assert shares == [0.25, 0.5, 0.75]


def test_query_list_names_every_query_with_examples_that_run(store, tmp_path):
    store = shutil.copytree(store, tmp_path / "store")
    for name in ("hard", "hard-random"):  # clip sets that examples name
        with draft(Store.open(store), "clipset", name) as d:
            d.publish({}, {}, {"versions": {}})
    queries = json.loads(echolab("query", "--list", "--json").stdout)
    assert len(queries) >= 13
    text = echolab("query", "--list").stdout
    for q in queries:
        assert q["title"] and q["answers"] and q["title"] in text
        for example in q["examples"]:
            arguments = shlex.split(re.sub(r"=(my-run|baseline|echo)\b", "=r", example))[1:]
            result = echolab(*arguments, store=store)
            assert result.returncode == 0, f"{example}: {result.stderr}"


def test_earlier_versions_answer_as_they_did(tmp_path):
    dump, store = tmp_path / "1.jsonl", tmp_path / "s"
    row = json.dumps({"input": "a", "output": "x", "score": 1}) + "\n"
    for n in (1, 3):
        dump.write_text(row * n)
        echolab("ingest", dump, "--run", "r", "--store", store)
    count = ["sql", "SELECT count(*) AS n FROM rollouts", "--json", "--store", store]
    assert json.loads(echolab(*count).stdout)["rows"] == [{"n": 3}]
    assert json.loads(echolab(*count, "--version", 1).stdout)["rows"] == [{"n": 1}]


def test_ctrl_c_says_so_with_exit_code_130_and_leaves_a_store_that_opens(tmp_path):
    dump = tmp_path / "big.jsonl"
    dump.write_text('{"input": "p", "output": "x", "score": 1}\n' * 200_000)
    command = [
        sys.executable,
        "-c",
        "from pipelines.cli import main; main()",
        "ingest",
        dump,
        "--run",
        "r",
        "--store",
        tmp_path / "s",
    ]
    restore = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, preexec_fn=restore)
    while not list(tmp_path.glob("s/_jobs/ingest-*")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=60)[1], process.returncode) == ("echolab: interrupted\n", 130)
    assert list(tmp_path.glob("s/_jobs/*")) == []
    assert echolab("store", "validate", "--store", tmp_path / "s").returncode == 0


def test_a_pipe_that_closes_early_is_no_error(store):
    program = f"{sys.executable} -c 'from pipelines.cli import main; main()'"
    command = f"{program} sql 'SELECT * FROM range(200000)' --format csv --store {store} | head -1"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("command", ["info", "history", "validate", "compact", "vacuum", "migrate"])
def test_maintenance_commands_answer_in_text_and_json(command, store):
    assert echolab("store", command, "--store", store).returncode == 0
    assert json.loads(echolab("store", command, "--store", store, "--json").stdout) is not None


def test_the_version_is_said_and_the_help_names_every_command_in_whole_sentences():
    assert echolab("--version").stdout == f"{__version__}\n"
    lines = echolab("--help").stdout.split("Commands:\n")[1].splitlines()
    assert len(lines) == 16 and lines[0].split()[0] == "demo"
    assert [line for line in lines if not line.endswith(".") or line.endswith("...")] == []


def test_every_command_has_help_with_an_example():
    for command in (
        ["ingest"],
        ["query"],
        ["sql"],
        ["demo"],
        ["score"],
        *(["store", c] for c in ("init", "info", "history", "schema", "validate")),
    ):
        text = echolab(*command, "--help").stdout
        assert f"echolab {' '.join(command)}" in text.split("Options:")[0], command
        assert "--json" in text


def test_the_sql_prompt_answers_keeps_history_and_survives_errors(store, tmp_path):
    """Through a real terminal."""
    import pty

    master, slave = pty.openpty()
    environment = {**ENVIRONMENT, "XDG_STATE_HOME": str(tmp_path), "ECHOLAB_STORE": str(store), "TERM": "dumb"}
    command = [sys.executable, "-c", "from pipelines.cli import main; main()", "sql"]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment, close_fds=True)
    os.close(slave)
    os.write(master, b"SELECT count(*) AS n\nFROM groups;\nSELECT oops;\n.queries\n.quit\n")
    output = b""
    while chunk := _read(master):
        output += chunk
    assert process.wait(timeout=60) == 0
    text = output.decode()
    assert "12" in text and "oops" in text and "wasted_tokens" in text
    assert "SELECT count(*)" in (tmp_path / "echolab" / "sql_history").read_text()


def _read(master: int) -> bytes:
    try:
        return os.read(master, 65536)
    except OSError:  # the terminal closed
        return b""


def test_without_arguments_the_help_is_shown_whole():
    for command in ([], ["store"]):
        result = echolab(*command)
        assert result.returncode == 2 and result.stderr == ""
        assert "Commands:" in result.stdout and result.stdout.count("\n") > 5


def test_the_suffix_of_out_is_its_format_and_a_file_is_never_cut(store, tmp_path):
    query = "SELECT i, repeat('long ', 30) AS t FROM range(100) r(i)"
    for suffix, read in ((".csv", pl.read_csv), (".parquet", pl.read_parquet)):
        assert echolab("sql", query, "--out", tmp_path / f"out{suffix}", store=store).returncode == 0
        assert read(tmp_path / f"out{suffix}").height == 100
    assert echolab("sql", query, "--out", tmp_path / "out.txt", store=store).returncode == 0
    lines = (tmp_path / "out.txt").read_text().splitlines()
    assert len(lines) == 102 and all("long " * 29 in line for line in lines[2:])


def test_a_demo_does_not_touch_a_folder_that_is_none(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for fresh in ([], ["--fresh"]):
        for kind, word in ([], "no demo"), (["--simulated"], "no simulated run"):
            assert word in refused(echolab("demo", *kind, "--keep", tmp_path / "mine", *fresh))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_fresh_simulation_leaves_what_it_did_not_make(tmp_path):
    assert echolab("demo", "--simulated", "--keep", tmp_path / "d").returncode == 0
    (tmp_path / "d" / "dumps" / "mine.txt").write_text("mine")
    again = echolab("demo", "--simulated", "--keep", tmp_path / "d", "--fresh")
    assert again.returncode == 0 and "7,728 rollouts new" in again.stdout
    assert (tmp_path / "d" / "dumps" / "mine.txt").read_text() == "mine"
