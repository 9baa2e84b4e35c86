-- title: Do scorers agree?
-- answers: How far apart are the log-probabilities (and entropies) that two scorers give the same tokens; also those that were
-- answers: recorded while sampling against scored ones. A wrong tokenizer, template or temperature shows at once.
-- answers: Tokens that the loss mask leaves out do not count. Rollouts whose token ids differ between the two are only counted.
-- param: run text = NULL | only this run
-- param: split text = NULL | only this split (train, eval, ...)
-- example: echolab query scorer_agreement --param run=my-run
WITH numbers AS (
  SELECT rollout_id, scorer AS name, token_ids, logprobs, entropies, loss_mask FROM scores
  UNION ALL
  SELECT rollout_id, 'recorded' AS name, completion_ids, logprobs, NULL, loss_mask
  FROM rollouts
  WHERE logprobs IS NOT NULL AND completion_ids IS NOT NULL
),
pairs AS (
  SELECT a.rollout_id, a.name AS a, b.name AS b, a.token_ids = b.token_ids AS same, a.logprobs AS la, b.logprobs AS lb,
    a.entropies AS ea, b.entropies AS eb, coalesce(a.loss_mask, b.loss_mask) AS mask
  FROM numbers a
  JOIN numbers b ON a.rollout_id = b.rollout_id AND a.name < b.name
  JOIN rollouts r ON r.rollout_id = a.rollout_id
  WHERE ($run::VARCHAR IS NULL OR r.run = $run::VARCHAR) AND ($split::VARCHAR IS NULL OR r.split = $split::VARCHAR)
),
differences AS (
  SELECT a, b, unnest(la) AS la, unnest(lb) AS lb, unnest(ea) AS ea, unnest(eb) AS eb, unnest(mask) AS counted
  FROM pairs
  WHERE same
)
SELECT
  a,
  b,
  n_rollouts,
  n_other_tokens,
  n_tokens,
  mean_logprob_a,
  mean_logprob_b,
  mean_abs_difference,
  max_abs_difference,
  correlation,
  mean_abs_entropy_difference
FROM (
  SELECT a, b, count(*) FILTER (WHERE same) AS n_rollouts, count(*) FILTER (WHERE NOT same) AS n_other_tokens
  FROM pairs
  GROUP BY a, b
)
LEFT JOIN (
  SELECT
    a,
    b,
    count(la - lb) AS n_tokens,
    avg(la) AS mean_logprob_a,
    avg(lb) AS mean_logprob_b,
    avg(abs(la - lb)) AS mean_abs_difference,
    max(abs(la - lb)) AS max_abs_difference,
    corr(la, lb) AS correlation,
    avg(abs(ea - eb)) AS mean_abs_entropy_difference
  FROM differences
  WHERE coalesce(counted, true)
  GROUP BY a, b
) USING (a, b)
ORDER BY a, b
