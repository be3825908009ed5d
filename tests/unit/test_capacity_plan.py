"""The arithmetic of `elastic-daemon plan` against closed forms, and what it reads from models."""

from __future__ import annotations

import json
import math
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_daemon.cli import main
from elastic_daemon.commands.capacity_plan import (
    GIB,
    Failures,
    ModelSize,
    Option,
    downtime,
    failed_gpus,
    options,
    recommended,
)
from elastic_daemon.commands.model_size import moe_layers, read_model_size
from elastic_daemon.commands.plan_command import percent
from elastic_daemon.config import BUNDLED_MODEL
from elastic_daemon.errors import ConfigError
from elastic_daemon.placement import PlacementError, expert_safety, initial, survivable_losses

TINY_MOE = BUNDLED_MODEL
DEEPSEEK = ModelSize(experts=256, layers=58, expert_bytes=44e6, other_bytes=17e9)

rates = st.builds(Failures, st.floats(10, 1e6), st.floats(0, 1000), st.floats(0, 100))


@given(st.integers(1, 80), rates)
def test_failed_gpus_are_binomial(gpus: int, failures: Failures) -> None:
    down = failures.repair_hours / (failures.mtbf_hours + failures.repair_hours)
    for failed, probability in enumerate(failed_gpus(gpus, failures)):
        expected = math.comb(gpus, failed) * down**failed * (1 - down) ** (gpus - failed)
        assert probability == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_one_gpu_is_up_mtbf_over_mtbf_plus_repair() -> None:
    no_capacity, pauses = downtime(1, 1, Failures(mtbf_hours=900, repair_hours=100, recovery_s=3600))
    assert no_capacity == pytest.approx(0.1)
    # One rejoin in each cycle of 1000 hours, of an hour here; the loss of the last GPU is no pause of its own.
    assert pauses == pytest.approx(1 / 1000)


def test_one_of_two_gpus_suffices() -> None:
    no_capacity, pauses = downtime(2, 1, Failures(mtbf_hours=900, repair_hours=100, recovery_s=3600))
    assert no_capacity == pytest.approx(0.1**2)
    # From both up to one: 0.81 * 2 / 900 an hour, and as often back; from none to one: 0.18 / 900.
    assert pauses == pytest.approx(2 * 0.81 * 2 / 900 + 0.18 / 900)


def test_small_probabilities_are_not_rounded_away() -> None:
    no_capacity, _ = downtime(16, 8, Failures(1e5, 1, 1))
    assert no_capacity == pytest.approx(math.comb(16, 9) * 1e-5**9, rel=1e-3)


@pytest.mark.parametrize("wrong", [(0, 1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, -1), (math.nan, 1, 1)])
def test_rates_that_make_no_sense_are_refused(wrong: tuple[float, float, float]) -> None:
    with pytest.raises(PlacementError, match="failure rates"):
        Failures(*wrong)


def test_options_of_a_known_model() -> None:
    found = options(DEEPSEEK, 16, 80 * GIB, Failures())
    assert [option.slots_per_rank for option in found] == [16, 18, 19, 20, 22, 24, 26]
    assert [option.redundant_experts for option in found[:3]] == [0, 32, 48]
    assert found[1].weight_bytes == 17e9 + 58 * 18 * 44e6
    assert [option.fits for option in found] == [True] * 6 + [False]
    assert all(left.unavailability >= right.unavailability for left, right in pairwise(found))


@given(st.integers(1, 300), st.integers(1, 72))
def test_options_say_what_placements_have(experts: int, ranks: int) -> None:
    model = ModelSize(experts, 1, 1.0, 0.0)
    for option in options(model, ranks, GIB, Failures())[:3]:
        placement = initial(experts, 1, range(ranks), option.slots_per_rank)
        assert option.expert_safety == expert_safety(placement)
        assert option.survivable_losses == survivable_losses(experts, ranks, option.slots_per_rank)
        assert option.redundant_experts == ranks * option.slots_per_rank - experts


def option(losses: int, kv: float, no_capacity: float) -> Option:
    return Option(losses, 1, 0, 0, losses, 0.0, kv, no_capacity, pauses=1e-6)


def test_recommended_is_the_least_that_makes_capacity_the_lesser_trouble() -> None:
    found = [option(0, 50, 1e-2), option(1, 40, 1e-5), option(2, 30, 1e-8), option(3, 20, 1e-11)]
    assert recommended(found, 100) is found[2]
    assert recommended(found, 350) is found[1]  # the most that leaves a tenth
    assert recommended(found, 1000) is None


@pytest.mark.parametrize(("ranks", "memory"), [(0, GIB), (4, 0.0), (4, math.nan)])
def test_nothing_to_plan_with_is_refused(ranks: int, memory: float) -> None:
    with pytest.raises(PlacementError, match="can serve nothing"):
        options(DEEPSEEK, ranks, memory, Failures())


@pytest.mark.parametrize(
    ("unavailability", "text"), [(0.1, "90.00%"), (0.0076, "99.24%"), (8e-7, "99.999920%"), (0.0, "100.000000000000%")]
)
def test_percent_shows_the_nines(unavailability: float, text: str) -> None:
    assert percent(unavailability) == text


def model_dir(path: Path, tensors: dict[str, int] | None = None, **config: Any) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, size in tensors.items():
            header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    return path


DEEPSEEK_CONFIG: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "hidden_size": 10,
    "moe_intermediate_size": 2,
    "dtype": "bfloat16",
}


def test_the_bundled_model_is_read_to_the_byte() -> None:
    model = read_model_size(TINY_MOE)
    assert (model.experts, model.layers, model.expert_bytes) == (16, 4, 3 * 128 * 64 * 2)  # stored as bfloat16
    file = (TINY_MOE / "model.safetensors").read_bytes()
    (header,) = struct.unpack("<Q", file[:8])
    assert model.other_bytes + 16 * 4 * model.expert_bytes == len(file) - 8 - header


def test_weights_count_shared_experts_and_dense_layers_on_every_rank(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": 7, "model.layers.0.mlp.up_proj.weight": 5, "lm_head.weight": 1}
    for layer in (1, 2, 3):  # layer 3 predicts a further token: it is not one of the model proper
        tensors[f"model.layers.{layer}.mlp.shared_experts.up_proj.weight"] = 11
        for expert in range(4):
            tensors[f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"] = 100
            tensors[f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight_scale_inv"] = 3
    model = read_model_size(model_dir(tmp_path, tensors, **DEEPSEEK_CONFIG))
    assert model == ModelSize(experts=4, layers=2, expert_bytes=103, other_bytes=7 + 5 + 1 + 2 * 11)


def test_without_weights_sizes_are_computed(tmp_path: Path) -> None:
    path = model_dir(tmp_path, **DEEPSEEK_CONFIG)
    with pytest.raises(ConfigError, match="give --other-bytes"):
        read_model_size(path)
    assert read_model_size(path, other_bytes=9) == ModelSize(4, 2, 3 * 10 * 2 * 2, 9)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1000}}))
    assert read_model_size(path) == ModelSize(4, 2, 120, 1000 - 4 * 2 * 120)


@pytest.mark.parametrize(
    ("changes", "expert_bytes"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, 60),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, 30),
        ({"dtype": None, "torch_dtype": "float32"}, 240),
        ({"moe_intermediate_size": None, "intermediate_size": 3}, 180),
    ],
)
def test_bytes_of_an_expert_follow_the_configuration(
    tmp_path: Path, changes: dict[str, Any], expert_bytes: float
) -> None:
    model = read_model_size(model_dir(tmp_path, **{**DEEPSEEK_CONFIG, **changes}), other_bytes=0)
    assert model.expert_bytes == expert_bytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_routed_experts": None}, "a dense model"),
        ({"first_k_dense_replace": 3}, "no layer has experts"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"dtype": "int3"}, "give --expert-bytes"),
        ({"quantization_config": {"quant_method": "new"}}, "give --expert-bytes"),
    ],
)
def test_what_cannot_be_computed_is_said(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_model_size(model_dir(tmp_path, **{**DEEPSEEK_CONFIG, **changes}), other_bytes=0)


def test_files_that_are_broken_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        read_model_size(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_model_size(tmp_path)
    model_dir(tmp_path, **DEEPSEEK_CONFIG)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ConfigError, match="is no safetensors file"):
        read_model_size(tmp_path)


def test_layers_with_experts() -> None:
    assert moe_layers({"num_hidden_layers": 4}) == [0, 1, 2, 3]
    assert moe_layers({"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}) == [1, 5]


BY_HAND = ["--experts", "256", "--layers", "58", "--expert-bytes", "44e6", "--other-bytes", "17e9"]
SIXTEEN = ["--data-parallel-size", "16", "--gpu-memory", "80"]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_plan_prints_a_table_and_a_recommendation(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*BY_HAND, *SIXTEEN) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("256 experts in 58 layers, 42 MiB each, 15.8 GiB besides; 16 GPUs")
    columns = "survive losses", "slots per rank", "redundant experts", "weights GiB", "left GiB", "expert safety"
    assert " ".join(lines[2].split()).startswith(" ".join(columns))
    assert lines[4].split()[:7] == ["1", "18", "32", "58.6", "15.0", "0", "1"]
    assert "does not fit" in lines[-2]
    assert lines[-1].startswith("recommended: --survive-losses 2; some experts have one copy")


def test_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(TINY_MOE), "--data-parallel-size", "4", "--gpu-memory", "1", "--json") == 0
    body = json.loads(capsys.readouterr().out)
    assert body["model"]["experts"] == 16
    assert [row["survive_losses"] for row in body["options"]] == [0, 1, 2, 3]
    assert body["recommended_survive_losses"] == 2


def test_plan_without_room_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*BY_HAND, "--data-parallel-size", "4", "--gpu-memory", "80") == 1
    assert "nothing fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*SIXTEEN,), "give MODEL, a directory with config.json, or else --experts, --layers"),
        ((str(TINY_MOE), "--experts", "3", *SIXTEEN), "leave them out with MODEL"),
        ((*BY_HAND, "--data-parallel-size", "0", "--gpu-memory", "80"), "0 GPUs"),
        ((*BY_HAND, *SIXTEEN, "--mtbf-hours", "0"), "failure rates"),
        ((*BY_HAND, "--layers", "0", *SIXTEEN), "positive sizes"),
    ],
)
def test_plan_refuses_what_makes_no_sense(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
