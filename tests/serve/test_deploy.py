"""The files in deploy: they parse, they name what exists, and the dashboard asks for metrics that are there."""

from __future__ import annotations

import configparser
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from tests.engine.scripted import scripted_llm
from tests.serve.served import serve

from pelagos.serve import read_settings
from pelagos.serve.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    with serve(scripted_llm("Hello")) as served:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
        assert served.client.post("/v1/chat/completions", json=body).status_code == 200
        found: dict[str, set[str]] = {}
        for family in text_string_to_metric_families(served.client.get("/metrics").text):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
            if family.type == "counter" and not family.samples:
                found[f"{family.name}_total"] = set()
    found["pelagos_rejected_total"], found["pelagos_disconnects_total"] = {"status"}, {"phase"}
    found["pelagos_engine_disk"] = {"part"}  # which these few requests did not touch
    dashboard = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
    asked = [target for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(asked) > 25
    for target in asked:
        names = re.findall(r"pelagos_\w+", target["expr"])
        assert names
        for name in names:
            assert name in found, f"{name} is not in /metrics"
            labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert labels <= found[name], target
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]}
    assert len(places) == len(dashboard["panels"])


def load(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def test_the_compose_file_names_what_exists() -> None:
    services = load("compose.yaml")["services"]
    assert (DEPLOY / services["server"]["build"]["context"] / services["server"]["build"]["dockerfile"]).is_file()
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            if source.startswith("./") and source != "./prometheus.key":
                assert (DEPLOY / source).is_file(), source
    [job] = load("prometheus.yml")["scrape_configs"]
    assert job["static_configs"][0]["targets"] == [f"server:{Settings().port}"]
    [source] = load("grafana-datasource.yaml")["datasources"]
    dashboard = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {source["uid"]}
    assert load("grafana-dashboards.yaml")["providers"][0]["options"]["path"] == "/var/lib/grafana/dashboards"


def test_the_container_recipe_copies_what_exists_and_starts_the_server() -> None:
    lines = (DEPLOY / "Containerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert steps[0][0] == "FROM"
    known = "FROM WORKDIR COPY RUN USER VOLUME EXPOSE STOPSIGNAL HEALTHCHECK ENTRYPOINT".split()
    assert {step[0] for step in steps} <= set(known)
    for _, rest in (step for step in steps if step[0] == "COPY"):
        for source in rest.split()[:-1]:
            assert (ROOT / source).exists(), source
    entry = json.loads(next(rest for word, rest in steps if word == "ENTRYPOINT"))
    assert entry[:3] == ["pelagos", "serve", "--config"]
    copied = {rest.split()[-1]: rest.split()[0] for word, rest in steps if word == "COPY"}
    settings = read_settings(["--config", str(ROOT / copied[entry[3]])])
    assert (settings.host, settings.allow_open) == ("0.0.0.0", False)
    assert next(rest for word, rest in steps if word == "USER") != "root"


def test_the_systemd_unit_parses_and_waits_for_the_drain() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(DEPLOY / "pelagos.service", encoding="utf-8")
    assert set(unit.sections()) == {"Unit", "Service", "Install"}
    service = unit["Service"]
    assert service["ExecStart"].split()[1:3] == ["serve", "--config"]
    settings = read_settings(["--config", str(DEPLOY / "server.toml")])
    assert float(service["TimeoutStopSec"]) > settings.drain_s
    compose = load("compose.yaml")["services"]["server"]
    assert float(compose["stop_grace_period"].removesuffix("s")) > settings.drain_s


@pytest.mark.parametrize("file", sorted(path.name for path in DEPLOY.iterdir() if path.is_file()))
def test_no_file_holds_a_secret(file: str) -> None:
    assert not re.search(r"pk-[\w-]{20}", (DEPLOY / file).read_text(encoding="utf-8"))
