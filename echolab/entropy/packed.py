"""Sequences packed end to end for one attention call of variable length, on CUDA: nothing is padded, and a prompt that
several completions follow stands there once."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from echolab.errors import EcholabError

NAME = "echolab_packed"


class Layout(NamedTuple):
    """Where the tokens of a pack lie. Attention sees the runs of `queries`: each run's keys are those of its prompt's run,
    if it has one, and its own."""

    ids: list[int]
    positions: list[int]
    queries: list[int]  # lengths of the runs
    keys: list[int]  # of their keys
    key_index: list[int]  # the keys of all runs, as places in the pack
    predicts: list[int]  # for the completion tokens of all samples: the places whose hidden states predict them


def layout(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]) -> Layout:
    """Of prompts, each with its completions. A prompt with one completion is one run with it."""
    pack = Layout([], [], [], [], [], [])
    for prompt, group in zip(prompts, completions, strict=True):
        begin = len(pack.ids)
        if len(group) == 1:
            _run(pack, [*prompt, *group[0]], 0, range(0))
            pack.predicts.extend(range(begin + len(prompt) - 1, len(pack.ids) - 1))
            continue
        _run(pack, prompt, 0, range(0))
        last = len(pack.ids) - 1
        for completion in group:
            first = len(pack.ids)
            _run(pack, completion, len(prompt), range(begin, last + 1))
            pack.predicts.extend([last, *range(first, len(pack.ids) - 1)])
    return pack


def _run(pack: Layout, tokens: Sequence[int], position: int, before: range) -> None:
    own = range(len(pack.ids), len(pack.ids) + len(tokens))
    pack.ids.extend(tokens)
    pack.positions.extend(range(position, position + len(tokens)))
    pack.queries.append(len(own))
    pack.keys.append(len(before) + len(own))
    pack.key_index.extend([*before, *own])


def hidden_states(body: Any, pack: Layout, device: torch.device) -> torch.Tensor:
    """The hidden states that predict the completion tokens of a pack, in the order of its samples."""

    def tensor(values: list[int], dtype: torch.dtype = torch.long) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    shares = len(pack.key_index) > len(pack.ids)
    hidden = body(
        input_ids=tensor(pack.ids)[None],
        position_ids=tensor(pack.positions)[None],
        use_cache=False,
        cu_seq_lens_q=tensor([0, *accumulate(pack.queries)], torch.int32),
        cu_seq_lens_k=tensor([0, *accumulate(pack.keys)], torch.int32),
        max_length_q=max(pack.queries),
        max_length_k=max(pack.keys),
        key_index=tensor(pack.key_index) if shares else None,
    ).last_hidden_state[0]
    return hidden[tensor(pack.predicts)]


def usable(model: Any, device: torch.device) -> bool:
    """CUDA, half precision, a torch that has the kernel, and a model whose attention is the plain one."""
    if device.type != "cuda" or model.dtype not in (torch.float16, torch.bfloat16):
        return False
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return capped is None and _kernel() is not None


def install(model: Any) -> None:
    """Let the model attend by this module."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)  # the lengths say all that a mask would
    model.set_attn_implementation(NAME)


def _kernel() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    key_index: torch.Tensor | None = None,
    **lengths: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function as transformers calls it: tensors of [1, heads, tokens, size] of one pack."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if key_index is not None:
        k, v = k[key_index], v[key_index]
    kernel = _kernel()
    known = inspect.signature(kernel).parameters  # they changed between torch 2.10 and 2.13
    options: dict[str, Any] = {}
    if "scale" in known:
        options["scale"] = scaling
    elif scaling is not None:  # the kernel's own is 1 / sqrt(size)
        q = q * (scaling * q.shape[-1] ** 0.5)
    if "window_size" in known:
        options["window_size"] = (sliding_window - 1 if sliding_window else -1, 0)  # to the right nothing: causal
    elif sliding_window is None or sliding_window > lengths["max_length_k"]:
        options["is_causal"] = True
    else:
        raise EcholabError(f"torch {torch.__version__} has no sliding window for packed sequences: update torch")
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    counts = (lengths[n] for n in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"))
    out = kernel(q.contiguous(), k.contiguous(), v.contiguous(), *counts, **options)
    return out[None], None
