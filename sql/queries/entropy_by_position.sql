-- title: Entropy by position
-- answers: Where along a completion is the policy uncertain? Segments of the chosen scorer and segmenter, by their place
-- answers: among the segments of their completion, in equal bins.
-- param: run text = NULL | only this run
-- param: split text = NULL | only this split (train, eval, ...)
-- param: role text{policy,expert} = policy | whose rollouts
-- param: bins int>=1 = 10 | bins from the first segment to the last
-- example: echolab query entropy_by_position --param bins=20
SELECT
  run,
  split,
  CASE success WHEN true THEN 'success' WHEN false THEN 'failure' ELSE 'unrewarded' END AS outcome,
  least(floor(position * $bins::INTEGER), $bins::INTEGER - 1)::INTEGER AS bin,
  count(*) AS n_segments,
  count(DISTINCT rollout_id) AS n_rollouts,
  avg(entropy) AS mean_entropy,
  stddev_samp(entropy) / sqrt(count(entropy)) AS se,
  avg(is_peak::INTEGER) AS share_of_peaks
FROM segments
JOIN rollouts USING (rollout_id)
WHERE entropy IS NOT NULL AND role = $role::VARCHAR AND ($run::VARCHAR IS NULL OR run = $run::VARCHAR)
  AND ($split::VARCHAR IS NULL OR split = $split::VARCHAR)
GROUP BY run, split, outcome, bin
ORDER BY run, split, outcome, bin
