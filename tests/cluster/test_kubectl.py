"""What users see of a PhoenixModel through kubectl alone."""

import subprocess
import time

import pytest
from phoenix_cluster import Phoenix, model


def table(text: str) -> dict[str, str]:
    """Return the columns of the one row of a table; an empty cell has the width of its heading."""
    head, row = text.rstrip("\n").split("\n")
    starts = [index for index, letter in enumerate(head) if letter != " " and (index == 0 or head[index - 1] == " ")]
    ends = [*starts[1:], None]
    return {head[a:b].strip(): row[a:b].strip() for a, b in zip(starts, ends, strict=True)}


def test_columns_scale_and_wait(phoenix: Phoenix, namespace: str) -> None:
    phoenix.apply(namespace, model(model={"uri": "iris/model.onnx", "version": "1"}))
    phoenix.kubectl("wait", "--for=condition=Ready", "phx/iris", "-n", namespace, "--timeout=60s")

    short = table(phoenix.kubectl("get", "phx", "-n", namespace))
    assert list(short) == ["NAME", "READY", "STATUS", "VERSION", "DEVICE", "P95", "AGE"]
    assert short | {"AGE": ""} == {
        "NAME": "iris", "READY": "1/1", "STATUS": "Ready", "VERSION": "1", "DEVICE": "CPUExecutionProvider", "P95": "",
        "AGE": "",
    }  # fmt: skip
    wide = table(phoenix.kubectl("get", "phx", "iris", "-n", namespace, "-o", "wide"))
    assert list(wide)[-2:] == ["URI", "ENDPOINT"]
    assert (wide["URI"], wide["ENDPOINT"]) == ("iris/model.onnx", f"http://iris.{namespace}.svc:8000")
    chosen = phoenix.kubectl("get", "phx", "-n", namespace, "--field-selector=spec.model.version=2", "-o", "name")
    assert chosen == ""

    phoenix.kubectl("scale", "phx/iris", "--replicas=2", "-n", namespace)
    phoenix.wait_for("two", lambda: table(phoenix.kubectl("get", "phx", "-n", namespace))["READY"] == "2/2")
    scale = phoenix.kubectl("get", "phx/iris", "-n", namespace, "--subresource=scale", "-o", "json")
    assert '"selector": "phoenix-ml.io/model=iris"' in scale
    phoenix.kubectl("scale", "phx/iris", "--replicas=0", "-n", namespace)
    phoenix.wait_for("none", lambda: table(phoenix.kubectl("get", "phx", "-n", namespace))["STATUS"] == "ScaledToZero")
    assert table(phoenix.kubectl("get", "phx", "-n", namespace))["READY"] == "0/0"


def test_wait_is_for_what_was_asked_last(phoenix: Phoenix, namespace: str) -> None:
    phoenix.apply(namespace, model(model={"uri": "iris/model.onnx", "version": "1"}))
    phoenix.wait_ready(namespace)
    waiting = ("wait", "--for=condition=Ready", "phx/iris", "-n", namespace)

    phoenix.apply(namespace, model(model={"uri": "iris/model.onnx", "version": "2", "sha256": "0" * 64}))
    with pytest.raises(subprocess.CalledProcessError) as failed:
        phoenix.kubectl(*waiting, "--timeout=4s")
    assert "timed out" in failed.value.stderr

    started = time.monotonic()
    phoenix.apply(namespace, model(model={"uri": "iris/model.onnx", "version": "3"}))
    phoenix.kubectl(*waiting, "--timeout=60s")
    print(f"version 3 was waited for for {time.monotonic() - started:.1f} s")
    found = phoenix.get(namespace, "phx/iris")
    assert found is not None
    assert found["status"]["model"]["version"] == "3"
    assert found["status"]["observedGeneration"] == found["metadata"]["generation"] == 3


def test_describe_tells_what_happened(phoenix: Phoenix, namespace: str) -> None:
    phoenix.apply(namespace, model(model={"uri": "iris/nothing.onnx"}))
    phoenix.wait_fault(namespace, "iris", "ModelVerified", "NotFound")
    phoenix.apply(namespace, model())
    phoenix.wait_ready(namespace)
    phoenix.wait_condition(namespace, "iris", "Progressing", "True", "RolledOut")

    def told(*expected: tuple[str, str, str]) -> str:
        text = phoenix.kubectl("describe", "phx/iris", "-n", namespace)
        lines = text[text.index("Events:") :].splitlines()
        missing = [words for words in expected if not any(all(word in line for word in words) for line in lines)]
        return "" if missing else text

    # the last event is written a moment after the status
    text = phoenix.wait_for(
        "the events",
        lambda: told(
            ("Warning", "NotFound", "iris/nothing.onnx is not found"),
            ("Normal", "RolledOut", "every pod is of version 1"),
            ("Normal", "Ready", "version 1 answers"),
        ),
        deadline_s=15,
    )
    print(text)
    for words in ("Type:                  ModelVerified", "Reason:                Verified", "Ready Replicas:       1"):
        assert words in text
    # the server's end has one cause, which is told once
    assert "CrashLoop" not in text
