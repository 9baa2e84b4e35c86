-- title: Truncation by step
-- answers: How many completions were cut at the length limit, and how do these fare?
-- answers: The share is NULL for a run and split whose dump says nothing about how completions ended.
-- param: run text = NULL | only this run
-- param: split text = NULL | only this split (train, eval, ...)
-- example: echolab query truncation_by_step
WITH samples AS (
  SELECT *, truncated(finish_reason) AS truncated
  FROM base.samples
  WHERE role = 'policy' AND ($run::VARCHAR IS NULL OR run = $run::VARCHAR) AND ($split::VARCHAR IS NULL OR split = $split::VARCHAR)
),
told AS (SELECT run, split, count(finish_reason) > 0 AS told FROM samples GROUP BY run, split)
SELECT
  s.run,
  s.split,
  s.step,
  count(*) AS n,
  CASE WHEN any_value(t.told) THEN count(*) FILTER (WHERE truncated) END AS n_truncated,
  CASE WHEN any_value(t.told) THEN count(*) FILTER (WHERE truncated) / count(*) END AS share,
  count(*) FILTER (WHERE truncated AND success) / nullif(count(score) FILTER (WHERE truncated), 0) AS success_rate_truncated,
  count(*) FILTER (WHERE NOT truncated AND success) / nullif(count(score) FILTER (WHERE NOT truncated), 0) AS success_rate_other
FROM samples s
JOIN told t ON t.run = s.run AND t.split = s.split
GROUP BY s.run, s.split, s.step
ORDER BY s.run, s.split, s.step
