-- title: All-fail groups that an expert solved
-- answers: Where does the policy fail every time although a successful expert rollout of the same problem is at hand?
-- answers: These are the groups where expert knowledge can still teach. The expert with the longest completion is named.
-- param: run text = NULL | only this run
-- param: split text = NULL | only this split (train, eval, ...)
-- param: excerpt int>=0 = 60 | characters of the prompt to show
-- example: echolab query all_fail_with_expert
WITH experts AS (
  SELECT
    problem_id,
    count(*) AS n_experts,
    arg_max(
      {'rollout_id': rollout_id, 'run': run, 'file': origin.file, 'model': model, 'n_chars': n_chars},
      {'chars': coalesce(n_chars, -1), 'rollout_id': rollout_id}
    ) AS expert
  FROM rollouts
  WHERE role = 'expert' AND success AND problem_id IS NOT NULL
  GROUP BY problem_id
),
excerpts AS (
  SELECT problem_id, min(excerpt(prompt, $excerpt::INTEGER)) AS prompt FROM base.rollouts WHERE role = 'policy' GROUP BY problem_id
)
SELECT
  g.run,
  g.split,
  g.step,
  g.group_id,
  g.problem_id,
  g.n,
  e.n_experts,
  e.expert.rollout_id AS expert_rollout_id,
  e.expert.run AS expert_run,
  e.expert.file AS expert_file,
  e.expert.model AS expert_model,
  e.expert.n_chars AS expert_chars,
  x.prompt
FROM groups g
JOIN experts e ON e.problem_id = g.problem_id
LEFT JOIN excerpts x ON x.problem_id = g.problem_id
WHERE g.role = 'policy' AND ($run::VARCHAR IS NULL OR g.run = $run::VARCHAR) AND ($split::VARCHAR IS NULL OR g.split = $split::VARCHAR) AND g.kind = 'all_fail'
ORDER BY g.run, g.split, g.step, g.group_id
