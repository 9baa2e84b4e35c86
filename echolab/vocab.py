"""What a tokenizer's ids stand for, byte by byte: all that is needed to cut completions without the tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from echolab import ids
from echolab.errors import EcholabError
from echolab.files import conform
from echolab.hub import located
from echolab.schema import VOCAB
from echolab.store import Snapshot, Store

pc: Any = pyarrow.compute


@dataclass(frozen=True, eq=False)
class Vocab:
    """The tokens of one tokenizer. Ids that it does not have, such as a model's padding of its embedding, have no text."""

    tokenizer: str  # its fingerprint
    pieces: Mapping[int, bytes]
    special: frozenset[int] = frozenset()

    @classmethod
    def of(cls, tokenizer: Any) -> Vocab:
        """Of a fast tokenizer of transformers."""
        state = _state(tokenizer)
        added = tokenizer.added_tokens_decoder
        to_bytes = _to_bytes(tokenizer, state)
        pieces = {i: to_bytes(piece) for piece, i in tokenizer.get_vocab().items()}
        pieces |= {i: token.content.encode() for i, token in added.items()}  # an added token is its own text
        special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        return cls(_fingerprint(state), dict(sorted(pieces.items())), frozenset(special))

    @classmethod
    def stored(cls, snapshot: Snapshot, tokenizer: str) -> Vocab:
        """As the store's `vocab` table has it."""
        files = [f.path for f in snapshot.files("vocab") if f.partition["tokenizer"] == tokenizer]
        if not files:
            raise EcholabError(f"the store has no vocabulary of tokenizer {tokenizer}: give the tokenizer itself")
        rows = pa.concat_tables(conform(pq.ParquetFile(path).read(), VOCAB.arrow) for path in files)
        exact = pc.coalesce(rows["bytes"], rows["text"].cast(pa.binary()), pa.scalar(b""))
        pieces = dict(zip(rows["token_id"].to_pylist(), exact.to_pylist(), strict=True))
        return cls(tokenizer, pieces, frozenset(rows.filter(rows["special"])["token_id"].to_pylist()))

    def keep(self, store: Store) -> None:
        """Put it into the store, unless it is there."""
        with store.lock():
            if all(f.partition["tokenizer"] != self.tokenizer for f in store.snapshot().files("vocab")):
                store.add("vocab", self.table())

    def table(self) -> pa.Table:
        """Its rows of the `vocab` table."""
        texts = [piece.decode(errors="replace") for piece in self.pieces.values()]
        columns = {
            "tokenizer": [self.tokenizer] * len(texts),
            "token_id": list(self.pieces),
            "bytes": list(self.pieces.values()),
            "text": texts,
            "has_newline": ["\n" in text for text in texts],
            "special": [i in self.special for i in self.pieces],
        }
        return pa.table(columns, schema=VOCAB.arrow)

    @cached_property
    def newline(self) -> np.ndarray:
        """By id: does its text hold a newline? The last entry is for ids that the vocabulary lacks."""
        return self._flags(lambda piece: b"\n" in piece, False)

    @cached_property
    def blank(self) -> np.ndarray:
        """By id: is it nothing but white space? A part of a character is not."""
        return self._flags(lambda piece: not piece.decode(errors="replace").strip(), True)

    @cached_property
    def dense(self) -> pa.LargeBinaryArray:
        """By id: its bytes."""
        return pa.array([self.pieces.get(i, b"") for i in range(self.size)] + [b""], pa.large_binary())

    @cached_property
    def size(self) -> int:
        return max(self.pieces, default=-1) + 1

    def _flags(self, test: Callable[[bytes], bool], unknown: bool) -> np.ndarray:
        flags = np.full(self.size + 1, unknown)
        flags[list(self.pieces)] = [test(piece) for piece in self.pieces.values()]
        return flags


def special_ids(snapshot: Snapshot, tokenizer: str) -> frozenset[int]:
    """The special tokens of a stored vocabulary; none where the store does not have it."""
    files = [f.path for f in snapshot.files("vocab") if f.partition["tokenizer"] == tokenizer]
    rows = [pq.ParquetFile(path).read(columns=["token_id", "special"]) for path in files]
    return frozenset(i for table in rows for i in table.filter(table["special"])["token_id"].to_pylist())


def load_tokenizer(name: str | Path) -> Any:
    """The fast tokenizer of a folder, or of a model in the cache of the Hub, exactly as its files describe it."""
    try:
        from transformers import PreTrainedTokenizerFast  # AutoTokenizer replaces parts of some models' tokenizers
    except ImportError:
        raise EcholabError("tokenizers need transformers: pip install 'echolab[torch]'") from None
    where, options = located(str(name), "tokenizer.json")
    try:
        return PreTrainedTokenizerFast.from_pretrained(where, **options)
    except Exception as e:  # of many kinds, down to a bare Exception for a damaged tokenizer.json
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise EcholabError(f"{name}: no tokenizer can be loaded from it: {reason}") from None


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """The same for the same tokenizer wherever and however often it is loaded: a hash of its vocabulary with ids, merges,
    normaliser, pre-tokenizer, decoder and added tokens. Its name, its chat template and what a caller sets (truncation
    and padding) do not count."""
    return _fingerprint(_state(tokenizer))


def _fingerprint(state: dict[str, Any]) -> str:
    counted = {key: value for key, value in state.items() if key not in ("truncation", "padding")}
    return ids.config_id("tokenizer", [orjson.dumps(counted, option=orjson.OPT_SORT_KEYS).decode()])


def _state(tokenizer: Any) -> dict[str, Any]:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "to_str"):
        raise EcholabError(f"{type(tokenizer).__name__} is a slow tokenizer: only those with a tokenizer.json are read")
    return orjson.loads(backend.to_str())


def _to_bytes(tokenizer: Any, state: dict[str, Any]) -> Callable[[str], bytes]:
    """How a piece of the vocabulary becomes bytes, by the kind of the tokenizer's decoder."""
    decoder = state["decoder"] or {}
    kinds = {part["type"] for part in [decoder, *decoder.get("decoders", [])] if part}
    if "ByteLevel" in kinds:
        alphabet = _byte_alphabet()
        return lambda piece: _byte_level(piece, alphabet)
    if "ByteFallback" in kinds:  # SentencePiece: bytes that have no piece are written <0x0A>
        return lambda piece: (
            bytes([int(piece[3:5], 16)]) if re.fullmatch("<0x[0-9A-F]{2}>", piece) else piece.replace("▁", " ").encode()
        )
    # What a decoder does to a text's first token (no space before it) does not count: so it comes after another one.
    before = len(tokenizer.convert_tokens_to_string(["a"]))
    return lambda piece: tokenizer.convert_tokens_to_string(["a", piece])[before:].encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: the printable ones stand for themselves, the others lie from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _byte_level(piece: str, alphabet: dict[str, int]) -> bytes:
    try:
        return bytes(alphabet[c] for c in piece)
    except KeyError:  # a piece that was written as plain text
        return piece.encode()
