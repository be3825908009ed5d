"""What is relied on of the HTTP server."""

from __future__ import annotations

from elastic_daemon.engine.compat.relied_on import ReliedOn

_SERVE = "vllm.entrypoints"

SERVER = (
    ReliedOn(f"{_SERVE}.launchers.cli_args.make_arg_parser", "vLLM's own flags", ("parser",)),
    ReliedOn(
        f"{_SERVE}.launchers.api_server.app_state.init_app_state",
        "vLLM's own handlers",
        ("engine_client", "state", "args", "supported_tasks"),
    ),
    ReliedOn(f"{_SERVE}.launchers.utils.server_utils.lifespan", "vLLM's own start and stop", ("app",)),
    ReliedOn(f"{_SERVE}.generate.api_router.register_generate_api_routers", "served routes", ("app",)),
    ReliedOn(f"{_SERVE}.openai.models.api_router.attach_router", "served routes", ("app",)),
    ReliedOn(f"{_SERVE}.serve.tokenize.api_router.attach_router", "served routes", ("app",)),
    ReliedOn(f"{_SERVE}.serve.exception_handling.register.init_exception_handler", "error bodies", ("app",)),
)
