"""Every REST endpoint but the inference itself, as one FastAPI application.

Bodies are the protocol's own shapes, made by the data plane; this module only routes, checks keys and words errors.
"""

from typing import Annotated, Any

import orjson
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, RedirectResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from phoenix_server import __version__, codec_json
from phoenix_server.auth import ApiKeys
from phoenix_server.dataplane import DataPlane
from phoenix_server.errors import Code, PhoenixError, invalid, shown
from phoenix_server.hotpath import HttpReply, InferEndpoint, error_reply, routine_reply
from phoenix_server.logs import LogSettings
from phoenix_server.schemas import (
    ErrorBody,
    InferResponseBody,
    LogSettingsBody,
    ModelConfigBody,
    ModelIndexItem,
    ModelList,
    ModelMetadataBody,
    ModelReadyBody,
    ModelStateBody,
    ReadyBody,
    RepositoryLoadResponse,
    ServerLiveBody,
    ServerMetadataBody,
    StatisticsBody,
)  # fmt: skip

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request has a fault; the message names it."},
    404: {"model": ErrorBody, "description": "No such model, version or route."},
    503: {"model": ErrorBody, "description": "Not ready, or overloaded; `Retry-After` says when to come back."},
}
_INFER_ERRORS: dict[int | str, dict[str, Any]] = {
    **_ERRORS,
    408: {"model": ErrorBody, "description": "The request did not arrive in time."},
    413: {"model": ErrorBody, "description": "The body is over the model's limit."},
    415: {"model": ErrorBody, "description": "The content encoding is not supported."},
    429: {"model": ErrorBody, "description": "Over the model's rate limit; `Retry-After` says when to come back."},
    500: {"model": ErrorBody, "description": "The model failed on this input."},
    504: {"model": ErrorBody, "description": "The deadline passed."},
}
# Phrases for what the router refuses by itself.
_ROUTER_CODES = {404: Code.NOT_FOUND, 405: Code.METHOD_NOT_ALLOWED}


async def _json_object(request: Request) -> dict[str, Any]:
    """Return a small JSON body whatever its content type says (stock clients send none); {} if there is none."""
    try:
        body = await request.body()
    except ClientDisconnect:  # or refused by `http_server`; nobody reads this answer
        raise PhoenixError(Code.CANCELLED, "the client went away") from None
    return codec_json.parse(body) if body.strip() else {}


JsonObject = Annotated[dict[str, Any], Depends(_json_object)]


class OrjsonResponse(Response):
    """A JSON response by orjson: 64-bit integers as numbers, compact."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return orjson.dumps(content)


def create_rest(plane: DataPlane, endpoint: InferEndpoint, log_settings: LogSettings, keys: ApiKeys | None) -> FastAPI:
    """Return the application for one data plane."""

    def check_key(request: Request) -> None:
        if keys is not None:
            value = request.headers.get("authorization")
            keys.check(None if value is None else value.encode("latin-1"))

    app = FastAPI(
        title="Phoenix inference server",
        version=__version__,
        summary="Open Inference Protocol v2 for ONNX models",
        docs_url="/docs",
        redoc_url=None,
        default_response_class=OrjsonResponse,
        redirect_slashes=False,
        separate_input_output_schemas=False,
    )
    app.add_exception_handler(PhoenixError, _on_phoenix_error)
    app.add_exception_handler(HTTPException, _on_router_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    guarded = [Depends(check_key)]

    async def routine(request: Request) -> Response:
        reply = routine_reply(plane, request.url.path, request.headers.get("accept", ""))
        assert reply is not None
        return _response(reply)

    app.get(
        "/v2/health/live", tags=["health"], response_model=ServerLiveBody, name="server_live",
        description="Say that the process answers.",
    )(routine)  # fmt: skip
    app.get(
        "/v2/health/ready", tags=["health"], response_model=ReadyBody, responses={503: {"model": ReadyBody}},
        name="server_ready", description="Say whether every model is loaded and warm.",
    )(routine)  # fmt: skip
    app.get(
        "/metrics", tags=["metrics"], response_class=PlainTextResponse, name="metrics",
        description="Metrics in the Prometheus text or OpenMetrics format.",
    )(routine)  # fmt: skip

    @app.get("/v2", tags=["metadata"], response_model=ServerMetadataBody, dependencies=guarded)
    async def server_metadata() -> Any:
        """Name, version and extensions of the server."""
        return OrjsonResponse(plane.server_metadata())

    @app.get("/v2/models", tags=["metadata"], response_model=ModelList, dependencies=guarded)
    async def models() -> Any:
        """Names of the loaded models."""
        return OrjsonResponse({"models": sorted({model.name for model in plane.repository.served()})})

    @app.get("/v2/models/stats", tags=["statistics"], response_model=StatisticsBody, dependencies=guarded)
    async def all_statistics() -> Any:
        """Statistics of every loaded version."""
        return OrjsonResponse(plane.statistics())

    for prefix in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        _add_model_routes(app, prefix, plane, endpoint, guarded)

    for prefix in ("/v2/repository", "/v2/repository/{repository}"):
        _add_repository_routes(app, prefix, plane, guarded)

    @app.get("/v2/logging", tags=["logging"], response_model=LogSettingsBody, dependencies=guarded)
    async def get_log_settings() -> Any:
        """Return the log settings."""
        return OrjsonResponse(log_settings.get())

    @app.post("/v2/logging", tags=["logging"], response_model=LogSettingsBody, responses=_ERRORS, dependencies=guarded)
    async def update_log_settings(settings: JsonObject) -> Any:
        """Change log settings; what is not named stays."""
        if faults := log_settings.faults(settings):
            raise invalid("; ".join(faults))
        return OrjsonResponse(log_settings.update(settings))

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("/docs")

    return app


def _add_model_routes(app: FastAPI, prefix: str, plane: DataPlane, endpoint: InferEndpoint, guarded: list[Any]) -> None:
    """Add what is asked of one model, with or without its version in the path."""

    @app.get(prefix, tags=["metadata"], response_model=ModelMetadataBody, responses=_ERRORS, dependencies=guarded)
    async def model_metadata(name: str, version: str = "") -> Any:
        """Inputs and outputs of a model."""
        return OrjsonResponse(plane.model_metadata(name, version))

    @app.get(
        f"{prefix}/ready", tags=["health"], response_model=ModelReadyBody,
        responses={404: _ERRORS[404], 503: {"model": ModelReadyBody}}, dependencies=guarded,
    )  # fmt: skip
    async def model_ready(name: str, version: str = "") -> Any:
        """Say whether a model answers."""
        is_ready = plane.is_model_ready(name, version)
        return OrjsonResponse({"name": name, "ready": is_ready}, status_code=200 if is_ready else 503)

    @app.get(
        f"{prefix}/config", tags=["metadata"], response_model=ModelConfigBody, responses=_ERRORS, dependencies=guarded
    )
    async def model_config(name: str, version: str = "") -> Any:
        """Model configuration in Triton's form."""
        return OrjsonResponse(plane.model_config(name, version))

    @app.get(
        f"{prefix}/stats", tags=["statistics"], response_model=StatisticsBody, responses=_ERRORS, dependencies=guarded
    )
    async def model_statistics(name: str, version: str = "") -> Any:
        """Statistics of a model."""
        return OrjsonResponse(plane.statistics(name, version))

    @app.get(
        f"{prefix}/state", tags=["metadata"], response_model=ModelStateBody, responses=_ERRORS, dependencies=guarded
    )
    async def model_state(name: str, version: str = "") -> Any:
        """What is loaded: digest, provider, signature, capacity."""
        return OrjsonResponse(plane.model_state(name, version))

    @app.post(
        f"{prefix}/infer", tags=["inference"], response_model=InferResponseBody, responses=_INFER_ERRORS,
        openapi_extra={"requestBody": {"required": True, "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/InferRequestBody"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        }}},
    )  # fmt: skip
    async def infer(name: str, request: Request, version: str = "") -> Response:
        """Run a model. The request is JSON, or JSON followed by binary tensors (`Inference-Header-Content-Length`)."""
        headers = dict(request.headers.raw)
        model = endpoint.admit((name, version), headers)
        return _response(await endpoint.infer(model, headers, await request.body(), request.scope.get("client")))


def _add_repository_routes(app: FastAPI, prefix: str, plane: DataPlane, guarded: list[Any]) -> None:
    """Add the model repository extension, with or without a repository name in the path."""

    @app.post(f"{prefix}/index", tags=["repository"], response_model=list[ModelIndexItem], dependencies=guarded)
    async def repository_index(body: JsonObject) -> Any:
        """Every declared version with its state; with `{"ready": true}` only what answers."""
        return OrjsonResponse(plane.index(ready_only=body.get("ready") is True))

    @app.post(
        f"{prefix}/models/{{name}}/load", tags=["repository"], response_model=RepositoryLoadResponse,
        responses=_ERRORS, dependencies=guarded,
    )  # fmt: skip
    async def repository_load(name: str, body: JsonObject) -> Any:
        """Read a model's manifest again and load it beside what serves now."""
        await plane.load(name, _parameters(body))
        return OrjsonResponse({"name": name, "load": True})

    @app.post(
        f"{prefix}/models/{{name}}/unload", tags=["repository"], response_model=RepositoryLoadResponse,
        responses=_ERRORS, dependencies=guarded,
    )  # fmt: skip
    async def repository_unload(name: str, body: JsonObject) -> Any:
        """Stop serving a model once what is in flight is answered."""
        _parameters(body)
        await plane.repository.unload(name)
        return OrjsonResponse({"name": name, "unload": True})


def _parameters(body: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of load and unload; raise INVALID unless they are an object or left out."""
    parameters = body.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise invalid(f"'parameters' must be an object, got {shown(parameters)}")
    return parameters or {}


async def _on_phoenix_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, PhoenixError)
    return _response(error_reply(error))


async def _on_router_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    if error.status_code == 405:
        message = f"{where}: method not allowed"
    elif error.status_code == 404:
        message = f"{where}: not found"
    else:
        message = str(error.detail)
    reply = error_reply(PhoenixError(_ROUTER_CODES.get(error.status_code, Code.INVALID), message))
    if error.status_code == 405:  # the router names only the methods of the first route of this path
        routes = [route for route in request.app.routes if route.matches(request.scope)[0] is Match.PARTIAL]
        allowed = sorted({method for route in routes for method in route.methods})
        allowed = ["GET", "HEAD", *allowed[1:]] if allowed[:1] == ["GET"] else allowed
        reply.headers.append((b"allow", ", ".join(allowed).encode()))
    return _response(reply)


async def _on_validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = [
        f"{'.'.join(str(part) for part in fault['loc'] if part != 'body') or 'body'}: {fault['msg']}"
        for fault in error.errors()
    ]
    return _response(error_reply(invalid("; ".join(faults))))


def _response(reply: HttpReply) -> Response:
    response = Response(reply.body, status_code=reply.status)
    response.raw_headers = [*reply.headers, (b"content-length", b"%d" % len(reply.body))]
    return response
