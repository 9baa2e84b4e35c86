-- view: problems
-- about: One row a problem, run, split and role: how it fared over its visits, whatever its prompt looked like.
-- column: first_step | step of its first visit
-- column: last_step | step of its newest visit
-- column: visits | groups sampled for it
-- column: n | samples in these
-- column: n_rewarded | of these, with a reward
-- column: n_success | of these, successes
-- column: success_rate | n_success / n_rewarded
-- column: kind | kind of its newest visit
SELECT
  problem_id,
  run,
  split,
  role,
  min(step) AS first_step,
  max(step) AS last_step,
  count(*) AS visits,
  sum(n)::BIGINT AS n,
  sum(n_rewarded)::BIGINT AS n_rewarded,
  sum(n_success)::BIGINT AS n_success,
  sum(n_success) / nullif(sum(n_rewarded), 0) AS success_rate,
  arg_max(kind, {'step': coalesce(step, -1), 'group_id': group_id}) AS kind
FROM groups
WHERE problem_id IS NOT NULL
GROUP BY problem_id, run, split, role
