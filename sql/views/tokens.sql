-- view: tokens
-- about: One row a token of a completion, as scored by the chosen scorer; a final EOS included.
-- about: Without a choice the only scorer there is; where there are several, reading the view is an error that lists them.
-- column: position | 0-based place of the token in the completion
-- column: token_id | token id
-- column: text | its text by the scorer's tokenizer; NULL where the vocabulary is not stored
-- column: entropy | entropy of the next-token distribution at this token, in nats
-- column: logprob | log-probability of the token
-- column: counted | the loss mask counts it; true where there is none
SELECT
  t.rollout_id, t.scorer, t.position::INTEGER AS position, t.token_id, v.text, t.entropy, t.logprob, coalesce(t.counted, true) AS counted
FROM (
  SELECT
    rollout_id,
    scorer,
    unnest(range(len(token_ids))) AS position,
    unnest(token_ids) AS token_id,
    unnest(entropies) AS entropy,
    unnest(logprobs) AS logprob,
    unnest(loss_mask) AS counted,
    chosen_tokenizer() AS tokenizer
  FROM base.scores
  WHERE scorer = chosen_scorer()
) t
LEFT JOIN (  -- grouped by what it is joined on: so DuckDB sees that the join adds no row, and can drop it
  SELECT tokenizer, token_id, any_value(text) AS text FROM base.vocab GROUP BY tokenizer, token_id
) v ON v.tokenizer = t.tokenizer AND v.token_id = t.token_id
