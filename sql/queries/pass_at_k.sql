-- title: pass@k
-- answers: How likely is at least one success among k samples of a prompt, by step and source?
-- answers: Unbiased: 1 - C(n - c, k) / C(n, k) for a group of n rewarded samples with c successes, averaged over groups.
-- answers: Groups with fewer than k rewarded samples are left out and counted.
-- param: run text = NULL | only this run
-- param: split text = NULL | only this split (train, eval, ...)
-- param: k list = 1,8 | the values of k
-- example: echolab query pass_at_k --param k=1,8,50
WITH ks AS (
  SELECT DISTINCT CASE WHEN k >= 1 THEN k ELSE error('k must be at least 1') END AS k FROM (SELECT unnest($k::BIGINT[]) AS k)
),
counts AS (  -- few distinct ones, however many groups
  SELECT run, split, step, source, n_rewarded AS n, n_success AS c, count(*) AS groups, worst(completeness) AS completeness
  FROM groups
  WHERE role = 'policy' AND ($run::VARCHAR IS NULL OR run = $run::VARCHAR) AND ($split::VARCHAR IS NULL OR split = $split::VARCHAR)
  GROUP BY ALL
),
estimates AS (
  SELECT
    *,
    CASE
      WHEN n < k THEN NULL
      WHEN n - c < k THEN 1.0::DOUBLE
      WHEN c = 0 THEN 0.0::DOUBLE
      -- a product of small factors, where the binomials themselves would overflow
      ELSE 1 - list_product(list_transform(range(n - c + 1, n + 1), lambda i: 1 - k::DOUBLE / i))
    END AS pass
  FROM counts, ks
)
SELECT
  run,
  split,
  step,
  source,
  k,
  sum(pass * groups) / nullif(sum(groups) FILTER (WHERE pass IS NOT NULL), 0) AS pass_at_k,
  coalesce(sum(groups) FILTER (WHERE pass IS NOT NULL), 0)::BIGINT AS n_groups,
  coalesce(sum(groups) FILTER (WHERE pass IS NULL), 0)::BIGINT AS n_left_out,
  upstream_note(worst(completeness)) AS note
FROM estimates
GROUP BY run, split, step, source, k
ORDER BY run, split, step, source, k
