-- title: Entropy by step
-- answers: How does the mean token entropy move as training goes on, under each scorer?
-- answers: mean_of_rollouts weighs all rollouts alike, mean_of_tokens all tokens. Recorded entropies are the scorer of their run.
-- param: run text = NULL | only this run
-- param: split text = NULL | only this split (train, eval, ...)
-- param: role text{policy,expert} = policy | whose rollouts
-- example: echolab query entropy_by_step --param run=my-run
SELECT
  scorer,
  r.run,
  split,
  r.step,
  count(*) AS n,
  sum(n_tokens)::BIGINT AS n_tokens,
  avg(mean_entropy) AS mean_of_rollouts,
  sum(mean_entropy * n_counted) / nullif(sum(n_counted) FILTER (WHERE mean_entropy IS NOT NULL), 0) AS mean_of_tokens,
  quantile_cont(mean_entropy, 0.1) AS p10,
  quantile_cont(mean_entropy, 0.5) AS median,
  quantile_cont(mean_entropy, 0.9) AS p90
FROM (
  SELECT
    rollout_id,
    scorer,
    mean_entropy,
    n_tokens,
    CASE WHEN loss_mask IS NULL THEN n_tokens ELSE len(list_filter(loss_mask[1:n_tokens], lambda m: m)) END AS n_counted
  FROM scores
)
JOIN rollouts r USING (rollout_id)
WHERE role = $role::VARCHAR AND ($run::VARCHAR IS NULL OR r.run = $run::VARCHAR)
  AND ($split::VARCHAR IS NULL OR split = $split::VARCHAR)
GROUP BY scorer, r.run, split, r.step
ORDER BY scorer, r.run, split, r.step
