"""What is deployed names only what there is: commands, settings, metrics, labels, topics, tables, files."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client.metrics import MetricWrapperBase

import simulator.metrics
import tapedeck.metrics
from schemas import topics
from sinks import tables
from tapedeck.cli import cli
from tapedeck.settings import Settings

TOP = Path(__file__).parents[1]
COMPOSE = yaml.safe_load((TOP / "docker-compose.yml").read_text())
OURS = {name: service for name, service in COMPOSE["services"].items() if service["image"] == "tapedeck:local"}
PROMETHEUS = yaml.safe_load((TOP / "deploy/prometheus.yml").read_text())
ALERTS = yaml.safe_load((TOP / "deploy/alerts.yml").read_text())
DASHBOARD = json.loads((TOP / "deploy/grafana/dashboards/tapedeck.json").read_text())
PAGES = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))]

SETTINGS = {name.upper() for name in Settings.model_fields}
# Of Prometheus itself, and of the containers that are not ours.
ADDED_LABELS = {"job", "instance", "le"}
ELSEWHERE = {"POSTGRES_PASSWORD", "GRAFANA_PASSWORD"}


def metrics() -> Iterator[tuple[str, set[str]]]:
    """Every sample that our processes can serve, with its labels."""
    for module in (tapedeck.metrics, simulator.metrics):
        for metric in vars(module).values():
            if isinstance(metric, MetricWrapperBase):
                suffixes = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
                for suffix in suffixes[str(metric._type)]:
                    yield metric._name + suffix, {*metric._labelnames}


SAMPLES = dict(metrics())


def expressions() -> list[str]:
    rules = [rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]]
    return rules + [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_the_metrics_are_found() -> None:
    assert "tapedeck_producer_events_total" in SAMPLES
    assert "tapedeck_feed_events_total" in SAMPLES
    assert len(SAMPLES) > 25


@pytest.mark.parametrize("expression", expressions())
def test_alerts_and_dashboard_ask_for_metrics_that_exist(expression: str) -> None:
    names = set(re.findall(r"\btapedeck_\w+", expression))
    assert names <= SAMPLES.keys()
    assert names or re.search(r"\bup\b", expression)
    known = ADDED_LABELS.union(*(SAMPLES[name] for name in names))
    asked = {label for labels in re.findall(r"\bby \(([^)]*)\)", expression) for label in labels.split(", ")}
    asked |= set(re.findall(r"(\w+)\s*=~?\s*\"", expression))
    assert asked <= known


@pytest.mark.parametrize("panel", DASHBOARD["panels"], ids=lambda panel: panel["title"])
def test_legends_use_labels_that_their_query_has(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
            assert re.search(rf"by \([^)]*\b{label}\b", target["expr"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_pages_name_metrics_and_settings_that_exist(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"\btapedeck_(?:producer|processor|sink|feed)_\w+", text):
        assert name in SAMPLES, name
    for name in re.findall(r"`([A-Z][A-Z0-9]+(?:_[A-Z0-9]+)+)(?:=[^`]*)?`", text):
        assert name in SETTINGS | ELSEWHERE | {"TAPEDECK_CACHE_DIR"}, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_pages_name_commands_and_files_that_exist(page: Path) -> None:
    text = page.read_text()
    for command in re.findall(r"`(?:\.venv/bin/)?tapedeck ([a-z]+)", text):
        assert command in cli.commands, command
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    folders = "producers|processors|sinks|schemas|tapedeck|simulator|deploy|docs"
    for path in re.findall(rf"`((?:{folders})/[\w./]*)`", text):
        assert (TOP / path).exists(), path


def test_the_readme_has_every_command_topic_and_table() -> None:
    text = (TOP / "README.md").read_text()
    for command in cli.commands:
        assert f"`tapedeck {command}" in text, command
    for topic in filter(lambda topic: topic.values, topics.ALL):
        assert f"`{topic.name}`" in text, topic.name
    for table in tables.ALL:
        assert f"`{table.name}`" in text, table.name


def understood(command: str, *arguments: str) -> None:
    """Raises UsageError. Below the group, for a command keeps the spellings of --help that it is first asked with."""
    cli.commands[command].make_context(command, list(arguments), click.Context(cli, **cli.context_settings))


@pytest.mark.parametrize("name", OURS)
def test_a_service_runs_a_real_command(name: str) -> None:
    command, *arguments = OURS[name]["command"]
    understood(command, *arguments)


@pytest.mark.parametrize("name", OURS)
def test_a_service_is_given_real_settings(name: str) -> None:
    assert OURS[name]["environment"].keys() <= SETTINGS
    assert OURS[name]["env_file"] == [{"path": "tapedeck.env", "required": False}]


def test_the_image_is_given_real_settings_and_a_real_entry_point() -> None:
    text = (TOP / "deploy/Dockerfile").read_text()
    given = set(re.findall(r"\b([A-Z][A-Z_]+)=", text)) - {"PATH", "PYTHONUNBUFFERED"}
    assert {name for name in given if not name.startswith("PIP_")} <= SETTINGS
    assert 'ENTRYPOINT ["tapedeck"]' in text
    assert re.search(r"^USER (?!root)", text, re.MULTILINE)
    for source in re.findall(r"^COPY (?!--from)(\S+) ", text, re.MULTILINE):
        assert (TOP / source).exists()


def test_every_folder_of_the_package_is_in_the_image() -> None:
    ignored = (TOP / ".dockerignore").read_text().splitlines()
    packages = {path.parent.name for path in TOP.glob("*/__init__.py")} - {"tests", "bench"}
    assert packages == {"schemas", "tapedeck", "producers", "processors", "sinks", "simulator"}
    assert {f"!{name}" for name in packages} <= set(ignored)


def test_prometheus_asks_every_service_at_the_port_it_listens_on() -> None:
    ports = {
        (name, config["port"])
        for job in PROMETHEUS["scrape_configs"]
        for config in job["dns_sd_configs"]
        for name in config["names"]
    }
    wanted = {(name, int(service["environment"]["HTTP_PORT"])) for name, service in OURS.items()}
    wanted.remove(("simulate", 9101))
    assert OURS["simulate"]["network_mode"] == "service:produce"
    assert ports == wanted | {("produce", 9101)}
    assert {job["job_name"] for job in PROMETHEUS["scrape_configs"]} == {"produce", "process", "sink", "simulate"}


def test_every_sink_has_a_service() -> None:
    kinds = next(parameter.type for parameter in cli.commands["sink"].params if parameter.name == "name")
    assert isinstance(kinds, click.Choice)
    ran = {service["command"][1] for service in OURS.values() if service["command"][0] == "sink"}
    assert ran == {*kinds.choices} - {"all"}


@pytest.mark.parametrize(
    ("service", "setting", "volume"),
    [("sink-archive", "ARCHIVE_URL", "archive"), ("produce", "JOURNAL_DIR", "journal")],
)
def test_what_must_outlive_a_container_lies_in_a_volume_that_it_may_write_to(
    service: str, setting: str, volume: str
) -> None:
    folder = OURS[service]["environment"][setting]
    assert OURS[service]["volumes"] == [f"{volume}:{folder}"]
    made = next(line for line in (TOP / "deploy/Dockerfile").read_text().splitlines() if "install -d" in line)
    assert folder in made.partition("install -d -o tapedeck ")[2].split()


def test_what_is_mounted_is_there() -> None:
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (TOP / source).exists(), source


def test_compose_asks_for_the_variables_that_the_example_has() -> None:
    asked = set(re.findall(r"\$\{(\w+)", (TOP / "docker-compose.yml").read_text()))
    example = set(re.findall(r"^(\w+)=", (TOP / "deploy/env.example").read_text(), re.MULTILINE))
    assert asked == example == ELSEWHERE


def test_a_wrong_command_would_be_noticed() -> None:
    with pytest.raises(click.UsageError):
        understood("sink", "cats")
