"""The broker's jars: downloaded once, checked against `kafka.lock` every time they are used."""

import hashlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from tapedeck.embedded.errors import EmbeddedError

Progress = Callable[[int, int], None]
"""Called with (jars downloaded, jars to download)."""

LOCK = Path(__file__).with_name("kafka.lock")
_THREADS = 8
_ATTEMPTS = 3
_TIMEOUT_S = 30

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Jar:
    """One line of `kafka.lock`."""

    group: str
    artifact: str
    version: str
    sha256: str

    @property
    def path(self) -> Path:
        """Where the jar lies, or will lie, in the cache."""
        return cache_dir() / "jars" / f"{self.artifact}-{self.version}.jar"


def cache_dir() -> Path:
    """The folder for downloads: `TAPEDECK_CACHE_DIR`, else the user's cache folder (XDG on Linux)."""
    override = os.environ.get("TAPEDECK_CACHE_DIR")
    return Path(override).absolute() if override else platformdirs.user_cache_path("tapedeck")


def locked_jars() -> list[Jar]:
    """The jars that `kafka.lock` names, whether they are in the cache or not."""
    lines = (line for line in LOCK.read_text().splitlines() if not line.startswith("#"))
    return [Jar(*line.replace(":", " ").split()) for line in lines]


def ensure_jars(progress: Progress | None = None) -> list[Path]:
    """Download the jars that are missing, check all of them, and return their paths.

    Without `progress` a bar is drawn if stderr is a terminal; otherwise one line is logged.

    Raises EmbeddedError if a jar can't be had, or isn't the one that `kafka.lock` names.
    """
    jars = locked_jars()
    missing = [jar for jar in jars if not jar.path.exists()]
    with ThreadPoolExecutor(_THREADS) as pool:
        if missing:
            _download_all(missing, progress, pool)
        list(pool.map(lambda jar: _check(jar, jar.path), jars))
    return [jar.path for jar in jars]


def _download_all(jars: list[Jar], progress: Progress | None, pool: ThreadPoolExecutor) -> None:
    folder = cache_dir() / "jars"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Beside the final place, hence on the same file system, so that the last step is one atomic rename:
        # a second process that downloads at the same time only puts the same bytes there again.
        with (
            tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as staging,
            _shown(progress) as show,
        ):
            show(0, len(jars))
            downloads = [pool.submit(_download, jar, Path(staging)) for jar in jars]
            try:
                for done, download in enumerate(as_completed(downloads), start=1):
                    download.result()
                    show(done, len(jars))
            finally:  # one failed or the user gave up: keep the staging folder while others write to it
                for download in downloads:
                    download.cancel()
                list(as_completed(downloads))
    except OSError as error:
        raise EmbeddedError(
            f"Can't keep the Kafka jars in {folder}: {error}. The broker can't start without them. "
            "Make room or set TAPEDECK_CACHE_DIR to a folder that you may write to."
        ) from error


def _download(jar: Jar, staging: Path) -> None:
    from jgo.maven import MavenContext  # 0.3 s to import, needed once in a machine's life

    for attempt in range(1, _ATTEMPTS + 1):
        context = MavenContext(repo_cache=staging / str(attempt), timeout=_TIMEOUT_S)
        try:
            path = context.project(jar.group, jar.artifact).at_version(jar.version).artifact().resolve()
        except Exception as error:  # jgo passes on whatever its HTTP client, the parser or the disk raise
            if attempt == _ATTEMPTS:
                raise EmbeddedError(
                    f"Can't download {jar.artifact} {jar.version}, which the embedded Kafka needs: {error}. "
                    "The first start needs the network, later ones don't. "
                    "Try again, or copy a filled cache to this machine and set TAPEDECK_CACHE_DIR to it."
                ) from error
            time.sleep(attempt)
        else:
            _check(jar, path)
            path.replace(jar.path)
            return


def _check(jar: Jar, path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != jar.sha256:
        path.unlink(missing_ok=True)
        raise EmbeddedError(
            f"{path} was not the file that kafka.lock names: its sha256 is {found} instead of {jar.sha256}. "
            "It was damaged or swapped, has been deleted and was not run. "
            "Start again to download it afresh; if that says the same, don't trust the network you are on."
        )


@contextmanager
def _shown(progress: Progress | None) -> Iterator[Progress]:
    if progress is not None:
        yield progress
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress as Bar

        with Bar(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("Downloading Apache Kafka")
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        log.info("Downloading Apache Kafka's jars (45 MB, once) to %s", cache_dir())
        yield lambda done, total: None
