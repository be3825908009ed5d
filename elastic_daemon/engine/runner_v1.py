"""What is the same for all model runners of vLLM's first generation, on any device."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput

from elastic_daemon.engine import seeds
from elastic_daemon.engine.worker import ElasticModelRunner


class ElasticRunnerV1(ElasticModelRunner):
    requests: dict[str, Any]
    input_batch: Any
    discard_request_mask: Any

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        """A request that is new here, with output, gets its generator where it was after that."""
        new = [one.req_id for one in scheduler_output.scheduled_new_reqs if one.req_id not in self.requests]
        corrections = super()._update_states(scheduler_output)  # type: ignore[misc]  # of vLLM's GPUModelRunner
        config = self.model_config
        for state in map(self.requests.__getitem__, new):
            if state.generator is not None:
                tokens = len(state.output_token_ids)
                seeds.advance(state.generator, tokens, config.get_vocab_size(), config.use_fp64_gumbel)
        return corrections

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        """vLLM samples after each part of a long prefill too, throws the token away, and turns the generator back:
        generators on CPU cannot be turned back, and raise. So none is drawn from for a token that nobody gets."""
        mask = self.discard_request_mask.np[: self.input_batch.num_reqs]
        with seeds.untouched(self.input_batch.generators, mask.nonzero()[0].tolist()):
            return super().sample_tokens(grammar_output)  # type: ignore[misc]  # of vLLM's GPUModelRunner

    def _forget_requests(self) -> None:
        self.execute_model_state = None
        gone = SchedulerOutput.make_empty()
        gone.finished_req_ids = set(self.requests)
        self._update_states(gone)
        # What a step in flight was to sample, on the device and on its way to the host.
        batch = self.input_batch
        batch.prev_sampled_token_ids = batch.prev_req_id_to_index = None
        batch.sampled_token_ids_cpu = batch.async_copy_ready_event = None
