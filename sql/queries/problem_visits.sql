-- title: Problems over steps
-- answers: How did each problem fare at each visit: solved (all rollouts right), mixed, constant, failed (all wrong), or
-- answers: forgotten (all wrong, though an earlier step had a success)?
-- answers: success_rate is that of the visit, problem_success_rate that of the problem over all its visits.
-- param: run text = NULL | only this run
-- param: split text = NULL | only this split (train, eval, ...)
-- param: excerpt int>=0 = 60 | characters of the prompt to show
-- example: echolab query problem_visits --param run=my-run
WITH visits AS (
  SELECT run, split, problem_id, step, group_id, kind, n_rewarded, n_success
  FROM groups
  WHERE role = 'policy' AND ($run::VARCHAR IS NULL OR run = $run::VARCHAR) AND ($split::VARCHAR IS NULL OR split = $split::VARCHAR)
    AND problem_id IS NOT NULL
),
histories AS (
  SELECT
    run,
    split,
    problem_id,
    min(step) FILTER (WHERE n_success > 0) AS first_solved,
    sum(n_success) / nullif(sum(n_rewarded), 0) AS problem_success_rate
  FROM visits
  GROUP BY run, split, problem_id
),
excerpts AS (
  SELECT problem_id, min(excerpt(prompt, $excerpt::INTEGER)) AS prompt FROM base.rollouts WHERE role = 'policy' GROUP BY problem_id
)
SELECT
  v.run,
  v.split,
  v.problem_id,
  v.step,
  v.group_id,
  CASE v.kind
    WHEN 'all_success' THEN 'solved'
    WHEN 'all_fail' THEN CASE WHEN h.first_solved < v.step THEN 'forgotten' ELSE 'failed' END
    ELSE v.kind
  END AS status,
  v.n_rewarded,
  v.n_success,
  v.n_success / nullif(v.n_rewarded, 0) AS success_rate,
  h.problem_success_rate,
  x.prompt
FROM visits v
JOIN histories h ON h.run = v.run AND h.split = v.split AND h.problem_id = v.problem_id
LEFT JOIN excerpts x ON x.problem_id = v.problem_id
ORDER BY v.run, v.split, v.problem_id, v.step, v.group_id
