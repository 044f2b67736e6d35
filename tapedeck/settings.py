"""Every setting, from environment variables of the same name or from the file `tapedeck.env`."""

import json
import ssl
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from schemas.events import NS_PER_MS, NS_PER_S
from tapedeck.errors import UsageError


class Settings(BaseSettings):
    """Environment variables win over the file. Lists are comma separated."""

    model_config = SettingsConfigDict(env_file="tapedeck.env", extra="ignore", hide_input_in_errors=True)

    kafka_bootstrap_servers: str = Field("127.0.0.1:9092", description="Kafka brokers, host:port, comma separated")
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="How to talk to the brokers"
    )
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "PLAIN", description="SASL mechanism, where the protocol has SASL"
    )
    kafka_sasl_username: str | None = Field(None, description="SASL user")
    kafka_sasl_password: SecretStr | None = Field(None, description="SASL password")
    kafka_ssl_ca_file: str | None = Field(None, description="CA certificates (PEM) for the brokers; default: system")
    kafka_ssl_cert_file: str | None = Field(None, description="Client certificate (PEM), for mutual TLS")
    kafka_ssl_key_file: str | None = Field(None, description="Key of the client certificate (PEM)")
    kafka_replication_factor: int | None = Field(
        None, ge=1, description="For topics created here; default: 3, or the number of brokers where it is smaller"
    )
    worker_id: str | None = Field(
        None, description="Unique to each process and kept over restarts: its partitions come back at once"
    )
    topic_prefix: str = Field("", description="Put before every topic name and consumer group, to keep lines apart")

    database_url: SecretStr = Field(
        SecretStr("postgresql://postgres@127.0.0.1:5432/tapedeck"),
        description="PostgreSQL; TLS as usual: ?sslmode=verify-full&sslrootcert=ca.pem",
    )

    polygon_api_key: SecretStr | None = Field(None, description="Key for the vendor's feed")
    polygon_ws_url: str = Field(
        "wss://socket.polygon.io/crypto",
        description="The vendor's WebSocket; also socket.massive.com, delayed.massive.com, or the simulator's",
    )
    polygon_rest_url: str = Field(
        "https://api.polygon.io",
        description="The vendor's REST, asked whether a silence was one; also api.massive.com, or the simulator's",
    )
    symbols: Annotated[list[str], NoDecode] = Field(
        ["BTC-USD", "ETH-USD", "SOL-USD", "MATIC-USD", "AVAX-USD"],
        description="Pairs to record (BTC-USD, BTCUSD and X:BTCUSD mean the same), or * for all",
    )
    streams: Annotated[list[Literal["XT", "XQ", "XA", "XAS"]], NoDecode] = Field(
        ["XT", "XQ", "XA"], description="Trades, quotes, minute and second aggregates"
    )

    slice_linger_ms: float = Field(5, ge=0, le=1000, description="How long a slice waits for more events")
    feed_usual_s: float = Field(
        10, gt=0, description="A stream's silence up to this long is nothing unusual; what is for each, is learned"
    )
    journal_dir: Path = Field(
        Path(".tapedeck/journal"), description="Where the producer keeps what Kafka has not acknowledged yet"
    )
    journal_max_bytes: int = Field(
        8 * 1024**3, ge=1024**2, description="How long it may get; what comes while it is full lies in a marked gap"
    )
    lateness_s: float = Field(900, ge=120, description="How late a trade may come and still change its bar")
    grace_s: float = Field(2, ge=0, le=30, description="How long after its end a bar waits for trades")
    anomalies: Annotated[dict[str, dict[str, Any]], NoDecode] = Field(
        {}, description='Thresholds of detectors (docs/anomalies.md), as JSON: {"price_spike": {"deviations": 8}}'
    )

    outputs: Annotated[list[str], NoDecode] = Field(
        [], description="Topics that `tapedeck process` fills, as bars.1m.v1,bars.5m.v1; default: all"
    )

    sink_batch_rows: int = Field(5000, ge=1, description="Rows a sink writes in one transaction, at most")
    trades_keep_days: int = Field(
        730, ge=0, description="With TimescaleDB: trades and quotes older than this by event time are deleted; 0: never"
    )
    columnstore_after_days: int = Field(
        7, ge=1, description="With TimescaleDB: rows older than this go into the columnstore, a tenth of the size"
    )

    archive_url: SecretStr | None = Field(
        None,
        description="Where `tapedeck sink archive` writes and --source archive reads: a folder, or what pyarrow's "
        "filesystems reach, as s3://bucket/path; credentials as usual there, for S3 AWS_ACCESS_KEY_ID and so on",
    )
    archive_seconds: float = Field(60, gt=0, description="How long the archive waits for a file to fill")
    archive_bytes: int = Field(
        64 * 1024**2, ge=1, description="How much it holds in memory meanwhile, all partitions together"
    )

    http_host: str = Field("127.0.0.1", description="Where /metrics and /health listen")
    http_port: int | None = Field(
        None, ge=0, le=65535, description="Their port; default: one for each kind of process, 0: any"
    )
    connect_timeout_s: float = Field(60, gt=0, description="How long to try Kafka and PostgreSQL at start")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="What to log")
    log_format: Literal["auto", "console", "json"] = Field("auto", description="auto: console on a terminal, else JSON")

    @field_validator("kafka_bootstrap_servers")
    @classmethod
    def _with_ports(cls, value: str) -> str:
        for server in map(str.strip, value.split(",")):
            parts = urlsplit(f"//{server}")
            _ = parts.port  # it raises ValueError
            if not parts.hostname or parts.netloc != server or parts.username is not None:
                raise ValueError(f"'{server}' is not host:port")
        return value

    @field_validator("symbols", "streams", "outputs", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("anomalies", mode="before")
    @classmethod
    def _parse(cls, value: object) -> object:
        try:
            return json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            raise ValueError(f"not JSON: {error}") from None

    @property
    def lateness_ns(self) -> int:
        return round(self.lateness_s * NS_PER_S)

    @property
    def grace_ns(self) -> int:
        return round(self.grace_s * NS_PER_S)

    @property
    def linger_ns(self) -> int:
        return round(self.slice_linger_ms * NS_PER_MS)

    @property
    def usual_ns(self) -> int:
        return round(self.feed_usual_s * NS_PER_S)

    def need_key(self, who: str) -> str:
        """The vendor's key; raises UsageError where there is none."""
        if not self.polygon_api_key:
            raise UsageError(f"POLYGON_API_KEY is not set: {who} needs a key")
        return self.polygon_api_key.get_secret_value()

    def kafka_options(self) -> dict[str, Any]:
        """Keyword arguments that every aiokafka client takes."""
        options: dict[str, Any] = {
            "bootstrap_servers": self.kafka_bootstrap_servers,
            "security_protocol": self.kafka_security_protocol,
        }
        if "SSL" in self.kafka_security_protocol:
            options["ssl_context"] = self.ssl_context()
        if "SASL" in self.kafka_security_protocol:
            password = self.kafka_sasl_password
            options |= {
                "sasl_mechanism": self.kafka_sasl_mechanism,
                "sasl_plain_username": self.kafka_sasl_username,
                "sasl_plain_password": password.get_secret_value() if password else None,
            }
        return options

    def ssl_context(self) -> ssl.SSLContext:
        """TLS to the brokers, verified; raises UsageError when a file cannot be read."""
        try:
            context = ssl.create_default_context(cafile=self.kafka_ssl_ca_file)
            if self.kafka_ssl_cert_file:
                context.load_cert_chain(self.kafka_ssl_cert_file, self.kafka_ssl_key_file)
        except (OSError, ssl.SSLError) as error:
            raise UsageError(f"cannot read the TLS files for Kafka (KAFKA_SSL_*): {error}") from error
        return context


def load(**overrides: Any) -> Settings:
    """The settings, with what the command line says on top; raises UsageError naming each wrong one."""
    try:
        return Settings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors())
        raise UsageError(f"wrong setting: {wrong}") from None


def document() -> str:
    """All settings as a Markdown table, for docs/settings.md."""
    rows = ["| variable | default | meaning |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = field.default
        if isinstance(default, SecretStr):
            default = default.get_secret_value()
        if isinstance(default, list):
            default = ",".join(default)
        shown = "" if default in (None, "") else f"`{default}`"
        rows.append(f"| `{name.upper()}` | {shown} | {field.description} |")
    return "\n".join(rows) + "\n"
