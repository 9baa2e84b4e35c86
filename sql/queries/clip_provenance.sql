-- title: Where clips come from
-- answers: Of each clip: the rollout that it is the beginning of, the source file and row (from 0) that it was read from, and
-- answers: whose entropies and which rule chose its end. `sha256` is that of the file's first `bytes_read` bytes.
-- param: clipset text = NULL | name@version, or a name: its newest version (default: all)
-- param: clip text = NULL | only the clip of this id
-- example: echolab query clip_provenance --param clipset=hard --rows 0
WITH chosen AS (
  SELECT id
  FROM clipsets
  WHERE CASE
    WHEN $clipset::VARCHAR IS NULL THEN true
    ELSE id = coalesce(
      (SELECT arg_max(id, version) FROM clipsets WHERE $clipset::VARCHAR IN (id, name)),
      error('no clip set ''' || $clipset::VARCHAR || ''' in this store; there are: '
        || (SELECT string_agg(id, ', ' ORDER BY id) FROM clipsets))
    ) END
)
SELECT
  c.clipset,
  c.clip_id,
  c.rollout_id,
  c.end_token,
  r.run,
  r.split,
  r.step,
  r.sample,
  r.origin.file AS file,
  r.origin.row AS row,
  i.source_path,
  i.format,
  i.sha256,
  i.bytes_read,
  c.selector,
  s.name || '@' || s.version AS scorer,
  g.name || '@' || g.version AS segmenter
FROM clips c
JOIN chosen ON chosen.id = c.clipset
LEFT JOIN rollouts r ON r.rollout_id = c.rollout_id
LEFT JOIN ingests i ON i.ingest_id = r.ingest_id
LEFT JOIN scorers s ON s.id = c.scorer
LEFT JOIN segmenters g ON g.id = c.segmenter
WHERE $clip::VARCHAR IS NULL OR c.clip_id = $clip::VARCHAR
ORDER BY c.clipset, r.run, r.split, r.step, c.group_id, r.sample NULLS LAST, c.rollout_id, c.end_token
