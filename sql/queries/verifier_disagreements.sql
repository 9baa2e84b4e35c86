-- title: Where a verifier and the recorded rewards differ
-- answers: Which rollouts does one of them call right and the other wrong? Gold and answer stand side by side.
-- answers: An answer that was not found counts as wrong. Rewards are those of the dump; --verifier shows only that verifier.
-- param: run text = NULL | only this run
-- param: split text = NULL | only this split (train, eval, ...)
-- param: role text = NULL | only policy or only expert
-- param: excerpt int>=0 = 60 | characters of the prompt to show
-- example: echolab query verifier_disagreements --param run=my-run
SELECT
  v.name || '@' || v.version AS verifier,
  r.run,
  r.split,
  r.step,
  excerpt(r.prompt, $excerpt::INTEGER) AS prompt,
  r.sample,
  r.ground_truth,
  w.extracted,
  r.reward,
  w.status,
  said AS success,
  r.group_id,
  r.rollout_id
FROM (
  SELECT *, CASE status WHEN 'ok' THEN success WHEN 'no_answer' THEN false END AS said FROM verdicts
) w
JOIN (
  SELECT *, CASE WHEN isfinite(reward) THEN reward >= success_threshold(run) - tol() END AS recorded FROM base.visible
) r ON r.rollout_id = w.rollout_id
JOIN verifiers v ON v.id = w.verifier
WHERE recorded <> said AND ($run::VARCHAR IS NULL OR r.run = $run::VARCHAR)
  AND ($split::VARCHAR IS NULL OR r.split = $split::VARCHAR) AND ($role::VARCHAR IS NULL OR r.role = $role::VARCHAR)
  AND (chosen_verifier() IS NULL OR w.verifier = chosen_verifier())
ORDER BY v.name, v.version, r.run, r.split, r.step, r.group_id, r.sample NULLS LAST, r.rollout_id
