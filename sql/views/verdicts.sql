-- view: verdicts
-- about: The newest word of each verifier on each rollout.
SELECT unnest(arg_max(v, v.created_at))
FROM base.verdicts v
GROUP BY v.rollout_id, v.verifier
