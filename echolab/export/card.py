"""A dataset card: front matter that the Hub and `datasets` read, and a page that says where the rows come from."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from echolab.export import yaml
from echolab.export.files import File
from echolab.schema import TABLES

KINDS = {
    "clips": "EchoClips: prefixes of verified successes, each up to the segment that the selector chose",
    "rollouts": "rollouts: completions that a policy sampled, with their rewards",
    "prompts": "prompts, each with how a policy fared on it",
}
SIZES = {
    10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M", 10**8: "10M<n<100M",
    10**9: "100M<n<1B",
}  # fmt: skip
SHOWN = 20  # names of one list


def card(provenance: Mapping[str, Any], facts: Mapping[str, Any], schema: pa.Schema, files: Sequence[File]) -> str:
    config = provenance["config"]
    body = "\n".join(_body(provenance, facts, schema, files))
    return f"---\n{yaml.dump(front_matter(config, facts, schema, files))}---\n\n{body}\n"


def front_matter(
    config: Mapping[str, Any], facts: Mapping[str, Any], schema: pa.Schema, files: Sequence[File]
) -> dict[str, Any]:
    splits = list(dict.fromkeys(f.split for f in files))
    sizes = [
        {
            "name": split,
            "num_bytes": sum(f.memory for f in files if f.split == split),
            "num_examples": sum(f.rows or 0 for f in files if f.split == split),
        }
        for split in splits
    ]
    given = {"license": config["license"], "language": list(config["language"]), "pretty_name": config["title"]}
    n = sum(s["num_examples"] for s in sizes)
    return {
        **{key: value for key, value in given.items() if value},
        "task_categories": ["text-generation"],
        "size_categories": [next((name for limit, name in SIZES.items() if n < limit), "1B<n<10B")],
        "tags": ["echolab", config["what"], "reasoning", "reinforcement-learning"],
        **({"source_datasets": facts["sources"][:SHOWN]} if facts["sources"] else {}),
        "configs": [{"config_name": "default", "data_files": [{"split": s, "path": f"data/{s}-*"} for s in splits]}],
        "dataset_info": {
            "features": [feature(f.name, f.type) for f in schema],
            "splits": sizes,
            "download_size": sum(f.bytes for f in files),
            "dataset_size": sum(s["num_bytes"] for s in sizes),
        },
    }


def feature(name: str, type: pa.DataType) -> dict[str, Any]:
    """A column as `datasets` writes its features."""
    if pa.types.is_list(type):
        inner = feature("", type.value_type)
        return {"name": name, "list": inner.get("struct") or inner["dtype"]}
    if pa.types.is_struct(type):
        return {"name": name, "struct": [feature(f.name, f.type) for f in type]}
    return {
        "name": name,
        "dtype": "float64" if pa.types.is_float64(type) else "float32" if pa.types.is_float32(type) else str(type),
    }


def _body(provenance: Mapping[str, Any], facts: Mapping[str, Any], schema: pa.Schema, files: Sequence[File]) -> Iterator[str]:
    config, what = provenance["config"], provenance["config"]["what"]
    yield f"# {_plain(config['title'] or 'Exported ' + what)}\n"
    yield f"{facts['n']:,} {KINDS[what]}.\n"
    yield f"Written by echolab {provenance['echolab']['version']}; `provenance.json` has all details.\n"
    yield from _origin(provenance, facts)
    yield from _choice(provenance)
    yield from _decontamination(provenance)
    yield from _statistics(facts, files)
    yield '## Loading\n\n```python\nfrom datasets import load_dataset\n\ndataset = load_dataset("path/to/this/folder")\n```\n'
    yield "## Columns\n\n| column | type | what it is |\n|---|---|---|"
    for f in schema:
        yield f"| `{f.name}` | `{str(f.type).replace('item: ', '')}` | {_doc(what, f.name)} |"
    yield "\n## Licence\n"
    yield f"{_code(config['license'])}, as its maker says." if config["license"] else "None was stated by its maker."


def _origin(provenance: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[str]:
    yield "## Where the rows come from\n"
    steps = {facts["first_step"], facts["last_step"]} - {None}
    named = {"run": facts["runs"], "policy": facts["models"], "source data": facts["sources"], "sampling": facts["samplings"]}
    for name, words in named.items():
        yield f"- {name}: {_codes(words) if words else 'not recorded'}"
    yield f"- steps: {' to '.join(str(s) for s in sorted(steps)) if steps else 'not recorded'}"
    for scorer in provenance["scorer"]:
        facts_of = ", ".join(
            f"{k} {_code(scorer[k])}" for k in ("weights", "dtype", "temperature") if scorer.get(k) is not None
        )
        yield f"- scorer: {_code(scorer['name'])} ({facts_of})"
    systems = facts["systems"]
    yield f"- system prompt: {'none' if not systems else _code(systems[0]) if len(systems) == 1 else 'several'}\n"


def _choice(provenance: Mapping[str, Any]) -> Iterator[str]:
    config = provenance["config"]
    yield "## How they were chosen\n"
    for parent in provenance["clipsets"]:
        options = ", ".join(f"{_plain(k)} {_code(v)}" for k, v in _options(parent["config"]))
        yield f"- clip set {_code(parent['name'])}: {options}"
    for key in ("where", "best", "verifier"):
        if config[key] is not None:
            yield f"- {key}: {_code(config[key])}"
    yield "\n| stage | in | left out | out |\n|---|---|---|---|"
    for c in provenance["counts"]:
        dropped = ", ".join(f"{_plain(rule)} {n:,}" for rule, n in c["dropped"].items()) or "-"
        yield f"| {_plain(c['stage'])} | {c['in']:,} | {dropped} | {c['out']:,} |"
    yield ""


def _options(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What was said, with what is said inside of it."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _options(value)
        elif value not in (None, [], False) and key not in ("version", "against"):  # benchmarks have their own section
            yield key, value


def _decontamination(provenance: Mapping[str, Any]) -> Iterator[str]:
    """n-grams find copies, not paraphrases: the card never says clean."""
    yield "## Decontamination\n"
    sets = provenance["decontamination"]
    if not sets:
        yield "Not compared with any benchmark.\n"
        return
    for s in sets:
        against = f"{_code(s['file'])} (sha256 {_code(s['sha256'])})"
        yield f"- n-gram decontaminated (n={s['ngram']}) against {against}: {s['clips']:,} clips with hits left out"
    yield "\nEqual words are found, paraphrases and translations are not.\n"


def _statistics(facts: Mapping[str, Any], files: Sequence[File]) -> Iterator[str]:
    yield "## Statistics\n\n| split | rows | files | bytes |\n|---|---|---|---|"
    for split in dict.fromkeys(f.split for f in files):
        of = [f for f in files if f.split == split]
        yield f"| {split} | {sum(f.rows or 0 for f in of):,} | {len(of)} | {sum(f.bytes for f in of):,} |"
    yield ""
    if facts["tokens"]:
        low, mean, high = facts["fewest"], facts["tokens"] / facts["counted"], facts["most"]
        yield f"Tokens of a row: {low:,} to {high:,}, {mean:,.1f} on average, {facts['tokens']:,} in all.\n"


def _doc(what: str, column: str) -> str:
    """What a column means in the table of its name, else in the first that has it."""
    tables = [*([TABLES[what]] if what in TABLES else []), TABLES["rollouts"]]
    return next((_plain(c.doc) for t in tables for c in t.columns if c.name == column), "")


def _codes(words: Sequence[Any]) -> str:
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return ", ".join(_code(w) for w in words[:SHOWN]) + more


def _code(value: Any) -> str:
    """Foreign text as code: nothing in it is markup."""
    text = _flat(str(value))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if len(fence) > 1 or not text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _plain(text: str) -> str:
    """Foreign text outside of code, in a heading or a table's cell."""
    return html.escape(_flat(text), quote=False).replace("|", "\\|").replace("`", "\\`")


def _flat(text: str) -> str:
    """On one line, without what cannot be written."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(shown.split())
