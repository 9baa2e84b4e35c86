-- title: Degenerate groups
-- answers: Which groups teach nothing, why, and what did each cost?
-- answers: Every rollout of such a group has the same reward, so every advantage is zero.
-- param: run text = NULL | only this run
-- param: split text = NULL | only this split (train, eval, ...)
-- param: kind text{all_success,all_fail,constant} = NULL | only this kind: all_success, all_fail or constant
-- param: excerpt int>=0 = 60 | characters of the prompt to show
-- example: echolab query degenerate_groups --param kind=all_fail
WITH degenerate_groups AS (
  SELECT run, split, step, group_id, problem_id, kind, n, n_rewarded, mean AS reward, n_tokens, n_chars
  FROM groups
  WHERE role = 'policy' AND ($run::VARCHAR IS NULL OR run = $run::VARCHAR) AND ($split::VARCHAR IS NULL OR split = $split::VARCHAR)
    AND degenerate(kind) AND ($kind::VARCHAR IS NULL OR kind = $kind::VARCHAR)
),
excerpts AS (
  SELECT group_id, min(excerpt(prompt, $excerpt::INTEGER)) AS prompt
  FROM base.rollouts
  WHERE role = 'policy' AND group_id IN (SELECT group_id FROM degenerate_groups)
  GROUP BY group_id
)
SELECT d.*, e.prompt
FROM degenerate_groups d
LEFT JOIN excerpts e ON e.group_id = d.group_id
ORDER BY run, split, step, d.group_id
