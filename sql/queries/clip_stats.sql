-- title: Clip sets in numbers
-- answers: How many clips has a clip set, how long are they, how much of their completions do they take, and where and how high
-- answers: are the segments that were chosen? Tokens count a final EOS; shares and positions leave it out.
-- answers: `fraction` is the clip's share of its completion, `position` the middle of its last segment (0..1).
-- param: clipset text = NULL | name@version, or a name: its newest version (default: all)
-- example: echolab query clip_stats --param clipset=hard
WITH chosen AS (
  SELECT id, created_at
  FROM clipsets
  WHERE CASE
    WHEN $clipset::VARCHAR IS NULL THEN true
    ELSE id = coalesce(
      (SELECT arg_max(id, version) FROM clipsets WHERE $clipset::VARCHAR IN (id, name)),
      error('no clip set ''' || $clipset::VARCHAR || ''' in this store; there are: '
        || (SELECT string_agg(id, ', ' ORDER BY id) FROM clipsets))
    ) END
),
measured AS (
  SELECT
    c.*,
    c.end_token / nullif(s.segment_ends[-1], 0) AS fraction,
    c.end_token >= s.segment_ends[-1] AS whole,
    (c.peak_segment + 0.5::DOUBLE) / s.n_segments AS position
  FROM clips c
  LEFT JOIN segmentations s ON s.rollout_id = c.rollout_id AND s.scorer = c.scorer AND s.segmenter = c.segmenter
)
SELECT
  m.clipset,
  min(m.selector) AS selector,
  count(*) AS n_clips,
  count(DISTINCT m.rollout_id) AS n_rollouts,
  count(DISTINCT m.group_id) AS n_groups,
  count(DISTINCT m.problem_id) AS n_problems,
  sum(m.n_tokens)::BIGINT AS n_tokens,
  avg(m.n_tokens) AS mean_tokens,
  quantile_cont(m.n_tokens, 0.05) AS tokens_q05,
  quantile_cont(m.n_tokens, 0.5) AS tokens_q50,
  quantile_cont(m.n_tokens, 0.95) AS tokens_q95,
  avg(m.fraction) AS mean_fraction,
  quantile_cont(m.fraction, 0.05) AS fraction_q05,
  quantile_cont(m.fraction, 0.5) AS fraction_q50,
  quantile_cont(m.fraction, 0.95) AS fraction_q95,
  avg(m.whole::INTEGER) AS share_whole,
  avg(m.position) AS mean_position,
  quantile_cont(m.position, 0.05) AS position_q05,
  quantile_cont(m.position, 0.5) AS position_q50,
  quantile_cont(m.position, 0.95) AS position_q95,
  avg(m.peak_entropy) AS mean_entropy,
  quantile_cont(m.peak_entropy, 0.05) AS entropy_q05,
  quantile_cont(m.peak_entropy, 0.5) AS entropy_q50,
  quantile_cont(m.peak_entropy, 0.95) AS entropy_q95,
  avg(m.distance) AS mean_distance
FROM measured m
JOIN chosen ON chosen.id = m.clipset
GROUP BY m.clipset
ORDER BY min(chosen.created_at), m.clipset
