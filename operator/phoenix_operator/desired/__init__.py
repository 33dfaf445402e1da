"""What a PhoenixModel becomes: a pure function from what is asked and what was seen to a list of plain dicts.

What should not exist is not in the list. Nothing here does I/O, reads a clock or the environment.
"""

from phoenix_operator.desired import accelerator, autoscaling, bindings, config, deployment, keda, network, policy
from phoenix_operator.desired.naming import sealed
from phoenix_operator.kinds import POD_MONITOR, SERVICE_MONITOR, kind_of
from phoenix_operator.observed import Object, Observed, Subject
from phoenix_operator.settings import Settings


def desired_objects(
    subject: Subject, observed: Observed, settings: Settings, *, operator_namespace: str
) -> list[Object]:
    """Return the objects of a model that was accepted, in the order in which they are to be applied."""
    asked = accelerator.ask(subject, settings)
    wanted = [
        policy.service_account(subject),
        config.config_map(subject, observed),
        accelerator.claim_template(subject, asked) if asked and asked.device_class_name else None,
        network.network_policy(subject, observed, settings, operator_namespace) if settings.network_policies else None,
        *network.services(subject),
        # pods without the Secrets that they mount would wait where nobody looks
        None if bindings.is_held(subject, observed) else deployment.deployment(subject, observed, settings),
        policy.disruption_budget(subject),
        autoscaling.autoscaler(subject, observed, settings),
        keda.trigger_authentication(subject, observed, settings),
        keda.scaled_object(subject, observed, settings),
        network.route(subject, settings),
        network.monitor(subject, settings),
    ]
    # a monitor is the cluster's wish, not the model's: where its kind is missing, models are served all the same
    unserved = {POD_MONITOR, SERVICE_MONITOR} - observed.served_kinds
    wanted = [manifest for manifest in wanted if manifest is None or kind_of(manifest) not in unserved]
    return [sealed(manifest) for manifest in wanted if manifest is not None]
