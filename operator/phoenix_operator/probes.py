"""What the outside asks the operator: `/healthz`, `/readyz`, `/metrics`.

Health looks at real work: a key that waits too long, a watch that misses changes, a loop that is late. A process that
merely runs is not healthy.
"""

from collections.abc import Callable

from aiohttp import web

from phoenix_operator.metrics import CONTENT_TYPE, Metrics, MetricsApiMetrics

# Returns what is wrong, in words; nothing is wrong with an empty list.
Check = Callable[[], list[str]]


async def serve(port: int, metrics: Metrics | MetricsApiMetrics, *, health: Check, readiness: Check) -> web.AppRunner:
    """Serve the three until the runner is cleaned up. Raises `OSError` if the port is taken."""

    def answer(check: Check) -> Callable[[web.Request], "web.StreamResponse"]:
        async def handler(_: web.Request) -> web.StreamResponse:
            wrong = check()
            return web.Response(text="\n".join(wrong) or "ok", status=503 if wrong else 200)

        return handler  # type: ignore[return-value]

    async def render(_: web.Request) -> web.StreamResponse:
        return web.Response(body=metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    app = web.Application()
    for path in ("/healthz", "/livez"):  # the second is what Kubernetes' own servers call it
        app.router.add_get(path, answer(health))  # type: ignore[arg-type]
    app.router.add_get("/readyz", answer(readiness))  # type: ignore[arg-type]
    app.router.add_get("/metrics", render)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, port=port).start()
    return runner
