-- title: Recorded advantages against recomputed ones
-- answers: Which formula explains the advantages in the dump, and how far off is it, by step and kind of group?
-- answers: std is (reward - mean) / (sample standard deviation + 1e-4), as GRPO does; mean is reward - mean, as Dr. GRPO does;
-- answers: both where they agree (degenerate groups), neither where none fits. A mean over several steps of one batch, or
-- answers: groups that are not what the trainer took for a group, show as neither.
-- param: run text = NULL | only this run
-- param: split text = NULL | only this split (train, eval, ...)
-- param: tolerance float>=0 = 1e-3 | largest deviation that counts as a fit
-- example: echolab query advantage_check --param tolerance=1e-4
WITH deviations AS (
  SELECT
    r.run,
    r.split,
    r.step,
    g.kind,
    abs(r.advantage - (r.score - g.mean)
      / (CASE WHEN g.n_rewarded > 1 THEN g.std * sqrt(g.n_rewarded / (g.n_rewarded - 1)) ELSE 0 END + 1e-4)) AS by_std,
    abs(r.advantage - (r.score - g.mean)) AS by_mean
  FROM base.rollouts r
  JOIN groups g ON g.group_id = r.group_id AND g.role = r.role
  WHERE r.role = 'policy' AND ($run::VARCHAR IS NULL OR r.run = $run::VARCHAR) AND ($split::VARCHAR IS NULL OR r.split = $split::VARCHAR)
    AND isfinite(r.advantage) AND r.score IS NOT NULL
)
SELECT
  run,
  split,
  step,
  kind,
  count(*) AS n,
  max(by_std) AS max_deviation_std,
  max(by_mean) AS max_deviation_mean,
  CASE
    WHEN max(by_std) <= $tolerance::DOUBLE AND max(by_mean) <= $tolerance::DOUBLE THEN 'both'
    WHEN max(by_std) <= $tolerance::DOUBLE THEN 'std'
    WHEN max(by_mean) <= $tolerance::DOUBLE THEN 'mean'
    ELSE 'neither'
  END AS formula
FROM deviations
GROUP BY run, split, step, kind
ORDER BY run, split, step, kind
