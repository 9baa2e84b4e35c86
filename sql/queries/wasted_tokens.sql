-- title: Tokens spent on degenerate groups
-- answers: What did the groups that teach nothing cost, by step?
-- answers: In completion tokens; in characters for a run and split where the tokens of some rollout are unknown (column unit).
-- answers: Where the dump left groups out, wasted is a lower bound, the share is unknown (NULL), and the note says so.
-- param: run text = NULL | only this run
-- param: split text = NULL | only this split (train, eval, ...)
-- example: echolab query wasted_tokens
WITH units AS (
  SELECT run, split, CASE WHEN count(n_tokens) = count(*) THEN 'tokens' ELSE 'chars' END AS unit
  FROM groups
  WHERE role = 'policy' AND ($run::VARCHAR IS NULL OR run = $run::VARCHAR) AND ($split::VARCHAR IS NULL OR split = $split::VARCHAR)
  GROUP BY run, split
),
costs AS (
  SELECT g.*, u.unit, CASE u.unit WHEN 'tokens' THEN g.n_tokens ELSE g.n_chars END AS cost
  FROM groups g
  JOIN units u ON u.run = g.run AND u.split = g.split
  WHERE g.role = 'policy'
)
SELECT
  run,
  split,
  step,
  unit,
  count(*) AS n_groups,
  count(*) FILTER (WHERE degenerate(kind)) AS n_degenerate,
  coalesce(sum(cost) FILTER (WHERE degenerate(kind)), sum(cost) * 0)::BIGINT AS wasted,
  coalesce(sum(cost) FILTER (WHERE kind = 'all_success'), sum(cost) * 0)::BIGINT AS wasted_all_success,
  coalesce(sum(cost) FILTER (WHERE kind = 'all_fail'), sum(cost) * 0)::BIGINT AS wasted_all_fail,
  coalesce(sum(cost) FILTER (WHERE kind = 'constant'), sum(cost) * 0)::BIGINT AS wasted_constant,
  sum(cost)::BIGINT AS total,
  CASE WHEN worst(completeness) = 'all' AND bool_or(judged(kind)) THEN coalesce(sum(cost) FILTER (WHERE degenerate(kind)), 0) / nullif(sum(cost), 0) END AS share,
  coalesce(upstream_note(worst(completeness)), CASE WHEN NOT bool_or(judged(kind)) THEN 'no group has rewards to compare' END) AS note
FROM costs
GROUP BY run, split, step, unit
ORDER BY run, split, step
