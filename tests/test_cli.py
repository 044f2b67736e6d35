"""The command line: help that teaches, and wrong use answered in one line, with exit code 2 and no stack trace."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tapedeck.cli import cli
from tapedeck.errors import UsageError
from tapedeck.settings import Settings, load

HEAVY = {"faust", "aiokafka", "asyncpg", "psycopg", "websockets", "uvloop", "rich", "pydantic", "structlog"}


def tapedeck(
    folder: Path, *arguments: str, code: str | None = None, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Runs the command in an empty folder, with no settings but these."""
    environment = {name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields}
    what = ["-c", code] if code is not None else ["-m", "tapedeck", *arguments]
    return subprocess.run(
        [sys.executable, *what],
        cwd=folder,
        env=environment | settings,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that says what is wrong: a log line of a service, or the command line's own."""
    assert "Traceback" not in done.stderr
    assert not done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith(("Error: ", "tapedeck: "))]
    events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    lines += [event["event"] for event in events if event["level"] == "error"]
    assert len(lines) == 1, done.stderr
    return str(lines[0])


# -- help -----------------------------------------------------------------------------------------


def test_every_command_is_shown_with_what_it_does(tmp_path: Path) -> None:
    done = tapedeck(tmp_path, "--help")
    assert done.returncode == 0
    for name, command in cli.commands.items():
        assert f"\n  {name} " in done.stdout
        assert command.get_short_help_str()
    assert "tapedeck demo" in done.stdout
    assert "docs/settings.md" in done.stdout


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_the_help_of_a_command_explains_it_and_each_option(name: str) -> None:
    command = cli.commands[name]
    text = CliRunner().invoke(cli, [name, "--help"]).stdout
    assert len((command.help or "").split()) >= 8, "one sentence at least"
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{parameter.name} is not explained"
            assert parameter.opts[0] in text


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_both_spellings_of_help_end_well(name: str) -> None:
    for option in ("-h", "--help"):
        done = CliRunner().invoke(cli, [name, option])
        assert done.exit_code == 0
        assert done.stdout.startswith("Usage: ")
        assert not done.stderr


def test_help_is_instant_for_it_imports_no_part(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from tapedeck.cli import cli\n"
        "cli(['--help'], standalone_mode=False)\n"
        "print('|', *{name.partition('.')[0] for name in sys.modules})"
    )
    done = tapedeck(tmp_path, code=code)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.rpartition("|")[2].split())
    assert "click" in imported
    assert not imported & HEAVY
    assert not imported & {"producers", "processors", "sinks", "simulator"}


def test_the_version_is_told(tmp_path: Path) -> None:
    done = tapedeck(tmp_path, "--version")
    assert done.returncode == 0
    assert "0.1.0" in done.stdout


# -- wrong use ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("nonsense", "nonsense"),
        ("sink", "trades"),
        ("sink cats", "cats"),
        ("local", "start"),
        ("local burn", "burn"),
        ("log", "--out"),
        ("log --out a b", "b"),
        ("compute --out x", "--frames or --log"),
        ("compute --out x --frames none.ndjson", "none.ndjson"),
        ("simulate", "--port"),
        ("simulate --port 70000", "70000"),
        ("simulate --port 0 --speed 0", "above 0"),
        ("simulate --port 0 --speed fast", "fast"),
        ("simulate --port 0 --symbols B%C", "B%C"),
        ("simulate --port 0 --seconds -1", "--seconds"),
        ("simulate --port 0 --symbols BTC-USD --pairs 3", "--symbols or --pairs"),
        ("simulate --port 0 --fault drop", "--fault"),
        ("simulate --port 0 --fault 20:flood", "'flood' is not a fault"),
        ("demo --seconds 0", "--seconds"),
        ("demo --symbols ,", "BTC-USD"),
        ("demo --live", "POLYGON_API_KEY"),
        ("produce", "POLYGON_API_KEY"),
        ("reference", "POLYGON_API_KEY"),
        ("replay --from soon --to 2026-11-26", "'soon' is no time like 2026-11-26"),
        ("replay --from 1969-12-31 --to 2026-11-26", "between 1970 and 2262"),
        ("replay --from 2026-11-26 --to 2026-11-26T02:00+02:00", "--from must lie before --to"),
        ("replay --from 2026-11-25 --to 2026-11-26 --prefix a/b", "--prefix 'a/b'"),
        ("replay --from 2026-11-25 --to 2026-11-26 --source archive", "ARCHIVE_URL"),
        ("rebuild trades --from 2026-11-25", "--to"),
        ("rebuild bars --from 2026-11-25 --to 9999-12-31", "between 1970 and 2262"),
        ("archive compact", "ARCHIVE_URL"),
        ("sink archive", "ARCHIVE_URL"),
    ],
)
def test_wrong_use_is_exit_code_2_and_one_line(tmp_path: Path, arguments: str, says: str) -> None:
    done = tapedeck(tmp_path, *arguments.split())
    assert done.returncode == 2
    assert says in complaint(done)


@pytest.mark.parametrize(
    "servers", ["", "localhost:9092,", "SASL_SSL://a:9092", "a:9092/", "me@a:9092", "::1", "a:99999"]
)
def test_what_is_no_address_of_a_broker_is_refused(servers: str) -> None:
    with pytest.raises(UsageError, match="KAFKA_BOOTSTRAP_SERVERS"):
        load(kafka_bootstrap_servers=servers)


@pytest.mark.parametrize("servers", ["localhost", "a:1 , b:2", "[::1]:9092", "[fe80::1%eth0]:9092"])
def test_what_is_one_is_taken(servers: str) -> None:
    assert load(kafka_bootstrap_servers=servers).kafka_bootstrap_servers == servers


def test_a_wrong_setting_is_named(tmp_path: Path) -> None:
    wrong = {"LATENESS_S": "soon", "GRACE_S": "99", "KAFKA_BOOTSTRAP_SERVERS": "localhost:port"}
    done = tapedeck(tmp_path, "log", "--out", "x", **wrong)
    assert done.returncode == 2
    said = complaint(done)
    assert "KAFKA_BOOTSTRAP_SERVERS" in said
    assert "LATENESS_S" in said
    assert "GRACE_S" in said


def test_settings_come_from_the_file_and_a_variable_wins(tmp_path: Path) -> None:
    (tmp_path / "tapedeck.env").write_text("LATENESS_S=soon\n")
    assert "LATENESS_S" in complaint(tapedeck(tmp_path, "log", "--out", "x"))
    done = tapedeck(tmp_path, "demo", "--live", LATENESS_S="900")
    assert "POLYGON_API_KEY" in complaint(done)


def test_a_secret_is_not_repeated(tmp_path: Path) -> None:
    done = tapedeck(tmp_path, "log", "--out", "x", POLYGON_API_KEY="hush-hush", LATENESS_S="soon")
    assert "hush-hush" not in done.stderr


@pytest.mark.parametrize("option", ["--frames", "--log"])
def test_a_file_of_another_kind_is_refused_with_its_line(tmp_path: Path, option: str) -> None:
    (tmp_path / "file.ndjson").write_text('{"a":1}\n')
    done = tapedeck(tmp_path, "compute", "--out", "out", option, "file.ndjson")
    assert done.returncode == 2
    assert "line 1" in complaint(done)


# -- what fails outside ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", ["log --out x", "process", "sink trades", "replay --from 2026-11-25 --to 2026-11-26"]
)
def test_what_cannot_be_reached_is_named_with_its_setting(tmp_path: Path, arguments: str) -> None:
    done = tapedeck(
        tmp_path,
        *arguments.split(),
        KAFKA_BOOTSTRAP_SERVERS="127.0.0.1:1",
        DATABASE_URL="postgresql://postgres:hush@127.0.0.1:1/tapedeck",
        CONNECT_TIMEOUT_S="0.2",
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    said = done.stderr.splitlines()[-1]
    assert "127.0.0.1:1" in said
    assert ("DATABASE_URL" if "sink" in arguments else "KAFKA_BOOTSTRAP_SERVERS") in said
    assert "hush" not in done.stderr


def test_local_says_what_does_not_run(tmp_path: Path) -> None:
    done = tapedeck(tmp_path, "local", "status")
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["kafka is not running", "postgres is not running"]
    assert tapedeck(tmp_path, "local", "stop").returncode == 0


def test_local_names_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = tapedeck(tmp_path, "local", "start", "--data-dir", "file/data")
    assert done.returncode == 1
    assert "file" in complaint(done)
