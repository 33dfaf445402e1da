"""Writes rules as Prometheus reads them, with expressions as blocks that people can read. Needs nothing but pyyaml."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml


class Block(str):
    """A text that is written as a block."""


class _Dumper(yaml.SafeDumper):
    """Knows blocks."""


def _block(dumper: yaml.SafeDumper, text: Block) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style="|")


_Dumper.add_representer(Block, _block)


def rule_file(groups: Sequence[Mapping[str, Any]]) -> str:
    """Return a rule file of Prometheus with these groups."""
    return _yaml({"groups": list(groups)})


def prometheus_rule(name: str, groups: Sequence[Mapping[str, Any]]) -> str:
    """Return the same as an object of the Prometheus operator."""
    return _yaml(
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "phoenix"}},
            "spec": {"groups": list(groups)},
        }
    )


def _yaml(document: Mapping[str, Any]) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=1000)
