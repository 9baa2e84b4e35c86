-- title: Length by outcome
-- answers: How long are right, wrong and unrewarded completions, by step?
-- answers: Lengths are NULL where unknown; n_tokens_known and n_chars_known say how many samples they rest on.
-- param: run text = NULL | only this run
-- param: split text = NULL | only this split (train, eval, ...)
-- example: echolab query length_by_outcome
SELECT
  run,
  split,
  step,
  CASE success WHEN true THEN 'success' WHEN false THEN 'failure' ELSE 'unrewarded' END AS outcome,
  count(*) AS n,
  count(n_completion_tokens) AS n_tokens_known,
  avg(n_completion_tokens) AS tokens_mean,
  quantile_cont(n_completion_tokens, 0.5) AS tokens_median,
  quantile_cont(n_completion_tokens, 0.9) AS tokens_p90,
  max(n_completion_tokens) AS tokens_max,
  count(n_chars) AS n_chars_known,
  avg(n_chars) AS chars_mean,
  quantile_cont(n_chars, 0.5) AS chars_median,
  quantile_cont(n_chars, 0.9) AS chars_p90,
  max(n_chars) AS chars_max
FROM base.samples
WHERE role = 'policy' AND ($run::VARCHAR IS NULL OR run = $run::VARCHAR) AND ($split::VARCHAR IS NULL OR split = $split::VARCHAR)
GROUP BY run, split, step, outcome
ORDER BY run, split, step, outcome
