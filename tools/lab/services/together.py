"""The three services of one lab: started and stopped together, and what clients and an operator are given of them.

`up` leaves three things in the lab's folder `services`, for whoever may read it: `bindings/<kind>/<key>`, the admin's
credentials as a SERVICE_BINDING_ROOT; `secrets.json`, the same as Secrets for the operator's namespace; and
`settings.json`, the part of the operator's settings that names these backends.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from .. import LabError, machine
from ..state import Lab, say
from .kafka import Kafka
from .postgres import Postgres
from .redis import Redis
from .service import Service, write_secret

KINDS: tuple[type[Service], ...] = (Redis, Postgres, Kafka)
OPERATOR_NAMESPACE = "phoenix-system"
# Root's home is closed to the user that PostgreSQL runs as.
_DATA = Path("/var/lib/phoenix-lab")
_LOOPBACK = "127.0.0.1"
# Taken where they are free: the operator's NetworkPolicy lets it out to these without being told.
_USUAL_PORTS = {"redis": 6379, "postgresql": 5432, "kafka": 9092}


def up(lab: Lab, *, is_secure: bool, is_for_pods: bool) -> Path:
    """Have all three; the folder to name in SERVICE_BINDING_ROOT.

    `is_for_pods`: they listen on the address by which the lab's pods reach this machine.
    """
    host = machine.host_ip() if is_for_pods else _LOOPBACK
    wanted = {"host": host, "is_secure": is_secure}
    facts = _facts(lab)
    if facts and {name: facts[name] for name in wanted} != wanted:
        raise LabError(f"the services of the lab {lab.name!r} are up {_described(facts)}; take them down first")
    for kind in KINDS:
        kind.install()
    folder = _folder(lab)
    if facts is None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)
        facts = wanted | {
            "ports": {kind.kind: machine.free_port(host, usual=_USUAL_PORTS.get(kind.kind)) for kind in KINDS}
        }
        (folder / "services.json").write_text(json.dumps(facts))
    services = _services(lab, facts)
    for service in services:
        if not service.is_running:
            say(f"starting {service.kind} on {service.host}:{service.port}")
            service.start()
    _hand_over(folder, services)
    say(f"the services of the lab {lab.name!r} are up {_described(facts)}")
    return folder / "bindings"


def down(lab: Lab) -> None:
    """End all three and delete their data and credentials."""
    if facts := _facts(lab):
        for service in _services(lab, facts):
            service.remove()
    for leftover in (_data(lab), _folder(lab)):
        shutil.rmtree(leftover, ignore_errors=True)


def running(lab: Lab) -> dict[str, Service]:
    """The three by kind, for who wants to stop one of them."""
    facts = _facts(lab)
    if facts is None:
        raise LabError(f"the services of the lab {lab.name!r} are not up")
    return {service.kind: service for service in _services(lab, facts)}


def status(lab: Lab) -> tuple[list[str], bool]:
    """Lines for people, and whether all run."""
    facts = _facts(lab)
    if facts is None:
        return [f"the services of the lab {lab.name!r} are not up"], False
    services = _services(lab, facts)
    lines = [f"the services of the lab {lab.name!r}, {_described(facts)}; SERVICE_BINDING_ROOT {_folder(lab)}/bindings"]
    for each in services:
        lines.append(f"  {each.kind:<12}{each.host}:{each.port}  {'runs' if each.is_running else 'does not run'}")
    return lines, all(each.is_running for each in services)


def admin_secret(kind: str) -> str:
    """The name of the Secret with the admin's credentials of a kind."""
    return f"lab-{kind}-admin"


def _hand_over(folder: Path, services: Sequence[Service]) -> None:
    secrets = []
    for service in services:
        binding = service.binding()
        place = folder / "bindings" / service.kind
        place.mkdir(parents=True, exist_ok=True)
        for key, value in binding.items():
            write_secret(place / key, value)
        secrets.append(
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": admin_secret(service.kind), "namespace": OPERATOR_NAMESPACE},
                "type": f"servicebinding.io/{service.kind}",
                "stringData": binding,
            }
        )
    write_secret(folder / "secrets.json", json.dumps({"apiVersion": "v1", "kind": "List", "items": secrets}, indent=1))
    backends = [
        {"name": "default", "kind": service.kind, "adminSecretRef": {"name": admin_secret(service.kind)}}
        for service in services
    ]
    (folder / "settings.json").write_text(json.dumps({"backends": backends}, indent=1))


def _services(lab: Lab, facts: dict[str, object]) -> list[Service]:
    ports = facts["ports"]
    assert isinstance(ports, dict)
    return [
        kind(_data(lab) / kind.kind, host=str(facts["host"]), port=ports[kind.kind], is_secure=bool(facts["is_secure"]))
        for kind in KINDS
    ]


def _facts(lab: Lab) -> dict[str, object] | None:
    try:
        return dict(json.loads((_folder(lab) / "services.json").read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _described(facts: dict[str, object]) -> str:
    return f"on {facts['host']}, {'behind TLS and logins' if facts['is_secure'] else 'without logins'}"


def _folder(lab: Lab) -> Path:
    return lab.folder / "services"


def _data(lab: Lab) -> Path:
    return _DATA / lab.name if os.geteuid() == 0 else _folder(lab) / "data"
