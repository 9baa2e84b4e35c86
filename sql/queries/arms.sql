-- title: Arms of an experiment, over seeds
-- answers: Do runs that were trained in different ways end up solving more, or less, than the runs they are compared with?
-- answers: A run NAME-s3 or NAME_seed3 is seed 3 of the arm NAME; other runs are left out. An arm is compared seed by seed, at
-- answers: the steps that both evaluated: gains are means over these steps, with 95 % intervals over seeds (Student's t, not
-- answers: corrected for several arms). One seed has no interval: it is an anecdote. `solved`: by at least one of its samples.
-- answers: The rows without a source are all sources together.
-- param: base text = NULL | the arm that the others are compared with (default: grpo, baseline or base, else the first by name)
-- param: split text = eval | the split that is compared
-- param: after int = 0 | compare the steps after this one; `start` is the success rate before
-- example: echolab query arms --param base=grpo
WITH evaluated AS (
  SELECT
    regexp_extract(run, '^(.+)[-_./](seed|s)[-_]?(\d+)$', 1) AS arm,
    regexp_extract(run, '^(.+)[-_./](seed|s)[-_]?(\d+)$', 3) AS seed,
    run,
    step,
    coalesce(source, 'unknown') AS source,
    count(*) AS n_groups,
    sum(n_success / n_rewarded) AS successes,
    count(*) FILTER (WHERE n_success > 0) AS solved
  FROM groups
  WHERE role = 'policy' AND split = $split::VARCHAR AND n_rewarded > 0 AND step IS NOT NULL
  GROUP BY ALL
  HAVING arm <> ''
),
sources AS (
  SELECT count(DISTINCT source) AS n FROM evaluated
),
rates AS (
  SELECT
    arm,
    seed,
    step,
    source,
    sum(successes) / sum(n_groups) AS success_rate,
    sum(solved) / sum(n_groups) AS solved,
    sum(n_groups) AS n_groups,
    min(run) AS run
  FROM evaluated
  GROUP BY GROUPING SETS ((arm, seed, step, source), (arm, seed, step))
  HAVING source IS NOT NULL OR (SELECT n FROM sources) > 1
),
chosen AS (
  SELECT coalesce($base::VARCHAR, (
    SELECT arm FROM rates ORDER BY arm NOT IN ('grpo', 'baseline', 'base'), arm LIMIT 1
  )) AS base
),
starts AS (
  SELECT arm, source, avg(success_rate) AS start FROM rates WHERE step <= $after::BIGINT GROUP BY arm, source
),
by_seed AS (
  SELECT
    r.arm,
    r.seed,
    r.source,
    min(r.run) AS run,
    max(r.n_groups) AS n_groups,
    count(*) AS n_steps,
    avg(r.success_rate) AS success_rate,
    avg(r.solved) AS solved,
    avg(r.success_rate - b.success_rate) AS gain,
    avg(r.solved - b.solved) AS solved_gain
  FROM rates r, rates b, chosen
  WHERE b.arm = base AND r.seed = b.seed AND r.step = b.step AND r.source IS NOT DISTINCT FROM b.source AND r.step > $after::BIGINT
  GROUP BY r.arm, r.seed, r.source
),
over_seeds AS (
  SELECT
    arm,
    source,
    list(run ORDER BY run) AS runs,
    count(*) AS n_seeds,
    max(n_groups)::BIGINT AS n_groups,
    min(n_steps) AS n_steps,
    avg(success_rate) AS success_rate,
    avg(solved) AS solved,
    avg(gain) AS gain,
    avg(solved_gain) AS solved_gain,
    -- the 97.5th percentile of Student's t for 1 to 30 degrees of freedom; beyond, that of 30, which is a little too wide
    ([
      12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448, 2.1314,
      2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423
    ])[least(count(*) - 1, 30)]::DOUBLE / sqrt(count(*)) AS t,
    stddev_samp(gain) AS spread,
    stddev_samp(solved_gain) AS solved_spread
  FROM by_seed
  GROUP BY arm, source
)
SELECT
  o.arm,
  base,
  o.source,
  n_seeds,
  n_steps,
  n_groups,
  start,
  success_rate,
  CASE WHEN o.arm <> base THEN gain END AS gain,
  CASE WHEN o.arm <> base THEN gain - t * spread END AS gain_low,
  CASE WHEN o.arm <> base THEN gain + t * spread END AS gain_high,
  solved,
  CASE WHEN o.arm <> base THEN solved_gain END AS solved_gain,
  CASE WHEN o.arm <> base THEN solved_gain - t * solved_spread END AS solved_low,
  CASE WHEN o.arm <> base THEN solved_gain + t * solved_spread END AS solved_high,
  runs
FROM over_seeds o JOIN chosen ON true LEFT JOIN starts s ON s.arm = o.arm AND s.source IS NOT DISTINCT FROM o.source
ORDER BY o.source IS NOT NULL, o.source, o.arm <> base, o.arm
