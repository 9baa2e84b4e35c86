-- title: Difficulty of problems
-- answers: How often is each problem solved, and where does it stand among the others of its run and split?
-- answers: Hardest first. quantile is the share of problems that are solved less often; bucket counts from 0 (hardest).
-- param: run text = NULL | only this run
-- param: split text = NULL | only this split (train, eval, ...)
-- param: buckets int>=1 = 5 | buckets of equal width over the success rate
-- param: excerpt int>=0 = 60 | characters of the prompt to show
-- example: echolab query difficulty --param buckets=10
WITH excerpts AS (
  SELECT problem_id, min(excerpt(prompt, $excerpt::INTEGER)) AS prompt FROM base.rollouts WHERE role = 'policy' GROUP BY problem_id
)
SELECT
  run,
  split,
  problem_id,
  visits,
  n_rewarded,
  n_success,
  success_rate,
  percent_rank() OVER (PARTITION BY run, split ORDER BY success_rate) AS quantile,
  least(floor(success_rate * $buckets::INTEGER), $buckets::INTEGER - 1)::INTEGER AS bucket,
  first_step,
  last_step,
  kind,
  prompt
FROM problems
LEFT JOIN excerpts USING (problem_id)
WHERE role = 'policy' AND ($run::VARCHAR IS NULL OR run = $run::VARCHAR) AND ($split::VARCHAR IS NULL OR split = $split::VARCHAR)
  AND n_rewarded > 0
ORDER BY run, split, success_rate, problem_id
