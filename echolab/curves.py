"""Trajectories -> curves: segment entropy and what goes with it over position, a row a trajectory.

A trajectory of n segments is a step function on 0..1 whose segment i holds from i/n to (i+1)/n. The value of a bin is the
mean of the function over the bin. So a trajectory with fewer segments than bins leaves no hole, one with more is averaged,
and every trajectory weighs the same in every bin. Unknown segments (no counted token) take no part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from echolab.errors import EcholabError
from echolab.files import pc
from echolab.sql import Session

Progress = Callable[[int, int], None]
OTHERS = "the condition chose other rollouts when asked again: for a sample write hash(rollout_id) % 10 = 0, not random()"
BATCH_ROWS = 256  # trajectories whose tokens are in memory at once


def resample(values: np.ndarray, counts: np.ndarray, bins: int) -> np.ndarray:
    """[trajectories, bins]. `values` holds the segments of all trajectories in a row, `counts` how many each has; NaN is
    unknown, and so is a bin of which nothing is known. Widths are whole numbers, 1/(n * bins) each: nothing is rounded."""
    n = np.repeat(counts, bins)
    low = np.tile(np.arange(bins), len(counts)) * n
    first = low // bins
    pieces = -(-(low + n) // bins) - first  # segments that a bin touches
    low, high = np.repeat(low, pieces), np.repeat(low + n, pieces)
    start = np.cumsum(pieces) - pieces
    segment = np.arange(pieces.sum()) + np.repeat(first - start, pieces)
    piece = values[np.repeat(np.repeat(np.cumsum(counts) - counts, bins), pieces) + segment]
    width = np.minimum(high, (segment + 1) * bins) - np.maximum(low, segment * bins)
    known = ~np.isnan(piece)
    out = np.full(len(n), np.nan)
    if len(piece):
        there = start[pieces > 0]
        sums = np.add.reduceat(np.where(known, width * piece, 0.0), there)
        with np.errstate(invalid="ignore"):  # 0 / 0 where nothing is known
            out[pieces > 0] = sums / np.add.reduceat(np.where(known, width, 0), there)
    return out.reshape(-1, bins)


@dataclass(frozen=True)
class Axes:
    """The columns of a curve: bins of relative position, the first segments by their number, and the whole trajectory
    (one bin of relative position)."""

    bins: int
    segments: int

    def __len__(self) -> int:
        return self.bins + self.segments + 1

    @property
    def columns(self) -> list[tuple[str, int]]:
        relative, absolute = range(self.bins), range(self.segments)
        return [*(("relative", i) for i in relative), *(("absolute", i) for i in absolute), ("whole", 0)]

    def place(self, values: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """[trajectories, columns] of numbers that each segment has."""
        out = np.full((len(counts), len(self)), np.nan, np.float32)
        out[:, : self.bins] = resample(values, counts, self.bins)
        row = np.repeat(np.arange(len(counts)), counts)
        segment = np.arange(len(values)) - np.repeat(np.cumsum(counts) - counts, counts)
        some = segment < self.segments
        out[row[some], self.bins + segment[some]] = values[some]
        out[:, -1:] = resample(values, counts, 1)
        return out

    def peaks(self, peak: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """[trajectories, columns]: how much of the peak lies in each bin, 1 in all; 1 at the segment that is the peak; its
        middle, 0..1, for the whole. NaN without a peak (-1)."""
        out = np.full((len(counts), len(self)), np.nan, np.float32)
        some = peak >= 0
        peak, n = peak[some, None], counts[some, None]
        edge = np.arange(self.bins) * n
        overlap = np.minimum(edge + n, (peak + 1) * self.bins) - np.maximum(edge, peak * self.bins)
        relative = np.maximum(overlap, 0) / self.bins
        absolute = np.arange(self.segments) == peak
        out[some] = np.hstack([relative, absolute, (peak + 0.5) / n])
        return out


@dataclass
class Trajectories:
    """Scored trajectories in the order of their ids: the columns of `frame`, and the curves of each."""

    frame: pl.DataFrame
    axes: Axes
    entropy: np.ndarray  # [trajectories, columns], float32, NaN where unknown; so are the next three
    tokens: np.ndarray  # of a segment
    top: np.ndarray  # share of the entropy that the trajectory's top tokens hold
    peaks: np.ndarray
    n_segments: np.ndarray
    n_tokens: np.ndarray

    @classmethod
    def empty(cls, frame: pl.DataFrame, axes: Axes) -> Trajectories:
        curves = [np.full((frame.height, len(axes)), np.nan, np.float32) for _ in range(4)]
        return cls(frame, axes, *curves, *np.zeros((2, frame.height), np.int64))

    def take(self, chosen: np.ndarray) -> Trajectories:
        curves = (self.entropy, self.tokens, self.top, self.peaks, self.n_segments, self.n_tokens)
        return Trajectories(self.frame.filter(chosen), self.axes, *(c[chosen] for c in curves))


def trajectories(
    session: Session, members: pl.DataFrame, cut: str, axes: Axes, top_share: float, progress: Progress | None = None
) -> Trajectories:
    """The curves of `members`, in the order of this frame. `cut` is a condition on `segmentations` that holds for one row
    of each of them, and for no other. Tokens are in memory for some trajectories at a time."""
    found, done = Trajectories.empty(members, axes), 0
    places = {rollout: i for i, rollout in enumerate(members["rollout_id"])}
    for batch in session.batches(
        f"""SELECT rollout_id, segment_ends, segment_entropies, peak_segment, entropies, loss_mask
        FROM (SELECT * FROM segmentations WHERE {cut}) JOIN scores USING (rollout_id, scorer)""",
        BATCH_ROWS,
    ):
        at = np.array([places.pop(rollout, -1) for rollout in batch["rollout_id"].to_pylist()])
        if (at < 0).any():
            raise EcholabError(OTHERS)
        ends, counts = flat(batch["segment_ends"])
        entropies, _ = flat(batch["segment_entropies"])
        peak = batch["peak_segment"].fill_null(-1).to_numpy()
        sizes = np.diff(ends, prepend=0)
        first = (np.cumsum(counts) - counts)[counts > 0]
        sizes[first] = ends[first]
        whole, share = top_shares(batch, sizes, counts, top_share)
        found.entropy[at] = axes.place(entropies, counts)
        found.tokens[at] = axes.place(sizes.astype(np.float64), counts)
        found.top[at] = axes.place(np.where(np.isnan(entropies), np.nan, share), counts)
        found.top[at, -1] = whole
        found.peaks[at] = axes.peaks(peak, counts)
        found.n_segments[at] = counts
        found.n_tokens[at] = _sums(sizes, counts)
        done += batch.num_rows
        if progress:
            progress(done, members.height)
    if places:
        raise EcholabError(OTHERS)
    return found


def flat(lists: Any) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of all lists in a row, NaN for NULL, and how many each list has."""
    values, counts = lists.flatten(), pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)
    if pa.types.is_floating(values.type):
        return values.fill_null(np.nan).to_numpy().astype(np.float64), counts
    return values.to_numpy().astype(np.int64), counts


def top_shares(batch: pa.RecordBatch, sizes: np.ndarray, counts: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """What part of the entropy the top `share` of a trajectory's counted tokens hold (that many, rounded up; equal ones
    at the edge in parts): in the whole trajectory, and in each segment. NaN where there is no entropy to hold."""
    entropies, lengths = flat(batch["entropies"])
    mask = np.ones(len(entropies), bool)
    masks = batch["loss_mask"]
    masked = np.repeat(masks.is_valid().to_numpy(zero_copy_only=False), lengths)
    mask[masked] = masks.flatten().fill_null(False).to_numpy(zero_copy_only=False)
    # What lies behind the last segment is a final EOS.
    row = np.repeat(np.arange(len(lengths)), lengths)
    within = np.arange(len(entropies)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    inside = within < np.repeat(_sums(sizes, counts), lengths)
    segment = np.repeat(np.arange(len(sizes)), sizes)
    counted = (mask & np.isfinite(entropies))[inside]
    numbers = np.maximum(entropies[inside], 0).astype(np.float32)[counted]
    row, segment = row[inside][counted], segment[counted]
    part = _top_parts(numbers, row, len(lengths), share)

    def ratio(keys: np.ndarray, n: int) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return np.bincount(keys, part * numbers, n) / np.bincount(keys, numbers, n)

    return ratio(row, len(lengths)), ratio(segment, len(sizes))


def _top_parts(numbers: np.ndarray, row: np.ndarray, rows: int, share: float) -> np.ndarray:
    """Of each number: 1 among the top of its row, 0 below, and what is left over where several equal ones end it."""
    n = np.bincount(row, minlength=rows)
    k = np.ceil(n * share - 1e-9).astype(np.int64)
    # One sort for all rows: the bits of floats from 0 on are in the order of the floats.
    keys = (row.astype(np.uint64) << np.uint64(32)) | (~numbers.view(np.uint32)).astype(np.uint64)
    keys.sort()
    edge = np.zeros(rows, np.float32)
    some = n > 0
    edge[some] = (~keys[(np.cumsum(n) - n + k - 1)[some]].astype(np.uint32)).view(np.float32)
    above, equal = numbers > edge[row], numbers == edge[row]
    with np.errstate(invalid="ignore"):
        rest = (k - np.bincount(row[above], minlength=rows)) / np.bincount(row[equal], minlength=rows)
    return np.where(above, 1.0, np.where(equal, rest[row], 0.0))


def _sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    total = np.concatenate([[0], np.cumsum(values)])
    after = np.cumsum(counts)
    return total[after] - total[after - counts]
