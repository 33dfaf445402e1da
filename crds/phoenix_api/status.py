"""The status of a PhoenixModel. The operator writes it, the control API and `kubectl get` read it.

Servers ignore it, but read it without complaint: a manifest fetched with `kubectl get -o yaml` carries one.
"""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from phoenix_api.fields import ApiObject, Whole, text
from phoenix_api.quantity import Quantity

ShortText = Annotated[str, Field(max_length=256)]
Url = Annotated[str, Field(max_length=1024)]
Count = Annotated[Whole, Field(ge=0, le=1_000_000)]
Generation = Annotated[Whole, Field(ge=0, le=2**53)]
Instant = Annotated[
    str,
    text(
        r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?(Z|[+-][0-9]{2}:[0-9]{2})$",
        "a time as in RFC 3339",
        max_length=35,
    ),
]


class ConditionStatus(StrEnum):
    """Whether a condition holds."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Condition(ApiObject):
    """A condition as in metav1.Condition; its types and reasons are in the table of conditions."""

    type: Annotated[str, text("^[A-Za-z][A-Za-z0-9]*$", "a condition type", max_length=316)] = Field(
        description="Which condition."
    )
    status: ConditionStatus = Field(description="Whether it holds.")
    observed_generation: Generation = Field(0, description="Generation of the spec that it speaks of.")
    last_transition_time: Instant = Field(description="When `status` last changed.")
    reason: Annotated[str, text("^[A-Za-z][A-Za-z0-9]*$", "a reason in CamelCase", max_length=1024)] = Field(
        description="Why, for programs."
    )
    message: Annotated[str, Field(max_length=32768)] = Field(description="Why, for people, with the next step.")


class ReplicaCounts(ApiObject):
    """Pods of the model."""

    desired: Count = Field(0, description="Asked for.")
    ready: Count = Field(0, description="Ready.")
    updated: Count = Field(0, description="Of the newest version.")
    summary: ShortText | None = Field(None, description="`ready/desired`, for the column READY.")


class TensorDescription(ApiObject):
    """An input or output of the model."""

    name: ShortText = Field(description="Its name.")
    datatype: ShortText = Field(description="Its datatype in the Open Inference Protocol, for example `FP32`.")
    shape: Annotated[list[Annotated[Whole, Field(ge=-1, le=2**53)]], Field(max_length=32)] = Field(
        description="Its shape; -1 is any length."
    )


class LoadedModel(ApiObject):
    """What a ready pod says that it loaded."""

    sha256: ShortText | None = Field(None, description="Digest.")
    version: ShortText | None = Field(None, description="Version.")
    provider: ShortText | None = Field(None, description="Execution provider that sessions really run on.")
    inputs: Annotated[list[TensorDescription], Field(max_length=256)] = Field(
        default_factory=list, description="Inputs."
    )
    outputs: Annotated[list[TensorDescription], Field(max_length=256)] = Field(
        default_factory=list, description="Outputs."
    )


class Endpoints(ApiObject):
    """Where the model answers."""

    rest: Url | None = Field(None, description="REST, in the cluster.")
    grpc: Url | None = Field(None, description="gRPC, in the cluster.")
    url: Url | None = Field(None, description="From outside, when networking.host is given.")


class ScalingStatus(ApiObject):
    """What the autoscaler sees."""

    concurrency: Quantity | None = Field(None, description="Mean requests in service or queue.")
    latency_p95: Quantity | None = Field(None, description="The latency percentile in seconds.")
    pressure: Quantity | None = Field(None, description="Latency against the objective; above 1 scales up.")
    desired_replicas: Count | None = Field(None, description="Replicas that the autoscaler wants.")


class Status(ApiObject):
    """What the operator saw."""

    observed_generation: Generation | None = Field(None, description="Generation of the spec that it speaks of.")
    replicas: ReplicaCounts | None = Field(None, description="Pods.")
    ready_replicas: Count | None = Field(None, description="Ready pods, for the scale subresource.")
    selector: Url | None = Field(None, description="Label selector of the pods, for the scale subresource.")
    model: LoadedModel | None = Field(None, description="What a ready pod loaded.")
    endpoints: Endpoints | None = Field(None, description="Where the model answers.")
    autoscaling: ScalingStatus | None = Field(None, description="What the autoscaler sees.")
    conditions: Annotated[list[Condition], Field(max_length=32)] = Field(
        default_factory=list,
        description="Conditions, one of each type.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
