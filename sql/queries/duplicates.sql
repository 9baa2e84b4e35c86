-- title: Identical completions inside a group
-- answers: In which groups did the policy give the same completion several times, and how many of them are surplus?
-- param: run text = NULL | only this run
-- param: split text = NULL | only this split (train, eval, ...)
-- param: role text = policy | policy or expert
-- example: echolab query duplicates
SELECT
  run,
  split,
  step,
  group_id,
  any_value(problem_id) AS problem_id,
  any_value(kind) AS kind,
  count(*) AS n,
  count(DISTINCT content) AS n_distinct,
  count(*) - count(DISTINCT content) AS surplus
FROM (
  -- the text, else the ids; parts of a rollout are compared with the same part of others
  SELECT *, hash(part, CASE WHEN completion IS NULL THEN hash(completion_ids) ELSE hash(completion) END) AS content
  FROM rollouts
  WHERE role = $role::VARCHAR AND ($run::VARCHAR IS NULL OR run = $run::VARCHAR)
    AND ($split::VARCHAR IS NULL OR split = $split::VARCHAR)
    AND (completion IS NOT NULL OR completion_ids IS NOT NULL)
)
GROUP BY run, split, step, group_id
HAVING count(*) > count(DISTINCT content)
ORDER BY run, split, step, group_id
