"""Tells Prometheus which pods there are, since Debian's is built without discovery of its own for Kubernetes.

A program: it asks an API server once a second for the pods with a label, and writes them as a file for Prometheus'
`file_sd_configs`, with the labels that `kubernetes_sd_configs` with the role `pod` would give them. While the API
server does not answer, the last answer stands, as it would there. `lab.prometheus` starts it; it imports nothing of the
lab.
"""

import argparse
import json
import re
import ssl
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PREFIX = "__meta_kubernetes_"
_EVERY_S = 1.0
_DEADLINE_S = 5.0


def meta(name: str) -> str:
    """Return the name of a label of discovery; what cannot stand in one becomes `_`."""
    return PREFIX + re.sub(r"\W", "_", name)


def groups(pods: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a target for each port that a container of a pod declares; pods without an address have none yet."""
    return [
        {"targets": [f"{address}:{port['containerPort']}"], "labels": {meta(name): text for name, text in labels}}
        for pod in sorted(pods, key=lambda pod: (pod["metadata"]["namespace"], pod["metadata"]["name"]))
        if (address := _address(pod))
        for container in pod["spec"]["containers"]
        for port in container.get("ports", ())
        for labels in ([*_labels(pod), *_of_port(container, port)],)
    ]


def _address(pod: dict[str, Any]) -> str:
    found = str(pod.get("status", {}).get("podIP", ""))
    return f"[{found}]" if ":" in found else found


def _labels(pod: dict[str, Any]) -> Iterator[tuple[str, str]]:
    about = pod["metadata"]
    yield "namespace", about["namespace"]
    yield "pod_name", about["name"]
    yield "pod_uid", about["uid"]
    yield "pod_phase", pod["status"].get("phase", "Unknown")
    conditions = {each["type"]: each["status"] for each in pod["status"].get("conditions", ())}
    yield "pod_ready", conditions.get("Ready", "Unknown").lower()
    yield "pod_node_name", pod["spec"].get("nodeName", "")
    for name, value in about.get("labels", {}).items():
        yield f"pod_label_{name}", value


def _of_port(container: dict[str, Any], port: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "pod_container_name", container["name"]
    yield "pod_container_port_name", port.get("name", "")
    yield "pod_container_port_number", str(port["containerPort"])


def ask(url: str, authority: Path, token: Path, label: str) -> list[dict[str, Any]]:
    """Return the pods of all namespaces that have the label; raises OSError, and ValueError for another answer."""
    query = urllib.parse.urlencode({"labelSelector": label, "resourceVersion": "0"})  # as the API server remembers them
    request = urllib.request.Request(
        f"{url}/api/v1/pods?{query}", headers={"authorization": f"Bearer {token.read_text().strip()}"}
    )
    context = ssl.create_default_context(cafile=str(authority))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    with opener.open(request, timeout=_DEADLINE_S) as answer:
        return list(json.load(answer)["items"])


def write(path: Path, found: list[dict[str, Any]]) -> None:
    """Write the targets in one step, if they are others than before."""
    text = json.dumps(found, indent=1)
    if path.exists() and path.read_text() == text:
        return
    draft = path.with_name(f"{path.name}.new")
    draft.write_text(text)
    draft.replace(path)


def main() -> None:
    """Ask and write until the process is ended; say once what goes wrong, and once that it is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("url", "label"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("authority", "token", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    trouble = ""
    while True:
        try:
            write(options.out, groups(ask(options.url, options.authority, options.token, options.label)))
            now = ""
        except (OSError, ValueError, KeyError) as error:
            now = f"{type(error).__name__}: {error}"
        if now != trouble:
            print(now or "the API server answers again", file=sys.stderr, flush=True)
            trouble = now
        time.sleep(_EVERY_S)


if __name__ == "__main__":
    main()
