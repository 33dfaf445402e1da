"""Load from inside the cluster, sent to a pod's Python by `kubectl exec`: keep-alive clients ask until stdin ends.

Arguments: URL's host, model, clients, perhaps `new` (a connection for each request, so that each replica gets some of
them), least number of requests. Prints JSON: requests, failures (a sample), versions. Standard library only.
"""

import collections
import http.client
import json
import sys
import threading
import time

BODY = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [5.1, 3.5, 1.4, 0.2]}]})


def main(host: str, model: str, clients: int, least: int, *, is_kept: bool) -> None:
    stop = threading.Event()
    lock = threading.Lock()
    versions: collections.Counter[str] = collections.Counter()
    failures: list[str] = []

    def ask(connection: http.client.HTTPConnection) -> str:
        connection.request("POST", f"/v2/models/{model}/infer", BODY, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {text[:200]}")
        return str(json.loads(text)["model_version"])

    def client() -> None:
        connection = http.client.HTTPConnection(host, 8000, timeout=10)
        while not (stop.is_set() and sum(versions.values()) >= least):
            try:
                version = ask(connection)
            except Exception as error:
                with lock:
                    failures.append(f"{time.strftime('%H:%M:%S')} {type(error).__name__}: {error}")
                connection.close()
            else:
                with lock:
                    versions[version] += 1
                if not is_kept:
                    connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()
    print(json.dumps({"requests": sum(versions.values()), "failures": failures[:20], "failed": len(failures),
                      "versions": versions}))  # fmt: skip


if __name__ == "__main__":
    host, model, clients, *connections, least = sys.argv[1:]
    main(host, model, int(clients), int(least), is_kept=connections != ["new"])
