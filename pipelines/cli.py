"""The `echolab` command: a thin skin over the library. Heavy imports wait until a command needs them."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from echolab.errors import EcholabError, WrongUsage
from pipelines.curate_command import curate
from pipelines.export_command import export
from pipelines.generate_command import generate
from pipelines.mine_command import mine
from pipelines.options import (
    DONE,
    ERROR,
    INTERRUPTED,
    PARTLY,
    USAGE,
    AtOption,
    FormatOption,
    JsonOption,
    OutOption,
    Progress,
    RowsOption,
    ScorerOption,
    SegmenterOption,
    StoreOption,
    VerifierOption,
    VersionOption,
    answer_format,
    argument,
    count,
    number,
    open_lab,
    option,
    pairs,
    print_json,
    read_json,
    say,
    say_why_empty,
    store_path,
    view_options,
)
from pipelines.profile_command import profile
from pipelines.report_command import report
from pipelines.score_command import score_app
from pipelines.store_commands import store_app
from pipelines.train_command import evaluate, train
from pipelines.verify_command import verify
from pipelines.view_command import view

ORDER = (
    "demo", "ingest", "query", "sql", "report", "view", "verify", "score", "profile", "mine", "curate", "export", "generate",
    "train", "evaluate", "store",
)  # fmt: skip


class _InOrder(TyperGroup):
    """Commands as a newcomer meets them."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)


app = typer.Typer(
    name="echolab",
    cls=_InOrder,
    help="Which rollouts of your RL run still teach something? Ask a store of them by SQL.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import echolab

        print(echolab.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version, and stop.", is_eager=True, callback=_print_version)
    ] = False,
) -> None: ...


app.add_typer(store_app, name="store")
app.add_typer(score_app, name="score")
app.command()(report)
app.command()(view)
app.command()(generate)
app.command()(verify)
app.command()(mine)
app.command()(curate)
app.command()(export)
app.command()(profile)
app.command()(train)
app.command()(evaluate)


def main() -> None:
    """Run the command. Errors are one line; nobody sees a traceback."""
    try:
        code = app(standalone_mode=False) or DONE
        if code == INTERRUPTED:  # Ctrl-C, as typer passes it on
            _fail("interrupted", code)
    except WrongUsage as e:
        code = _fail(str(e), USAGE)
    except EcholabError as e:
        code = _fail(str(e), ERROR)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("interrupted", INTERRUPTED)
    except OSError as e:
        code = _fail(f"{e.filename}: {e.strerror}" if e.filename else str(e), ERROR)
    except Exception as e:
        if not hasattr(e, "format_message"):  # not typer's way to say that the command line is wrong
            raise
        code = _usage(e)
    sys.exit(code)


def _usage(error: Any) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message())
        return USAGE
    where = error.ctx.command_path if error.ctx else " ".join(["echolab", *(a for a in sys.argv[1:2] if a in ORDER)])
    if where.endswith(" query") and (wrong := getattr(error, "option_name", "")):
        return _fail(f"No such option: {wrong}; parameters of a query are given by --param {wrong.lstrip('-')}=VALUE", USAGE)
    return _fail(f"{error.format_message().removesuffix('.')} (see `{where} --help`)", USAGE)


def _fail(message: str, code: int) -> int:
    print(f"echolab: {' '.join(message.split())}", file=sys.stderr)
    return code


@app.command()
def ingest(
    paths: Annotated[list[Path], argument("Dump files, or folders of them.")],
    run: Annotated[str, option("The run that the rollouts belong to.")],
    store: StoreOption = None,
    format: Annotated[str, typer.Option(help="The dump format; auto looks at the files.")] = "auto",
    role: Annotated[str, typer.Option(help="policy, or expert for golden solutions.")] = "policy",
    step: Annotated[int | None, option("Training step of all rows.")] = None,
    split: Annotated[str | None, option("train, eval, ...")] = None,
    model: Annotated[str | None, option("Model that sampled.")] = None,
    source: Annotated[str | None, option("Name of the dataset.")] = None,
    map: Annotated[list[str] | None, option("Where a column is found; ys[] walks a list.", metavar="COLUMN=PATH")] = None,
    group_size: Annotated[int | None, option("Rollouts of a group, where the dump does not say.")] = None,
    reward_weights: Annotated[list[str] | None, option("Weights of the reward functions.", metavar="NAME=WEIGHT")] = None,
    success_threshold: Annotated[float | None, option("Lowest reward of a success; kept with the run (1).")] = None,
    failure_reward: Annotated[float | None, option("Reward of a failure; kept with the run.")] = None,
    strip_template: Annotated[str | None, option("Cut this from prompts to find the problem.", metavar="REGEX")] = None,
    problems: Annotated[Path | None, option("JSON object: prompt -> name of its problem.", metavar="FILE")] = None,
    tokenizer: Annotated[str | None, option("Tokenizer of the token ids.")] = None,
    temperature: Annotated[float | None, option("Sampling temperature, where the dump does not say.")] = None,
    dtype: Annotated[str | None, option("Precision of recorded entropies.")] = None,
    attempt: Annotated[int | None, option("Attempt of the run; hides earlier ones from its lowest step on.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Changed files take the place of what was read.")] = False,
    rename: Annotated[str | None, option("Name of the file (or folder) in the store.", "--as", metavar="REL")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Load pickles, which can run any code.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on reading what is new or longer, until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between looks of --watch.", min=0.1)] = 10.0,
    json_: JsonOption = False,
) -> None:  # fmt: skip
    """Read dumps of any trainer into the store. It is made if it is not there. What is known already is not read again.

    echolab ingest runs/dumps --run my-run --store store
    """
    from echolab.ingest import ingest as ingest_
    from echolab.plan import IngestConfig
    from echolab.store import Store
    from echolab.watch import watch as watch_

    weights = {k: number(v, "--reward-weights") for k, v in pairs(reward_weights or [], "--reward-weights").items()}
    config = IngestConfig.make(
        run=run, format=format, role=role, step=step, split=split, model=model, source=source,
        map=pairs(map or [], "--map"), group_size=group_size, reward_weights=weights, success_threshold=success_threshold,
        failure_reward=failure_reward, strip_template=strip_template, problems=read_json(problems), tokenizer=tokenizer,
        temperature=temperature, dtype=dtype, attempt=attempt, replace=replace, rename=rename, allow_pickle=allow_pickle,
    )  # fmt: skip
    root = store_path(store)
    for path in paths:  # before a mistyped one leaves an empty store behind
        if not watch and not path.expanduser().exists():
            raise EcholabError(f"{path}: no such file or folder")
    target = Store.create(root)
    if watch:
        for path in paths:
            if not path.expanduser().exists():
                say(f"{path} is not there yet: waiting for it")
        for report in watch_(target, paths, config, every):  # until Ctrl-C
            _show_ingest(report, root, json_)
    with Progress("reading", enabled=not json_) as progress:
        report = ingest_(target, paths, config, progress)
    _show_ingest(report, root, json_)
    if report.quarantined or any(f.status == "failed" for f in report.files):
        raise typer.Exit(PARTLY)


def _show_ingest(report: Any, root: Path, json_: bool) -> None:
    if not json_:
        _print_ingest(report, root)
    else:
        print_json({"run": report.run, "rows": report.rows, "scores": report.scores, "quarantined": report.quarantined,
                     "quarantine": report.quarantine, "notes": report.notes, "asides": report.asides,
                     "files": [f.__dict__ for f in report.files]})  # fmt: skip
    sys.stdout.flush()


GROUPS_BY = {
    "explicit": "the dump's own keys",
    "contiguous": "consecutive rows",
    "prompt_text": "prompt and ground truth",
    "prompt_ids": "prompt ids and ground truth",
}


def _print_ingest(report: Any, root: Path) -> None:
    shown = report.files if len(report.files) <= 20 else [f for f in report.files if f.status in ("failed", "skipped")][:20]
    for f in shown:
        print(f"{printable(f.file)}: {f.status}{_how(f)}")
        for note in f.notes:
            print(f"    {note}")
        if f.shared:
            conflicts = f", {f.conflicts:,} of them with another reward" if f.conflicts else ""
            print(f"    {count(f.shared, 'rollout')} known already, which show once{conflicts}")
    if len(shown) < len(report.files):
        kinds: dict[str, list[Any]] = {}
        for f in report.files:
            kinds.setdefault(f"{f.status}{_how(f, counted=False)}", []).append(f)
        for kind, members in kinds.items():
            rows, scores = sum(f.rows for f in members), sum(f.scores for f in members)
            print(f"{count(len(members), 'file')} {kind}{_numbers(rows, scores)}")
            notes = Counter(n for f in members if f.status not in ("failed", "skipped") for n in dict.fromkeys(f.notes))
            for note, n in notes.items():
                print(f"    {note}" + (f" ({n} of the {len(members)} files)" if n < len(members) else ""))
    for reason, n in report.asides.items():
        print(f"{count(n, 'file')} not read on {'its' if n == 1 else 'their'} own: {reason}")
    known = sum(f.shared for f in report.files)
    print(
        f"run {report.run}: {count(report.rows - known, 'rollout')} new in {root}"
        + (f", {known:,} known already" if known else "")
        + (f", {count(report.scores, 'rollout')} with recorded entropies" if report.scores else "")
    )
    for note in report.notes:
        print(note)
    if report.quarantined:
        print(f"{count(report.quarantined, 'row')} in quarantine, with reason and bytes: {root / '_quarantine'}")


def _how(f: Any, counted: bool = True) -> str:
    known = f" as {f.format} ({f.known_by})" if f.known_by else ""
    groups = " and ".join(GROUPS_BY[g] for g in f.groups_by.split("+")) if f.groups_by else ""
    numbers = _numbers(f.rows, f.scores) if counted and f.status in ("ingested", "continued", "replaced") else ""
    return f"{known}{', groups by ' + groups if groups else ''}{numbers}"


def printable(name: str) -> str:
    """A file's name on one line, without what would move a terminal's cursor."""
    return name if name.isprintable() else ascii(name)


def _numbers(rows: int, scores: int) -> str:
    if scores and not rows:
        return f": entropies of {count(scores, 'rollout')}"
    return f": {count(rows, 'rollout')}" + (f", {scores:,} with entropies" if scores else "")


@app.command()
def query(
    name: Annotated[str | None, argument("Name of the query.")] = None,
    param: Annotated[list[str] | None, option("A parameter of the query.", "--param", "-p", metavar="NAME=VALUE")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show the queries and their parameters, or those of NAME.")] = False,
    store: StoreOption = None,
    format: FormatOption = None,
    out: OutOption = None,
    rows: RowsOption = 50,
    verifier: VerifierOption = None,
    scorer: ScorerOption = None,
    segmenter: SegmenterOption = None,
    version: VersionOption = None,
    at: AtOption = None,
    json_: JsonOption = False,
) -> None:  # fmt: skip
    """Answer a named question.

    echolab query degenerate_by_step --param run=my-run --store store
    """
    from echolab.queries import find_query
    from pipelines.render import write

    if list_:
        _list_queries(name, json_)
        return
    if name is None:
        raise WrongUsage("which query? `echolab query --list` shows them")
    format = answer_format(format, json_)
    with open_lab(store, version, at) as lab:
        frame = lab.session(view_options(verifier, scorer, segmenter)).query(name, **pairs(param or [], "--param"))
        write(frame, format, out, rows)
        say_why_empty(frame, lab, find_query(name).sql)


def _list_queries(name: str | None, json_: bool) -> None:
    from echolab.queries import find_query, list_queries

    queries = list_queries() if name is None else [find_query(name)]
    if json_:
        print_json([{"name": q.name, "title": q.title, "answers": q.answers, "examples": list(q.examples),
                      "params": [p.__dict__ for p in q.params]} for q in queries])  # fmt: skip
        return
    for q in queries:
        print(f"{q.name}: {q.title}\n    {q.answers}")
        for p in q.params:
            kind = " | ".join(p.choices) or p.type
            print(f"    --param {p.name}={kind}  {p.doc} (default {p.default})")
        print("".join(f"    {e}\n" for e in q.examples))


@app.command()
def sql(
    text: Annotated[str | None, argument("One SELECT; without it a prompt, or stdin.", "QUERY")] = None,
    store: StoreOption = None,
    format: FormatOption = None,
    out: OutOption = None,
    rows: RowsOption = 50,
    verifier: VerifierOption = None,
    scorer: ScorerOption = None,
    segmenter: SegmenterOption = None,
    version: VersionOption = None,
    at: AtOption = None,
    json_: JsonOption = False,
) -> None:  # fmt: skip
    """Ask the store in SQL. Views: rollouts, groups, prompts, problems, segments, tokens, and one for each table.

    echolab sql "SELECT kind, count(*) FROM groups GROUP BY kind" --store store
    """
    from pipelines.render import write

    format = answer_format(format, json_)
    with open_lab(store, version, at) as lab:
        session = lab.session(view_options(verifier, scorer, segmenter))
        if text is None and sys.stdin.isatty():
            from pipelines.prompt import prompt

            prompt(session, rows)
            return
        asked = sys.stdin.read() if text is None or text == "-" else text
        frame = session.sql(asked)
        write(frame, format, out, rows)
        say_why_empty(frame, lab, asked)


@app.command()
def demo(
    keep: Annotated[Path | None, option("Its folder (echolab-demo, or echolab-simulated).", "--keep", metavar="DIR")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="A small one in a minute, from weights that are at hand.")] = False,
    seeds: Annotated[int | None, option("How often it is all done (as often as five minutes allow).")] = None,
    simulated: Annotated[
        bool, typer.Option("--simulated", help="No training: dumps of a made-up run to try things on.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again from nothing.")] = False,
    json_: JsonOption = False,
) -> None:
    """A whole experiment on this machine's CPU, and its page.

    A policy is trained until its groups teach nothing, and the remedies are measured. What was stopped goes on; a finished
    demo prints its page.

    echolab demo --keep echolab-demo
    """
    if simulated:
        from pipelines.simulated import simulated as simulate

        facts = simulate(keep or Path("echolab-simulated"), fresh, say=say if json_ else print)
    else:
        try:
            import torch  # noqa: F401
            import transformers  # noqa: F401
            import vl_convert  # noqa: F401
        except ImportError:
            raise EcholabError("the demo trains a policy: pip install 'echolab[torch,report]'; or try --simulated") from None
        from pipelines.demo import demo as demo_

        if seeds is not None and seeds < 1:
            raise WrongUsage("--seeds is at least 1")
        facts = demo_(keep or Path("echolab-demo"), fast=fast, seeds=seeds, fresh=fresh, say=say if json_ else print)
    if json_:
        print_json(facts)
