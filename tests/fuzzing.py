"""Fuzzing of an HTTP API from its OpenAPI document."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from requests.exceptions import ConnectionError as BrokenOff
from requests.exceptions import InvalidHeader, InvalidURL, Timeout
from schemathesis import GenerationMode
from urllib3.exceptions import ReadTimeoutError


def fuzz(schema: Any, examples: int, call: Callable[[Any], Any]) -> dict[str, set[int]]:
    """Call every operation with what the document allows and with what it does not. Returns the codes by operation."""
    seen: dict[str, set[int]] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        codes = seen.setdefault(operation.label, set())
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and not (operation.path_parameters or operation.query or operation.body):
                continue  # there is nothing to get wrong
            _fuzz_operation(operation.as_strategy(generation_mode=mode), examples, call, codes)
    return seen


@contextlib.contextmanager
def _suppressed() -> Iterator[None]:
    """What takes long, as a stream of events does, and what cannot be sent as HTTP.

    Nothing else: a handler that crashes may drop the connection, and that is what is looked for.
    """
    try:
        yield
    except (Timeout, InvalidHeader, InvalidURL):
        pass
    except BrokenOff as error:
        if not (error.args and isinstance(error.args[0], ReadTimeoutError)):  # requests' way to say so within a body
            raise


def _fuzz_operation(cases: st.SearchStrategy[Any], examples: int, call: Callable[[Any], Any], codes: set[int]) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def run(case: Any) -> None:
        with _suppressed():
            answer = call(case)
            codes.add(answer.status_code)
            assert answer.status_code != 500, (case.as_curl_command(), answer.text)

    with contextlib.suppress(Unsatisfiable):  # nothing that could be sent is wrong here
        run()
