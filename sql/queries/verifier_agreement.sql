-- title: Verifiers against recorded rewards
-- answers: By step, how often does a verifier agree with the rewards of the dump, and which of the two is kinder?
-- answers: An answer that was not found counts as wrong. n_compared leaves out timeouts, errors and rollouts without a recorded reward.
-- answers: Rewards are those of the dump; --verifier shows only that verifier.
-- param: run text = NULL | only this run
-- param: split text = NULL | only this split (train, eval, ...)
-- param: role text = NULL | only policy or only expert
-- example: echolab query verifier_agreement --param run=my-run
SELECT
  v.name || '@' || v.version AS verifier,
  r.run,
  r.split,
  r.step,
  r.role,
  count(*) AS n,
  count(*) FILTER (WHERE w.status = 'no_answer') AS no_answer,
  count(*) FILTER (WHERE w.status = 'timeout') AS timeout,
  count(*) FILTER (WHERE w.status = 'error') AS error,
  count(recorded) FILTER (WHERE said IS NOT NULL) AS n_compared,
  count(*) FILTER (WHERE recorded = said) AS n_agree,
  count(*) FILTER (WHERE recorded = said) / nullif(count(recorded) FILTER (WHERE said IS NOT NULL), 0) AS agreement,
  count(*) FILTER (WHERE said AND NOT recorded) AS only_verifier,
  count(*) FILTER (WHERE recorded AND NOT said) AS only_recorded,
  avg(reward) FILTER (WHERE isfinite(reward)) AS mean_recorded,
  avg(CASE w.status WHEN 'ok' THEN coalesce(w.score, w.success::INTEGER) WHEN 'no_answer' THEN 0 END) AS mean_verifier
FROM (
  SELECT *, CASE status WHEN 'ok' THEN success WHEN 'no_answer' THEN false END AS said FROM verdicts
) w
JOIN (
  SELECT *, CASE WHEN isfinite(reward) THEN reward >= success_threshold(run) - tol() END AS recorded FROM base.visible
) r ON r.rollout_id = w.rollout_id
JOIN verifiers v ON v.id = w.verifier
WHERE ($run::VARCHAR IS NULL OR r.run = $run::VARCHAR) AND ($split::VARCHAR IS NULL OR r.split = $split::VARCHAR)
  AND ($role::VARCHAR IS NULL OR r.role = $role::VARCHAR)
  AND (chosen_verifier() IS NULL OR w.verifier = chosen_verifier())
GROUP BY v.name, v.version, r.run, r.split, r.step, r.role
ORDER BY v.name, v.version, r.run, r.split, r.step, r.role
