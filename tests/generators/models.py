"""Tiny random causal language models with a tokenizer of their own, as folders that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = (
    "the sum of two and three is five so x = 12 then y = 7 . Therefore \\boxed{42} naïve 日本語 😀 wait , let us check again"
)
TEXT = [WORDS, WORDS.replace(" ", "\n"), "a\n\nb \n c", "<think>\nfirst\n</think>\n\nSolution: 1+1=2\n"]
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_GROUPED = {"num_key_value_heads": 2}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 16, "tie_word_embeddings": False}),
    "llama": ("LlamaConfig", {**_GROUPED, "tie_word_embeddings": False}),
    "mistral": ("MistralConfig", {**_GROUPED, "sliding_window": 24}),
    "gemma2": ("Gemma2Config", {**_GROUPED, "head_dim": 16, "final_logit_softcapping": 5.0, "sliding_window": 24}),
    "gemma3": ("Gemma3TextConfig", {**_GROUPED, "head_dim": 16, "sliding_window": 24}),
    "gpt_neox": ("GPTNeoXConfig", {"tie_word_embeddings": False}),
}


def tokenizer(folder: Path, size: int = 400, text: list[str] = TEXT) -> Any:
    """Byte-level BPE of some 400 tokens, with a chat template, an end and a padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]
    bare.train_from_iterator(text * 4, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=special))
    made = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|end|>", pad_token="<|pad|>", chat_template=CHAT)
    made.save_pretrained(folder)
    return made


def model(folder: Path, architecture: str = "qwen3", seed: int = 0, scale: float = 4.0, **config: Any) -> Path:
    """A random model in `folder`; `scale` makes its distributions far from flat. Its embedding is larger than the
    tokenizer's vocabulary, as those of real models are. `config`: other entries than the tiny tokenizer asks for."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    end = tokenizer(folder).eos_token_id
    name, options = ARCHITECTURES[architecture]
    ids = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": None}
    settings = {"vocab_size": 451, **_SIZES, **options, **ids, **config}
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    made.save_pretrained(folder)
    return folder


def spoil(folder: Path, **changes: Any) -> None:
    """Change entries of a saved config."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
