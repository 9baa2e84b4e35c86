-- view: ingests
-- about: The ledger, one row a reading of one source. Rollouts of readings that are not live do not show.
-- column: live | no later reading supersedes it
SELECT i.*, i.ingest_id IN (SELECT ingest_id FROM base.live) AS live
FROM base.ingests i
