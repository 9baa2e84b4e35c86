-- view: rollouts
-- about: One row a rollout of a live reading, each once. With a chosen verifier, reward and success are its word.
-- column: reward | total reward, or the chosen verifier's score; NULL, NaN or infinite = unrewarded
-- column: success | the reward reaches the run's success threshold, or the chosen verifier's word; NULL = unrewarded
-- column: kind | kind of its group (same group and role)
-- column: success_threshold | the run's: a reward of at least this (within the tolerance) is a success
-- column: failure_reward | the run's: the reward of a plain failure
-- column: completeness | of its reading: all, effective or filtered
SELECT
  r.* EXCLUDE (score, success, completeness),
  r.success,
  g.kind,
  success_threshold(r.run) AS success_threshold,
  failure_reward(r.run) AS failure_reward,
  r.completeness
FROM base.rollouts r
LEFT JOIN (  -- `groups`, but grouped by what it is joined on: so DuckDB sees that the join adds no row, and can drop it
  SELECT run, split, group_id, role, group_kind(run, count(score), count(*) FILTER (WHERE success), min(score), max(score)) AS kind
  FROM base.samples
  GROUP BY run, split, group_id, role
) g ON g.group_id = r.group_id AND g.role = r.role AND g.run = r.run AND g.split = r.split
