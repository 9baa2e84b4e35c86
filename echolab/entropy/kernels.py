"""One Triton pass over the logits of a chunk of rows: all that head.py wants to know of a row, from one read of it.

A program reads one row in blocks and keeps the state that head.py describes. It runs on CUDA; with TRITON_INTERPRET=1 set
before this module is imported it runs on CPU tensors, slowly, which is how it is tested without a GPU.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
BLOCK = 4096


@triton.jit
def _scan(
    logits, targets, sharpness, top_out, total_out, weighted_out, target_out, second_out, rank_out,
    stride, vocabulary, scale, softcap,
    CAPPED: tl.constexpr, EXTRAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # a chunk may hold more than 2**31 logits
    logits += row * stride
    sharp = tl.load(sharpness + row)
    target = tl.load(logits + tl.load(targets + row)).to(tl.float32)
    top = tl.full((), -1e30, tl.float32)  # finite, as inf - inf is not a number
    total = tl.full((), 0.0, tl.float32)
    weighted = tl.full((), 0.0, tl.float32)
    second = tl.full((), float("-inf"), tl.float32)
    rank = tl.full((), 0, tl.int32)
    if CAPPED:
        target = softcap * (2 * tl.sigmoid(2 * target * scale / softcap) - 1)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocabulary
        x = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32)
        if CAPPED:  # tanh(u) = 2 * sigmoid(2u) - 1
            x = tl.where(inside, softcap * (2 * tl.sigmoid(2 * x * scale / softcap) - 1), float("-inf"))
        highest = tl.max(x, 0)
        new = tl.maximum(top, highest)
        if EXTRAS:
            rank += tl.sum((x > target).to(tl.int32), 0)
            runner_up = tl.max(tl.where(tl.arange(0, BLOCK) == tl.argmax(x, 0), float("-inf"), x), 0)
            before = tl.where(top == -1e30, float("-inf"), top)
            second = tl.maximum(tl.maximum(second, runner_up), tl.minimum(before, highest))
        # 2**-126 is the smallest normal number; this also keeps 0 * -inf out of `weighted`
        y = tl.maximum((x - new) * sharp, -126.0, propagate_nan=tl.PropagateNan.ALL)
        p = tl.where(inside, tl.exp2(y), 0.0)
        step = tl.maximum((top - new) * sharp, -126.0)
        shrink = tl.exp2(step)
        weighted = shrink * (weighted + total * step) + tl.sum(p * y, 0)
        total = shrink * total + tl.sum(p, 0)
        top = new
    tl.store(top_out + row, top)
    tl.store(total_out + row, total)
    tl.store(weighted_out + row, weighted)
    tl.store(target_out + row, target)
    if EXTRAS:
        tl.store(second_out + row, second)
        tl.store(rank_out + row, rank)


def scan(
    logits: Tensor, targets: Tensor, sharpness: Tensor, scale: float, softcap: float | None, extras: bool
) -> tuple[Tensor, ...]:
    """The state of each row of `logits` [N, V]: top, total, weighted, target, second and rank (these two with `extras`)."""
    rows, vocabulary = logits.shape
    state = [logits.new_empty(rows, dtype=torch.float32) for _ in range(5)]
    rank = logits.new_empty(rows, dtype=torch.int32)
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    _scan[(rows,)](
        logits, targets.contiguous(), (sharpness * LOG2E).contiguous(), *state, rank,
        logits.stride(0), vocabulary, scale, softcap or 1.0,
        CAPPED=softcap is not None, EXTRAS=extras, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return *state, rank
