"""The metrics of every process, in one place so that names stay consistent."""

from prometheus_client import Counter, Gauge, Histogram

FRAMES = Counter("tapedeck_producer_frames", "WebSocket frames received")
FEED_EVENTS = Counter("tapedeck_producer_events", "Events received", ["stream"])
PUBLISHED = Counter("tapedeck_producer_records", "Raw records acknowledged by Kafka", ["kind"])
JOURNAL = Gauge("tapedeck_producer_journal_records", "Raw records made and not yet acknowledged")
JOURNAL_BYTES = Gauge("tapedeck_producer_journal_bytes", "The journal's size on disk")
DROPPED = Counter("tapedeck_producer_dropped_events", "Events that a full journal did not take: they lie in a gap")
SILENT = Gauge("tapedeck_producer_silent_channels", "Channels that were acknowledged and never delivered")
SILENCES = Counter("tapedeck_producer_silences", "Suspected silences by what REST said of them", ["verdict"])
LEASE = Gauge("tapedeck_producer_lease", "1: this producer records, 0: it stands by")
CONNECTS = Counter("tapedeck_producer_connects", "Times the feed was connected and subscribed")
LAST_EVENT = Gauge("tapedeck_producer_last_event_timestamp_seconds", "Wall time of the newest frame with data")
FEED_CLOCK = Gauge("tapedeck_producer_feed_clock_seconds", "The feed clock")
PRODUCER_ERRORS = Counter("tapedeck_producer_errors", "Connection and send errors", ["kind"])

PROCESSED = Counter("tapedeck_processor_records", "Raw records by what was done with them", ["verdict"])
PIPELINE = Counter("tapedeck_processor_events", "Events that did not become an output", ["outcome"])
OUTPUTS = Counter("tapedeck_processor_outputs", "Records acknowledged on output topics", ["topic"])
REBUILDS = Counter("tapedeck_processor_rebuilds", "Partitions whose state was rebuilt from the log")
REBUILD_SECONDS = Histogram("tapedeck_processor_rebuild_seconds", "How long a rebuild took")
WATERMARK = Gauge("tapedeck_processor_watermark_seconds", "Last tick", ["partition"])

ROWS = Counter("tapedeck_sink_rows", "Rows written", ["table"])
ROW_DUPLICATES = Counter("tapedeck_sink_duplicates", "Records dropped by a table's key or a bar's order", ["table"])
SINK_DEAD_LETTERS = Counter("tapedeck_sink_dead_letters", "Records kept in sink_dead_letters", ["table"])
SINK_LOST = Counter("tapedeck_sink_lost_records", "Records that retention took before they were read", ["table"])
COMMIT_SECONDS = Histogram("tapedeck_sink_commit_seconds", "Time of one batch's transaction", ["table"])
NEWEST_ROW = Gauge("tapedeck_sink_newest_row_timestamp_seconds", "Feed time of the newest record written", ["table"])
SINK_LAG = Gauge("tapedeck_sink_lag_records", "Records between the table and the end of its topic", ["table"])
SINK_ERRORS = Counter("tapedeck_sink_errors", "Transactions that failed and were tried again", ["table"])
ARCHIVE_BYTES = Counter("tapedeck_sink_archive_bytes", "Bytes of the files that the archive sink wrote")
