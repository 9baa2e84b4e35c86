-- title: Two runs side by side
-- answers: At the same step, how do two runs differ in reward, success, degenerate groups and length?
-- answers: Steps that only one of them has show with the other's columns NULL.
-- param: a text = NULL | the first run (default: the first policy run by name)
-- param: b text = NULL | the second run (default: the next by name)
-- param: split text = NULL | only this split (train, eval, ...)
-- example: echolab query compare_runs --param a=baseline --param b=echo
WITH live AS (SELECT DISTINCT run FROM groups WHERE role = 'policy'),
first AS (SELECT coalesce($a::VARCHAR, min(run) FILTER (WHERE run IS DISTINCT FROM $b::VARCHAR)) AS a FROM live),
pair AS (SELECT a, coalesce($b::VARCHAR, (SELECT min(l.run) FROM live l WHERE l.run <> f.a)) AS b FROM first f),
sides AS (
  SELECT
    split,
    step,
    run,
    count(*) AS n_groups,
    sum(n)::BIGINT AS n,
    sum(mean * n_rewarded) / nullif(sum(n_rewarded), 0) AS reward,
    sum(n_success) / nullif(sum(n_rewarded), 0) AS success_rate,
    CASE WHEN worst(completeness) = 'all'
      THEN count(*) FILTER (WHERE degenerate(kind)) / nullif(count(*) FILTER (WHERE judged(kind)), 0) END AS degenerate,
    sum(n_tokens) / nullif(sum(n) FILTER (WHERE n_tokens IS NOT NULL), 0) AS tokens,
    sum(n_chars) / nullif(sum(n) FILTER (WHERE n_chars IS NOT NULL), 0) AS chars
  FROM groups
  WHERE role = 'policy' AND run IN (SELECT unnest([a, b]) FROM pair) AND ($split::VARCHAR IS NULL OR split = $split::VARCHAR)
  GROUP BY split, step, run
)
SELECT
  split,
  step,
  any_value(p.a) AS run_a,
  any_value(p.b) AS run_b,
  any_value(n_groups) FILTER (WHERE run = a) AS n_groups_a,
  any_value(n_groups) FILTER (WHERE run = b) AS n_groups_b,
  any_value(reward) FILTER (WHERE run = a) AS reward_a,
  any_value(reward) FILTER (WHERE run = b) AS reward_b,
  any_value(success_rate) FILTER (WHERE run = a) AS success_rate_a,
  any_value(success_rate) FILTER (WHERE run = b) AS success_rate_b,
  any_value(success_rate) FILTER (WHERE run = b) - any_value(success_rate) FILTER (WHERE run = a) AS success_rate_gain,
  any_value(degenerate) FILTER (WHERE run = a) AS share_degenerate_a,
  any_value(degenerate) FILTER (WHERE run = b) AS share_degenerate_b,
  any_value(tokens) FILTER (WHERE run = a) AS tokens_a,
  any_value(tokens) FILTER (WHERE run = b) AS tokens_b,
  any_value(chars) FILTER (WHERE run = a) AS chars_a,
  any_value(chars) FILTER (WHERE run = b) AS chars_b
FROM sides, pair p
GROUP BY split, step
ORDER BY split, step
