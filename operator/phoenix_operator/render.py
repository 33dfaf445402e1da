"""`phoenix-operator render`: what the operator would apply for manifests in a file, without a cluster."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from phoenix_api import Manifest, read_manifests
from phoenix_operator.desired import bindings, desired_objects
from phoenix_operator.desired.acceptance import faults
from phoenix_operator.kinds import OPTIONAL
from phoenix_operator.observed import BindingSeen, Object, Observed, Subject
from phoenix_operator.settings import Settings

NO_UID = "00000000-0000-0000-0000-000000000000"  # owner references need one; the cluster gives the real one


def render(paths: Sequence[Path], settings: Settings, *, operator_namespace: str) -> int:
    """Print the objects as YAML; return 1 if a model would not be accepted. Raises `ManifestError`."""
    refused = 0
    for manifest in read_manifests(paths):
        subject = subject_of(manifest)
        observed = Observed(served_kinds=OPTIONAL)
        found = faults(subject, observed, settings)
        for fault in found:
            print(f"{manifest.file}: {subject.name}: {fault.reason}: {fault.message}", file=sys.stderr)
        if found:
            refused += 1
        else:
            observed = replace(observed, bindings={each.kind: _stand_in(each) for each in bindings.asked(subject)})
            objects = desired_objects(subject, observed, settings, operator_namespace=operator_namespace)
            sys.stdout.write(as_yaml([*_secrets(subject), *objects]))
    return 1 if refused else 0


def _stand_in(each: bindings.Asked) -> BindingSeen:
    """Return a binding as it will be seen once there is a Secret, at the usual port."""
    return BindingSeen(each.kind, digest="0" * 16, ports=bindings.ports_of(each.kind, {}))


def _secrets(subject: Subject) -> list[Object]:
    """Return the Secrets of bindings to backends; what their admin Secrets say is not known here."""
    found = []
    for each in bindings.asked(subject):
        if each.backend is not None:
            told = dict.fromkeys(bindings.KEYS[each.kind], f"<of backend {each.backend}>")
            values = told | {"type": each.kind, "provider": "phoenix", "password": "<made once by the operator>"}
            made = bindings.secret(subject, each.kind, {}, {})
            del made["data"], made["metadata"]["annotations"]
            found.append(made | {"stringData": values})
    return found


def subject_of(manifest: Manifest) -> Subject:
    """Return the model of a file as if it had just been created."""
    return Subject(model=manifest.model, uid=NO_UID, generation=1, created="", status={})


class _Dumper(yaml.SafeDumper):
    """Writes repeated values out and text of several lines as a block: machines read the others, people do not."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # U+0085 reads back as the end of a line unless it is escaped
    style = '"' if "\x85" in text else "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def as_yaml(objects: Sequence[Object]) -> str:
    """Return the objects as a stream of YAML documents."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, explicit_start=True)
