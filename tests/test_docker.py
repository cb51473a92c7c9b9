"""The files of docker/, without an engine: what they name exists, and what they promise they say."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
COMPOSE = ["compose.yml", "client.yml"]


def services(name):
    return yaml.safe_load((DOCKER / name).read_text())["services"]


@pytest.mark.parametrize("name", COMPOSE)
def test_every_variable_is_in_the_example(name):
    known = set(re.findall(r"^(\w+)=", (DOCKER / ".env.example").read_text(), re.M))
    used = set(re.findall(r"\$\{(\w+)", (DOCKER / name).read_text())) - {"PWD"}
    assert used <= known


@pytest.mark.parametrize("name", COMPOSE)
def test_no_service_is_root_or_privileged_or_writes_to_its_image(name):
    for service, found in services(name).items():
        assert found["user"] == "${COROLLA_UID:-1000}:${COROLLA_GID:-1000}", service
        assert found["read_only"] is True, service
        assert not found.get("privileged"), service
        assert found["restart"] in ("unless-stopped", "no", "on-failure"), service


@pytest.mark.parametrize("name", COMPOSE)
def test_who_runs_what_the_server_sends_has_neither_key_nor_data(name):
    apps = {service: found for service, found in services(name).items() if service.startswith("app")}
    assert apps
    for found in apps.values():
        targets = {volume.rsplit(":ro", 1)[0].rsplit(":", 1)[1] for volume in found["volumes"]}
        assert targets == {"/secrets/runtime-ca.crt", "/secrets/runtime.secret", "/run/corolla"}


@pytest.mark.parametrize("name", COMPOSE)
def test_who_has_the_data_has_no_network_and_cannot_write_to_them(name):
    for service, found in services(name).items():
        data = [volume for volume in found.get("volumes", []) if ":/data" in volume]
        assert bool(data) == service.startswith("worker")
        if data:
            assert found["network_mode"] == "none"
            assert data[0].endswith(":ro")


def test_the_superlink_is_reached_from_outside_through_the_proxy_alone():
    found = services("compose.yml")
    assert [name for name, service in found.items() if service.get("ports")] == ["proxy"]
    on_control = {name for name, service in found.items() if "control" in service.get("networks", [])}
    assert on_control == {"superlink", "serverapp", "proxy", "operator", "enrol"}
    assert yaml.safe_load((DOCKER / "compose.yml").read_text())["networks"]["control"] == {"internal": True}


@pytest.mark.parametrize("name", COMPOSE)
def test_every_volume_is_a_folder_of_the_image_that_any_user_can_write_to(name):
    """An engine makes a volume's folder with the owner and mode that the image has there, and as root's without."""
    open_to_all = re.search(r"install -d -m 1777 (.+)", (DOCKER / "Dockerfile").read_text())[1].split()
    compose = yaml.safe_load((DOCKER / name).read_text())
    found = [v.split(":") for s in compose["services"].values() for v in s.get("volumes", [])]
    targets = {words[1] for words in found if words[0] in compose["volumes"]}
    assert targets
    assert targets <= set(open_to_all)


def test_the_servers_image_can_serve_metrics_and_account_for_privacy():
    """COROLLA_METRICS is set in the compose file, and [privacy] needs its accountant on the server alone."""
    stage = (DOCKER / "Dockerfile").read_text().split("FROM build AS build-cpu")[1].split("\nFROM ")[0]
    assert set(re.search(r"'\.\[([\w,]+)\]'", stage)[1].split(",")) >= {"metrics", "dp"}
    assert "COPY --from=build-cpu" in (DOCKER / "Dockerfile").read_text().split("AS server")[1].split("\nFROM ")[0]


def test_the_edge_client_reserves_a_gpu():
    devices = services("client.yml")["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]


def test_every_target_of_a_build_is_in_the_dockerfile():
    stages = set(re.findall(r"^FROM \S+ AS (\S+)", (DOCKER / "Dockerfile").read_text(), re.M))
    for name in COMPOSE:
        for found in services(name).values():
            if "build" in found:
                target = found["build"]["target"].replace("${COROLLA_VARIANT:-cuda}", "cuda")
                assert target in stages


def test_the_image_gets_every_folder_of_the_package():
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    folders = re.findall(r'^"corolla[\w.]*" = "([\w/]+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert {f"!{folder.split('/')[0]}" for folder in folders} <= set(ignored)


@pytest.mark.skipif(not shutil.which("docker-compose"), reason="needs docker-compose, which needs no engine for this")
@pytest.mark.parametrize("name", COMPOSE)
def test_compose_itself_reads_the_files(name, tmp_path):
    file = tmp_path / "compose.yml"
    file.write_text(re.sub(r"^name: .*\n", "", (DOCKER / name).read_text(), flags=re.M))  # version 1 knows no name
    command = ["docker-compose", "--env-file", DOCKER / ".env.example", "-f", file, "config", "-q"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
