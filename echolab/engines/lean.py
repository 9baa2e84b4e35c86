"""Decode steps of the models that are built as Llama is: what transformers computes for one token of each row, without what
a single token does not need. On small models that is nearly half of the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from echolab.engines.cache import RowCache

MODELS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
FUSED_BYTES = 256 << 20  # weights of smaller models are laid side by side, to be multiplied at once: a copy for each call
Module = Callable[[Tensor], Tensor]


def fits(model: Any, capacity: int) -> bool:
    """Is it one of these, with plain layers and full attention over so many tokens?"""
    window = getattr(model.config, "sliding_window", None)
    if type(model).__name__ not in MODELS or (window is not None and capacity > window):
        return False
    return all(type(m) is nn.Linear for name, m in model.named_modules() if name.endswith(("_proj", "lm_head")))


class Lean:
    """The steps of a model with the weights that it has now."""

    def __init__(self, model: Any):
        fuse = sum(p.nbytes for p in model.parameters()) <= FUSED_BYTES
        self.body, self.head, self.norm = model.model, model.lm_head, _norm(model.model.norm)
        self.heads = model.config.num_attention_heads, model.config.num_key_value_heads
        self.layers = [_Layer(layer, fuse) for layer in model.model.layers]

    def step(self, tokens: Tensor, positions: Tensor, cache: RowCache) -> Tensor:
        """Logits after one token of each row, [rows, vocabulary]; `positions` are [rows, 1]."""
        x = self.body.embed_tokens(tokens)
        cos, sin = self.body.rotary_emb(x, positions)  # [rows, 1, size]
        half = cos.shape[-1] // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        mask = cache.mask()
        mask = None if mask is None else mask[:, None, None]
        queries, pairs = self.heads
        for i, layer in enumerate(self.layers):
            qk, v = layer.project(x, queries, pairs)
            qk = torch.addcmul(qk * cos, qk.roll(half, -1), sin)
            keys, values = cache.update(qk[:, queries:, None], v[:, :, None], i)
            q = qk[:, :queries].unflatten(1, (pairs, -1))  # the queries of one key head together
            out = functional.scaled_dot_product_attention(q, keys, values, mask, scale=layer.scale)
            x += layer.out(out.flatten(1))
            x += layer.feed(x)
        return self.head(self.norm(x))


class _Layer:
    def __init__(self, layer: Any, fuse: bool):
        attention, mlp = layer.self_attn, layer.mlp
        self.before, self.between = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self.qkv = _joined((attention.q_proj, attention.k_proj, attention.v_proj), fuse)
        self.out, self.scale, self.size = attention.o_proj, attention.scaling, attention.head_dim
        self.norms = (_norm(attention.q_norm), _norm(attention.k_norm)) if hasattr(attention, "q_norm") else None
        self.gate_up, self.activation, self.down = _joined((mlp.gate_proj, mlp.up_proj), fuse), mlp.act_fn, mlp.down_proj

    def project(self, x: Tensor, queries: int, pairs: int) -> tuple[Tensor, Tensor]:
        """Queries and keys, and values: [rows, heads, size]."""
        heads = self.qkv(self.before(x)).unflatten(1, (-1, self.size))
        qk, v = heads.split((queries + pairs, pairs), 1)
        if self.norms:
            qk = torch.cat([norm(part) for norm, part in zip(self.norms, qk.split((queries, pairs), 1), strict=True)], 1)
        return qk, v

    def feed(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(self.between(x)).chunk(2, -1)
        return self.down(self.activation(gate).mul_(up))


def _joined(layers: Sequence[Any], fuse: bool) -> Module:
    """What several linear layers give, side by side."""
    if not fuse:
        return lambda x: torch.cat([layer(x) for layer in layers], -1)
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers]) if layers[0].bias is not None else None
    return lambda x: functional.linear(x, weight, bias)


def _norm(module: Any) -> Module:
    """In float32 by one operation, or on a CPU, where torch makes that one of eight, by five; in others as the model rounds."""
    weight, eps = module.weight, module.variance_epsilon
    if weight.dtype != torch.float32:
        return module
    if weight.device.type != "cpu":
        return lambda x: functional.rms_norm(x, (x.shape[-1],), weight, eps)
    least = torch.tensor(eps)

    def norm(x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.addcmul(least, length, length, value=1 / x.shape[-1]).rsqrt_() * weight

    return norm
