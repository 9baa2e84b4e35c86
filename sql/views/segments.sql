-- view: segments
-- about: One row a segment of a completion, as cut by the chosen segmenter from the chosen scorer's entropies.
-- about: Without a choice the only ones there are; where there are several, reading the view is an error that lists them.
-- column: segment | 0-based number of the segment
-- column: start_token | its first token: 0, or the end of the segment before
-- column: end_token | exclusive 0-based offset of its end
-- column: n_tokens | end_token - start_token
-- column: entropy | mean token entropy over its counted tokens, in nats; NULL without any
-- column: position | where its middle lies among the segments, 0..1: (segment + 0.5) / number of segments
-- column: is_peak | it is the segment of highest entropy
SELECT
  rollout_id,
  scorer,
  segmenter,
  segment::INTEGER AS segment,
  coalesce(segment_ends[segment], 0) AS start_token,  -- lists count from 1: this is the segment before
  segment_ends[segment + 1] AS end_token,
  segment_ends[segment + 1] - coalesce(segment_ends[segment], 0) AS n_tokens,
  segment_entropies[segment + 1] AS entropy,
  (segment + 0.5::DOUBLE) / len(segment_ends) AS position,
  coalesce(segment = peak_segment, false) AS is_peak
FROM (
  SELECT rollout_id, scorer, segmenter, segment_ends, segment_entropies, peak_segment, unnest(range(len(segment_ends))) AS segment
  FROM base.segmentations
  WHERE scorer = chosen_scorer() AND segmenter = chosen_segmenter()
)
