-- view: groups
-- about: One row a group and role: the rollouts that were sampled together for one prompt, and whether they can teach anything.
-- about: Several parts of one rollout count as one sample. Rewards that are NULL, NaN or infinite are unrewarded.
-- column: source | dataset name (the first by name, should a group have several)
-- column: kind | unrewarded, single, all_success, all_fail, constant or mixed; all_success, all_fail and constant are degenerate
-- column: n | samples
-- column: n_rewarded | samples with a reward
-- column: n_unrewarded | samples without one
-- column: n_success | samples whose reward reaches the run's success threshold, or that the chosen verifier accepts
-- column: mean | mean reward
-- column: std | population standard deviation of the rewards (divides by n_rewarded)
-- column: min | lowest reward
-- column: max | highest reward
-- column: n_tokens | completion tokens of all its samples; NULL unless known for each
-- column: n_chars | completion characters of all its samples; NULL unless known for each
-- column: completeness | filtered if any of its readings is, else effective if any is, else all
SELECT
  group_id, run, split, step, role, source, prompt_id, problem_id,
  group_kind(run, n_rewarded, n_success, "min", "max") AS kind,
  n, n_rewarded, n - n_rewarded AS n_unrewarded, n_success, mean, std, "min", "max", n_tokens, n_chars, completeness
FROM (
  SELECT
    group_id,
    role,
    run,
    split,
    step,
    min(source) AS source,
    min(prompt_id) AS prompt_id,
    min(problem_id) AS problem_id,
    count(*) AS n,
    count(score) AS n_rewarded,
    count(*) FILTER (WHERE success) AS n_success,
    avg(score) AS mean,
    stddev_pop(score) AS std,
    min(score) AS "min",
    max(score) AS "max",
    CASE WHEN count(n_completion_tokens) = count(*) THEN sum(n_completion_tokens)::BIGINT END AS n_tokens,
    CASE WHEN count(n_chars) = count(*) THEN sum(n_chars)::BIGINT END AS n_chars,
    worst(completeness) AS completeness  -- all < effective < filtered, also as words
  FROM base.samples
  GROUP BY run, split, step, group_id, role  -- group_id alone decides the first three; as keys they let filters reach the files
)
