"""Learner actor: one rank of a DeepSpeed engine that applies the objective.

Promise: an update's gradient is that of Σ loss / Σ tokens over all its groups, however they are cut into micro-batches and ranks; one
whose loss or gradient is not finite is not applied.
"""

import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.deepspeed_keys import check_deepspeed_keys
from maspo_ray.config import KLConfig, LearnerConfig, ModelConfig, ObjectiveConfig
from maspo_ray.data.tokenizers import save_tokenizer
from maspo_ray.errors import ConfigError
from maspo_ray.experience import PublishReport, UpdateReport
from maspo_ray.packing import Bundle, RankPlan
from maspo_ray.weight_sync import Backend


class DeepSpeedLearner:
    """One rank. See `maspo_ray.protocols.LearnerActor`."""

    def __init__(
        self,
        *,
        model: ModelConfig,
        learner: LearnerConfig,
        objective: ObjectiveConfig,
        kl: KLConfig,
        temperature: float,
        total_updates: int,
        rank: int,
        world_size: int,
        threads: int,
        seed: int,
    ) -> None:
        self._model_config = model
        self._config = learner
        self._objective = objective
        self._kl = kl
        self._temperature = temperature
        self._total_updates = total_updates
        self._rank = rank
        self._world_size = world_size
        self._threads = threads
        self._seed = seed
        self._publisher: Any = None
        self._version = 0

    @staticmethod
    def check_config(learner: LearnerConfig) -> None:
        check_deepspeed_keys(learner)

    def rendezvous(self) -> tuple[str, int]:
        import ray

        from maspo_ray.weight_sync import free_port

        return ray.util.get_node_ip_address(), free_port()

    def setup(self, master_address: str, master_port: int) -> None:
        import ray

        self._address = ray.util.get_node_ip_address()
        os.environ.update(
            {
                "RANK": str(self._rank),
                "WORLD_SIZE": str(self._world_size),
                # Ray shows each actor its own GPUs only, so that every rank is the first of its process.
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": master_address,
                "MASTER_PORT": str(master_port),
                "TOKENIZERS_PARALLELISM": "false",
                "DS_ACCELERATOR": "cuda" if self._config.gpus > 0 else "cpu",
            }
        )
        import torch

        from actors.deepspeed_engine import (
            EngineWeights,
            UpdateSize,
            device_of,
            init_process_group,
            interface_of,
            start_engine,
        )
        from actors.experts import LoadBalance, balance_coefficient, freeze_routers
        from actors.model_check import check_model
        from actors.token_model import load_token_model

        if (interface := interface_of(self._address)) is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
        torch.set_num_threads(self._threads)
        torch.manual_seed(self._seed)
        init_process_group(self._config.gpus)
        self._device = device_of()
        model = load_token_model(self._model_config, self._config.lora, self._device)
        check_model(model, self._model_config, self._config, self._device)
        if model.attention == "alone" and self._config.zero_stage == 3 and self._world_size > 1:
            # A forward pass for each sequence gathers the layers each time, and ranks have different numbers of sequences.
            raise ConfigError(
                "learner.zero_stage is 3; this model runs a sequence at a time, which its ranks cannot do in step. Set it to 2."
            )
        if self._config.router == "frozen":
            freeze_routers(model.model)
        self._engine = start_engine(model, self._config, self._model_config, self._total_updates)
        balance = balance_coefficient(model.model, self._config.router_aux_loss_coef)
        self._balance = LoadBalance(model.model, balance) if balance > 0 else None
        self._weights = EngineWeights(self._engine)
        self._update_size = UpdateSize(self._engine)

    def train_step(self, version: int, plans: Sequence[RankPlan], *payloads: Any) -> list[UpdateReport]:
        from actors.learner_metrics import reduce_breakdown
        from actors.parity_sums import ParitySums
        from maspo_ray.objectives.breakdown import Breakdown

        started = perf_counter()
        self._version = version
        old: list[Sequence[Any] | None] = [None] * len(plans)
        if self._objective.old_policy == "recompute":
            # The first update meets the weights that the batch met: its own log-probs will do.
            old[1:] = [self._logprobs(plan, payloads) for plan in plans[1:]]
        breakdown = Breakdown(self._device)
        # Only the first update meets the weights that the batch met.
        parity = ParitySums()
        reports = [
            self._update(plan, payloads, known, breakdown, parity if i == 0 else None)
            for i, (plan, known) in enumerate(zip(plans, old, strict=True))
        ]
        reports[0] = replace(reports[0], parity=parity.reduce())
        # The breakdown is of all updates that were applied, so that it is the same in each report. The time is the step's, with what
        # is of no update by itself, such as recompute's passes: it stands once, and the sum over the updates is the step's.
        figures = reduce_breakdown(breakdown)
        for i, report in enumerate(reports):
            report.metrics.update(figures | {"time/train_s": 0.0 if i else perf_counter() - started})
        return reports

    def _logprobs(self, plan: RankPlan, payloads: Sequence[Any]) -> list[Any]:
        """Returns the log-probs of each micro-batch under the weights as they are, without a gradient."""
        import torch

        from actors.micro_batch import gather_micro_batch

        self._engine.eval()
        with torch.no_grad():
            batches = (
                gather_micro_batch(bundles, payloads, self._version, self._device) for bundles in plan.micro_batches
            )
            return [self._engine(batch.tokens, self._temperature)[0] for batch in batches]

    def _update(
        self, plan: RankPlan, payloads: Sequence[Any], old: Sequence[Any] | None, breakdown: Any, parity: Any
    ) -> UpdateReport:
        """Makes one optimizer update; returns its report, of an update that is left out by the same names.

        Args:
            old: with `recompute`, log π_old of each micro-batch, [tokens]; None for what the weights say now.
            breakdown: takes up this update's, if it is applied.
            parity: takes up the difference to the engines' log-probs; None for an update that others came before.
        """
        from actors.deepspeed_engine import apply_update
        from actors.learner_metrics import UpdateSums, faulty_groups

        self._engine.train()
        sums = UpdateSums(self._device)
        token_losses = []
        for i, bundles in enumerate(plan.micro_batches):
            loss, token_loss = self._loss(bundles, payloads, old[i] if old else None, sums, parity)
            token_losses.append(token_loss)
            # DeepSpeed averages gradients over the ranks; the shares are to be added up.
            self._engine.backward(loss * (self._world_size / plan.batch_tokens), scale_wrt_gas=False)
        rate = {"learner/lr": float(self._engine.get_lr()[0])}
        metrics = sums.reduce(plan.batch_tokens)
        norm = apply_update(self._engine, self._config.max_grad_norm)
        applied = math.isfinite(norm)
        metrics |= {
            "learner/grad_norm": norm,
            "learner/clipped_share": float(norm > self._config.max_grad_norm),
            "learner/update_to_weight": self._update_size.take() if applied else math.nan,
        }
        if not applied:
            undefined = dict.fromkeys(metrics, math.nan)
            counts = {"tokens/trained": 0.0, "learner/skipped": 1.0}
            return UpdateReport(undefined | counts | rate, False, faulty_groups(plan, token_losses))
        breakdown.merge(sums.breakdown)
        counts = {"tokens/trained": float(plan.batch_tokens), "learner/skipped": 0.0}
        return UpdateReport(metrics | counts | rate, True, ())

    def _loss(
        self, bundles: Sequence[Bundle], payloads: Sequence[Any], old: Any, sums: Any, parity: Any
    ) -> tuple[Any, Any]:
        """Returns the loss, Σ over the tokens of a micro-batch, and its terms, [tokens] without a gradient."""
        import torch

        from actors.micro_batch import gather_micro_batch
        from maspo_ray.objectives import importance_weights, policy_loss
        from maspo_ray.objectives.breakdown import ScoredTokens
        from maspo_ray.objectives.tensor_ops import kl_estimate, masked_sum

        batch = gather_micro_batch(bundles, payloads, self._version, self._device)
        with self._balance.recording() if self._balance else nullcontext():
            logprobs, entropy = self._engine(batch.tokens, self._temperature)
        recompute = self._objective.old_policy == "recompute"
        if old is None:
            old = logprobs.detach() if recompute else batch.behaviour_logprobs
        if parity is not None:
            parity.add(logprobs, batch)
        policy = policy_loss(logprobs, old, batch.advantages, self._objective)
        token_loss = policy.token_loss
        if recompute:
            weights = importance_weights(old, batch.behaviour_logprobs, self._objective.importance_cap)
            token_loss = token_loss * weights
            sums.add("importance_weight", weights, batch.mask)
        tokens = ScoredTokens(
            logprobs, old, batch.behaviour_logprobs, entropy, batch.advantages, batch.lags, batch.mask
        )
        sums.add_objective(policy, tokens)
        sums.add("policy_loss", token_loss, batch.mask)
        if self._kl.coef > 0:
            assert batch.reference_logprobs is not None, "the KL's reference log-probs are missing"
            divergence = kl_estimate(logprobs, batch.reference_logprobs, self._kl.estimator)
            sums.add("kl", divergence, batch.mask)
            token_loss = token_loss + self._kl.coef * divergence
        if self._balance:
            # Added to each token's loss, so that a micro-batch counts by its tokens.
            balance = self._balance.loss().expand_as(token_loss)
            sums.add("load_balance", balance, batch.mask)
            token_loss = token_loss + self._balance.coefficient * balance
        sums.add("loss", token_loss, batch.mask)
        loss = masked_sum(token_loss, batch.mask)
        # An update is left out where its gradient is not finite. A loss that is NaN can have a finite gradient, since that of a clamp is
        # 0 at NaN: multiplying by NaN here makes sure that it has not.
        fault = torch.where(loss.detach().isfinite(), 0.0, math.nan)
        return loss + fault * logprobs.sum(), token_loss.detach()

    def shares_prompts(self) -> bool:
        return self._engine.module.shares_prompts

    def completion_logprobs(
        self, pairs: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]]
    ) -> Sequence[NDArray[np.float32]]:
        from actors.token_model import completion_logprobs

        self._engine.eval()
        bundles = [(prompt, [completion]) for prompt, completion in pairs]
        limit = self._config.max_tokens_per_micro_batch
        return completion_logprobs(self._engine, bundles, self._temperature, self._device, limit)

    def connect(
        self,
        replicas: tuple[int, ...],
        engines: Sequence[Any],
        workers_per_engine: int,
        backend: Backend,
        timeout_s: float,
    ) -> None:
        from actors.weight_source import EngineWeightSource
        from maspo_ray.weight_sync.publisher import WeightPublisher

        if self._publisher is None:
            source = EngineWeightSource(self._weights)
            self._publisher = WeightPublisher(source, backend, self._rank, self._address, timeout_s)
        self._publisher.connect(replicas, engines, workers_per_engine)

    def publish(self, version: int, replicas: tuple[int, ...]) -> PublishReport:
        report: PublishReport = self._publisher.publish(version, replicas)
        return report

    def save(self, folder: str) -> None:
        state, adapters = self._weights.state()
        if self._rank > 0:
            return
        model = self._engine.module.model
        model.save_pretrained(folder, state_dict=state)
        save_tokenizer(self._model_config, Path(folder))
        if adapters:
            from actors.lora import save_adapter

            save_adapter(model, adapters, Path(folder) / "adapter")

    def save_state(self, folder: str) -> None:
        from actors.deepspeed_engine import save_engine

        save_engine(self._engine, Path(folder))

    def load_state(self, folder: str) -> None:
        from actors.deepspeed_engine import load_engine

        load_engine(self._engine, Path(folder))

    def shutdown(self) -> None:
        if self._publisher is not None:
            self._publisher.shutdown()
