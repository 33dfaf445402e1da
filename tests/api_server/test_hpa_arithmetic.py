"""The port of the HPA controller's arithmetic against the controller itself: the same decision at every look."""

import asyncio
import random
from itertools import pairwise

import pytest
from hpa_recording import NAME, Step, controller

from phoenix_operator.simulation.controller import HorizontalController, Metrics, Target
from phoenix_operator.simulation.replica_calculator import Pod

LOOKS = 170
CONCURRENCY, PRESSURE = "inference_latency_seconds_concurrency", "inference_latency_seconds_pressure"


def _object(metric: str, target: dict[str, str]) -> dict[str, object]:
    described = {"apiVersion": "phoenix-ml.io/v1alpha1", "kind": "PhoenixModel", "name": NAME}
    return {"type": "Object", "object": {"describedObject": described, "metric": {"name": metric}, "target": target}}


# As the operator makes it, in seconds where that has minutes.
SPEC: dict[str, object] = {
    "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": NAME},
    "minReplicas": 1,
    "maxReplicas": 9,
    "metrics": [
        _object(CONCURRENCY, {"type": "AverageValue", "averageValue": "1400m"}),
        _object(PRESSURE, {"type": "Value", "value": "1"}),
    ],
    "behavior": {
        "scaleUp": {
            "stabilizationWindowSeconds": 0,
            "selectPolicy": "Max",
            "policies": [
                {"type": "Percent", "value": 100, "periodSeconds": 8},
                {"type": "Pods", "value": 4, "periodSeconds": 8},
            ],
        },
        "scaleDown": {
            "stabilizationWindowSeconds": 5,
            "selectPolicy": "Max",
            "policies": [{"type": "Percent", "value": 25, "periodSeconds": 8}],
        },
    },
}


async def _recorded(seed: int) -> list[Step]:
    """Let load, latency and readiness wander, and metrics come and go."""
    dice = random.Random(seed)
    async with controller(SPEC, [CONCURRENCY, PRESSURE]) as scene:
        scene.values = {CONCURRENCY: 0, PRESSURE: 0}
        await scene.next_look()
        await scene.run_pods()
        is_high = False
        while len(scene.steps) < LOOKS:
            # high and low in turn: a load between them would change little
            is_high = not is_high
            load = dice.randrange(9000, 14_000) if is_high else dice.randrange(0, 3000)
            pressure = dice.choice([0, 0, 1000, 1200, 2000]) if is_high else 0
            for _ in range(dice.randint(3, 8) + 14 * (not is_high)):
                scene.values = {
                    CONCURRENCY: None if dice.random() < 0.06 else load + dice.randrange(0, 900),
                    PRESSURE: None if dice.random() < 0.06 else pressure,
                }
                scene.unready = dice.choice([0, 0, 0, 1, 2])
                await scene.run_pods()
                await scene.next_look()
        return scene.steps


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_port_decides_as_the_controller_does() -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    steps = asyncio.run(_recorded(seed))
    port, wrong, ups, downs = HorizontalController(), [], 0, 0
    for step, after in pairwise(steps):
        pods = [Pod(name, is_ready=name in step.ready) for name in step.pods]
        target = Target(step.spec_replicas, step.status_replicas, pods)
        objects = {name: value for name, value in step.values.items() if value is not None}
        decision = port.step(step.at_s, SPEC, target, Metrics(objects=objects))
        ups += after.spec_replicas > step.spec_replicas
        downs += after.spec_replicas < step.spec_replicas
        if decision.replicas != after.spec_replicas:
            wrong.append(f"{step} -> {after.spec_replicas}, and the port says {decision.replicas}")
    print(f"{len(steps)} looks, {ups} times up and {downs} times down, {len(wrong)} differ")
    assert len(steps) >= 100
    assert min(ups, downs) >= 3, "a recording in which little happens proves little"
    assert not wrong, "\n".join(wrong[:10])
