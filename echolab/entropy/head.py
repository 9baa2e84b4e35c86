"""Hidden states x output matrix -> the entropy and the log-probability of every token, over the full vocabulary.

The logits of [tokens x vocabulary] are never held. On a CPU a pass computes them for some hundred rows and one tile of the
vocabulary, and folds the tile into what is known of each row:

    top       the largest logit so far
    total     sum of 2**y, with y = (logit - top) / temperature * log2(e)
    weighted  sum of 2**y * y

    entropy = ln(total) - ln(2) * weighted / total        logprob = (target - top) / temperature - ln(total)

Everything is relative to `top`, so that logits of -1e4 lose no digits, and in float32 whatever the dtype of the matmul. Base 2,
since outside a compiler `exp` takes four times as long as `exp2` on AMD's processors (on Intel's two thirds). On CUDA with
Triton a row's numbers come from one pass over the logits of a chunk of rows (kernels.py). Scoring and the trainer call the same
code; the gradient computes the tiles again.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from echolab.errors import EcholabError

LOG2E, LN2 = math.log2(math.e), math.log(2)
TILE = 8192  # columns of the vocabulary at a time
PASS = 2**22  # logits of one pass, rows x columns: 8 MB in bfloat16, 16 MB in float32
BLOCK = 2**17  # logits that a thread turns into statistics at a time: they stay in its cache
CUDA_ROWS = 4096  # rows of the full vocabulary that the kernel gets at a time: 1.2 GB in bfloat16 at 151,936 tokens
LOWEST = -1e30  # where `top` starts: finite, as inf - inf is not a number
FLUSH = -126.0  # 2**FLUSH is the smallest normal float32: nothing is lost below it, and 2**-inf * -inf is avoided


@dataclass(frozen=True, eq=False)
class Head:
    """The output layer: logits = cap(scale * (hidden @ weight.T + bias)) with cap(x) = softcap * tanh(x / softcap)."""

    weight: Tensor  # [vocabulary, hidden]; rows beyond the tokenizer's size are part of the model's distribution
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, model: Any) -> Head:
        """The head of a transformers causal language model, tied or not."""
        layer = model.get_output_embeddings()
        if not isinstance(getattr(layer, "weight", None), Tensor) or not layer.weight.is_floating_point():
            raise EcholabError(f"{type(model).__name__} has no output matrix of floats: entropies need an unquantised head")
        config = model.config.get_text_config()
        scale = 1.0
        for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):  # Cohere, Falcon-H1, Muse
            scale *= getattr(config, name, None) or 1.0
        if scaling := getattr(config, "logits_scaling", None):  # Granite and MiniCPM divide, HyperCLOVA X multiplies
            scale = scale * scaling if "hyperclovax" in config.model_type else scale / scaling
        softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
        return cls(layer.weight, getattr(layer, "bias", None), softcap, scale)

    @torch.no_grad()
    def check(self, model: Any) -> None:
        """Whether the model's own logits are this head's: an architecture that changes them in another way is refused."""
        ids = torch.arange(min(8, len(self.weight)), device=self.weight.device)[None]
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        theirs = model(input_ids=ids, use_cache=False).logits[0].float()
        work = _Work.of(hidden, self, ids[0])
        x = work.logits(slice(None), slice(None), hidden.new_empty(theirs.numel()))
        ours = _shape(x, self.scale, self.softcap) * work.sharpness[:, None]
        if not torch.allclose(ours, theirs, rtol=0, atol=0.03 * float(theirs.abs().max())):
            raise EcholabError(f"{type(model).__name__} changes its logits in a way that echolab does not know")


class Stats(NamedTuple):
    """One number a token, float32 (float64 for float64 hidden states)."""

    entropy: Tensor  # nats, of the distribution that the token was drawn from
    logprob: Tensor
    margin: Tensor | None = None  # log-probability of the likeliest token minus that of the second
    rank: Tensor | None = None  # how many tokens are likelier than this one: 0 is the top token


@torch.no_grad()
def token_stats(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    extras: bool = False,
    compiled: bool = False,
) -> Stats:
    """Entropy and log-probability of `targets` [N], predicted from `hidden` [N, H]; with `extras` also margin and rank.

    The matmul runs in the dtype of hidden states and weight (under autocast in autocast's), the statistics in float32.
    `temperature` is one number or one a row. `compiled` fuses the CPU's statistics: a few percent, after half a minute.
    """
    work = _Work.of(hidden, head, targets, temperature)
    state = _scan(work, extras=extras, compiled=compiled)
    entropy, logprob = _finish(state, work.sharpness)
    if not extras:
        return Stats(entropy, logprob)
    # the rank was counted against a target logit of another matmul: the last bit must not cost the top token its place
    rank = torch.where(state.target == state.top, 0, state.rank)
    return Stats(entropy, logprob, (state.top - state.second) * work.sharpness, rank.int())


def token_logprobs(
    hidden: Tensor, head: Head, targets: Tensor, temperature: float | Tensor = 1.0, *, entropy_grad: bool = False
) -> tuple[Tensor, Tensor]:
    """(logprob, entropy) of each token, differentiable in hidden states, weight and bias; the entropy only if asked.

    The arithmetic is that of `token_stats`. The backward pass computes the tiles again and holds one of them at a time.
    """
    work = _Work.of(hidden, head, targets, temperature)
    return _TokenLogprobs.apply(work.hidden, head.weight, head.bias, work, entropy_grad)  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class _Work:
    """One checked call."""

    hidden: Tensor
    head: Head
    targets: Tensor
    sharpness: Tensor  # [N]: what differences of logits are multiplied with, 1 / temperature and the scale if there is no cap
    exact: torch.dtype  # of the statistics

    @classmethod
    def of(cls, hidden: Tensor, head: Head, targets: Tensor, temperature: float | Tensor = 1.0) -> _Work:
        kind, weight = hidden.device.type, head.weight
        if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
            raise ValueError(f"hidden states {list(hidden.shape)} do not fit an output matrix of {list(weight.shape)}")
        if targets.shape != hidden.shape[:1] or targets.is_floating_point():
            raise ValueError(f"one token id is needed for each of {len(hidden)} rows, not {list(targets.shape)}")
        if torch.is_autocast_enabled(kind):
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        elif hidden.dtype != weight.dtype:
            raise ValueError(f"hidden states are {hidden.dtype}, the output matrix is {weight.dtype}")
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < len(weight):
            raise ValueError(f"token ids must be 0..{len(weight) - 1}, got {int(targets.min())}..{int(targets.max())}")
        floats = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        heat = torch.as_tensor(temperature, dtype=floats, device=hidden.device)
        if heat.shape not in ((), targets.shape) or not bool(((heat > 0) & heat.isfinite()).all()):
            raise ValueError("the temperature is one number above 0, or one for each row")
        scale = head.scale if head.softcap is None else 1.0
        return cls(hidden, head, targets, (scale / heat).expand(targets.shape), floats)

    def logits(self, rows: slice, columns: slice, buffer: Tensor) -> Tensor:
        """The raw logits of a tile, in the dtype of the matmul."""
        hidden, weight = self.hidden[rows], self.head.weight[columns].to(self.hidden.dtype)
        out = buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight))
        if self.head.bias is None:
            return torch.mm(hidden, weight.T, out=out)
        return torch.addmm(self.head.bias[columns].to(hidden.dtype), hidden, weight.T, out=out)

    def tiles(self) -> tuple[list[slice], list[slice], Tensor]:
        """Spans of rows, spans of columns, and a buffer for the logits of one of each."""
        columns = _spans(len(self.head.weight), TILE)
        rows = _spans(len(self.hidden), PASS // _longest(columns))
        return rows, columns, self.hidden.new_empty(_longest(rows) * _longest(columns))

    def column(self, columns: slice, rows: slice) -> tuple[Tensor, Tensor]:
        """Which rows have their target in these columns, and where (anywhere for the others)."""
        at = self.targets[rows] - columns.start
        width = columns.stop - columns.start
        return (at >= 0) & (at < width), at.clamp(0, width - 1)[:, None]


class _State(NamedTuple):
    """What is known of each row; logits are capped, but not yet divided by the temperature."""

    top: Tensor
    total: Tensor
    weighted: Tensor
    target: Tensor
    second: Tensor  # this and the rank only if asked for
    rank: Tensor


def _scan(work: _Work, *, extras: bool, compiled: bool) -> _State:
    with torch.autocast(work.hidden.device.type, enabled=False):  # the dtype is chosen already
        if work.hidden.is_cuda and len(work.hidden) and (kernels := _kernels()):
            return _scan_rows(work, kernels, extras)
        return _scan_tiles(work, extras, compiled)


def _scan_rows(work: _Work, kernels: Any, extras: bool) -> _State:
    """Plan for CUDA: one large matmul a chunk of rows, one pass of a kernel over its logits."""
    head, found = work.head, []
    rows, vocabulary = _spans(len(work.hidden), CUDA_ROWS), slice(0, len(work.head.weight))
    buffer = work.hidden.new_empty(_longest(rows) * vocabulary.stop)
    for r in rows:
        logits = work.logits(r, vocabulary, buffer)
        found.append(kernels.scan(logits, work.targets[r], work.sharpness[r], head.scale, head.softcap, extras))
    return _State(*(torch.cat(column) for column in zip(*found, strict=True)))


def _scan_tiles(work: _Work, extras: bool, compiled: bool) -> _State:
    head, n = work.head, len(work.hidden)
    reduce, block = (_fused(work.hidden.dtype, head.softcap is not None), 4 * BLOCK) if compiled else (_reduce, BLOCK)
    new = functools.partial(work.sharpness.new_full, (n,))
    state = _State(new(LOWEST), new(0), new(0), new(-math.inf), new(-math.inf), new(0))
    sharpness = work.sharpness * LOG2E
    all_rows, all_columns, buffer = work.tiles()
    for rows in all_rows:
        expected = _expected(work, rows) if extras else None
        old = _State(*(s[rows] for s in state))
        for columns in all_columns:
            x = work.logits(rows, columns, buffer)
            inside, at = work.column(columns, rows)
            own = x.gather(1, at)[:, 0]
            old.target.copy_(torch.where(inside, _shape(own, head.scale, head.softcap), old.target))
            if expected is not None:  # a token is not likelier than itself, whatever the last bit says
                old.rank.sub_((inside & (own > expected)).to(work.exact))
            found = []
            for part in _blocks(x, block):
                likelier = None if expected is None else expected[part]
                found.append(reduce(x[part], sharpness[rows][part], likelier, head.scale, head.softcap))
            _merge(old, [torch.cat(column) for column in zip(*found, strict=True)], sharpness[rows])
    return state


def _reduce(x: Tensor, sharpness: Tensor, expected: Tensor | None, scale: float, softcap: float | None) -> list[Tensor]:
    """Of raw logits by row: the highest; total and weighted relative to it; if asked the second, and how many are expected
    to be above the target. `x` is used up. The compiled form is made from this code."""
    above = None
    if expected is not None:  # comparing in place gives floats, which are summed six times as fast as truth values
        above = x.to(sharpness.dtype, copy=True).gt_(expected[:, None]).sum(-1)
    x = _shape(x, scale, softcap)
    highest = x.amax(-1).clamp_(min=LOWEST)
    extras = []
    if above is not None:
        is_highest = x.clone().eq_(highest[:, None])
        runner_up = torch.add(x, is_highest, alpha=-3e38).amax(-1)
        runner_up = torch.where(is_highest.sum(-1) > 1, highest, runner_up.masked_fill(runner_up < LOWEST, -math.inf))
        extras = [runner_up, above]
    y = x.sub_(highest[:, None]).mul_(sharpness[:, None]).clamp_(min=FLUSH)
    p = y.exp2()
    return [highest, p.sum(-1), p.mul_(y).sum(-1), *extras]


def _merge(state: _State, tile: list[Tensor], sharpness: Tensor) -> None:
    """Fold what was found in a tile into the state of its rows."""
    highest, total, weighted, *extras = tile
    top = torch.maximum(state.top, highest)
    if extras:
        before, here = (t.masked_fill(t == LOWEST, -math.inf) for t in (state.top, highest))
        state.second.copy_(torch.maximum(torch.maximum(state.second, extras[0]), torch.minimum(before, here)))
        state.rank.add_(extras[1])
    old, new = (((t - top) * sharpness).clamp_(min=FLUSH) for t in (state.top, highest))
    state.weighted.copy_(old.exp2() * (state.weighted + state.total * old) + new.exp2() * (weighted + total * new))
    state.total.copy_(old.exp2() * state.total + new.exp2() * total)
    state.top.copy_(top)


def _finish(state: _State, sharpness: Tensor) -> tuple[Tensor, Tensor]:
    log_total = state.total.log()
    entropy = log_total - LN2 * state.weighted / state.total
    logprob = (state.target - state.top) * sharpness - log_total
    seen = state.top > LOWEST  # a row of nothing but -inf has no distribution
    return entropy.where(seen, math.nan), logprob.where(seen, math.nan)


def _shape(x: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Raw logits in float32, capped. Without a cap the scale joins the temperature, after the subtraction."""
    x = x if x.dtype == torch.float64 else x.float()
    return x if softcap is None else torch.tanh(x * (scale / softcap)) * softcap


def _expected(work: _Work, rows: slice) -> Tensor:
    """The raw logits of the targets before their tile is reached, to count those above them."""
    head, ids = work.head, work.targets[rows]
    x = (work.hidden[rows].to(work.exact) * head.weight[ids].to(work.exact)).sum(-1)
    x = x if head.bias is None else x + head.bias[ids]
    return x.to(work.hidden.dtype).to(work.exact)  # as the matmul rounds


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work, entropy_grad: bool):
        state = _scan(work, extras=False, compiled=False)
        entropy, logprob = _finish(state, work.sharpness)
        # tensors go through save_for_backward, so that autograd notices a weight that was changed meanwhile
        ctx.save_for_backward(hidden, weight, bias, work.targets, work.sharpness, state.top, state.total, entropy)
        ctx.head = (work.head.softcap, work.head.scale)
        ctx.set_materialize_grads(False)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None):
        hidden, weight, bias, targets, sharpness, top, total, entropy = ctx.saved_tensors
        work = _Work(hidden, Head(weight, bias, *ctx.head), targets, sharpness, entropy.dtype)
        slopes = _slopes(top, total, entropy, *grads)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            return *_backward(work, slopes, ctx.needs_input_grad), None, None


class _Slopes(NamedTuple):
    """The gradient of a row's logits / temperature: 2**y * (constant + linear * y), and `target` more at the target."""

    top: Tensor
    constant: Tensor
    linear: Tensor | None
    target: Tensor


def _slopes(top: Tensor, total: Tensor, entropy: Tensor, g_logprob: Tensor | None, g_entropy: Tensor | None) -> _Slopes:
    """With p = softmax(z), d logprob / dz = [is target] - p and d entropy / dz = -p * (log p + entropy)."""
    g = torch.zeros_like(top) if g_logprob is None else g_logprob
    if g_entropy is None:
        return _Slopes(top, -g / total, None, g)
    return _Slopes(top, -(g + g_entropy * (entropy - total.log())) / total, -g_entropy * LN2 / total, g)


def _backward(work: _Work, slopes: _Slopes, wanted: tuple[bool, ...]) -> list[Tensor | None]:
    """Gradients of hidden states, weight and bias; sums over tiles and chunks of rows are kept in float32."""
    head, exact = work.head, work.exact
    hidden = torch.zeros_like(work.hidden, dtype=exact) if wanted[0] else None
    weight = torch.empty_like(head.weight) if wanted[1] else None
    bias = torch.empty_like(head.bias) if wanted[2] and head.bias is not None else None
    all_rows, all_columns, buffer = work.tiles()
    for columns in all_columns:
        width = columns.stop - columns.start
        weight_sum = work.hidden.new_zeros(width, work.hidden.shape[1], dtype=exact)
        bias_sum = work.hidden.new_zeros(width, dtype=exact)
        for rows in all_rows:
            x = work.logits(rows, columns, buffer)
            inside, at = work.column(columns, rows)
            for part in _blocks(x):
                at_rows = slice(rows.start + part.start, rows.start + part.stop)
                x[part] = _slope(work, slopes, x[part], at_rows, inside[part], at[part])
            if hidden is not None:
                hidden[rows] += x @ head.weight[columns].to(x.dtype)
            if weight is not None:
                weight_sum += x.T @ work.hidden[rows]
            if bias is not None:
                bias_sum += x.sum(0, dtype=exact)
        if weight is not None:
            weight[columns] = weight_sum
        if bias is not None:
            bias[columns] = bias_sum
    return [None if hidden is None else hidden.to(work.hidden.dtype), weight, bias]


def _slope(work: _Work, slopes: _Slopes, raw: Tensor, rows: slice, inside: Tensor, at: Tensor) -> Tensor:
    """The gradient of a block of raw logits."""
    head, sharpness = work.head, work.sharpness[rows, None]
    x = _shape(raw, head.scale, head.softcap)
    y = torch.sub(x, slopes.top[rows, None]).mul_(sharpness * LOG2E).clamp_(min=FLUSH)
    slope, constant = y.exp2(), slopes.constant[rows, None]
    slope.mul_(constant if slopes.linear is None else y.mul_(slopes.linear[rows, None]).add_(constant))
    slope.scatter_add_(1, at, slopes.target[rows, None] * inside[:, None])
    if head.softcap is not None:
        slope.mul_(1 - (x / head.softcap) ** 2).mul_(head.scale)
    return slope.mul_(sharpness)


def _spans(n: int, most: int) -> list[slice]:
    """0..n in equal pieces of at most `most`: multiples of 64, but the last."""
    pieces = max(1, math.ceil(n / most))
    size = max(1, min(most, math.ceil(n / pieces / 64) * 64))
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _longest(spans: list[slice]) -> int:
    return max((s.stop - s.start for s in spans), default=1)


def _blocks(x: Tensor, size: int = BLOCK) -> Iterator[slice]:
    """Rows of a tile whose statistics are made at once."""
    rows = len(x) if x.is_cuda else max(1, size // x.shape[1]) * torch.get_num_threads()
    for start in range(0, len(x), rows):
        yield slice(start, min(start + rows, len(x)))


@functools.cache
def _fused(dtype: torch.dtype, capped: bool) -> Any:
    """`_reduce`, compiled once for all shapes; where nothing compiles, as it is."""
    reduce = torch.compile(_reduce, dynamic=True)
    row = torch.ones(4, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    try:
        reduce(torch.zeros(4, 128, dtype=dtype), row, None, 1.0, 30.0 if capped else None)
    except (RuntimeError, OSError) as error:
        warnings.warn(f"the entropy head runs uncompiled: {str(error).splitlines()[0]}", stacklevel=2)
        return _reduce
    return reduce


@functools.cache
def _kernels() -> Any:
    try:
        from echolab.entropy import kernels
    except ImportError:
        return None
    return kernels
