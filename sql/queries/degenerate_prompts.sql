-- title: Problems that no longer teach
-- answers: Which problems are saturated (all rollouts right for several visits in a row, up to now), never solved (not one
-- answers: success in any visit), or forgotten (solved before, without a success in the newest visit), and since which step?
-- answers: Visits without rewards do not count.
-- param: run text = NULL | only this run
-- param: split text = NULL | only this split (train, eval, ...)
-- param: streak int>=1 = 3 | visits in a row that make a problem saturated
-- param: status text{saturated,never_solved,forgotten} = NULL | only saturated, never_solved or forgotten
-- param: excerpt int>=0 = 60 | characters of the prompt to show
-- example: echolab query degenerate_prompts --param streak=5
WITH visits AS (
  SELECT
    run, split, problem_id, step, kind, n_rewarded, n_success,
    row_number() OVER (PARTITION BY run, split, problem_id ORDER BY step NULLS FIRST, group_id) AS visit
  FROM groups
  WHERE role = 'policy' AND ($run::VARCHAR IS NULL OR run = $run::VARCHAR) AND ($split::VARCHAR IS NULL OR split = $split::VARCHAR)
    AND problem_id IS NOT NULL AND n_rewarded > 0
),
histories AS (
  SELECT
    run, split, problem_id,
    count(*) AS visits,
    list(step ORDER BY visit) AS steps,
    max(visit) FILTER (WHERE n_success > 0) AS last_solved,
    coalesce(max(visit) FILTER (WHERE kind <> 'all_success'), 0) AS last_open,
    sum(n_rewarded)::BIGINT AS n_rewarded,
    sum(n_success) / sum(n_rewarded) AS success_rate
  FROM visits
  GROUP BY run, split, problem_id
),
judged AS (
  SELECT
    *,
    CASE
      WHEN visits - last_open >= $streak::INTEGER AND visits > last_open THEN 'saturated'
      WHEN last_solved IS NULL THEN 'never_solved'
      -- without steps nobody knows which visit came later
      WHEN last_solved < visits AND steps[last_solved] < steps[visits] THEN 'forgotten'
    END AS status
  FROM histories
),
excerpts AS (
  SELECT problem_id, min(excerpt(prompt, $excerpt::INTEGER)) AS prompt FROM base.rollouts WHERE role = 'policy' GROUP BY problem_id
)
SELECT
  run, split, problem_id, status,
  CASE status
    WHEN 'saturated' THEN steps[last_open + 1]
    WHEN 'never_solved' THEN steps[1]
    WHEN 'forgotten' THEN steps[last_solved + 1]
  END AS since_step,
  CASE status WHEN 'saturated' THEN visits - last_open WHEN 'never_solved' THEN visits ELSE visits - last_solved END AS streak,
  steps[visits] AS last_step,
  visits, n_rewarded, success_rate, prompt
FROM judged
LEFT JOIN excerpts USING (problem_id)
WHERE status IS NOT NULL AND ($status::VARCHAR IS NULL OR status = $status::VARCHAR)
ORDER BY run, split, status, problem_id
