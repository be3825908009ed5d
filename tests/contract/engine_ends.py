"""The ends of vLLM's ZMQ protocol that ranks have, for tests of the client of the engines."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineCoreRequestType,
    FinishReason,
)
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

TIMEOUT_S = 10.0


class EngineEnd:
    """What a rank of this incarnation receives and sends. It computes nothing."""

    def __init__(self, context: zmq.asyncio.Context, directory: Path, incarnation: int) -> None:
        self.incarnation = incarnation
        self._input = context.socket(zmq.DEALER)
        self._input.setsockopt(zmq.IDENTITY, incarnation.to_bytes(2, "little"))
        self._input.connect(input_address(directory))
        self._output = context.socket(zmq.PUSH)
        self._output.connect(output_address(directory))
        self._requests, self._messages = MsgpackDecoder(EngineCoreRequest), MsgpackDecoder()

    async def next(self) -> tuple[EngineCoreRequestType, Any]:
        kind, *frames = await asyncio.wait_for(self._input.recv_multipart(copy=False), TIMEOUT_S)
        type_ = EngineCoreRequestType(bytes(kind.buffer))
        decoder = self._requests if type_ is EngineCoreRequestType.ADD else self._messages
        return type_, decoder.decode(frames)

    async def added(self) -> EngineCoreRequest:
        kind, request = await self.next()
        assert kind is EngineCoreRequestType.ADD, f"{kind.name} {request}"
        assert isinstance(request, EngineCoreRequest)
        return request

    async def aborted(self) -> list[str]:
        kind, attempts = await self.next()
        assert kind is EngineCoreRequestType.ABORT, f"{kind.name} {attempts}"
        assert isinstance(attempts, list)
        return attempts

    async def say(self, attempt_id: str, *tokens: int, end: bool = False) -> None:
        output = EngineCoreOutput(attempt_id, list(tokens), finish_reason=FinishReason.STOP if end else None)
        outputs = EngineCoreOutputs(engine_index=self.incarnation, outputs=[output])
        await self._output.send_multipart(MsgpackEncoder().encode(outputs))


def input_address(directory: Path) -> str:
    return f"ipc://{directory}/input.sock"


def output_address(directory: Path) -> str:
    return f"ipc://{directory}/output.sock"


def request(request_id: str) -> EngineCoreRequest:
    params = SamplingParams(extra_args={"of": "the user"})
    return EngineCoreRequest(request_id, [1, 2, 3], None, params, None, 0.0, None, None, None)
