-- title: A profile
-- answers: Where along the trajectories of a cohort is the policy uncertain? The numbers of a profile, bin by bin.
-- answers: Each trajectory counts once a bin: n of them, their mean entropy with its standard error, its 95 % band by a bootstrap
-- answers: over trajectories, and their quantiles; the mean tokens of the segments there, the share of peaks that lie there, and
-- answers: the share of entropy that the trajectories' top fifth of tokens holds there.
-- param: profile text = NULL | name@version, or a name: its newest version (default: the profile made last)
-- param: slice text = all | part of the cohort: all, source=NAME, length=short, middle or long, outcome=success, failure or unrewarded
-- param: axis text{relative,absolute} = relative | bins of relative position, or the first segments by their number
-- example: echolab query entropy_profile --param profile=golden --rows 0
-- example: echolab query entropy_profile --param profile=golden@1 --param slice=length=long --param axis=absolute
WITH chosen AS (
  SELECT CASE
    WHEN $profile::VARCHAR IS NULL THEN (SELECT arg_max(id, created_at) FROM cohorts)
    ELSE coalesce(
      (SELECT arg_max(id, version) FROM cohorts WHERE $profile::VARCHAR IN (id, name)),
      error('no profile ' || $profile::VARCHAR || ' in this store; there are: '
        || coalesce((SELECT string_agg(id, ', ' ORDER BY id) FROM cohorts), 'none'))
    ) END AS id
),
sliced AS (
  SELECT coalesce(
    (SELECT any_value(slice) FROM profiles WHERE profile = id AND slice = $slice::VARCHAR),
    CASE WHEN id IS NOT NULL THEN error('profile ' || id || ' has no slice ' || $slice::VARCHAR || '; there are: '
      || (SELECT string_agg(DISTINCT slice, ', ' ORDER BY slice) FROM profiles WHERE profile = id)) END
  ) AS slice, id FROM chosen
)
SELECT
  p.profile,
  p.slice,
  p.bin,
  CASE p.axis WHEN 'relative' THEN (p.bin + 0.5::DOUBLE) / count(*) OVER () END AS position,
  any_value(p.n) FILTER (WHERE statistic = 'mean') AS n,
  any_value(value) FILTER (WHERE statistic = 'mean') AS mean,
  any_value(value) FILTER (WHERE statistic = 'se') AS se,
  any_value(value) FILTER (WHERE statistic = 'lo') AS lo,
  any_value(value) FILTER (WHERE statistic = 'hi') AS hi,
  any_value(value) FILTER (WHERE statistic = 'q05') AS q05,
  any_value(value) FILTER (WHERE statistic = 'q25') AS q25,
  any_value(value) FILTER (WHERE statistic = 'q50') AS q50,
  any_value(value) FILTER (WHERE statistic = 'q75') AS q75,
  any_value(value) FILTER (WHERE statistic = 'q95') AS q95,
  any_value(value) FILTER (WHERE statistic = 'tokens') AS tokens,
  any_value(value) FILTER (WHERE statistic = 'peaks') AS share_of_peaks,
  any_value(value) FILTER (WHERE statistic = 'top20') AS top20
FROM profiles p
JOIN sliced s ON s.id = p.profile AND s.slice = p.slice
WHERE p.axis = $axis::VARCHAR
GROUP BY p.profile, p.slice, p.axis, p.bin
ORDER BY p.bin
