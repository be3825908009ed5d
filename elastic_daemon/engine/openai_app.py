"""vLLM's OpenAI server over our engine client, from an explicit list of its routes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast
from unittest import mock

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from vllm.entrypoints.generate.api_router import register_generate_api_routers
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.utils.server_utils import lifespan
from vllm.entrypoints.openai.models.api_router import attach_router as attach_models_router
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.tokenize.api_router import attach_router as attach_tokenize_router
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient

from elastic_daemon.app import ControlPlane, make_control_app
from elastic_daemon.engine.client import ElasticClient
from elastic_daemon.engine.configure import Deployment
from elastic_daemon.engine.plan import LocalExecutor
from elastic_daemon.routes.openapi import control_document, merged

SERVED_ROUTES = frozenset(
    {
        "/v1/models",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/cancel",
        "/tokenize",
        "/detokenize",
    }
)
"""All that is mounted of vLLM's routes. Its health, elastic, development and /invocations routes never are."""

TASKS = ("generate",)


@contextlib.contextmanager
def _engine_client(client: ElasticClient) -> Iterator[None]:
    # AsyncLLM creates its client itself; there is no hook for another class.
    with mock.patch.object(EngineCoreClient, "make_async_mp_client", staticmethod(lambda **_: client)):
        yield


def make_llm(deployment: Deployment, client: ElasticClient) -> AsyncLLM:
    with _engine_client(client):
        return AsyncLLM(
            vllm_config=deployment.config,
            executor_class=LocalExecutor,
            log_stats=not deployment.args.disable_log_stats,
            usage_context=UsageContext.OPENAI_API_SERVER,
            log_requests=deployment.args.enable_log_requests,
        )


async def make_app(deployment: Deployment, llm: AsyncLLM) -> FastAPI:
    """vLLM's application with `SERVED_ROUTES` only, ready to serve."""
    args = deployment.args
    app = FastAPI(title="elastic-daemon", lifespan=lifespan)
    app.state.args = args
    app.root_path = args.root_path
    attach_models_router(app)
    register_generate_api_routers(app)
    attach_tokenize_router(app)
    app.router.routes[:] = [route for route in app.router.routes if isinstance(route, Route) and _is_served(route.path)]
    app.openapi = _with_control_routes(app.openapi)  # type: ignore[method-assign]
    init_exception_handler(app)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=args.allowed_origins,
        allow_credentials=args.allow_credentials,
        allow_methods=args.allowed_methods,
        allow_headers=args.allowed_headers,
    )
    await init_app_state(llm, app.state, args, TASKS)
    return app


def _with_control_routes(own: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """The document of an application that stands before the control routes."""
    whole: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not whole:
            routes = make_control_app(cast(ControlPlane, None))  # to be described, never asked
            whole.update(merged(own(), control_document(routes)))
        return whole

    return openapi


def _is_served(path: str) -> bool:
    return path in SERVED_ROUTES or path in ("/openapi.json", "/docs", "/docs/oauth2-redirect")


def fail_in_flight(llm: AsyncLLM, client: ElasticClient, error: Exception) -> int:
    """End every request in flight with `error`, also in the engines. Returns how many."""
    return fail_requests(llm, client, tuple(llm.output_processor.request_states), error)


def fail_requests(llm: AsyncLLM, client: ElasticClient, request_ids: Iterable[str], error: Exception) -> int:
    """As above, these only, and the other choices that the client of one of them asked for. Returns how many."""
    processor = llm.output_processor
    whole = set()
    for request_id in request_ids:
        if (state := processor.request_states.get(request_id)) is not None:
            if state.queue is not None:
                state.queue.put(error)
            whole.add(state.parent_req.request_id if state.parent_req is not None else request_id)
    # AsyncLLM takes an error of this kind for a refusal: it would keep what it knows of the request for ever.
    ended = processor.abort_requests(whole, internal=True)
    client.give_up(ended)
    return len(ended)
