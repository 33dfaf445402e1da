"""CustomResourceDefinitions of others whose kinds the operator makes, from the modules that they are released in.

They are had from the Go module proxy, as the lab's programs are.
"""

import json
import subprocess
from pathlib import Path

from lab import LabError

_MODULES = {
    "github.com/kedacore/keda/v2@v2.17.2": (
        "config/crd/bases/keda.sh_scaledobjects.yaml",
        "config/crd/bases/keda.sh_triggerauthentications.yaml",
    ),
    "sigs.k8s.io/gateway-api@v1.4.0": ("config/crd/standard/gateway.networking.k8s.io_httproutes.yaml",),
    "github.com/prometheus-operator/prometheus-operator@v0.85.0": (
        "example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml",
        "example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml",
    ),
}


def files() -> list[Path]:
    """The files with the definitions. Raises `LabError` for a module that cannot be had."""
    return [_folder(module) / file for module, paths in _MODULES.items() for file in paths]


def _folder(module: str) -> Path:
    command = ["go", "mod", "download", "-json", module]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=300)
        return Path(json.loads(done.stdout)["Dir"])
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError) as error:
        raise LabError(f"{module} cannot be downloaded: {error!r}") from error
