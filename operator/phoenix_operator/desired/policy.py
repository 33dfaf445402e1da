"""Who the pods are, and how many of them may be taken away at once."""

from phoenix_operator.desired.naming import owned, selector, service_account_name
from phoenix_operator.kinds import POD_DISRUPTION_BUDGET, SERVICE_ACCOUNT
from phoenix_operator.observed import Object, Subject


def service_account(subject: Subject) -> Object | None:
    """Return the ServiceAccount, which has no rights and no token; None where the user names one."""
    if subject.spec.pod.service_account_name:
        return None
    return owned(subject, SERVICE_ACCOUNT, service_account_name(subject), {"automountServiceAccountToken": False})


def disruption_budget(subject: Subject) -> Object | None:
    """Return the PodDisruptionBudget; None for one replica, which a budget could only keep a node from draining.

    Pods that are not ready may always be evicted: a crash loop must not block a drain.
    """
    scaling = subject.spec.autoscaling
    if (subject.spec.replicas if scaling is None else scaling.max_replicas) < 2:
        return None
    spec = {
        "maxUnavailable": 1,
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
        "selector": {"matchLabels": selector(subject.name)},
    }
    return owned(subject, POD_DISRUPTION_BUDGET, subject.name, {"spec": spec})
