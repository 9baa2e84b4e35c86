-- title: Reward by step
-- answers: How do rewards and the success rate move as training goes on?
-- param: run text = NULL | only this run
-- param: split text = NULL | only this split (train, eval, ...)
-- example: echolab query reward_by_step --param run=my-run
SELECT
  run,
  split,
  step,
  count(DISTINCT group_id) AS n_groups,
  count(*) AS n,
  count(score) AS n_rewarded,
  avg(score) AS mean,
  stddev_pop(score) AS std,
  min(score) AS "min",
  max(score) AS "max",
  count(*) FILTER (WHERE success) / nullif(count(score), 0) AS success_rate
FROM base.samples
WHERE role = 'policy' AND ($run::VARCHAR IS NULL OR run = $run::VARCHAR) AND ($split::VARCHAR IS NULL OR split = $split::VARCHAR)
GROUP BY run, split, step
ORDER BY run, split, step
