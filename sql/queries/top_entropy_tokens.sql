-- title: Forking tokens
-- answers: Before which tokens is the policy least certain? By mean entropy over all places where they stand, as text; of the
-- answers: chosen scorer.
-- param: run text = NULL | only this run
-- param: split text = NULL | only this split (train, eval, ...)
-- param: role text{policy,expert} = policy | whose rollouts
-- param: min_count int>=1 = 20 | leave out tokens that stand less often
-- param: top int>=1 = 50 | how many tokens
-- example: echolab query top_entropy_tokens --param min_count=100
SELECT
  t.token_id,
  any_value(t.text) AS text,
  count(*) AS n,
  count(DISTINCT rollout_id) AS n_rollouts,
  avg(t.entropy) AS mean_entropy,
  quantile_cont(t.entropy, 0.9) AS p90_entropy,
  avg(t.logprob) AS mean_logprob
FROM tokens t
JOIN rollouts r USING (rollout_id)
WHERE t.counted AND r.role = $role::VARCHAR AND ($run::VARCHAR IS NULL OR r.run = $run::VARCHAR)
  AND ($split::VARCHAR IS NULL OR r.split = $split::VARCHAR)
GROUP BY t.token_id
HAVING count(*) >= $min_count::INTEGER
ORDER BY mean_entropy DESC, t.token_id
LIMIT $top::INTEGER
