-- title: Histogram of segment entropies
-- answers: How are the mean entropies of segments distributed? Segments of the chosen scorer and segmenter.
-- param: run text = NULL | only this run
-- param: split text = NULL | only this split (train, eval, ...)
-- param: role text{policy,expert} = policy | whose rollouts
-- param: width float = 0.1 | width of a bin, in nats
-- example: echolab query segment_entropy_histogram --param width=0.25
SELECT
  run,
  split,
  floor(entropy / $width::DOUBLE) * $width::DOUBLE AS low,
  (floor(entropy / $width::DOUBLE) + 1) * $width::DOUBLE AS high,
  count(*) AS n_segments,
  count(*) / sum(count(*)) OVER (PARTITION BY run, split) AS share,
  sum(n_tokens)::BIGINT AS n_tokens,
  count(*) FILTER (WHERE is_peak) AS n_peaks
FROM segments
JOIN rollouts USING (rollout_id)
WHERE entropy IS NOT NULL AND role = $role::VARCHAR AND ($run::VARCHAR IS NULL OR run = $run::VARCHAR)
  AND ($split::VARCHAR IS NULL OR split = $split::VARCHAR)
GROUP BY run, split, floor(entropy / $width::DOUBLE)
ORDER BY run, split, low
