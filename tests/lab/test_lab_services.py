"""`python -m lab services`: the three beside a lab, and what they hand over."""

import json
import shutil
import tempfile
from pathlib import Path

import confluent_kafka
import psycopg
import pytest
import redis
import services
from lab import LabError, machine
from lab.services import together
from lab.state import Lab


@pytest.fixture
def lab(tmp_path, monkeypatch, services_here):
    for kind in (services.RedisServer, services.PostgresServer, services.KafkaBroker):
        services.have(kind)
    monkeypatch.setattr("lab.state.HOME", tmp_path)
    monkeypatch.setattr(together, "_DATA", Path(tempfile.mkdtemp(prefix="phoenix-lab-")))
    together._DATA.chmod(0o711)
    monkeypatch.setattr(together, "_USUAL_PORTS", {})  # they are left to whoever else uses this machine
    lab = Lab("unit")
    yield lab
    together.down(lab)
    shutil.rmtree(together._DATA)


def test_services_of_a_lab_are_for_pods_behind_logins_and_hand_over_what_an_operator_needs(lab):
    root = together.up(lab, is_secure=True, is_for_pods=True)
    files = {f"{path.parent.name}/{path.name}": path for path in root.glob("*/*")}
    keys = {name: path.read_text() for name, path in files.items()}
    assert keys["redis/host"] == keys["postgresql/host"] == machine.host_ip()
    assert {path.stat().st_mode & 0o777 for path in files.values()} == {0o600}
    with redis.Redis.from_url(keys["redis/uri"], ssl_ca_certs=str(files["redis/certificates"])) as client:
        assert client.ping()
    verified = f"?sslmode={keys['postgresql/sslmode']}&sslrootcert={files['postgresql/certificates']}"
    psycopg.connect(keys["postgresql/uri"] + verified).close()
    admin = confluent_kafka.admin.AdminClient(
        {
            "bootstrap.servers": keys["kafka/bootstrap-servers"],
            "security.protocol": keys["kafka/security-protocol"],
            "sasl.mechanism": keys["kafka/sasl-mechanism"],
            "sasl.username": keys["kafka/username"],
            "sasl.password": keys["kafka/password"],
            "ssl.ca.location": str(files["kafka/certificates"]),
        }
    )
    assert admin.list_topics(timeout=services.DEADLINE_S).brokers
    items = json.loads((root.parent / "secrets.json").read_text())["items"]
    secrets = {item["metadata"]["name"]: item for item in items}
    settings = json.loads((root.parent / "settings.json").read_text())
    for backend in settings["backends"]:
        kind = backend["kind"]
        secret = secrets[backend["adminSecretRef"]["name"]]
        assert secret["metadata"]["namespace"] == "phoenix-system"
        assert secret["type"] == f"servicebinding.io/{kind}"
        assert secret["stringData"] == {path.name: path.read_text() for path in (root / kind).iterdir()}
    assert [backend["kind"] for backend in settings["backends"]] == ["redis", "postgresql", "kafka"]


def test_services_of_a_lab_start_again_where_they_were_and_go_with_their_data(lab):
    assert together.status(lab) == (["the services of the lab 'unit' are not up"], False)
    root = together.up(lab, is_secure=False, is_for_pods=False)
    uri = (root / "redis" / "uri").read_text()
    facts = together._facts(lab)
    assert facts is not None
    server, *others = together._services(lab, facts)
    server.kill()
    lines, is_well = together.status(lab)
    assert not is_well
    assert "does not run" in lines[1]
    assert together.up(lab, is_secure=False, is_for_pods=False) == root
    assert (root / "redis" / "uri").read_text() == uri
    assert together.status(lab)[1]
    with pytest.raises(LabError, match=r"are up on 127\.0\.0\.1, without logins; take them down first"):
        together.up(lab, is_secure=True, is_for_pods=False)
    together.down(lab)
    assert not any(each.is_running for each in (server, *others))
    assert not root.exists()
    assert not list(together._DATA.glob("*"))
