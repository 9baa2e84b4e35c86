"""`echolab store ...`: make, inspect and maintain a store."""

from __future__ import annotations

from typing import Annotated

import typer

from echolab.errors import WrongUsage
from pipelines.options import ERROR, JsonOption, RowsOption, StoreOption, open_lab, option, print_json, store_path

store_app = typer.Typer(help="Make, inspect and maintain a store.", no_args_is_help=True, rich_markup_mode=None)


@store_app.command("init")
def store_init(store: StoreOption = None, json_: JsonOption = False) -> None:
    """Make an empty store.

    echolab store init --store store
    """
    from echolab.store import Store

    root = Store.create(store_path(store)).root
    print_json({"store": str(root)}) if json_ else print(f"store at {root}")


@store_app.command("info")
def store_info(store: StoreOption = None, json_: JsonOption = False) -> None:
    """What the store holds.

    echolab store info --store store
    """
    from echolab.maintenance import info
    from pipelines.render import facts

    document = info(open_lab(store).snapshot)
    if json_:
        print_json(document)
    else:
        pins = [{"kind": p["kind"], "id": p["id"]} for p in document["pins"]]  # --json says which versions they hold
        print(facts(document | {"pins": pins}), end="")


@store_app.command("history")
def store_history(store: StoreOption = None, rows: RowsOption = 50, json_: JsonOption = False) -> None:
    """The store's versions: every commit, newest last.

    echolab store history --store store
    """
    import polars as pl

    from echolab.maintenance import history
    from pipelines.render import table

    commits = history(open_lab(store).store)
    if json_:
        print_json(commits)
    elif not commits:
        print("no commits yet")
    else:
        newest = commits[-rows:] if rows else commits
        print(table(pl.DataFrame(newest, infer_schema_length=None), 0), end="")


@store_app.command("schema")
def store_schema(format: Annotated[str, typer.Option(help="ddl, json or md.")] = "ddl", json_: JsonOption = False) -> None:
    """The tables, as SQL, JSON schema or Markdown.

    echolab store schema --format md
    """
    from echolab.schema import render

    try:
        print(render("json" if json_ else format), end="")
    except ValueError as e:
        raise WrongUsage(str(e)) from None


@store_app.command("validate")
def store_validate(store: StoreOption = None, json_: JsonOption = False) -> None:
    """Check that the store is sound. Exit code 1 if it is not.

    echolab store validate --store store
    """
    from echolab.validate import leftovers, validate

    snapshot = open_lab(store).snapshot
    problems, notes = validate(snapshot), leftovers(snapshot)
    if json_:
        print_json({"sound": not problems, "problems": problems, "notes": notes})
    else:
        print("\n".join([*(problems or ["sound"]), *notes]))
    if problems:
        raise typer.Exit(ERROR)


@store_app.command("compact")
def store_compact(
    store: StoreOption = None,
    full: Annotated[bool, typer.Option("--full", help="Rewrite large files too, sorted as a whole.")] = False,
    json_: JsonOption = False,
) -> None:
    """Merge small files, and drop rows of readings that never finished or were replaced.

    echolab store compact --store store
    """
    from echolab.compaction import compact
    from pipelines.render import facts

    document = compact(open_lab(store).store, full=full)
    print_json(document) if json_ else print(facts(document), end="")


@store_app.command("vacuum")
def store_vacuum(
    store: StoreOption = None,
    keep_days: Annotated[float, typer.Option(help="Keep files that a reader of the last days may need.")] = 7.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    unpin: Annotated[list[str] | None, option("Release the versions that this pins.", metavar="NAME")] = None,
    json_: JsonOption = False,
) -> None:  # fmt: skip
    """Delete files that no kept version needs. What clip sets, cohorts and exports pin stays.

    echolab store vacuum --keep-days 7 --store store
    """
    from echolab.maintenance import vacuum
    from pipelines.render import facts

    document = vacuum(open_lab(store).store, keep_days=keep_days, dry_run=dry_run, unpin=unpin or ())
    print_json(document) if json_ else print(facts(document), end="")


@store_app.command("migrate")
def store_migrate(store: StoreOption = None, json_: JsonOption = False) -> None:
    """Bring a store of an older echolab up to this one.

    echolab store migrate --store store
    """
    from echolab.maintenance import migrate

    done = migrate(open_lab(store).store)
    print_json({"done": done}) if json_ else print("\n".join(done) or "nothing to do")
