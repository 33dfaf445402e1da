"""How a pod asks for an accelerator: an extended resource or a DRA claim, and which nodes have it."""

from dataclasses import dataclass, field

from phoenix_api import AcceleratorPolicy, Provider
from phoenix_operator.desired.naming import claim_template_name, owned
from phoenix_operator.kinds import RESOURCE_CLAIM_TEMPLATE
from phoenix_operator.observed import Object, Subject
from phoenix_operator.settings import AcceleratorProfile, Settings

CLAIM = "accelerator"
# The extended resource of each provider's vendor, as its device plugin names it.
USUAL_RESOURCE = {
    Provider.CUDA: "nvidia.com/gpu",
    Provider.TENSORRT: "nvidia.com/gpu",
    Provider.ROCM: "amd.com/gpu",
    Provider.MIGRAPHX: "amd.com/gpu",
    Provider.OPENVINO: "gpu.intel.com/i915",
}


@dataclass(frozen=True, slots=True)
class Ask:
    """What a model's pods ask for: `resource_name` or `device_class_name`, and where such nodes are."""

    count: int
    resource_name: str | None
    device_class_name: str | None
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[Object] = field(default_factory=list)
    runtime_class_name: str | None = None

    @property
    def what(self) -> str:
        """The resource or DeviceClass, for messages."""
        return self.resource_name or f"DeviceClass {self.device_class_name}"


def ask(subject: Subject, settings: Settings) -> Ask | None:
    """Return what the pods ask for; None for the CPU. An unknown profile counts as an empty one (it is refused)."""
    asked = subject.spec.runtime.accelerator
    if asked is None:
        return None
    profile = AcceleratorProfile()
    if asked.profile is not None:
        profile = settings.accelerator_profiles.get(asked.profile, profile)
    device_class = asked.device_class_name or profile.device_class_name
    resource = asked.resource_name or profile.resource_name or USUAL_RESOURCE[asked.provider]
    return Ask(
        count=asked.count,
        resource_name=None if device_class else resource,
        device_class_name=device_class,
        node_selector=dict(profile.node_selector),
        tolerations=[row.model_dump(mode="json", by_alias=True, exclude_none=True) for row in profile.tolerations],
        runtime_class_name=profile.runtime_class_name,
    )


def prefers(subject: Subject) -> bool:
    """Whether the model also serves without its accelerator."""
    accelerator = subject.spec.runtime.accelerator
    return accelerator is not None and accelerator.policy is AcceleratorPolicy.PREFER


def claim_template(subject: Subject, asked: Ask) -> Object:
    """Return the ResourceClaimTemplate (resource.k8s.io/v1) of a model that asks for a DeviceClass."""
    request = {
        "name": CLAIM,
        "exactly": {
            "deviceClassName": asked.device_class_name,
            "allocationMode": "ExactCount",
            "count": asked.count,
        },
    }
    body = {"spec": {"spec": {"devices": {"requests": [request]}}}}
    return owned(subject, RESOURCE_CLAIM_TEMPLATE, claim_template_name(subject), body)
