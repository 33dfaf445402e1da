"""The API of Phoenix: the PhoenixModel, and the reader of manifests. Servers, operator and tools build on it.

Importing it stays light, because a server imports it before it can answer: the generators (`crd`, `schema`,
`reference`) are imported by `python -m phoenix_api` only.
"""

from phoenix_api.conditions import CONDITIONS, ConditionRow, ConditionType, Reason
from phoenix_api.faults import Fault, ManifestError
from phoenix_api.manifest import MANIFEST_SUFFIXES, Manifest, manifest_files, parse_manifests, read_manifests
from phoenix_api.quantity import Quantity
from phoenix_api.status import Condition, ConditionStatus, Status
from phoenix_api.types import (
    API_VERSION,
    GROUP,
    KIND,
    AcceleratorPolicy,
    AuditMode,
    DeletionPolicy,
    Features,
    Metadata,
    OnMissing,
    OnStale,
    PhoenixModel,
    PhoenixModelSpec,
    Provider,
    RateLimitScope,
    RolloutStrategy,
    ScalingMetric,
)

__all__ = [
    "API_VERSION",
    "CONDITIONS",
    "GROUP",
    "KIND",
    "MANIFEST_SUFFIXES",
    "AcceleratorPolicy",
    "AuditMode",
    "Condition",
    "ConditionRow",
    "ConditionStatus",
    "ConditionType",
    "DeletionPolicy",
    "Fault",
    "Features",
    "Manifest",
    "ManifestError",
    "Metadata",
    "OnMissing",
    "OnStale",
    "PhoenixModel",
    "PhoenixModelSpec",
    "Provider",
    "Quantity",
    "RateLimitScope",
    "Reason",
    "RolloutStrategy",
    "ScalingMetric",
    "Status",
    "manifest_files",
    "parse_manifests",
    "read_manifests",
]
