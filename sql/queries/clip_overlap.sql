-- title: Two clip sets side by side
-- answers: What do two clip sets have in common: clips, rollouts, groups, problems, and tokens? Of clips of one rollout that lie
-- answers: within each other the tokens count once. `jaccard_tokens` is the share of all their tokens that both have;
-- answers: `same_rollout` and `same_clip` count the groups of both in which the choice fell on the same.
-- param: a text = NULL | name@version, or a name: its newest version (default: the clip set made last but one)
-- param: b text = NULL | the other one (default: the clip set made last)
-- example: echolab query clip_overlap --param a=hard --param b=hard-random
WITH newest AS (SELECT id, row_number() OVER (ORDER BY created_at DESC) AS place FROM clipsets),
named AS (
  SELECT
    side,
    CASE
      WHEN word IS NULL THEN (SELECT id FROM newest WHERE place = CASE side WHEN 'a' THEN 2 ELSE 1 END)
      ELSE coalesce(
        (SELECT arg_max(id, version) FROM clipsets WHERE word IN (id, name)),
        error('no clip set ''' || word || ''' in this store; there are: '
          || coalesce((SELECT string_agg(id, ', ' ORDER BY id) FROM clipsets), 'none'))
      ) END AS id
  FROM (VALUES ('a', $a::VARCHAR), ('b', $b::VARCHAR)) given (side, word)
),
pair AS (
  SELECT any_value(id) FILTER (WHERE side = 'a') AS a, any_value(id) FILTER (WHERE side = 'b') AS b
  FROM named
  HAVING count(id) = 2
),
sides AS (SELECT 'a' AS side, c.* FROM clips c, pair WHERE clipset = a UNION ALL SELECT 'b', c.* FROM clips c, pair WHERE clipset = b),
by_clip AS (SELECT clip_id, count(*) FILTER (WHERE side = 'a') AS a, count(*) FILTER (WHERE side = 'b') AS b FROM sides GROUP BY clip_id),
by_rollout AS (
  SELECT
    rollout_id,
    coalesce(max(end_token) FILTER (WHERE side = 'a'), 0) AS a,
    coalesce(max(end_token) FILTER (WHERE side = 'b'), 0) AS b
  FROM sides
  GROUP BY rollout_id
),
by_problem AS (
  SELECT problem_id, bool_or(side = 'a') AS a, bool_or(side = 'b') AS b FROM sides WHERE problem_id IS NOT NULL GROUP BY problem_id
),
by_group AS (
  SELECT
    group_id,
    bool_or(side = 'a') AS a,
    bool_or(side = 'b') AS b,
    list_has_any(list(rollout_id) FILTER (WHERE side = 'a'), list(rollout_id) FILTER (WHERE side = 'b')) AS same_rollout,
    list_has_any(list(clip_id) FILTER (WHERE side = 'a'), list(clip_id) FILTER (WHERE side = 'b')) AS same_clip
  FROM sides
  GROUP BY group_id
)
SELECT
  pair.a,
  pair.b,
  c.*,
  r.*,
  g.*,
  p.*
FROM pair,
  (
    SELECT count(*) FILTER (WHERE a > 0) AS clips_a, count(*) FILTER (WHERE b > 0) AS clips_b,
      count(*) FILTER (WHERE a > 0 AND b > 0) AS clips_both
    FROM by_clip
  ) c,
  (
    SELECT count(*) FILTER (WHERE a > 0) AS rollouts_a, count(*) FILTER (WHERE b > 0) AS rollouts_b,
      count(*) FILTER (WHERE a > 0 AND b > 0) AS rollouts_both, sum(a)::BIGINT AS tokens_a, sum(b)::BIGINT AS tokens_b,
      sum(least(a, b))::BIGINT AS tokens_both, sum(least(a, b)) / nullif(sum(greatest(a, b)), 0) AS jaccard_tokens
    FROM by_rollout
  ) r,
  (
    SELECT count(*) FILTER (WHERE a) AS groups_a, count(*) FILTER (WHERE b) AS groups_b,
      count(*) FILTER (WHERE a AND b) AS groups_both, count(*) FILTER (WHERE same_rollout) AS same_rollout,
      count(*) FILTER (WHERE same_clip) AS same_clip
    FROM by_group
  ) g,
  (
    SELECT count(*) FILTER (WHERE a) AS problems_a, count(*) FILTER (WHERE b) AS problems_b,
      count(*) FILTER (WHERE a AND b) AS problems_both
    FROM by_problem
  ) p
