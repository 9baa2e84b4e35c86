"""Every table of a store, once. DDL, JSON schema and docs/tables.md are generated from here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

FORMAT_VERSION = 1  # of the store as a whole; `echolab store migrate` brings an older one up to it

STRING, INT32, INT64 = pa.string(), pa.int32(), pa.int64()
FLOAT32, FLOAT64, BOOL, BINARY = pa.float32(), pa.float64(), pa.bool_(), pa.binary()
TIME = pa.timestamp("us", tz="UTC")
TOKEN_IDS, FLOATS, BOOLS, STRINGS = pa.list_(INT32), pa.list_(FLOAT32), pa.list_(BOOL), pa.list_(STRING)
REWARDS = pa.map_(STRING, FLOAT64)
ORIGIN = pa.struct([("file", STRING), ("row", INT64)])


@dataclass(frozen=True)
class Column:
    name: str
    type: pa.DataType
    doc: str
    required: bool = False


@dataclass(frozen=True)
class Table:
    """One table: `key` names its rows, `partition` its folders, `sort` the order of rows within a file."""

    name: str
    doc: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    partition: str | None = None
    sort: tuple[str, ...] = ()

    @property
    def arrow(self) -> pa.Schema:
        return pa.schema([pa.field(c.name, c.type, nullable=not c.required) for c in self.columns])

    def column(self, name: str) -> Column:
        return next(c for c in self.columns if c.name == name)


def _c(name: str, type: pa.DataType, doc: str) -> Column:
    return Column(name, type, doc)


def _r(name: str, type: pa.DataType, doc: str) -> Column:
    return Column(name, type, doc, required=True)


INGESTS = Table(
    "ingests",
    "The ledger: one row a reading of one source. Rows of other tables count only while their reading is live.",
    (
        _r("ingest_id", STRING, "random, new for each reading"),
        _r("run", STRING, "the run that the rollouts belong to"),
        _r("source_path", STRING, "the file: its path below the folder that was given, or its bare name"),
        _r("attempt", INT32, "attempt of the run, from 1; a later attempt supersedes lower ones from its lowest step on"),
        _c("start_step", INT64, "the lowest step of this reading"),
        _r("bytes_read", INT64, "how far into the file this reading came, from its first byte"),
        _r("sha256", STRING, "of the file's first `bytes_read` bytes"),
        _r("format", STRING, "the dump format, as resolved"),
        _r("reader_version", INT32, "version of the reader that read it"),
        _r("options", STRING, "JSON: `given` (options that count), `found` (by the reader), `path`, `tail`, `continues`"),
        _r("n_rows", INT64, "rollouts stored by this reading"),
        _r("n_shared", INT64, "of these: ids that another live reading held already (shown once)"),
        _r("n_quarantined", INT64, "rows that could not be read; see the quarantine file of this reading"),
        _c("group_source", STRING, "how groups were identified: explicit, contiguous, prompt_text, prompt_ids, or several"),
        _r("completeness", STRING, "all; effective (what the trainer kept); filtered (zero-spread groups dropped upstream)"),
        _r("supersedes", STRINGS, "readings that this one replaces"),
        _r("created_at", TIME, "when the reading was committed"),
    ),
    key=("ingest_id",),
    sort=("created_at", "ingest_id"),
)

ROLLOUTS = Table(
    "rollouts",
    "One sampled completion of one prompt, with what is known of it. Append-only.",
    (
        _r("rollout_id", STRING, "H(group_id, prompt, completion, part, sample or occurrence)"),
        _r("ingest_id", STRING, "the reading that brought it"),
        _r("run", STRING, "the run"),
        _r("split", STRING, "train, eval, or the dump's own word"),
        _c("step", INT64, "the policy update that sampled it"),
        _r("role", STRING, "policy or expert"),
        _c("model", STRING, "the model that sampled it"),
        _c("source", STRING, "dataset name"),
        _r("group_id", STRING, "H(run, split, step, group key): rollouts sampled together for one prompt"),
        _r("group_source", STRING, "the rule that found the group: explicit, contiguous, prompt_text or prompt_ids"),
        _c("prompt_id", STRING, "H(the exact prompt as sampled)"),
        _c("problem_id", STRING, "H(the problem behind the prompt); joins runs and experts"),
        _c("sample", INT32, "number of the sample within its group, where the dump has one"),
        _c("part", INT32, "number of the training sample within its rollout (branches, turns)"),
        _c("prompt", STRING, "the prompt as text"),
        _c("messages", STRING, "JSON: the prompt as chat messages"),
        _r("prompt_format", STRING, "raw, chat, rendered (template applied) or unknown"),
        _c("completion", STRING, "the completion as text"),
        _c("tokenizer", STRING, "tokenizer of the ids"),
        _c("prompt_ids", TOKEN_IDS, "token ids of the prompt"),
        _c("completion_ids", TOKEN_IDS, "token ids of the completion"),
        _c("logprobs", FLOATS, "log-probabilities of the completion's tokens when sampled"),
        _c("loss_mask", BOOLS, "which completion tokens were trained on; NULL = all"),
        _c("n_prompt_tokens", INT64, "tokens of the prompt"),
        _c("n_completion_tokens", INT64, "tokens of the completion"),
        _c("n_chars", INT64, "characters of the completion"),
        _c("reward", FLOAT64, "total reward; NULL or NaN = unrewarded"),
        _c("rewards", REWARDS, "rewards by name, where there are several"),
        _c("success_recorded", BOOL, "the dump's own verdict"),
        _c("advantage", FLOAT64, "advantage as recorded"),
        _c("finish_reason", STRING, "stop, length, or the dump's own word; NULL = not truncated as far as is known"),
        _c("ground_truth", STRING, "the gold answer"),
        _c("policy_version", STRING, "version of the weights that sampled it"),
        _c("sampling", STRING, "JSON: temperature, top_p, top_k, max_tokens"),
        _r("origin", ORIGIN, "where it was read: source file and 0-based row"),
        _c("extra", STRING, "JSON: fields of the dump that have no column, and raw values that were converted"),
    ),
    key=("rollout_id",),
    partition="run",
    sort=("split", "step", "group_id", "sample", "rollout_id"),
)

VERDICTS = Table(
    "verdicts",
    "One verifier's word on one rollout. A verdict whose input changed is made anew; views use the newest.",
    (
        _r("rollout_id", STRING, "the rollout"),
        _r("verifier", STRING, "id of the verifier: name, version, options"),
        _r("input_hash", STRING, "hash of gold and extracted text"),
        _r("status", STRING, "ok, no_answer, timeout or error"),
        _c("success", BOOL, "right or wrong, where status is ok"),
        _c("score", FLOAT64, "score, where status is ok"),
        _c("extracted", STRING, "the answer that was compared"),
        _r("created_at", TIME, "when it was made"),
    ),
    key=("rollout_id", "verifier", "input_hash"),
    partition="verifier",
    sort=("rollout_id",),
)

SCORES = Table(
    "scores",
    "One scorer's token numbers for one rollout.",
    (
        _r("rollout_id", STRING, "the rollout"),
        _r("scorer", STRING, "id of the scorer: weights, tokenizer, temperature, dtype, prompt rendering"),
        _c("run", STRING, "run of the rollout"),
        _c("step", INT64, "step of the rollout"),
        _r("token_ids", TOKEN_IDS, "the completion's tokens, as scored"),
        _c("loss_mask", BOOLS, "which of them count, as scored; NULL = all"),
        _r("entropies", FLOATS, "entropy of the next-token distribution at each token, in nats"),
        _c("logprobs", FLOATS, "log-probability of each token"),
        _c("mean_entropy", FLOAT64, "mean over counted tokens, a final EOS left out"),
        _r("n_tokens", INT64, "tokens, a final EOS left out"),
    ),
    key=("rollout_id", "scorer"),
    partition="scorer",
    sort=("run", "step", "rollout_id"),
)

SEGMENTATIONS = Table(
    "segmentations",
    "One segmenter's cut of one score.",
    (
        _r("rollout_id", STRING, "the rollout"),
        _r("scorer", STRING, "the scorer"),
        _r("segmenter", STRING, "id of the segmenter: mode, options, tokenizer"),
        _r("segment_ends", TOKEN_IDS, "exclusive 0-based offsets into token_ids; the first segment starts at 0"),
        _r("segment_entropies", FLOATS, "mean token entropy of each segment over counted tokens; NULL without any"),
        _r("n_segments", INT32, "segments"),
        _c("peak_segment", INT32, "0-based segment of highest entropy"),
        _c("peak_entropy", FLOAT64, "its entropy"),
    ),
    key=("rollout_id", "scorer", "segmenter"),
    partition="scorer",
    sort=("segmenter", "rollout_id"),
)

CLIPS = Table(
    "clips",
    "A clip: the prefix of a verified success up to and including the chosen segment.",
    (
        _r("clip_id", STRING, "H(rollout_id, tokenizer, end_token)"),
        _r("clipset", STRING, "the clip set, as name@version"),
        _r("rollout_id", STRING, "the rollout"),
        _r("group_id", STRING, "its group"),
        _c("group_kind", STRING, "kind of the group when mined"),
        _c("prompt_id", STRING, "its prompt"),
        _c("problem_id", STRING, "its problem"),
        _c("run", STRING, "its run"),
        _c("step", INT64, "its step"),
        _c("scorer", STRING, "whose entropies chose the segment"),
        _c("segmenter", STRING, "who cut the segments"),
        _r("selector", STRING, "the rule that chose the segment"),
        _c("tokenizer", STRING, "tokenizer of the ids"),
        _c("temperature", FLOAT64, "temperature of the entropies"),
        _r("end_token", INT32, "exclusive 0-based offset of the clip's end in the scored tokens, before a final EOS"),
        _r("n_tokens", INT32, "tokens of the clip, with the EOS of a whole completion"),
        _c("peak_segment", INT32, "0-based chosen segment; where a token was chosen, the one that it lies in"),
        _c("peak_entropy", FLOAT64, "its entropy"),
        _c("distance", FLOAT64, "distance to the matched profile (selector match)"),
        _c("weight", FLOAT64, "weight in replay"),
        _c("split", STRING, "train or validation; NULL = train"),
        _c("prompt", STRING, "prompt text"),
        _c("clip", STRING, "clip text, without the EOS"),
        _c("prompt_ids", TOKEN_IDS, "token ids of the prompt"),
        _c("clip_ids", TOKEN_IDS, "token ids of the clip"),
        _c("clip_mask", BOOLS, "which clip tokens count; NULL = all"),
    ),
    key=("clipset", "clip_id"),
    partition="clipset",
    sort=("clip_id",),
)

PROFILES = Table(
    "profiles",
    "One statistic of one bin of a profile: segment entropy over position, aggregated over a cohort.",
    (
        _r("profile", STRING, "the profile, as name@version"),
        _r("axis", STRING, "relative (bins of position), absolute (segments by number) or whole (the trajectory)"),
        _r("slice", STRING, "part of the cohort: all, source=NAME, length=short, middle or long, outcome=success, ..."),
        _r("bin", INT32, "0-based bin along the axis"),
        _r("statistic", STRING, "mean, se, lo, hi, q05, q25, q50, q75, q95, tokens, peaks, top20; see profiles.md"),
        _c("value", FLOAT64, "its value"),
        _r("n", INT64, "trajectories behind it"),
    ),
    key=("profile", "axis", "slice", "bin", "statistic"),
    partition="profile",
    sort=("axis", "slice", "bin", "statistic"),
)

PROFILE_MEMBERS = Table(
    "profile_members",
    "One trajectory of a profile's cohort.",
    (
        _r("profile", STRING, "the profile, as name@version"),
        _r("rollout_id", STRING, "the trajectory"),
        _c("problem_id", STRING, "its problem"),
    ),
    key=("profile", "rollout_id"),
    partition="profile",
    sort=("rollout_id",),
)

VOCAB = Table(
    "vocab",
    "One token of one tokenizer.",
    (
        _r("tokenizer", STRING, "fingerprint of the tokenizer"),
        _r("token_id", INT32, "token id"),
        _c("bytes", BINARY, "its exact bytes; NULL = those of text"),
        _c("text", STRING, "these decoded, with U+FFFD where they are part of a character"),
        _r("has_newline", BOOL, "the decoded text holds a newline"),
        _r("special", BOOL, "a special token"),
    ),
    key=("tokenizer", "token_id"),
    partition="tokenizer",
    sort=("token_id",),
)


def _registry(name: str, doc: str) -> Table:
    return Table(
        name,
        doc + " The newest row of an id counts.",
        (
            _r("id", STRING, "the id"),
            _r("name", STRING, "its name"),
            _r("version", INT32, "version of that name, from 1"),
            _r("config", STRING, "JSON: the resolved configuration"),
            _r("parents", STRING, "JSON: what it was made from; `versions` pins the store's table versions against vacuum"),
            _r("created_at", TIME, "when it was registered"),
        ),
        key=("id", "created_at"),
        sort=("id", "created_at"),
    )


REGISTRIES = tuple(
    _registry(name, doc)
    for name, doc in (
        ("runs", "Runs: success threshold, failure reward."),
        ("scorers", "Scorers: weights, tokenizer, temperature, dtype, rendering."),
        ("segmenters", "Segmenters: mode, options, tokenizer."),
        ("verifiers", "Verifiers: name, version, options."),
        ("clipsets", "Clip sets: the selector or the curation that made them."),
        ("cohorts", "Cohorts: profiles and the SQL that chose their members."),
        ("exports", "Exports: datasets written out, with their provenance."),
    )
)

TABLES: dict[str, Table] = {
    t.name: t
    for t in (
        INGESTS, ROLLOUTS, VERDICTS, SCORES, SEGMENTATIONS, CLIPS, PROFILES, PROFILE_MEMBERS, VOCAB, *REGISTRIES,
    )
}  # fmt: skip

_DUCKDB = {
    STRING: "VARCHAR", INT32: "INTEGER", INT64: "BIGINT", FLOAT32: "FLOAT", FLOAT64: "DOUBLE", BOOL: "BOOLEAN",
    BINARY: "BLOB", TIME: "TIMESTAMP WITH TIME ZONE",
}  # fmt: skip
_JSON: dict[pa.DataType, dict[str, Any]] = {
    STRING: {"type": "string"}, INT32: {"type": "integer"}, INT64: {"type": "integer"},
    FLOAT32: {"type": "number"}, FLOAT64: {"type": "number"}, BOOL: {"type": "boolean"},
    BINARY: {"type": "string"}, TIME: {"type": "string", "format": "date-time"},
}  # fmt: skip


def duckdb_type(type: pa.DataType) -> str:
    """The DuckDB name of a column's type."""
    if pa.types.is_list(type):
        return duckdb_type(type.value_type) + "[]"
    if pa.types.is_map(type):
        return f"MAP({duckdb_type(type.key_type)}, {duckdb_type(type.item_type)})"
    if pa.types.is_struct(type):
        return "STRUCT(" + ", ".join(f'"{f.name}" {duckdb_type(f.type)}' for f in type) + ")"
    return _DUCKDB[type]


def _json_type(type: pa.DataType) -> dict[str, Any]:
    if pa.types.is_list(type):
        return {"type": "array", "items": _or_null(_json_type(type.value_type))}
    if pa.types.is_map(type):
        return {"type": "object", "additionalProperties": _or_null(_json_type(type.item_type))}
    if pa.types.is_struct(type):
        return {"type": "object", "properties": {f.name: _or_null(_json_type(f.type)) for f in type}}
    return _JSON[type]


def _or_null(kind: dict[str, Any]) -> dict[str, Any]:
    return {**kind, "type": [kind["type"], "null"]}


def ddl(table: Table) -> str:
    """`CREATE TABLE` of one table in DuckDB's dialect."""
    lines = [f'  "{c.name}" {duckdb_type(c.type)}{" NOT NULL" if c.required else ""}' for c in table.columns]
    return f"CREATE TABLE {table.name} (\n" + ",\n".join(lines) + "\n);"


def json_schema(table: Table) -> dict[str, Any]:
    """JSON schema of one row. Columns that may be NULL accept null."""

    def property(c: Column) -> dict[str, Any]:
        kind = _json_type(c.type)
        return {**(kind if c.required else _or_null(kind)), "description": c.doc}

    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": table.name,
        "description": table.doc,
        "type": "object",
        "properties": {c.name: property(c) for c in table.columns},
        "required": [c.name for c in table.columns if c.required],
        "additionalProperties": False,
    }


def markdown() -> str:
    """The whole of docs/tables.md."""
    out = [
        "# Tables",
        "",
        "Generated from `echolab/schema.py` by `echolab store schema --format md`. Each is a Delta table in the store.",
        "The views of the same names add columns: see [views.md](views.md).",
    ]
    for table in TABLES.values():
        partition = f", partitioned by `{table.partition}`" if table.partition else ""
        out += ["", f"## {table.name}", "", table.doc, "", f"Key: {', '.join(f'`{k}`' for k in table.key)}{partition}.", ""]
        out += ["| column | type | NULL | what it is |", "|---|---|---|---|"]
        out += [f"| `{c.name}` | `{duckdb_type(c.type)}` | {'' if c.required else 'yes'} | {c.doc} |" for c in table.columns]
    return "\n".join(out) + "\n"


def render(format: str) -> str:
    """All tables as `ddl`, `json` or `md`."""
    if format == "ddl":
        return "\n\n".join(ddl(t) for t in TABLES.values()) + "\n"
    if format == "json":
        return json.dumps({name: json_schema(t) for name, t in TABLES.items()}, indent=2) + "\n"
    if format == "md":
        return markdown()
    raise ValueError(f"unknown schema format {format!r}: use ddl, json or md")
