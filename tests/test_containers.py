"""The files of `containers/` agree with each other and with the command line.

`tests/server/test_metrics.py` compares the dashboard with the metrics of a server.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import yaml

from twotower.cli.serve import serve
from twotower.model_loading import source_of

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "containers"
DOCKERFILE = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
DASHBOARD = json.loads((FOLDER / "grafana" / "dashboards" / "twotower.json").read_text(encoding="utf-8"))


def test_provisioned_names_fit_together() -> None:
    (source,) = yaml.safe_load((FOLDER / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    parts = [*DASHBOARD["panels"], *DASHBOARD["templating"]["list"]]
    assert {part["datasource"]["uid"] for part in parts} == {source["uid"]}
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in COMPOSE["services"]
    scraped = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    (job,) = scraped["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["server:8000"]}]
    assert f'job="{job["job_name"]}"' in json.dumps(DASHBOARD).replace('\\"', '"')
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((FOLDER / "grafana/provisioning/dashboards/twotower.yaml").read_text())["providers"]
    mounts = [mount.split(":") for mount in COMPOSE["services"]["grafana"]["volumes"]]
    assert provider["options"]["path"] in [target for _, target, *_ in mounts]


def test_mounted_files_exist_and_volumes_are_declared() -> None:
    for name, service in COMPOSE["services"].items():
        for mount in service["volumes"]:
            source = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", mount).split(":")[0]
            known = (FOLDER / source).exists() if source.startswith("./") else source in COMPOSE["volumes"]
            assert known, (name, mount)


def test_the_image_starts_a_server() -> None:
    """The entry point and the command of compose.yaml are options that `twotower serve` takes."""
    (line,) = re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)
    entry = json.loads(line)
    assert entry[:2] == ["twotower", "serve"]
    own = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", part) for part in COMPOSE["services"]["server"]["command"]]
    values = serve.make_context("serve", [*entry[2:], *own]).params
    assert (values["host"], values["port"]) == ("0.0.0.0", 8000)
    assert (source_of(values["model"]), values["model"]) == (source_of("bundled/adapters"), "bundled/adapters")
    (check,) = re.findall(r"^ +CMD (.*)$", DOCKERFILE, re.MULTILINE)
    assert "'127.0.0.1', 8000" in json.loads(check)[2]
    assert "'GET', '/ready'" in json.loads(check)[2]
    assert re.search(r"^USER 10001:10001$", DOCKERFILE, re.MULTILINE)
    drain = next(option.default for option in serve.params if option.name == "drain")
    assert int(COMPOSE["services"]["server"]["stop_grace_period"].removesuffix("s")) > drain


def test_the_image_is_built_from_files_that_it_gets() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [shlex.split(line)[1:-1] for line in DOCKERFILE.splitlines() if line.startswith("COPY ")]
    assert sorted(allowed) == sorted(name for names in copied for name in names)
    assert all((ROOT / name).exists() for name in allowed)
    extras = re.findall(r"'\.\[(.*)\]'", DOCKERFILE)
    known = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f"\n{extra} = [" in known for group in extras for extra in group.split(","))
    services = yaml.safe_load((FOLDER / "compose.cuda.yaml").read_text())["services"]
    devices = {"cpu": COMPOSE["services"]["server"], "cuda": services["server"]}
    for device, server in devices.items():
        assert server["build"]["args"] == {"DEVICE": device}
        assert f"      {device}) index=" in DOCKERFILE
