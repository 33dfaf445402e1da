"""The conditions of a PhoenixModel and their reasons: the one table behind status, server reasons and reference page.

The operator takes types and reasons from here; the server's reasons (termination message) are a subset of the names.
"""

from dataclasses import dataclass
from enum import StrEnum


class ConditionType(StrEnum):
    """What a condition speaks of, in the order in which `Ready` looks at them."""

    ACCEPTED = "Accepted"
    MODEL_VERIFIED = "ModelVerified"
    ACCELERATOR_READY = "AcceleratorReady"
    BINDINGS_READY = "BindingsReady"
    AUTOSCALING_READY = "AutoscalingReady"
    AVAILABLE = "Available"
    PROGRESSING = "Progressing"
    READY = "Ready"


class Reason(StrEnum):
    """Why a condition is as it is. The names are API; `meaning` says each in one line."""

    meaning: str

    def __new__(cls, name: str, meaning: str) -> "Reason":
        """Make a member that is its name, with its meaning beside it."""
        member = str.__new__(cls, name)
        member._value_ = name
        member.meaning = meaning
        return member

    UNKNOWN = "Unknown", "The operator has not seen enough to tell."
    # what stands when a condition holds
    SPEC_UNDERSTOOD = "SpecUnderstood", "Every field is valid and supported."
    VERIFIED = "Verified", "The digest matched and the model loads."
    SESSION_ON_ACCELERATOR = "SessionOnAccelerator", "The session runs on the accelerator."
    BOUND = "Bound", "Every binding is provisioned and reachable."
    METRICS_READ = "MetricsRead", "The HPA reads its metrics."
    REPLICAS_AVAILABLE = "ReplicasAvailable", "At least one replica answers."
    ROLLING_OUT = "RollingOut", "New pods are replacing old ones."
    ROLLED_OUT = "RolledOut", "Every pod is of the newest version."
    READY = "Ready", "Every condition holds for this generation."
    # Accepted
    INVALID_SPEC = "InvalidSpec", "A field is wrong; the message names it and what is expected."
    UNKNOWN_BACKEND = "UnknownBackend", "A binding names a backend that the operator's settings do not know."
    NAME_CLASH = "NameClash", "An object or host of this name belongs to somebody else."
    NOT_SUPPORTED_YET = "NotSupportedYet", "The spec asks for something that this release does not do yet."
    KIND_NOT_SERVED = "KindNotServed", "The spec needs a kind of object that the cluster does not serve."
    OBJECT_REFUSED = "ObjectRefused", "The API server refuses an object that the spec asks for."
    # ModelVerified
    DIGEST_MISMATCH = "DigestMismatch", "The file is not the one that sha256 names; it is never loaded."
    FETCH_FAILED = "FetchFailed", "The store did not give the model."
    NOT_FOUND = "NotFound", "There is no file at model.uri."
    INVALID_MODEL = "InvalidModel", "The file is no whole ONNX model, or ONNX Runtime refuses it."
    EXTERNAL_DATA_MISSING = "ExternalDataMissing", "A weights file that the model refers to is missing."
    UNSUPPORTED_OPSET = "UnsupportedOpset", "The model needs a newer ONNX Runtime."
    SCHEMA_CHANGED = (
        "SchemaChanged",
        "The model loads, but its inputs or outputs differ from those of the version before.",
    )
    # AcceleratorReady
    PROVIDER_UNAVAILABLE = "ProviderUnavailable", "The execution provider is not there and policy is Require."
    FELL_BACK_TO_CPU = "FellBackToCPU", "The session runs on the CPU; policy is Prefer."
    UNSCHEDULABLE = "Unschedulable", "No node has room; the message has the scheduler's words."
    # BindingsReady
    BACKEND_UNREACHABLE = "BackendUnreachable", "The backend does not answer."
    SECRET_MISSING = "SecretMissing", "A Secret or one of its keys is missing."
    ACCESS_DENIED = "AccessDenied", "The backend refuses the credentials."
    TOPIC_MISMATCH = "TopicMismatch", "A topic exists with other settings than asked."
    DELETION_BLOCKED = "DeletionBlocked", "The backend is down, so data or access cannot be removed."
    # AutoscalingReady
    METRICS_UNAVAILABLE = "MetricsUnavailable", "The HPA cannot read its metrics and keeps the replicas."
    TARGET_BELOW_SERVICE_TIME = "TargetBelowServiceTime", "One request alone takes longer than targetLatency."
    SCALING_LIMITED = "ScalingLimited", "The HPA wants more replicas than maxReplicas."
    # Available
    SCALED_TO_ZERO = "ScaledToZero", "No pods are asked for."
    PODS_REFUSED = "PodsRefused", "The API server refuses to make pods."
    CONFIGURATION_MISSING = "ConfigurationMissing", "A Secret or ConfigMap that the container needs is missing."
    LOADING = "Loading", "Pods are starting or loading the model."
    CRASH_LOOP = "CrashLoop", "The server ends again and again."
    IMAGE_PULL_FAILED = "ImagePullFailed", "The server image cannot be pulled."
    OUT_OF_MEMORY = "OutOfMemory", "The server was ended for exceeding its memory limit."
    QUOTA_EXCEEDED = "QuotaExceeded", "A quota of the namespace forbids more pods."
    INVALID_SETTING = "InvalidSetting", "A setting in the server's environment is wrong."
    PORT_IN_USE = "PortInUse", "Another process listens on the server's port."
    # Progressing
    DEADLINE_EXCEEDED = "DeadlineExceeded", "The rollout made no progress for progressDeadlineSeconds."


@dataclass(frozen=True, slots=True)
class ConditionRow:
    """A row of the table of conditions: what True means, and which reasons come with True and with not True."""

    true_means: str
    when_true: tuple[Reason, ...]
    otherwise: tuple[Reason, ...] = ()
    is_optional: bool = False


CONDITIONS: dict[ConditionType, ConditionRow] = {
    ConditionType.ACCEPTED: ConditionRow(
        "the spec is understood",
        (Reason.SPEC_UNDERSTOOD,),
        (
            Reason.INVALID_SPEC,
            Reason.UNKNOWN_BACKEND,
            Reason.NAME_CLASH,
            Reason.NOT_SUPPORTED_YET,
            Reason.KIND_NOT_SERVED,
            Reason.OBJECT_REFUSED,
        ),
    ),
    ConditionType.MODEL_VERIFIED: ConditionRow(
        "the digest matched and the model loads",
        (Reason.VERIFIED, Reason.SCHEMA_CHANGED),
        (
            Reason.LOADING,
            Reason.DIGEST_MISMATCH,
            Reason.FETCH_FAILED,
            Reason.SECRET_MISSING,
            Reason.NOT_FOUND,
            Reason.INVALID_MODEL,
            Reason.EXTERNAL_DATA_MISSING,
            Reason.UNSUPPORTED_OPSET,
        ),
    ),
    ConditionType.ACCELERATOR_READY: ConditionRow(
        "the session runs on the accelerator",
        (Reason.SESSION_ON_ACCELERATOR,),
        (Reason.LOADING, Reason.PROVIDER_UNAVAILABLE, Reason.FELL_BACK_TO_CPU, Reason.UNSCHEDULABLE),
        is_optional=True,
    ),
    ConditionType.BINDINGS_READY: ConditionRow(
        "every binding is provisioned and reachable",
        (Reason.BOUND,),
        (
            Reason.BACKEND_UNREACHABLE,
            Reason.SECRET_MISSING,
            Reason.ACCESS_DENIED,
            Reason.TOPIC_MISMATCH,
            Reason.DELETION_BLOCKED,
        ),
        is_optional=True,
    ),
    ConditionType.AUTOSCALING_READY: ConditionRow(
        "the HPA reads its metrics",
        (Reason.METRICS_READ,),
        (Reason.METRICS_UNAVAILABLE, Reason.TARGET_BELOW_SERVICE_TIME, Reason.SCALING_LIMITED),
        is_optional=True,
    ),
    ConditionType.AVAILABLE: ConditionRow(
        "at least one replica answers",
        (Reason.REPLICAS_AVAILABLE,),
        (
            Reason.SCALED_TO_ZERO,
            Reason.LOADING,
            Reason.CRASH_LOOP,
            Reason.IMAGE_PULL_FAILED,
            Reason.OUT_OF_MEMORY,
            Reason.UNSCHEDULABLE,
            Reason.QUOTA_EXCEEDED,
            Reason.PODS_REFUSED,
            Reason.CONFIGURATION_MISSING,
            Reason.INVALID_SETTING,
            Reason.PORT_IN_USE,
        ),
    ),
    ConditionType.PROGRESSING: ConditionRow(
        "a rollout is under way or done", (Reason.ROLLING_OUT, Reason.ROLLED_OUT), (Reason.DEADLINE_EXCEEDED,)
    ),
    # its other reasons are those of the first condition that fails
    ConditionType.READY: ConditionRow(
        "all of the above hold for this generation; with policy Prefer, AcceleratorReady need not",
        (Reason.READY, Reason.FELL_BACK_TO_CPU),
    ),
}
