-- title: Degenerate groups by step
-- answers: How large is the share of groups that teach nothing, by kind, as training goes on?
-- answers: Shares divide by the judged groups: those with more than one rewarded sample. Where the dump left groups out
-- answers: before it was written, shares are unknown (NULL) and the note says so.
-- param: run text = NULL | only this run
-- param: split text = NULL | only this split (train, eval, ...)
-- example: echolab query degenerate_by_step --param run=my-run
SELECT
  * EXCLUDE (known, note),
  (all_success + all_fail + constant) / known AS share_degenerate,
  all_success / known AS share_all_success,
  all_fail / known AS share_all_fail,
  constant / known AS share_constant,
  mixed / known AS share_mixed,
  note
FROM (
  SELECT
    run,
    split,
    step,
    count(*) AS n_groups,
    count(*) FILTER (WHERE judged(kind)) AS n_judged,
    count(*) FILTER (WHERE kind = 'unrewarded') AS unrewarded,
    count(*) FILTER (WHERE kind = 'single') AS single,
    count(*) FILTER (WHERE kind = 'all_success') AS all_success,
    count(*) FILTER (WHERE kind = 'all_fail') AS all_fail,
    count(*) FILTER (WHERE kind = 'constant') AS constant,
    count(*) FILTER (WHERE kind = 'mixed') AS mixed,
    CASE WHEN worst(completeness) = 'all' THEN nullif(count(*) FILTER (WHERE judged(kind)), 0) END AS known,
    coalesce(
      upstream_note(worst(completeness)), CASE WHEN NOT bool_or(judged(kind)) THEN 'no group has rewards to compare' END
    ) AS note
  FROM groups
  WHERE role = 'policy' AND ($run::VARCHAR IS NULL OR run = $run::VARCHAR) AND ($split::VARCHAR IS NULL OR split = $split::VARCHAR)
  GROUP BY run, split, step
)
ORDER BY run, split, step
