"""What `helm test` asks: are operator and server ready, and does the API server pass questions to the metrics API.

Runs in the operator's image with nothing but the standard library. READY_URLS says what is asked; METRICS_URL, where
it is given, is asked with the token and the authority in CREDENTIALS, which every pod with a token has.
"""

import json
import os
import ssl
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

METRICS = {
    "phoenixmodels.phoenix-ml.io/inference_latency_seconds",
    "phoenixmodels.phoenix-ml.io/inference_latency_seconds_concurrency",
    "phoenixmodels.phoenix-ml.io/inference_latency_seconds_pressure",
}


def all_are_ready() -> str:
    """Ask a replica of each; raise if one is not ready."""
    addresses = os.environ["READY_URLS"].split()
    for address in addresses:
        with urlopen(address, timeout=5):
            pass
    return f"ready: {', '.join(addresses) or 'nothing to ask'}"


def metrics_are_told() -> str:
    """Ask the API server which custom metrics there are; raise if one of ours is missing."""
    folder = Path(os.environ["CREDENTIALS"])
    request = Request(os.environ["METRICS_URL"])
    request.add_header("Authorization", f"Bearer {(folder / 'token').read_text().strip()}")
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    with urlopen(request, timeout=5, context=context) as answer:
        told = {row["name"] for row in json.load(answer)["resources"]}
    if missing := METRICS - told:
        raise ValueError(f"expected {', '.join(sorted(missing))} among the custom metrics, got {sorted(told)}")
    return f"the metrics API tells of {len(told)} metrics"


def main() -> int:
    """Ask until each answers as it should, or for as long as DEADLINE_SECONDS; return the exit code."""
    end = time.monotonic() + float(os.environ.get("DEADLINE_SECONDS", "60"))
    checks = [all_are_ready, *([metrics_are_told] if "METRICS_URL" in os.environ else [])]
    for check in checks:
        while True:
            try:
                print(check())
                break
            except (OSError, ValueError, KeyError) as error:
                if time.monotonic() > end:
                    print(f"{check.__name__}: {error}", file=sys.stderr)
                    return 1
                time.sleep(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
