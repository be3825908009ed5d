"""The document has all control routes, and nothing that it says or forbids makes the daemon fail."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

import pytest
import schemathesis
from requests.exceptions import ChunkedEncodingError, ConnectionError, ReadTimeout
from urllib3.exceptions import ReadTimeoutError

from elastic_daemon.app import ControlPlane, make_control_app
from elastic_daemon.gates.access import AccessGuard, AccessRules
from elastic_daemon.gates.limits import SizeLimits
from elastic_daemon.routes.control_routes import CONTROL_PATHS, CONTROL_TEMPLATES, is_order
from elastic_daemon.routes.openapi import BODIES, control_document, merged
from tests.fuzzing import fuzz
from tests.unit.operator_plane import OperatorPlane

JSON = {"Content-Type": "application/json"}


def document() -> dict[str, Any]:
    return control_document(make_control_app(OperatorPlane()))


def test_every_control_route_is_in_the_document() -> None:
    assert set(document()["paths"]) >= CONTROL_PATHS | CONTROL_TEMPLATES


def test_the_routes_can_be_described_where_nobody_stands_behind_them() -> None:
    """As the front end does, which has no supervisor in its process."""
    assert control_document(make_control_app(cast(ControlPlane, None))) == document()


def test_every_order_has_a_body_or_takes_none_and_needs_a_key() -> None:
    for path, methods in document()["paths"].items():
        for method, operation in methods.items():
            order = is_order(method.upper(), re.sub(r"[{}]", "", path))
            admin = order or path == "/experts/verify"
            assert (operation["security"] == [{"key": []}]) == admin, path
            assert ("requestBody" in operation) == (order and path in BODIES), path
            assert set(operation["responses"]) >= ({"400", "401", "409", "503"} if order else {"401", "503"})
    ids = [operation["operationId"] for methods in document()["paths"].values() for operation in methods.values()]
    assert len(ids) == len(set(ids))


def test_documents_are_merged() -> None:
    own = {"openapi": "3.1.0", "paths": {"/v1/x": {"get": 1}}, "components": {"schemas": {"X": 2}}}
    whole = merged(own, document())
    assert whole["paths"]["/v1/x"] == {"get": 1} and "/automation" in whole["paths"]
    assert {"X", "Error"} <= set(whole["components"]["schemas"])
    assert own["components"] == {"schemas": {"X": 2}}


PING = {"openapi": "3.1.0", "info": {"title": "x", "version": "1"}, "paths": {"/ping": {"get": {"responses": {}}}}}


def test_fuzzing_takes_a_dropped_connection_for_a_fault_and_a_long_answer_for_none() -> None:
    def failing(error: Exception) -> Callable[[Any], Any]:
        def call(_: Any) -> Any:
            raise error

        return call

    schema = schemathesis.openapi.from_dict(PING)
    in_a_body = ConnectionError(ReadTimeoutError(None, "/", "Read timed out."))  # type: ignore[arg-type]
    for slow in (ReadTimeout("slow"), in_a_body):
        assert fuzz(schema, 2, failing(slow)) == {"GET /ping": set()}
    for broken in (ConnectionError("reset by peer"), ChunkedEncodingError("broken off"), ConnectionError()):
        with pytest.raises(type(broken)):
            fuzz(schema, 2, failing(broken))


@pytest.mark.parametrize("guarded", [False, True])
def test_fuzzing_finds_no_500(guarded: bool) -> None:
    plane = OperatorPlane()
    app: Any = make_control_app(plane)
    rules = AccessRules(("key",), loopback=True, admin_key="admin")
    schema = schemathesis.openapi.from_dict(document())

    def call(case: Any) -> Any:
        if plane.operations.busy:
            plane.pass_time(200)
        headers = {"Authorization": "Bearer admin"} if guarded else {}
        return case.call(app=served, base_url="http://localhost", headers=headers)

    served = SizeLimits(AccessGuard(app, rules), 1 << 20) if guarded else app
    seen = fuzz(schema, 40, call)
    assert len(seen) >= len(CONTROL_PATHS | CONTROL_TEMPLATES)
    assert set.union(*seen.values()) >= {200, 400, 404}
