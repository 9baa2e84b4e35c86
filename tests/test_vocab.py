"""A vocabulary knows the exact bytes of every token, by the tokenizer and by the store alike."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echolab.errors import EcholabError
from echolab.sql import Session
from echolab.store import Store
from echolab.vocab import Vocab, load_tokenizer, tokenizer_fingerprint

TEXTS = ["Let x = 3.\n\nThen we get (x + 1)\nand é, 数学 🙂.\r\n\tSo it goes.\n"] * 20
LINES = ["One line.\n", "Two\n\nlines", "  é数🙂", "tab\t\n x"]


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed: no tokenizer to test with")


def fast(backend, **special: str):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def byte_level(vocab_size: int = 320, split: bool = True):
    """The kind of GPT-2, Qwen and Llama 3."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = fast(backend, eos_token="<|im_end|>")
    tokenizer.add_tokens(["<think>", "<｜User｜>", "café", "é数"])
    return tokenizer


def byte_fallback() -> Any:
    """The kind of Llama 2 and Gemma: SentencePiece with bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁a", "a", "\n\n", "é", "▁▁"]
    backend = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[("▁", "a")], byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return fast(backend, eos_token="</s>")


def word_piece() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = {p: i for i, p in enumerate(["[UNK]", "play", "##ing", "##ed", "the", "."])}
    backend = Tokenizer(models.WordPiece(vocab=pieces, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return fast(backend)


def metaspace() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁the", -1.0), ("▁", -2.0), ("re", -2.0), ("\n", -3.0)], 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return fast(backend)


@pytest.fixture(scope="module")
def bpe(transformers):
    return byte_level()


@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=40) | st.sampled_from(LINES))
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(bpe, text):
    vocab = Vocab.of(bpe)
    pieces = [vocab.pieces[i] for i in bpe(text)["input_ids"]]
    assert b"".join(pieces) == text.encode()


def test_single_tokens_decode_as_the_tokenizer_decodes_them(bpe):
    vocab = Vocab.of(bpe)
    assert len(vocab.pieces) == len(bpe) and vocab.size == max(vocab.pieces) + 1
    assert any(piece.decode(errors="replace") != piece.decode(errors="ignore") for piece in vocab.pieces.values())
    for i, piece in vocab.pieces.items():
        if i not in bpe.added_tokens_decoder:
            assert piece.decode(errors="replace") == bpe.decode([i]), i


def test_added_tokens_are_their_own_text_and_special_ones_are_marked(bpe):
    vocab = Vocab.of(bpe)
    added = {token.content: i for i, token in bpe.added_tokens_decoder.items()}
    assert set(added) == {"<|im_end|>", "<think>", "<｜User｜>", "café", "é数"}
    assert {content: vocab.pieces[i].decode() for content, i in added.items()} == {content: content for content in added}
    assert vocab.special == {added["<|im_end|>"]}


def test_a_piece_that_is_no_spelling_of_bytes_is_text(transformers):
    from tokenizers import Tokenizer, decoders, models

    backend = Tokenizer(models.BPE(vocab={"aĊ": 0, "数 é": 1, "é": 2}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    found = Vocab.of(fast(backend)).pieces
    assert found == {0: b"a\n", 1: "数 é".encode(), 2: b"\xe9"}
    assert found[1].decode() == backend.decoder.decode(["数 é"])


def test_pieces_of_sentencepiece_with_bytes(transformers):
    tokenizer = byte_fallback()
    vocab = Vocab.of(tokenizer)
    text = "a  é\n\n数a\n"
    tokens = tokenizer(text)["input_ids"]
    assert b"".join(vocab.pieces[i] for i in tokens) == text.encode() == tokenizer.decode(tokens).encode()
    assert vocab.pieces[tokenizer.convert_tokens_to_ids("<0x0A>")] == b"\n"
    assert vocab.newline[tokenizer.convert_tokens_to_ids("<0x0A>")] and vocab.newline[tokenizer.convert_tokens_to_ids("\n\n")]


def test_pieces_of_other_tokenizers_are_what_they_add_after_another_token(transformers):
    words, spaces = word_piece(), metaspace()
    found = Vocab.of(words).pieces
    assert {p: found[words.convert_tokens_to_ids(p)] for p in ("play", "##ing", ".")} == {
        "play": b" play", "##ing": b"ing", ".": b" .",
    }  # fmt: skip
    found = Vocab.of(spaces).pieces
    assert [found[i] for i in range(1, 5)] == [b" the", b" ", b"re", b"\n"]


def test_the_fingerprint_is_the_same_in_another_process_and_folder(bpe, tmp_path):
    bpe.save_pretrained(tmp_path / "a folder")
    code = "import sys; from echolab.vocab import *; print(tokenizer_fingerprint(load_tokenizer(sys.argv[1])))"
    other = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a folder")], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == tokenizer_fingerprint(bpe) == Vocab.of(bpe).tokenizer


def test_the_fingerprint_changes_with_the_tokenizer_and_not_with_its_use(transformers):
    tokenizer = byte_level()
    first = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "a longer one"], truncation=True, max_length=2)
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer.backend_tokenizer.truncation and tokenizer_fingerprint(tokenizer) == first
    tokenizer.add_tokens(["<more>"])
    assert len({first, *map(tokenizer_fingerprint, (tokenizer, byte_level(290), byte_level(split=False)))}) == 4


def test_the_fingerprint_does_not_depend_on_the_order_of_keys():
    def written(text: str) -> Any:
        return SimpleNamespace(backend_tokenizer=SimpleNamespace(to_str=lambda: text))

    texts = '{"model": {"vocab": {"a": 0, "b": 1}}}', '{"model": {"vocab": {"b": 1, "a": 0}}}', '{"model": {"vocab": {"a": 0}}}'
    same, too, other = (tokenizer_fingerprint(written(t)) for t in texts)
    assert same == too != other


def test_a_stored_vocabulary_is_the_same_and_stored_once(bpe, tmp_path):
    vocab, store = Vocab.of(bpe), Store.create(tmp_path / "store")
    vocab.keep(store)
    vocab.keep(store)
    again = Vocab.stored(store.snapshot(), vocab.tokenizer)
    assert (again.tokenizer, dict(again.pieces), again.special) == (vocab.tokenizer, dict(vocab.pieces), vocab.special)
    with Session(store.snapshot()) as s:
        rows = s.sql("SELECT token_id, bytes, text, has_newline, special FROM vocab ORDER BY token_id").rows()
    assert len(rows) == len(bpe)
    for i, data, text, has_newline, special in rows:
        assert data == vocab.pieces[i] and text == data.decode(errors="replace")
        assert (has_newline, special) == ("\n" in text, i in vocab.special)


def test_a_stored_vocabulary_without_bytes_is_read_by_its_text(make_store, add_rows):
    store = make_store()
    row = {"tokenizer": "t", "has_newline": False, "special": False}
    add_rows(store, "vocab", [{**row, "token_id": 1, "text": "é"}, {**row, "token_id": 4, "text": None, "special": True}])
    vocab = Vocab.stored(store.snapshot(), "t")
    assert vocab.pieces == {1: "é".encode(), 4: b""} and vocab.special == {4} and vocab.size == 5
    with pytest.raises(EcholabError, match="no vocabulary of tokenizer u"):
        Vocab.stored(store.snapshot(), "u")


def test_ids_that_the_vocabulary_lacks_are_blank():
    vocab = Vocab("t", {1: b"a\n", 3: b" \n", 4: "é".encode()[:1], 5: "\u3000".encode()})
    assert vocab.newline.tolist() == [False, True, False, True, False, False, False]
    assert vocab.blank.tolist() == [True, False, True, True, False, True, True]
    assert vocab.dense.to_pylist() == [b"", b"a\n", b"", b" \n", b"\xc3", "\u3000".encode(), b""]
    assert Vocab("empty", {}).table().num_rows == 0
    assert isinstance(vocab.table(), pa.Table)


def test_what_is_no_fast_tokenizer_is_a_clear_error(transformers, tmp_path):
    with pytest.raises(EcholabError, match="slow tokenizer"):
        tokenizer_fingerprint(object())
    (tmp_path / "empty").mkdir()
    (tmp_path / "tokenizer.json").write_text("{}")
    reasons = {".": "no tokenizer can be loaded", "empty": "there is no tokenizer.json in it", "gone": "no such folder"}
    for name, reason in reasons.items():
        with pytest.raises(EcholabError, match=reason) as e:
            load_tokenizer(tmp_path / name)
        assert "\n" not in str(e.value)


def test_without_transformers_the_error_names_the_command(monkeypatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EcholabError, match=r"pip install 'echolab\[torch\]'"):
        load_tokenizer(tmp_path)
