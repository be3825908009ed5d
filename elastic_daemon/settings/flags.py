"""Which vLLM flags can work under this daemon. The table is the documentation: `docs/flags.md` is written from it.

Anything not listed passes through to vLLM unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OURS = frozenset(
    {
        "data_parallel_size",
        "host",
        "port",
        "api_key",
        "ssl_keyfile",
        "ssl_certfile",
        "ssl_ca_certs",
        "ssl_cert_reqs",
        "ssl_ciphers",
        "enable_ssl_refresh",
    }
)
"""vLLM flags that the daemon reads itself and hands on where they matter."""


@dataclass(frozen=True)
class Refusal:
    """`flag` is refused when its parsed value is not one of `allowed`."""

    flag: str
    reason: str
    allowed: tuple[Any, ...] = (None, False)

    @property
    def option(self) -> str:
        return "--" + self.flag.replace("_", "-")

    def applies(self, value: Any) -> bool:
        return value not in self.allowed


REFUSED = (
    Refusal("tensor_parallel_size", "a rank is one engine on one device until tensor parallelism is tested", (1,)),
    Refusal("pipeline_parallel_size", "pipeline stages cannot be regrouped after a loss", (1,)),
    Refusal("prefill_context_parallel_size", "context parallel groups span ranks and cannot be regrouped yet", (1,)),
    Refusal("decode_context_parallel_size", "context parallel groups span ranks and cannot be regrouped yet", (1,)),
    Refusal("speculative_config", "draft tokens of a void step cannot be taken back yet", (None,)),
    Refusal("spec_method", "draft tokens of a void step cannot be taken back yet", (None,)),
    Refusal("spec_model", "draft tokens of a void step cannot be taken back yet", (None,)),
    Refusal("kv_transfer_config", "prefill/decode disaggregation keeps state outside the rank", (None,)),
    Refusal("ec_transfer_config", "encoder disaggregation keeps state outside the rank", (None,)),
    Refusal("enable_sleep_mode", "a sleeping rank cannot answer a fence"),
    Refusal("data_parallel_external_lb", "the daemon balances load itself: it must know where each request runs"),
    Refusal("data_parallel_hybrid_lb", "the daemon balances load itself: it must know where each request runs"),
    Refusal("data_parallel_rank", "the daemon numbers the ranks", (None, 0)),
    Refusal("data_parallel_start_rank", "the daemon numbers the ranks", (None, 0)),
    Refusal("data_parallel_size_local", "all ranks are local until several hosts are supported", (None,)),
    Refusal("data_parallel_backend", "the daemon starts the ranks itself", ("mp",)),
    Refusal("nnodes", "one host until several hosts are supported", (1,)),
    Refusal("headless", "the daemon starts front end and ranks itself"),
    Refusal("api_server_count", "one front end until several are supported", (None, 1)),
    Refusal("enable_elastic_ep", "vLLM's own elastic scaling needs Ray and aborts requests; this daemon replaces it"),
    Refusal("enable_fault_tolerance", "vLLM's own fault tolerance aborts requests; this daemon replaces it"),
    Refusal("distributed_executor_backend", "core and worker of a rank share one process", (None, "uni", "mp")),
    Refusal("worker_cls", "the daemon brings its own worker", ("auto",)),
    Refusal("scheduler_cls", "the daemon brings its own scheduler", (None,)),
    Refusal("additional_config", "carries the daemon's own plan for a rank", (None, {})),
    Refusal("enable_dbo", "two half-batches in flight cannot be taken back after a loss yet"),
    Refusal("enable_lora", "adapters of a replayed request are not restored yet"),
    Refusal("kv_offloading_size", "offloaded blocks of a void step cannot be taken back yet", (None,)),
    Refusal("enable_return_routed_experts", "the record of a void step cannot be taken back yet"),
    Refusal("enable_mm_embeds", "only text reaches a replayed request"),
    Refusal("middleware", "it would run outside the daemon's access rules", ([],)),
    Refusal("uds", "the supervisor owns the listening socket", (None,)),
    Refusal("grpc", "only the OpenAI HTTP front end is supported"),
)

REFUSED_ON = {
    "cpu": (
        Refusal("async_scheduling", "vLLM's CPU backend schedules synchronously"),
        Refusal("quantization", "expert repair of quantized weights is not proven on CPU", (None,)),
    ),
    "cuda": (Refusal("quantization", "expert repair of quantized weights is not proven on GPUs", (None,)),),
}
"""What cannot work on one device, by the value of `--device`."""

REFUSED_LOAD_FORMATS = {"dummy": "replicas of one expert would get different random weights"}


def refusals(values: Mapping[str, Any], device: str) -> list[str]:
    """One sentence for each flag whose value cannot work here. `values`: flag name (underscores) -> parsed value."""
    table = REFUSED + REFUSED_ON[device]
    found = [
        f"{refusal.option} {values[refusal.flag]!r} is not supported: {refusal.reason}"
        for refusal in table
        if refusal.flag in values and refusal.applies(values[refusal.flag])
    ]
    if reason := REFUSED_LOAD_FORMATS.get(str(values.get("load_format"))):
        found.append(f"--load-format {values['load_format']} is not supported: {reason}")
    return found
