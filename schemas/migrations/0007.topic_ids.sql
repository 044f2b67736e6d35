-- depends: 0006.reference
-- Offsets mean nothing in another topic of the same name.

ALTER TABLE sink_offsets ADD COLUMN IF NOT EXISTS topic_id uuid;
COMMENT ON COLUMN sink_offsets.topic_id IS 'Kafka''s id of the topic, another one once it is made again; null until a sink has seen it';
