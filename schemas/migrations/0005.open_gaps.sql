-- depends: 0003.storage
-- Gaps of which nobody has said that nothing was missed in them.

CREATE OR REPLACE VIEW open_gaps AS
SELECT g.*
FROM gaps g
WHERE g.reason <> 'empty' AND NOT EXISTS (
    SELECT FROM gaps word
    WHERE word.reason = 'empty' AND word.time = g.time AND word.partition = g.partition
        AND word."from" IS NOT DISTINCT FROM g."from" AND word."to" = g."to"
        AND word.streams = g.streams AND word.pairs = g.pairs
);

COMMENT ON VIEW open_gaps IS 'Gaps that no record of reason empty has closed';
