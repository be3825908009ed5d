"""The worker of a rank on a GPU, for both generations of vLLM's model runner."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from torch.distributed import Store
from vllm.config import ParallelConfig
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from elastic_daemon.engine.heartbeat import Page
from elastic_daemon.engine.nccl import RANK_ENVIRONMENT, NcclGroup, prepare
from elastic_daemon.engine.plan import rank_plan
from elastic_daemon.engine.resume import enable_resume
from elastic_daemon.engine.runner_v1 import ElasticRunnerV1
from elastic_daemon.engine.sampling import enable_sampling_without_compilation
from elastic_daemon.engine.worker import ElasticModelRunner, ElasticWorker, alone

PREPARED_S = 5.0
"""How long the memory of the group that prepares NCCL is waited for. It took 0.5 s."""


@contextlib.contextmanager
def _no_balancing(config: ParallelConfig) -> Iterator[None]:
    """Keep vLLM from setting up its own load balancing, of which ours takes the place."""
    config.enable_eplb = False
    try:
        yield
    finally:
        config.enable_eplb = True


class ElasticGPUModelRunner(ElasticRunnerV1, GPUModelRunner):
    """vLLM's model runner of the first generation, with experts and groups that change."""

    def load_model(self, load_dummy_weights: bool = False, **_: Any) -> None:
        with self.jit_warmup_registry.activate():
            model = self.load_elastic_model()
        with _no_balancing(self.parallel_config):
            super().load_model(model=model)
        self.balance(model)


def runner_v2(*arguments: Any) -> ElasticModelRunner:
    """vLLM's model runner of the second generation; its modules need Triton, which only some machines have."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2

    class ElasticGPUModelRunnerV2(ElasticModelRunner, GPUModelRunnerV2):
        def load_model(self, load_dummy_weights: bool = False, *_: Any, **__: Any) -> None:
            with self.jit_warmup_registry.activate():
                model = self.load_elastic_model()
            with _no_balancing(self.parallel_config):
                super().load_model(model=model)
            self.balance(model)
            self.eplb._has_registered_models = True

        def _forget_requests(self) -> None:
            self.execute_model_state = None
            for request in list(self.req_states.req_id_to_index):
                self._remove_request(request)

    return ElasticGPUModelRunnerV2(*arguments)


class ElasticGPUWorker(ElasticWorker, Worker):
    """vLLM's GPU worker with groups that belong to an epoch."""

    def init_device(self) -> None:
        os.environ.update(RANK_ENVIRONMENT)
        enable_resume()
        enable_sampling_without_compilation()
        with alone(self.parallel_config):
            super().init_device()
        self._prepared = prepare(self.device)

    def _make_model_runner(self) -> ElasticModelRunner:
        """Called by vLLM when its groups of this rank alone are there."""
        self.install_groups(self.device)  # the runner looks at the size of the group while it is made
        if self.use_v2_model_runner:
            return runner_v2(self.vllm_config, self.device)
        return ElasticGPUModelRunner(self.vllm_config, self.device)

    def determine_available_memory(self) -> int:
        self._prepared.wait(PREPARED_S)  # or its memory would count as the model's
        with self._rehearsal():
            return int(super().determine_available_memory())

    def compile_or_warm_up_model(self) -> Any:
        self.rehearse()  # before vLLM captures graphs and begins to complain of kernels that are compiled
        with self._rehearsal():
            return super().compile_or_warm_up_model()

    def _rehearsal(self) -> contextlib.AbstractContextManager[None]:
        plan = rank_plan(self.vllm_config)
        return self.groups.rehearsal(plan.position, len(plan.members))

    def connect(
        self, store: Store, prefix: str, position: int, members: int, is_void: Callable[[], bool], page: Page
    ) -> NcclGroup:
        count = self.counters.count() if self.counters is not None else None
        return NcclGroup(store, prefix, position, members, self.device, is_void, page, count)
