"""The table of refused flags. That vLLM knows them, and that its defaults pass, is checked in tests/contract."""

from __future__ import annotations

from typing import Any

import pytest

from elastic_daemon.settings.flags import OURS, REFUSED, REFUSED_LOAD_FORMATS, REFUSED_ON, Refusal, refusals

TABLE = (*REFUSED, *REFUSED_ON["cpu"])


class Anything:
    """A value that no flag allows."""

    def __repr__(self) -> str:
        return "<anything>"


def ids(refusal: Refusal) -> str:
    return refusal.flag


def test_each_flag_is_listed_once_and_with_a_reason() -> None:
    flags = [refusal.flag for refusal in TABLE]
    assert len(flags) == len(set(flags))
    assert not OURS & set(flags), "a flag is either read by the daemon or refused"
    for refusal in TABLE:
        assert refusal.reason and not refusal.reason.endswith("."), refusal.flag
        assert refusal.option == "--" + refusal.flag.replace("_", "-")


@pytest.mark.parametrize("refusal", TABLE, ids=ids)
def test_a_refusal_names_option_value_and_reason(refusal: Refusal) -> None:
    assert refusals({refusal.flag: Anything()}, "cpu") == [
        f"{refusal.option} <anything> is not supported: {refusal.reason}"
    ]


@pytest.mark.parametrize("refusal", TABLE, ids=ids)
def test_allowed_values_pass(refusal: Refusal) -> None:
    assert refusal.allowed
    for value in refusal.allowed:
        assert refusals({refusal.flag: value}, "cpu") == []


@pytest.mark.parametrize("device", REFUSED_ON)
def test_each_device_has_limits_and_reasons_of_its_own(device: str) -> None:
    for refusal in REFUSED_ON[device]:
        (text,) = refusals({refusal.flag: Anything()}, device)
        assert text.endswith(refusal.reason)


@pytest.mark.parametrize("name", REFUSED_LOAD_FORMATS)
def test_load_formats(name: str) -> None:
    (text,) = refusals({"load_format": name}, "cuda")
    assert text.startswith(f"--load-format {name} is not supported: ")
    assert refusals({"load_format": "auto"}, "cuda") == []


def test_all_problems_are_told_at_once_and_others_pass() -> None:
    values: dict[str, Any] = {
        "pipeline_parallel_size": 2,
        "tensor_parallel_size": 2,
        "headless": True,
        "max_model_len": 1024,
        "dtype": "float32",
    }
    found = refusals(values, "cpu")
    assert [text.split()[0] for text in found] == ["--tensor-parallel-size", "--pipeline-parallel-size", "--headless"]


def test_a_flag_that_was_not_parsed_is_not_refused() -> None:
    assert refusals({}, "cpu") == []


@pytest.mark.parametrize(
    ("flag", "value"),
    [("tensor_parallel_size", True), ("data_parallel_rank", 1), ("enable_sleep_mode", True), ("middleware", ["x.y"])],
)
def test_values_a_person_would_give(flag: str, value: Any) -> None:
    if value is True and flag == "tensor_parallel_size":
        assert refusals({flag: value}, "cpu") == []  # True == 1, and both mean one
    else:
        assert len(refusals({flag: value}, "cpu")) == 1
