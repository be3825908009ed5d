"""What `engine/` relies on in vLLM without it being public. A failure here names what a new vLLM has changed."""

from __future__ import annotations

import ast
import dis
import importlib
import inspect
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm.distributed.eplb.eplb_state import EplbLayerState, EplbState
from vllm.model_executor.layers.fused_moe import modular_kernel
from vllm.model_executor.layers.fused_moe.router import base_router
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.core import DPEngineCoreProc
from vllm.v1.engine.core_client import AsyncMPClient, MPClient
from vllm.v1.fault_tolerance import fault_tolerant_wrapper
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from elastic_daemon.engine.client import ElasticClient
from elastic_daemon.engine.compat import RELIED_ON, VLLM_VERSION, ReliedOn, check_version
from elastic_daemon.engine.core import ElasticEngineCore, Parking
from elastic_daemon.engine.cpu import map_to_physical_and_record
from elastic_daemon.engine.groups import EpochCommunicator, EpochGroup
from elastic_daemon.engine.resume import ResumableRequestState, resumed_output, resuming_params
from elastic_daemon.errors import ConfigError

pytestmark = pytest.mark.contract

ROOT = Path(__file__).parents[2]


def resolve(symbol: str) -> Any:
    """The object of a dotted name. Members of classes come as they are stored, unbound."""
    parts = symbol.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = inspect.getattr_static(found, name)
        return found
    raise ModuleNotFoundError(symbol)


def syntax(function: Any) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except OSError:  # made by a decorator, as the constructors of dataclasses are
        return ast.Module([], [])


def assigned_to_self(function: Any) -> set[str]:
    """Names that the source of a method assigns to attributes of `self`."""
    tree = syntax(function)
    targets = [
        target
        for node in ast.walk(tree)
        for target in (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign | ast.AugAssign)
            else []
        )
    ]
    flat = [t for target in targets for t in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return {
        t.attr for t in flat if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name) and t.value.id == "self"
    }


def instance_attributes(cls: type) -> set[str]:
    """Members of a class and of its instances: declared, annotated, or set by one of its methods."""
    names = set(dir(cls))
    for base in cls.__mro__:
        if base.__module__.startswith("vllm"):
            names |= inspect.get_annotations(base).keys()
            names |= {name for m in vars(base).values() if inspect.isfunction(m) for name in assigned_to_self(m)}
    return names


def test_version() -> None:
    check_version()
    assert vllm.__version__.partition("+")[0] == VLLM_VERSION


@pytest.mark.parametrize("version", ["0.31.0", "0.32.1", "0.33.0+cpu", "0.32.0.dev1+gabc", "1.0"])
def test_another_version_is_refused_in_one_line(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(ConfigError) as error:
        check_version()
    text = str(error.value)
    assert version in text and VLLM_VERSION in text and "\n" not in text


def test_a_build_for_one_device_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", f"{VLLM_VERSION}+cpu")
    check_version()


def test_a_missing_vllm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=VLLM_VERSION):
        check_version()


@pytest.mark.parametrize("relied_on", RELIED_ON, ids=lambda r: r.symbol)
def test_symbol(relied_on: ReliedOn) -> None:
    found = resolve(relied_on.symbol)
    if relied_on.parameters is not None:
        function = found.__func__ if isinstance(found, classmethod | staticmethod) else found
        assert tuple(inspect.signature(function).parameters) == relied_on.parameters
    if relied_on.attributes:
        assert set(relied_on.attributes) <= instance_attributes(found)


def test_symbols_are_listed_once_with_a_reason() -> None:
    symbols = [relied_on.symbol for relied_on in RELIED_ON]
    assert len(symbols) == len(set(symbols))
    assert all(relied_on.why for relied_on in RELIED_ON)


def is_private(name: str) -> bool:
    return name.startswith("_") and name not in ("__init__", "__version__")


def private_names(path: Path) -> Iterator[str]:
    """Private names that a module imports from vLLM or reads from a vLLM module that it imported."""
    tree = ast.parse(path.read_text())
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            modules |= {alias.asname or alias.name for alias in node.names}
            yield from (alias.name for alias in node.names if is_private(alias.name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield from [node.attr] if node.value.id in modules and is_private(node.attr) else []


def test_private_names_used_in_engine_are_listed() -> None:
    listed = {relied_on.symbol.rpartition(".")[2] for relied_on in RELIED_ON}
    used = {name for path in (ROOT / "elastic_daemon" / "engine").glob("*.py") for name in private_names(path)}
    assert used, "the scan finds nothing: it is broken"
    assert used <= listed, "add them to engine/compat/"


def test_our_engine_core_sets_all_that_the_replaced_constructor_sets() -> None:
    wanted = assigned_to_self(DPEngineCoreProc.__init__)
    assert {"step_counter", "current_wave"} <= wanted
    assert wanted <= assigned_to_self(ElasticEngineCore.__init__)


def test_our_client_sets_all_that_the_replaced_constructors_set() -> None:
    wanted = assigned_to_self(MPClient.__init__) | assigned_to_self(AsyncMPClient.__init__)
    assert {"ctx", "resources", "outputs_queue"} <= wanted
    ours = assigned_to_self(ElasticClient.__init__) | assigned_to_self(ElasticClient.apply)
    assert wanted <= ours


def test_our_group_sets_all_that_the_replaced_constructor_sets() -> None:
    wanted = assigned_to_self(EpochGroup.__mro__[1].__init__)
    assert {"world_size", "rank_in_group"} <= wanted
    only_to_rebuild_or_send = {"group_ranks", "torch_distributed_backend", "use_device_communicator", "_pending_isends"}
    ours = assigned_to_self(EpochGroup.__init__) | assigned_to_self(EpochGroup.bind)
    assert wanted - only_to_rebuild_or_send <= ours


class Interrupted(Exception):
    pass


def test_busy_loop_hands_faults_to_the_sentinel_and_goes_on_when_it_has_resumed() -> None:
    seen: list[Any] = []

    class Sentinel:
        engine_recovery_timeout_sec = Parking.engine_recovery_timeout_sec

        def __init__(self) -> None:
            self.resumed = threading.Event()
            self.resumed.set()

        def on_fault(self, error: Exception) -> None:
            seen.append(error)

    turns = iter([Interrupted("first"), Interrupted("second"), SystemExit()])

    def loop(_: object) -> None:
        raise next(turns)

    core = SimpleNamespace(enable_fault_tolerance=True, ft_sentinel=Sentinel())
    with pytest.raises(SystemExit):
        fault_tolerant_wrapper(loop)(core)
    assert [str(error) for error in seen] == ["first", "second"]


def test_busy_loop_ends_with_what_the_sentinel_raises() -> None:
    def on_fault(error: Exception) -> None:
        raise error

    def loop(_: object) -> None:
        raise Interrupted

    core = SimpleNamespace(enable_fault_tolerance=True, ft_sentinel=SimpleNamespace(on_fault=on_fault))
    with pytest.raises(Interrupted):
        fault_tolerant_wrapper(loop)(core)


def test_busy_loop_of_a_data_parallel_engine_is_wrapped() -> None:
    assert DPEngineCoreProc.run_busy_loop.__qualname__.startswith("fault_tolerant_wrapper.")


def request(params: SamplingParams) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id="r",
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def test_output_of_a_resumed_request_survives_the_wire() -> None:
    params = SamplingParams(max_tokens=9, seed=3, extra_args={"own": [1]})
    sent = request(resuming_params(params, [7, 8, 9]))
    received = MsgpackDecoder(EngineCoreRequest).decode(MsgpackEncoder().encode(sent))
    assert resumed_output(received.sampling_params) == [7, 8, 9]
    assert received.sampling_params.extra_args["own"] == [1]
    assert (received.sampling_params.max_tokens, received.sampling_params.seed) == (9, 3)
    assert params.extra_args == {"own": [1]}, "the caller's own parameters stay as they are"


def test_a_fresh_request_has_no_output() -> None:
    received = MsgpackDecoder(EngineCoreRequest).decode(MsgpackEncoder().encode(request(SamplingParams())))
    assert resumed_output(received.sampling_params) == []
    assert resumed_output(None) == []


def test_last_tokens_and_finish_come_in_one_output() -> None:
    sent = EngineCoreOutputs(
        engine_index=5,
        outputs=[
            EngineCoreOutput("a", [1, 2], finish_reason=FinishReason.LENGTH),
            EngineCoreOutput("b", [3]),
        ],
    )
    received = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(sent))
    assert received.engine_index == 5
    assert [(o.request_id, o.new_token_ids, o.finished) for o in received.outputs] == [
        ("a", [1, 2], True),
        ("b", [3], False),
    ]


def calls(function: Any, name: str) -> list[ast.Call]:
    found = [node for node in ast.walk(syntax(function)) if isinstance(node, ast.Call)]
    return [node for node in found if (getattr(node.func, "id", None) or getattr(node.func, "attr", None)) == name]


def test_scheduler_sends_tokens_and_finish_together() -> None:
    made = calls(Scheduler.update_from_output, "EngineCoreOutput")
    assert made
    for call in made:
        assert {"new_token_ids", "finish_reason"} <= {keyword.arg for keyword in call.keywords}


def test_model_runner_builds_request_states_by_their_global_name() -> None:
    function = inspect.unwrap(GPUModelRunner._update_states)
    assert function.__globals__ is vars(gpu_model_runner)
    loads = {i.argval for i in dis.get_instructions(function) if i.opname == "LOAD_GLOBAL"}
    assert "CachedRequestState" in loads
    assert CPUModelRunner._update_states is GPUModelRunner._update_states


def test_request_states_start_with_the_output_of_a_resumed_request() -> None:
    (made,) = calls(GPUModelRunner._update_states, "CachedRequestState")
    keywords = {str(keyword.arg): None for keyword in made.keywords}
    assert {"sampling_params", "output_token_ids", "prompt_token_ids"} <= keywords.keys()
    fields: dict[str, Any] = {
        **keywords,
        "req_id": "r",
        "prompt_token_ids": [1, 2],
        "mm_features": [],
        "block_ids": ([],),
        "num_computed_tokens": 0,
        "output_token_ids": [],
    }
    resumed = ResumableRequestState(**{**fields, "sampling_params": resuming_params(SamplingParams(), [7, 8])})
    assert [resumed.get_token_id(index) for index in range(resumed.num_tokens)] == [1, 2, 7, 8]
    fresh = ResumableRequestState(**{**fields, "sampling_params": SamplingParams()})
    assert (fresh.num_tokens, fresh.output_token_ids) == (2, [])


@pytest.mark.parametrize(("experts", "redundant"), [(8, 0), (8, 3), (16, 16), (4, 9)])
def test_first_physical_ids_are_the_logical_ones(experts: int, redundant: int) -> None:
    table = list(EplbState.build_initial_global_physical_to_logical_map(experts, redundant))
    assert table[:experts] == list(range(experts))
    assert len(table) == experts + redundant


def test_router_maps_ids_by_a_global_name_that_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_router, "eplb_map_to_physical_and_record", map_to_physical_and_record)
    load = torch.zeros(4, dtype=torch.int32)
    state = EplbLayerState(
        expert_load_view=load,
        logical_to_physical_map=torch.tensor([[3], [2], [1], [0]]),
        logical_replica_count=torch.ones(4, dtype=torch.long),
        should_record_tensor=torch.tensor(True),
        num_unpadded_tokens_tensors=[torch.tensor(1, dtype=torch.int32)],
    )
    router = SimpleNamespace(eplb_state=state)
    ids = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    mapped = base_router.BaseRouter._apply_eplb_mapping(router, ids)
    assert mapped.tolist() == [[3, 2], [1, 0]]
    assert load.tolist() == [0, 0, 1, 1], "the second token is padding"


def test_router_replacement_takes_the_parameters_of_the_original() -> None:
    listed = next(r for r in RELIED_ON if r.symbol.endswith(".eplb_map_to_physical_and_record"))
    assert tuple(inspect.signature(map_to_physical_and_record).parameters) == listed.parameters


def test_experts_are_applied_with_keywords() -> None:
    (made,) = (
        call
        for cls in vars(modular_kernel).values()
        if inspect.isclass(cls) and cls.__module__ == modular_kernel.__name__
        for function in vars(cls).values()
        if inspect.isfunction(function)
        for call in calls(function, "apply")
        if ast.unparse(call.func) == "self.fused_experts.apply"
        if any(keyword.arg == "topk_ids" for keyword in call.keywords)
    )
    assert made.args == []
    assert {"topk_ids", "topk_weights", "expert_map"} <= {keyword.arg for keyword in made.keywords}


@pytest.mark.parametrize("name", ["dispatch", "combine"])
def test_groups_hand_their_arguments_on_by_position(name: str) -> None:
    theirs = list(inspect.signature(getattr(EpochGroup, name)).parameters)
    ours = list(inspect.signature(getattr(EpochCommunicator, name)).parameters)
    assert ours[: len(theirs)] == theirs
    seen: list[Any] = []
    group = SimpleNamespace(device_communicator=SimpleNamespace(**{name: lambda *args, **kw: seen.append((args, kw))}))
    arguments = [object() for _ in theirs[1:]]
    getattr(EpochGroup, name)(group, *arguments)
    args, keywords = seen[0]
    assert inspect.signature(getattr(EpochCommunicator, name)).bind(None, *args, **keywords)
    assert [*args, *keywords.values()] == arguments
