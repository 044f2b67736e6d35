"""Logs: one line an event, readable on a terminal, JSON elsewhere. Secrets never come here."""

import logging
import sys

import structlog

from tapedeck.settings import Settings


def configure(settings: Settings, service: str) -> None:
    """Routes structlog and the standard library's loggers to standard error in one format."""
    console = settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if console else "iso", utc=not console),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    colors = sys.stderr.isatty()
    renderer = structlog.dev.ConsoleRenderer(colors=colors) if console else structlog.processors.JSONRenderer()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level)
    structlog.contextvars.bind_contextvars(service=service)
    for noisy in ("faust", "mode", "processors.transport", "aiohttp", "websockets", "yoyo", "asyncio"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
    # It calls every passing state of a broker an error, many times a second. What lasts is raised, and said once.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
