-- title: Two profiles side by side
-- answers: Where along the trajectories do two profiles differ in entropy? Their mean curves, bin by bin, as they were stored.
-- answers: `apart` says that the 95 % bands of the bin do not meet. `echolab profile --compare A B` tests the whole curve.
-- param: a text = NULL | name@version, or a name: its newest version (default: the profile made last but one)
-- param: b text = NULL | the other one (default: the profile made last)
-- param: slice text = all | part of both: all, source=NAME, length=short, middle or long, outcome=success, failure or unrewarded
-- param: axis text{relative,absolute} = relative | bins of relative position, or the first segments by their number
-- example: echolab query profile_compare --param a=golden --param b=own --rows 0
WITH newest AS (SELECT id, row_number() OVER (ORDER BY created_at DESC) AS place FROM cohorts),
named AS (
  SELECT
    side,
    CASE
      WHEN word IS NULL THEN (SELECT id FROM newest WHERE place = CASE side WHEN 'a' THEN 2 ELSE 1 END)
      ELSE coalesce(
        (SELECT arg_max(id, version) FROM cohorts WHERE word IN (id, name)),
        error('no profile ' || word || ' in this store; there are: '
          || coalesce((SELECT string_agg(id, ', ' ORDER BY id) FROM cohorts), 'none'))
      ) END AS id
  FROM (VALUES ('a', $a::VARCHAR), ('b', $b::VARCHAR)) given (side, word)
),
sides AS (
  SELECT
    side,
    profile,
    bin,
    count(*) OVER (PARTITION BY side) AS bins,
    any_value(p.n) FILTER (WHERE statistic = 'mean') AS n,
    any_value(value) FILTER (WHERE statistic = 'mean') AS mean,
    any_value(value) FILTER (WHERE statistic = 'lo') AS lo,
    any_value(value) FILTER (WHERE statistic = 'hi') AS hi
  FROM profiles p
  JOIN named ON named.id = p.profile
  WHERE p.axis = $axis::VARCHAR AND p.slice = $slice::VARCHAR
  GROUP BY side, profile, bin
)
SELECT
  bin,
  CASE
    WHEN $axis::VARCHAR <> 'relative' THEN NULL
    WHEN a.bins <> b.bins THEN error(a.profile || ' has ' || a.bins || ' bins and ' || b.profile || ' has ' || b.bins
      || ': make one anew with --bins, or use echolab profile --compare')
    ELSE (bin + 0.5::DOUBLE) / a.bins END AS position,
  a.n AS n_a,
  b.n AS n_b,
  a.mean AS mean_a,
  b.mean AS mean_b,
  a.mean - b.mean AS difference,
  a.lo AS lo_a,
  a.hi AS hi_a,
  b.lo AS lo_b,
  b.hi AS hi_b,
  a.lo > b.hi OR b.lo > a.hi AS apart
FROM (SELECT * FROM sides WHERE side = 'a') a
FULL JOIN (SELECT * FROM sides WHERE side = 'b') b USING (bin)
ORDER BY bin
