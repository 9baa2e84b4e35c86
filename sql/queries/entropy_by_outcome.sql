-- title: Entropy by outcome
-- answers: Do right and wrong completions differ in entropy, under each scorer, and by the kind of their group?
-- param: run text = NULL | only this run
-- param: split text = NULL | only this split (train, eval, ...)
-- param: role text{policy,expert} = policy | whose rollouts
-- example: echolab query entropy_by_outcome
SELECT
  scorer,
  r.run,
  split,
  kind,
  CASE success WHEN true THEN 'success' WHEN false THEN 'failure' ELSE 'unrewarded' END AS outcome,
  count(*) AS n,
  sum(n_tokens)::BIGINT AS n_tokens,
  avg(mean_entropy) AS mean_entropy,
  stddev_samp(mean_entropy) AS std,
  quantile_cont(mean_entropy, 0.5) AS median,
  avg(peak_entropy) AS mean_peak_entropy
FROM (SELECT rollout_id, scorer, mean_entropy, n_tokens FROM scores)
JOIN rollouts r USING (rollout_id)
LEFT JOIN (  -- the peak does not depend much on the segmenter: where there are several, their mean
  SELECT rollout_id, scorer, avg(peak_entropy) AS peak_entropy FROM segmentations GROUP BY rollout_id, scorer
) USING (rollout_id, scorer)
WHERE role = $role::VARCHAR AND ($run::VARCHAR IS NULL OR r.run = $run::VARCHAR)
  AND ($split::VARCHAR IS NULL OR split = $split::VARCHAR)
GROUP BY scorer, r.run, split, kind, outcome
ORDER BY scorer, r.run, split, kind, outcome
