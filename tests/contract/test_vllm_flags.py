"""The table of refused flags against vLLM's own parser."""

from __future__ import annotations

import argparse

import pytest
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from elastic_daemon.engine.configure import DP_SYNC_INTERVAL, parse_flags
from elastic_daemon.settings.flags import OURS, REFUSED, REFUSED_LOAD_FORMATS, REFUSED_ON, Refusal, refusals
from elastic_daemon.settings.settings_table import MASK, SECRET_ENGINE_FLAGS, mask_flags

pytestmark = pytest.mark.contract

TABLE = (*REFUSED, *REFUSED_ON["cpu"])


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return make_arg_parser(FlexibleArgumentParser())


def options(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    return {action.dest: list(action.option_strings) for action in parser._actions}


@pytest.mark.parametrize("refusal", TABLE, ids=lambda r: r.flag)
def test_vllm_has_the_flag(parser: argparse.ArgumentParser, refusal: Refusal) -> None:
    assert refusal.option in options(parser)[refusal.flag]


@pytest.mark.parametrize("flag", sorted(OURS))
def test_vllm_has_the_flags_that_we_read(parser: argparse.ArgumentParser, flag: str) -> None:
    assert flag in options(parser)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_defaults_are_never_refused(parser: argparse.ArgumentParser, device: str) -> None:
    assert refusals(vars(parser.parse_args([])), device) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tensor-parallel-size", "2"],
        ["-tp", "2"],
        ["--pipeline-parallel-size=2"],
        ["--decode-context-parallel-size", "2"],
        ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'],
        ["--kv-transfer-config", '{"kv_connector": "NixlConnector", "kv_role": "kv_both"}'],
        ["--enable-sleep-mode"],
        ["--data-parallel-external-lb"],
        ["--data-parallel-hybrid-lb"],
        ["--data-parallel-rank", "1"],
        ["--data-parallel-size-local", "2"],
        ["--data-parallel-backend", "ray"],
        ["--nnodes", "2"],
        ["--headless"],
        ["--api-server-count", "2"],
        ["--enable-elastic-ep"],
        ["--enable-fault-tolerance"],
        ["--distributed-executor-backend", "ray"],
        ["--worker-cls", "my.Worker"],
        ["--scheduler-cls", "my.Scheduler"],
        ["--additional-config", '{"a": 1}'],
        ["--enable-dbo"],
        ["--enable-lora"],
        ["--kv-offloading-size", "1"],
        ["--middleware", "my.Middleware"],
        ["--uds", "/tmp/x"],
        ["--grpc"],
        ["--async-scheduling"],
        ["--quantization", "fp8"],
        ["--load-format", "dummy"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_refused_as_a_person_would_write_it(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    (text,) = refusals(vars(parser.parse_args(arguments)), "cpu")
    option = "--tensor-parallel-size" if arguments[0] == "-tp" else arguments[0].partition("=")[0]
    assert text.startswith(f"{option} ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-model-len", "512", "--dtype", "float32"],
        ["--api-server-count", "1"],
        ["--tensor-parallel-size", "1"],
        ["--no-enable-prefix-caching"],
        ["--no-async-scheduling"],
        ["--load-format", "safetensors"],
        ["--reasoning-parser", "qwen3", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_other_flags_pass(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    assert refusals(vars(parser.parse_args(arguments)), "cpu") == []


def test_load_formats_are_vllms(parser: argparse.ArgumentParser) -> None:
    for name in REFUSED_LOAD_FORMATS:
        assert parser.parse_args(["--load-format", name]).load_format == name


@pytest.mark.parametrize(("arguments", "steps"), [([], DP_SYNC_INTERVAL), (["--dp-sync-interval", "16"], 16)])
def test_engines_agree_more_often_than_vllm_has_them_unless_told(arguments: list[str], steps: int) -> None:
    assert parse_flags(arguments).dp_sync_interval == steps


@pytest.mark.parametrize("flag", sorted(SECRET_ENGINE_FLAGS))
def test_no_abbreviation_of_a_secret_flag_is_a_flag_of_its_own(parser: argparse.ArgumentParser, flag: str) -> None:
    """`mask_flags` hides what any of them is given. The parser does take those that are not ambiguous."""
    known = {option for spellings in options(parser).values() for option in spellings}
    full = "--" + flag.replace("_", "-")
    taken = 0
    for end in range(3, len(full)):
        short = full[:end]
        assert short not in known
        assert mask_flags([short, "x"]) == [short, MASK]
        if [option for option in known if option.startswith(short)] == [full]:
            assert getattr(parser.parse_args([short, "x"]), flag) in ("x", ["x"])
            taken += 1
    assert taken
