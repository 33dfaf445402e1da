"""A real Prometheus beside the lab's cluster: it scrapes the pods of models and evaluates the product's rules.

`config` says what is scraped, `objects` with which rights; both are pure. `Prometheus` is the process, with the faults
that every service of the lab has. `up`, `down` and `status` keep one for a lab, in its folder `prometheus`. It is
Debian's, which is built without discovery for Kubernetes: `pod_discovery` runs beside it, as a ServiceAccount that may
look for pods and do nothing else. Both run outside of the cluster, where no NetworkPolicy of a model lets them in; in
the lab none is enforced.
"""

import base64
import json
import re
import shutil
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import LabError, cluster, control_plane, machine, pod_discovery, processes
from .pod_discovery import meta
from .services.service import Login, Service, write_secret
from .state import Lab, say

RULES = Path(__file__).parents[2] / "dashboards" / "rules" / "phoenix.rules.yaml"
NAMESPACE, ACCOUNT = "phoenix-lab-monitoring", "prometheus"
_MODEL, _TRACK = "phoenix-ml.io/model", "phoenix-ml.io/track"
_METRICS_PORT = 8000
_USUAL_PORT = 9090
_LOOPBACK = "127.0.0.1"
_QUERY_DEADLINE_S = 10.0
_LONGEST_INTERVAL_S = 60
# Longer than any use of a lab. `up` gets another one.
_TOKEN_LIFE = "48h"


@dataclass(frozen=True, slots=True)
class ApiServer:
    """Where pods are found: its URL, the file with its authority, the file with a token."""

    url: str
    authority: Path
    token: Path


@dataclass(frozen=True, slots=True)
class Target:
    """A server that is scraped without a cluster: `HOST:PORT` and the labels that discovery would give it."""

    address: str
    labels: dict[str, str] = field(default_factory=dict)


def config(*, interval: str, rules: Path, pods: Path | None, targets: Sequence[Target]) -> dict[str, Any]:
    """Return Prometheus' configuration: the pods that discovery writes to the file `pods`, and fixed targets."""
    jobs: list[dict[str, Any]] = []
    if pods:
        discovery = {"files": [str(pods)], "refresh_interval": "5s"}  # it looks at once when the file changes
        jobs.append({"job_name": "models", "file_sd_configs": [discovery], "relabel_configs": _relabelling()})
    if targets:
        fixed = [{"targets": [target.address], "labels": target.labels} for target in targets]
        jobs.append({"job_name": "fixed", "static_configs": fixed})
    return {
        "global": {
            "scrape_interval": interval,
            "scrape_timeout": f"{min(_seconds(interval), 10)}s",
            "evaluation_interval": interval,
        },
        "rule_files": [str(rules)],
        "scrape_configs": jobs,
    }


def _relabelling() -> list[dict[str, Any]]:
    """The target labels that the rules know, and the model's as a PodMonitor of the operator gives it."""
    labels = {
        "namespace": meta("namespace"),
        "pod": meta("pod_name"),
        "track": meta(f"pod_label_{_TRACK}"),
        "phoenix_ml_io_model": meta(f"pod_label_{_MODEL}"),
    }
    return [
        {"action": "keep", "source_labels": [meta("pod_container_port_number")], "regex": str(_METRICS_PORT)},
        {"action": "drop", "source_labels": [meta("pod_phase")], "regex": "Failed|Succeeded"},
        *({"source_labels": [source], "target_label": label} for label, source in labels.items()),
    ]


def objects() -> list[dict[str, Any]]:
    """Return the ServiceAccount in a namespace of its own, and its one right: to look for pods."""
    account = {"kind": "ServiceAccount", "name": ACCOUNT, "namespace": NAMESPACE}
    name = {"name": f"{NAMESPACE}:{ACCOUNT}"}
    rights = "rbac.authorization.k8s.io"
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": ACCOUNT, "namespace": NAMESPACE},
            "automountServiceAccountToken": False,
        },
        {
            "apiVersion": f"{rights}/v1",
            "kind": "ClusterRole",
            "metadata": name,
            "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}],
        },
        {
            "apiVersion": f"{rights}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": name,
            "roleRef": {"apiGroup": rights, "kind": "ClusterRole", **name},
            "subjects": [account],
        },
    ]


class Prometheus(Service):
    """One Prometheus. With `is_secure` it speaks TLS only; nobody logs in, since all that it lets anybody do is read.

    `interval`, whole seconds as `5s`, is that of scrapes and of the rules; `rules` a rule file of the product's.
    """

    kind = "prometheus"
    needs_no_login = True

    def __init__(
        self,
        folder: Path,
        *,
        interval: str = "15s",
        api_server: ApiServer | None = None,
        targets: Sequence[Target] = (),
        rules: Path = RULES,
        **options: Any,
    ) -> None:
        super().__init__(folder, **options)
        _seconds(interval)
        self.interval = interval
        self.api_server = api_server
        self.targets = targets
        self.rules = rules

    @classmethod
    def install(cls) -> None:
        """Debian's prometheus, which brings promtool."""
        if not (shutil.which("prometheus") and shutil.which("promtool")):
            machine.install(["prometheus"])

    @property
    def admin(self) -> Login:
        """Nobody."""
        return Login("", "")

    @property
    def url(self) -> str:
        """Where it is asked."""
        return f"{'https' if self.is_secure else 'http'}://{self.host}:{self.port}"

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Ask for an instant vector; its elements as Prometheus' API gives them, `metric` and `value`."""
        answer = json.loads(self._get("/api/v1/query?" + urllib.parse.urlencode({"query": expression})))
        return list(answer["data"]["result"])

    def active_targets(self) -> list[dict[str, Any]]:
        """Return the targets as Prometheus' API gives them, with `labels` and `health`."""
        return list(json.loads(self._get("/api/v1/targets?state=active"))["data"]["activeTargets"])

    def version(self) -> str:
        """Return its version."""
        return str(json.loads(self._get("/api/v1/status/buildinfo"))["data"]["version"])

    def rule_groups(self) -> list[dict[str, Any]]:
        """Return the groups as Prometheus' API gives them, with `evaluationTime`, `lastEvaluation` and `rules`."""
        return list(json.loads(self._get("/api/v1/rules"))["data"]["groups"])

    def _get(self, path: str) -> bytes:
        context = ssl.create_default_context()
        # that it is this very one is known, and it may have been given an expired certificate
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        try:
            with opener.open(self.url + path, timeout=_QUERY_DEADLINE_S) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            raise LabError(f"Prometheus answers {path} with {error.code}: {error.read().decode()[:500]}") from error

    def _binding(self) -> dict[str, str]:
        return {"uri": self.url}

    def _prepare(self) -> None:
        (self.folder / "data").mkdir()
        if self.is_secure:
            files = {"cert_file": str(self._pki / "server.crt"), "key_file": str(self._pki / "server.key")}
            (self.folder / "web.yaml").write_text(json.dumps({"tls_server_config": files}))

    def stop(self) -> None:
        """End it in order, and the discovery."""
        super().stop()
        processes.stop([self._discovery])

    def remove(self) -> None:
        """End both and delete everything."""
        processes.stop([self._discovery])
        super().remove()

    @property
    def _discovery(self) -> Path:
        """The record of the program that finds pods; it goes on when Prometheus is killed or paused."""
        return self.folder / "discovery.json"

    @property
    def _pods(self) -> Path:
        return self.folder / "pods.yaml"

    def _before_start(self) -> None:
        made = config(
            interval=self.interval,
            rules=self.folder / "rules.yaml",
            pods=self._pods if self.api_server else None,
            targets=self.targets,
        )
        # JSON is YAML too
        (self.folder / "config.yaml").write_text(json.dumps(made, indent=1))
        text = re.sub(r"(?m)^( +interval: ).*$", rf"\g<1>{self.interval}", self.rules.read_text())
        (self.folder / "rules.yaml").write_text(text)
        self.discover_anew()

    def discover_anew(self) -> None:
        """Start the discovery, again if it runs: the API server may have moved since."""
        processes.stop([self._discovery])
        if not (api_server := self.api_server):
            return
        command = [
            *(sys.executable, pod_discovery.__file__, "--url", api_server.url, "--label", _MODEL, "--out", self._pods),
            *("--authority", api_server.authority, "--token", api_server.token),
        ]
        processes.start(command, record=self._discovery, log=self.folder / "discovery.log")

    def _command(self) -> Sequence[str | Path]:
        return [
            shutil.which("prometheus") or "prometheus",
            f"--config.file={self.folder / 'config.yaml'}",
            f"--storage.tsdb.path={self.folder / 'data'}",
            "--storage.tsdb.retention.time=2d",
            f"--web.listen-address={self.host}:{self.port}",
            "--log.level=warn",
            *([f"--web.config.file={self.folder / 'web.yaml'}"] if self.is_secure else []),
        ]

    def _is_ready(self) -> bool:
        try:
            self._get("/-/ready")
        except (OSError, LabError):
            return False
        return True


def _seconds(interval: str) -> int:
    found = re.fullmatch(r"([0-9]{1,2})s", interval)
    if not found or not 1 <= int(found[1]) <= _LONGEST_INTERVAL_S:
        raise LabError(f"interval: expected whole seconds from 1s to {_LONGEST_INTERVAL_S}s, got {interval!r}")
    return int(found[1])


def up(lab: Lab, *, is_for_pods: bool, interval: str) -> str:
    """Have one that scrapes the lab's pods; its URL.

    `is_for_pods`: it listens on the address by which the lab's pods reach this machine.
    """
    _seconds(interval)
    api_server = _grant(lab)
    host = machine.host_ip() if is_for_pods else _LOOPBACK
    wanted = {"host": host, "interval": interval}
    facts = _facts(lab)
    if facts and {name: facts[name] for name in wanted} != wanted:
        raise LabError(f"the Prometheus of the lab {lab.name!r} is up {_described(facts)}; take it down first")
    Prometheus.install()
    if facts is None:
        shutil.rmtree(_data(lab), ignore_errors=True)
        facts = wanted | {"port": machine.free_port(host, usual=_USUAL_PORT)}
        _facts_file(lab).write_text(json.dumps(facts))
    service = _service(lab, facts, api_server)
    if service.is_running:
        service.discover_anew()
    else:
        say(f"starting prometheus on {service.host}:{service.port}")
        service.start()
    say(f"the Prometheus of the lab {lab.name!r} is up {_described(facts)}")
    return service.url


def down(lab: Lab) -> None:
    """End it, and delete its data and its rights."""
    if facts := _facts(lab):
        _service(lab, facts, None).remove()
    shutil.rmtree(_folder(lab), ignore_errors=True)
    if not cluster.given_kubeconfig() and lab.facts():
        try:
            control_plane.kubectl(
                lab, "delete", "--ignore-not-found", "--wait=false", "-f", "-", stdin=json.dumps(_listed())
            )
        except LabError as error:
            say(f"its rights stay, since the cluster does not answer: {error}")


def running(lab: Lab) -> Prometheus:
    """The one that is up, for who asks it or wants to stop it."""
    facts = _facts(lab)
    if facts is None:
        raise LabError(f"the Prometheus of the lab {lab.name!r} is not up")
    return _service(lab, facts, _api_server(lab))


def status(lab: Lab) -> tuple[list[str], bool]:
    """Lines for people, and whether it runs."""
    facts = _facts(lab)
    if facts is None:
        return [f"the Prometheus of the lab {lab.name!r} is not up"], False
    service = _service(lab, facts, None)
    state = "runs" if service.is_running else "does not run"
    return [f"the Prometheus of the lab {lab.name!r}, {_described(facts)}: {service.url}  {state}"], service.is_running


def _grant(lab: Lab) -> ApiServer:
    """Have the ServiceAccount and its right; the files with which Prometheus is let in as it."""
    if given := cluster.given_kubeconfig():
        raise LabError(f"{given} is not the lab's cluster, and the lab gives nobody rights on it")
    lab.require()
    control_plane.kubectl(lab, "apply", "--server-side", "-f", "-", stdin=json.dumps(_listed()))
    token = control_plane.kubectl(lab, "create", "token", ACCOUNT, "-n", NAMESPACE, f"--duration={_TOKEN_LIFE}")
    _folder(lab).mkdir(parents=True, exist_ok=True, mode=0o700)
    made = _api_server(lab)
    write_secret(made.token, token.strip())
    made.authority.write_bytes(base64.b64decode(_cluster_of(lab)["certificate-authority-data"]))
    return made


def _api_server(lab: Lab) -> ApiServer:
    return ApiServer(_cluster_of(lab)["server"], _folder(lab) / "ca.crt", _folder(lab) / "token")


def _cluster_of(lab: Lab) -> dict[str, str]:
    shown = control_plane.kubectl(lab, "config", "view", "--raw", "--minify", "-o", "json")
    return dict(json.loads(shown)["clusters"][0]["cluster"])


def _listed() -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "List", "items": objects()}


def _service(lab: Lab, facts: dict[str, Any], api_server: ApiServer | None) -> Prometheus:
    return Prometheus(
        _data(lab), host=facts["host"], port=facts["port"], interval=facts["interval"], api_server=api_server
    )


def _facts(lab: Lab) -> dict[str, Any] | None:
    try:
        return dict(json.loads(_facts_file(lab).read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _described(facts: dict[str, Any]) -> str:
    return f"on {facts['host']}, every {facts['interval']}"


def _folder(lab: Lab) -> Path:
    return lab.folder / "prometheus"


def _facts_file(lab: Lab) -> Path:
    return _folder(lab) / "facts.json"


def _data(lab: Lab) -> Path:
    return _folder(lab) / "server"
