"""What is relied on in vLLM where a rank sees its GPU by UUID."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import vllm

pytestmark = pytest.mark.contract


def test_a_gpu_may_be_visible_by_uuid() -> None:
    """Read, not imported: the module needs the build for CUDA."""
    source = Path(vllm.__file__).with_name("platforms") / "cuda.py"
    [function] = [
        member
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "NvmlCudaPlatform"
        for member in node.body
        if isinstance(member, ast.FunctionDef) and member.name == "device_control_id_to_physical_device_id"
    ]
    assert "nvmlDeviceGetHandleByUUID" in ast.unparse(function)
