"""The training loop: megatron's schedule over this rank's stage, step by step."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from malora_dist.checkpoint.adapter import (
    Trained,
    check_adapter_matches,
    load_adapter_checkpoint,
    load_base_weights,
    save_adapter_checkpoint,
)
from malora_dist.checkpoint.base import checkpoint_dir, hf_dir, read_base_info
from malora_dist.config import Config
from malora_dist.data.batches import Microbatch
from malora_dist.errors import CheckpointError
from malora_dist.exchange.factory import plan_dispatch
from malora_dist.families.base import family_of
from malora_dist.families.build import adapter_shapes, build_stages
from malora_dist.layers.adapter import AdapterSettings
from malora_dist.layers.attention import attention_class
from malora_dist.layers.routing_context import RoutingContext
from malora_dist.metrics.banner import banner
from malora_dist.metrics.clock import Clock
from malora_dist.metrics.logger import ConsoleLogger, Logger, NullLogger, progress_line
from malora_dist.metrics.routing import reduce_statistics, report_routing
from malora_dist.metrics.traffic import TrafficCounter
from malora_dist.parallel.backends import adam_choice, attention_choice
from malora_dist.parallel.topology import Topology
from malora_dist.training.batches import BatchSource
from malora_dist.training.evaluation import TaskLosses, format_losses, mean_losses
from malora_dist.training.loss import forward_step
from malora_dist.training.optimizer import make_optimizer, make_scheduler


class Trainer:
    """One run of a validated config on an initialised layout.

    Raises:
        MaloraError: on construction, for anything the user's files or settings make impossible.
    """

    def __init__(self, config: Config, topology: Topology) -> None:
        self.config, self.topology = config, topology
        base_path = Path(config.pretrained_checkpoint)
        self.base = read_base_info(base_path)
        family = family_of(hf_dir(base_path))
        self.hf = family.hf
        if config.load:
            check_adapter_matches(checkpoint_dir(Path(config.load)), config, self.base)
        is_interleaved = config.virtual_pipeline_model_parallel_size > 1
        self.batches = BatchSource(
            config, _load_tokenizer(hf_dir(base_path)), topology, topology.pp_size if is_interleaved else 1
        )

        self.context = RoutingContext(num_tasks=len(config.data))
        self.plan = plan_dispatch(
            config.dispatch,
            config,
            adapter_shapes(self.hf, config, topology.tp_size),
            topology.ep_group,
            topology.device,
            tokens=max(1, config.global_batch_size * config.seq_length // topology.dp_size),
            itemsize=2 if config.bf16 else 4,
        )
        settings = AdapterSettings(config, topology, self.plan, self.context, config.seed, config.expert_compute)
        attention = attention_class(attention_choice(config, topology.device).chosen)
        model = build_stages(family, config, settings, attention)
        self.model_config = model[0].config
        load_base_weights(checkpoint_dir(base_path), model, topology)
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=config.use_distributed_optimizer
        )
        self.ddp = [DistributedDataParallel(self.model_config, ddp_config, chunk) for chunk in model]
        self.model_config.finalize_model_grads_func = self._finalize_gradients
        no_sync = [chunk.no_sync for chunk in self.ddp]
        self.model_config.no_sync_func = no_sync if is_interleaved else no_sync[0]
        optimizer = make_optimizer(config, self.ddp, adam_choice(config, topology.device))
        self.trained = Trained(model, optimizer, make_scheduler(config, optimizer))
        if config.load:
            load_adapter_checkpoint(Path(config.load), self.trained, topology)
        self.traffic = TrafficCounter(topology)
        self.logger = self._make_logger()

    def train(self) -> None:
        """Train to train_iters (or exit_interval), evaluating, logging and saving on the way."""
        config, trained = self.config, self.trained
        last = min(config.train_iters, config.exit_interval or config.train_iters)
        self.logger.message(banner(trained.model, config, self.hf, self.base, self.plan, self.topology))
        self.logger.message(self.batches.describe())
        if config.load:
            at = f"at iteration {trained.iteration}" if trained.iteration else "with a fresh optimizer"
            self.logger.message(f"loaded {config.load}, going on {at}")
        if trained.iteration >= last:
            self.logger.message(f"nothing to do: iteration {trained.iteration} of {last} is reached; raise train_iters")
        clock = Clock()
        while trained.iteration < last:
            is_logged = (trained.iteration + 1) % config.log_interval == 0 or trained.iteration + 1 == last
            losses, grad_norm, tokens = self.train_step(record=is_logged)
            clock.add(tokens)
            if is_logged:
                self._log(losses, grad_norm, clock)
            is_last = trained.iteration == last
            if config.eval_iters and (
                is_last or (config.eval_interval and trained.iteration % config.eval_interval == 0)
            ):
                with clock.paused():
                    self.evaluate()
            if config.save and (is_last or (config.save_interval and trained.iteration % config.save_interval == 0)):
                with clock.paused():
                    self.save()
        self.logger.close()

    def train_step(self, record: bool = False) -> tuple[TaskLosses, float, int]:
        """One optimizer step: (mean answer losses, gradient norm before clipping, tokens of the global batch).

        Args:
            record: keep the step's routing (``self.context``) and traffic (``self.traffic``).
        """
        trained = self.trained
        if record:
            self.traffic = TrafficCounter(self.topology)
        counting = self.traffic if record else contextlib.nullcontext()
        with counting:
            self.plan.gathered.start()
        microbatches = self.batches.train(trained.consumed_samples)
        counts = self.batches.global_token_counts(microbatches)
        self._seed_step(trained.iteration)
        # megatron divides all gradients by the answer tokens of the global batch; the auxiliary
        # loss shall be a mean over its microbatches, those of padding left out.
        MoEAuxLossAutoScaler.set_loss_scale(
            torch.tensor(counts.answer_tokens / max(counts.microbatches, 1), device=self.topology.device)
        )
        self.context.recording = record
        for chunk in self.ddp:
            chunk.train()
            chunk.zero_grad_buffer()
        trained.optimizer.zero_grad()
        with counting:
            sums = self._run(microbatches, forward_only=False)
            _, grad_norm, _ = trained.optimizer.step()
        if grad_norm is None:  # clip_grad=0: megatron does not compute it
            grad_norm = trained.optimizer.get_grad_norm()
        trained.scheduler.step(increment=1)
        self.context.recording = False
        trained.iteration += 1
        trained.consumed_samples += self.config.global_batch_size
        return mean_losses(sums, self.batches.task_names, self.topology), float(grad_norm), counts.tokens

    @torch.no_grad()
    def evaluate(self) -> TaskLosses:
        """Mean answer loss of each task's validation split; logged. Tasks without one are left out."""
        for chunk in self.ddp:
            chunk.eval()
        sums: list[Tensor] = []
        for task, microbatches in enumerate(self.batches.validation()):
            if task == 0:
                self.plan.gathered.start()
            sums.extend(self._run(microbatches, forward_only=True))
        self.plan.gathered.release()
        losses = mean_losses(sums, self.batches.task_names, self.topology)
        if not losses.by_task:
            return losses
        self.logger.message(f"validation at iteration {self.trained.iteration}: {format_losses(losses)}")
        scalars = {f"lm loss validation/{name}": loss for name, loss in losses.by_task.items()}
        self.logger.scalars({"lm loss validation": losses.overall, **scalars}, self.trained.iteration)
        return losses

    def save(self) -> None:
        """Write a checkpoint of this iteration."""
        directory = save_adapter_checkpoint(
            Path(self.config.save), self.trained, self.config, self.base, self.hf.num_hidden_layers, self.topology
        )
        self.logger.message(f"saved {directory}")

    def _run(self, microbatches: Sequence[Microbatch], forward_only: bool) -> list[Tensor]:
        """megatron's forward(-backward) over this rank's microbatches; the loss sums on the last stage."""
        return get_forward_backward_func()(
            forward_step_func=partial(forward_step, num_tasks=len(self.batches.task_names)),
            data_iterator=[iter(microbatches) for _ in self.ddp],  # each chunk runs all of them
            model=self.ddp,
            num_microbatches=len(microbatches),
            # What pipeline stages send, where they do not tell one another the shape of each microbatch.
            seq_length=microbatches[0].tokens_BS.shape[1],
            micro_batch_size=microbatches[0].tokens_BS.shape[0],
            forward_only=forward_only,
        )

    def _finalize_gradients(self, *args: Any, **kwargs: Any) -> None:
        """What megatron's schedule calls after the last backward of a step."""
        self.plan.gathered.reduce_gradients()
        finalize_model_grads(*args, **kwargs)

    def _seed_step(self, iteration: int) -> None:
        """Dropout is a function of (seed, step, data-parallel rank), so a resumed run draws the same masks."""
        if self.config.lora_dropout > 0:
            seed = (self.config.seed + 1_000_003 * iteration + 7919 * self.topology.dp_rank) % 2**31
            model_parallel_cuda_manual_seed(seed, force_reset_rng=True)

    def _make_logger(self) -> Logger:
        t = self.topology
        if not (t.is_last_stage and t.dp_rank == 0 and t.tp_rank == 0):
            return NullLogger()
        directory = self.config.tensorboard_dir or (self.config.save and str(Path(self.config.save) / "tensorboard"))
        return ConsoleLogger(Path(directory) if directory else None)

    def _log(self, losses: TaskLosses, grad_norm: float, clock: Clock) -> None:
        """One console line and the TensorBoard scalars of this step; called by all ranks."""
        config, iteration = self.config, self.trained.iteration
        routing = report_routing(reduce_statistics(self.context, self.topology), config.topk, self.batches.task_names)
        seconds, tokens_per_second = clock.lap()
        lr = self.trained.optimizer.param_groups[0]["lr"]
        figures = {"lm loss": f"{losses.overall:.4f}", "lr": f"{lr:.2e}", "grad-norm": f"{grad_norm:.3f}"}
        if "malora/balance" in routing.scalars:
            figures["balance"] = f"{routing.scalars['malora/balance']:.2f}"
        figures |= {"tokens/s": f"{tokens_per_second:,.0f}", "s/it": f"{seconds:.3f}"}
        self.logger.message(progress_line(iteration, config.train_iters, figures, seconds))
        scalars = {"lm loss": losses.overall, "learning-rate": lr, "grad-norm": grad_norm,
                   "throughput": tokens_per_second, "iteration-time": seconds}  # fmt: skip
        scalars |= {f"lm loss/{name}": loss for name, loss in losses.by_task.items()}
        scalars |= {f"malora/bytes/{group}": number for group, number in self.traffic.bytes.items()}
        self.logger.scalars(scalars, iteration)
        self.logger.routing(routing, iteration)


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The base's tokenizer.

    Raises:
        CheckpointError: its files are missing or broken.
    """
    try:
        return AutoTokenizer.from_pretrained(str(directory))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        cure = "import a model that has its tokenizer files"
        raise CheckpointError(f"{directory}: its tokenizer cannot be read ({reason}); {cure}") from error
