"""The worker of a rank on CPU."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch.distributed import Store
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

from elastic_daemon.engine.cpu import enable_expert_parallelism
from elastic_daemon.engine.gloo import GlooGroup
from elastic_daemon.engine.heartbeat import Page
from elastic_daemon.engine.resume import enable_resume
from elastic_daemon.engine.runner_v1 import ElasticRunnerV1
from elastic_daemon.engine.sampling import enable_sampling_without_compilation
from elastic_daemon.engine.worker import ElasticWorker, alone


class ElasticCPUModelRunner(ElasticRunnerV1, CPUModelRunner):
    """vLLM's CPU model runner, with experts and groups that change."""

    def load_model(self, load_dummy_weights: bool = False) -> None:
        """Load the model with the experts of this rank's planned column, and set up load balancing over it."""
        self.model = self.load_elastic_model()
        self.balance(self.model)


class ElasticCPUWorker(ElasticWorker, CPUWorker):
    """vLLM's CPU worker with groups that belong to an epoch."""

    def init_device(self) -> None:
        enable_expert_parallelism()
        enable_resume()
        enable_sampling_without_compilation()
        self.device = torch.device("cpu")
        os.environ["VLLM_DIST_IDENT"] = f"elastic-{os.getpid()}"
        with alone(self.parallel_config):
            init_worker_distributed_environment(
                self.vllm_config,
                self.rank,
                self.distributed_init_method,
                self.local_rank,
                current_platform.dist_backend,
            )
        self.install_groups(self.device)
        set_random_seed(self.model_config.seed)
        self.model_runner = ElasticCPUModelRunner(self.vllm_config, self.device)

    def connect(
        self, store: Store, prefix: str, position: int, members: int, is_void: Callable[[], bool], page: Page
    ) -> GlooGroup:
        return GlooGroup(store, prefix, position, members, is_void, page)
