"""What the feed counts, on prometheus_client's default registry."""

from prometheus_client import Counter, Gauge

EVENTS = Counter("tapedeck_feed_events", "Events published by stream, sent or not", ["stream"])
CLIENTS = Gauge("tapedeck_feed_clients", "Clients that are subscribed")
FINISHED = Gauge("tapedeck_feed_finished", "1 when the frames file is over or the time to send is up")
CLOCK = Gauge("tapedeck_feed_clock_seconds", "Market time of the last frame, in seconds since the epoch")
