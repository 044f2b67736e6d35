"""Flink SQL: TUMBLE over event time with a watermark 2 s behind, one slot, state on the heap, no checkpoints.

SQL has no hook for a row: the meter is the job's own count of what its source has read, asked for five times a second.
"""

import json
import sys
import time
import urllib.request

from meter import BROKER, EVENTS, GROUP, SINK, SOURCE, Meter
from pyflink.table import EnvironmentSettings, TableEnvironment

connector, port = sys.argv[1:]
settings = {
    "pipeline.jars": f"file://{connector}",
    "parallelism.default": "1",
    "rest.port": port,
    "rest.bind-port": port,
    "rest.address": "127.0.0.1",
    "rest.bind-address": "127.0.0.1",
    "table.local-time-zone": "UTC",
    "metrics.fetcher.update-interval": "100",
}
environment = TableEnvironment.create(EnvironmentSettings.in_streaming_mode())
for name, value in settings.items():
    environment.get_config().set(name, value)
environment.execute_sql(f"""
    CREATE TABLE trades (
        pair STRING, p DOUBLE, s DOUBLE, t BIGINT,
        ts AS TO_TIMESTAMP_LTZ(t, 3), WATERMARK FOR ts AS ts - INTERVAL '2' SECOND
    ) WITH (
        'connector' = 'kafka', 'topic' = '{SOURCE}', 'properties.bootstrap.servers' = '{BROKER}',
        'properties.group.id' = '{GROUP}', 'scan.startup.mode' = 'earliest-offset', 'format' = 'json',
        'scan.bounded.mode' = 'latest-offset'
    )""")
environment.execute_sql(f"""
    CREATE TABLE bars (
        pair STRING, `start` BIGINT, o DOUBLE, h DOUBLE, l DOUBLE, c DOUBLE, v DOUBLE, vw DOUBLE, n BIGINT
    ) WITH (
        'connector' = 'kafka', 'topic' = '{SINK}', 'properties.bootstrap.servers' = '{BROKER}',
        'key.format' = 'raw', 'key.fields' = 'pair', 'value.format' = 'json'
    )""")
job = environment.execute_sql("""
    INSERT INTO bars
    SELECT pair, UNIX_TIMESTAMP(CAST(window_start AS STRING)) * 1000,
           FIRST_VALUE(p), MAX(p), MIN(p), LAST_VALUE(p), SUM(s), SUM(p * s) / SUM(s), COUNT(*)
    FROM TABLE(TUMBLE(TABLE trades, DESCRIPTOR(ts), INTERVAL '1' MINUTES))
    GROUP BY pair, window_start, window_end""").get_job_client()

meter, state, deadline = Meter(), "", time.monotonic() + 60
while state not in ("FINISHED", "FAILED"):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/jobs/{job.get_job_id()}", timeout=2) as answer:
            found = json.load(answer)
    except OSError:
        if state:  # the cluster ends with its job
            break
        if time.monotonic() > deadline:
            raise
        time.sleep(0.1)
        continue
    state, read = found["state"], found["vertices"][0]["metrics"]["write-records"]
    for name, least in (("first", 1), ("half", EVENTS // 2), ("last", EVENTS)):
        if read >= least and name not in meter.times:
            meter.note(name)
    time.sleep(0.2)
if state != "FAILED" and meter.times:
    for name in ("first", "half", "last"):
        if name not in meter.times:
            meter.note(name)
time.sleep(3600)  # until it is told to go: what it took is counted to its end
