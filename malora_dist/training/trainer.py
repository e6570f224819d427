"""The training loop: megatron's schedule over this rank's stage, step by step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from malora_dist.checkpoint.adapter import (
    Trained,
    check_adapter_matches,
    describe_run,
    load_adapter_checkpoint,
    load_base_weights,
)
from malora_dist.checkpoint.base import checkpoint_dir, hf_dir, read_base_info
from malora_dist.checkpoint.resume import check_data, config_differences
from malora_dist.checkpoint.saving import CheckpointWriter
from malora_dist.checkpoint.start import BaseVerification, find_start
from malora_dist.config import Config, check_evaluated
from malora_dist.data.batches import Microbatch
from malora_dist.data.dataset import data_paths
from malora_dist.errors import MaloraError
from malora_dist.exchange.plan import plan_exchanges
from malora_dist.families.base import family_of, projection_widths
from malora_dist.layers.adapted_linear import start_from_base
from malora_dist.layers.adapter import AdapterSettings
from malora_dist.layers.attention import attention_class
from malora_dist.layers.routing_context import RoutingContext
from malora_dist.methods.budget import adapter_parameters
from malora_dist.metrics.banner import banner
from malora_dist.metrics.loggers.base import Loggers, RunDescription, make_loggers
from malora_dist.metrics.routing import RoutingReport, reduce_statistics
from malora_dist.metrics.speed import speed_of
from malora_dist.metrics.traffic import TrafficCounter
from malora_dist.metrics.watch import Watch
from malora_dist.models.build import adapter_sites, build_stages
from malora_dist.parallel.backends import adam_choice, attention_choice
from malora_dist.parallel.collectives import on_one_rank
from malora_dist.parallel.device import device_name
from malora_dist.parallel.heartbeat import Heartbeat
from malora_dist.parallel.step_state import seed_dropout, set_aux_loss_scale
from malora_dist.parallel.topology import Topology
from malora_dist.planning.flops import step_flops
from malora_dist.pretrained import load_tokenizer
from malora_dist.progress import Progress
from malora_dist.training.batches import BatchSource
from malora_dist.training.best import Best
from malora_dist.training.callbacks import (
    Callback,
    Ending,
    Evaluate,
    Log,
    Record,
    Save,
    Step,
    StopIfNotFinite,
    StopOnSignal,
)
from malora_dist.training.evaluation import Validation, task_means
from malora_dist.training.loss import forward_step
from malora_dist.training.optimizer import (
    make_optimizer,
    make_scheduler,
    set_hyperparameters,
    start_moments,
    step_if_finite,
)
from malora_dist.training.parameters import check_finite
from malora_dist.training.profiling import Profile
from malora_dist.training.replicas import CheckReplicas
from malora_dist.training.step_clock import StepClock
from malora_dist.training.stop import StopSignals


class Trainer:
    """One run of a validated config on an initialised layout.

    Raises:
        MaloraError: on construction, for anything the user's files or settings make impossible.
    """

    def __init__(self, config: Config, topology: Topology) -> None:
        self.config, self.topology = config, topology
        self.progress = Progress(is_shown=topology.is_writer and "console" in config.loggers)
        base_path = Path(config.pretrained_checkpoint)
        verification = BaseVerification(base_path)
        self.notes = [verification.note] if verification.note else []
        self.base = read_base_info(base_path)
        family = family_of(hf_dir(base_path))
        self.hf = family.hf
        with self.progress.phase("looking for a checkpoint to go on from"):
            self.start = find_start(config, topology)
        if self.start:
            check_adapter_matches(self.start.directory, self.start.info, config, self.base)
        is_interleaved = config.virtual_pipeline_model_parallel_size > 1
        self.batches = BatchSource(
            config,
            load_tokenizer(hf_dir(base_path), self.hf.vocab_size),
            topology,
            self.progress,
            topology.pp_size if is_interleaved else 1,
        )
        if self.start:
            changes = check_data(self.start, config, self.batches.fingerprints, data_paths(config))
            changes += config_differences(self.start, config)
            self.notes += [*self.start.notes, *(f"not as in the checkpoint: {change}" for change in changes)]

        check_evaluated(config, self.batches.evaluated_tasks)
        self.context = RoutingContext(num_tasks=len(config.data))
        sites = adapter_sites(self.hf, config, topology)
        self.plan = plan_exchanges(config, sites, topology.ep_group, topology.device)
        settings = AdapterSettings(config, topology, self.plan, self.context, config.seed, config.expert_compute)
        attention = attention_class(attention_choice(config, topology.device).chosen)
        model = build_stages(family, config, settings, attention)
        self.model_config = model[0].config
        with self.progress.phase(f"loading {base_path}"):
            try:
                load_base_weights(checkpoint_dir(base_path), model, topology)
            finally:  # a damaged file is a better reason than what comes of it
                verification.finish()
        start_from_base(model)
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=config.use_distributed_optimizer
        )
        self.ddp = [DistributedDataParallel(self.model_config, ddp_config, chunk) for chunk in model]
        self.model_config.finalize_model_grads_func = self._finalize_gradients
        no_sync = [chunk.no_sync for chunk in self.ddp]
        self.model_config.no_sync_func = no_sync if is_interleaved else no_sync[0]
        optimizer = make_optimizer(config, self.ddp, adam_choice(config, topology.device))
        start_moments(optimizer)
        self.trained = Trained(model, optimizer)
        if self.start:
            with self.progress.phase(f"loading {self.start.directory}"):
                load_adapter_checkpoint(self.start.directory, self.start.info.has_optimizer, self.trained, topology)
        check_finite(model, base_path, self.start and self.start.directory)
        self.scheduler = make_scheduler(config, optimizer)
        set_hyperparameters(config, optimizer, self.scheduler, self.trained.iteration)
        self.best, self.signals = Best(config.early_stopping_metric), StopSignals()
        self.ending = Ending(config.last_iteration)
        if self.start and self.start.info.best:
            self.best.load_state_dict(dict(self.start.info.best))
        self.replicas = CheckReplicas(config, model, topology)
        save = Path(config.save).resolve()
        goes_on_here = self.start is not None and self.start.directory.resolve().parent == save
        writer = self._make_writer(goes_on_here) if config.save else None  # refuses before anything is written
        self.clock, self.traffic = StepClock(topology), TrafficCounter(topology)
        self.flops = step_flops(self.hf, config, "grouped")  # what a token asks for, whatever form computes it
        replaces = bool(config.save) and config.overwrite and not goes_on_here
        self.logger = on_one_rank(topology.is_writer, lambda: make_loggers(config, replaces)) or Loggers()
        self.speed = speed_of(config, topology)
        self.callbacks = self._make_callbacks(writer)

    def _make_callbacks(self, writer: CheckpointWriter | None) -> list[Callback]:
        """In the order in which they are called; those that may end the run come before the one that saves."""
        config, logger, ending = self.config, self.logger, self.ending
        watch = Watch(config, self.topology.stage_of_rank)
        callbacks: list[Callback] = [
            Log(config, logger, self.recorded, self.speed, watch, ending),
            StopIfNotFinite(config, logger, self._last_sources),
            self.replicas,
        ]
        if config.eval_iters:
            callbacks.append(Evaluate(config, logger, self.evaluate, watch, self.best, ending))
        callbacks.append(StopOnSignal(config, ending, lambda: self.signals.agreed(self.topology.device)))
        if writer:
            check = self.replicas.check
            callbacks.append(Save(config, logger, writer, self.trained, self.best, ending, check, self.progress))
        if config.profile_steps:
            callbacks.insert(0, Profile(config, self.topology, self.context))
        return callbacks

    def _make_writer(self, goes_on_here: bool) -> CheckpointWriter:
        """What writes this run's checkpoints; `save` is made ready for them.

        Args:
            goes_on_here: the run starts from a checkpoint in `save`.
        """
        layers, data = self.hf.num_hidden_layers, self.batches.fingerprints
        writer = CheckpointWriter(self.config, describe_run(self.config, self.base, layers, data), self.topology)
        writer.prepare(goes_on_here, self.best.iteration if goes_on_here and self.best.value is not None else None)
        return writer

    def train(self) -> None:
        """Train to the last iteration; the callbacks do what is due between the steps, and may end it sooner.

        Raises:
            SystemExit: a signal has ended the run.
        """
        heartbeat = Heartbeat(self.topology, self.config.distributed_timeout_minutes * 60)
        bar = self.progress.phase("training", self.ending.last_iteration, self.trained.iteration)
        with contextlib.closing(self.logger), self.signals, heartbeat, bar:
            for callback in self.callbacks:
                callback.before_first_step(self.trained.iteration)
            run = self._describe()
            on_one_rank(self.topology.is_writer, lambda: self.logger.begin(run))
            for text in self._introduction():
                self.logger.message(text)
            self.clock.restart()
            while self.trained.iteration < self.ending.last_iteration:
                coming = self.trained.iteration + 1
                heartbeat.begin(coming)
                for callback in self.callbacks:
                    callback.before_step(coming)
                step = self.train_step(record=any(callback.wants_record(coming) for callback in self.callbacks))
                self.progress.advance(f"lm loss {step.losses.overall:.4f}")
                try:
                    for callback in self.callbacks:
                        with self.clock.region(callback.region):
                            callback.after_step(step)
                except MaloraError:
                    for callback in self.callbacks:
                        callback.on_error()
                    raise
            for callback in self.callbacks:
                callback.after_last_step(self.trained.iteration)
            if self.ending.reason:
                self.logger.message(f"ends after iteration {self.trained.iteration}: {self.ending.reason}")
            if self.best.value is not None:
                self.logger.message(self.best.describe())
        if self.ending.exit_code:
            dist.barrier()  # whoever starts the ranks ends the others when the first is gone
            raise SystemExit(self.ending.exit_code)

    def train_step(self, record: bool = False) -> Step:
        """One optimizer step.

        Args:
            record: keep the step's routing, traffic and times, see :meth:`recorded`.
        """
        trained = self.trained
        self.clock.begin_step(record)
        if record:
            self.traffic = TrafficCounter(self.topology, self.clock.spans)
        counting = self.traffic if record else contextlib.nullcontext()
        with counting:
            self.plan.begin_step()
        with self.clock.region("data"):
            microbatches = self.batches.train(trained.consumed_samples)
            counts = self.batches.global_token_counts(microbatches)
        self.clock.positions = sum(microbatch.tokens_BS.numel() for microbatch in microbatches)
        self._seed_step(trained.iteration)
        # megatron divides all gradients by the answer tokens of the global batch; the auxiliary
        # loss shall be a mean over its microbatches, those of padding left out.
        set_aux_loss_scale(counts.answer_tokens / max(counts.microbatches, 1), self.topology.device)
        self.context.recording = record
        for chunk in self.ddp:
            chunk.train()
            chunk.zero_grad_buffer()
        trained.optimizer.zero_grad()
        with counting:
            sums = self._run(microbatches, forward_only=False)
            with self.clock.on_device("optimizer"):
                grad_norm = step_if_finite(trained.optimizer)
        learning_rate = trained.optimizer.param_groups[0]["lr"]
        self.scheduler.step(increment=1)
        self.context.recording = False
        trained.iteration += 1
        trained.consumed_samples += self.config.global_batch_size
        with counting:
            (losses,) = task_means(sums, 1, self.batches.task_names, self.topology)  # waits for the device
        return Step(
            iteration=trained.iteration,
            losses=losses,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            tokens=counts.tokens,
            flops=self.flops.total(counts.tokens, counts.answer_tokens, counts.pairs),
            seconds=self.clock.end_step(),
        )

    def recorded(self) -> Record:
        """What the last recorded step has kept; called by all ranks, empties the record."""
        times = self.clock.report()
        statistics = reduce_statistics(self.context, self.topology)
        return Record(RoutingReport(statistics, self.config, self.batches.task_names), self.traffic.bytes, times)

    @torch.no_grad()
    def evaluate(self) -> Validation:
        """Mean answer loss and accuracy of each task's validation split; tasks without one are left out."""
        for chunk in self.ddp:
            chunk.eval()
        sums: list[Tensor] = []
        names = self.batches.evaluated_tasks
        for task, microbatches in enumerate(self.batches.validation()):
            if task == 0:
                self.plan.begin_step()
            text = f"evaluating {names[task]}, {task + 1} of {len(names)} tasks"
            with self.progress.phase(text, len(microbatches) * len(self.ddp)):
                sums.extend(self._run(microbatches, forward_only=True, each=self.progress.counted))
        self.plan.end_step(with_gradients=False)
        return Validation(*task_means(sums, 2, self.batches.task_names, self.topology))

    def _run(
        self,
        microbatches: Sequence[Microbatch],
        forward_only: bool,
        each: Callable[[Sequence[Microbatch]], Iterator[Microbatch]] = iter,
    ) -> list[Tensor]:
        """megatron's forward(-backward) over this rank's microbatches; the loss sums on the last stage."""
        return get_forward_backward_func()(
            forward_step_func=partial(forward_step, num_tasks=len(self.batches.task_names)),
            data_iterator=[each(microbatches) for _ in self.ddp],  # each chunk runs all of them
            model=self.ddp,
            num_microbatches=len(microbatches),
            # What pipeline stages send, where they do not tell one another the shape of each microbatch.
            seq_length=microbatches[0].tokens_BS.shape[1],
            micro_batch_size=microbatches[0].tokens_BS.shape[0],
            forward_only=forward_only,
        )

    def _finalize_gradients(self, *args: Any, **kwargs: Any) -> None:
        """What megatron's schedule calls after the last backward of a step."""
        self.plan.end_step(with_gradients=True)
        finalize_model_grads(*args, **kwargs)

    def _last_sources(self) -> list[str]:
        return self.batches.sources(self.trained.consumed_samples - self.config.global_batch_size)

    def _seed_step(self, iteration: int) -> None:
        """Dropout is a function of (seed, step, data-parallel rank), so a resumed run draws the same masks."""
        if self.config.lora_dropout > 0:
            seed = (self.config.seed + 1_000_003 * iteration + 7919 * self.topology.dp_rank) % 2**31
            seed_dropout(seed)

    def _describe(self) -> RunDescription:
        config, topology = self.config, self.topology
        return RunDescription(
            config=config,
            banner=banner(self.trained.model, config, self.hf, self.base, self.plan, topology),
            parameters=adapter_parameters(config, projection_widths(self.hf), self.hf.num_hidden_layers),
            tasks=self.batches.task_names,
            world_size=topology.world_size,
            device=device_name(topology.device),
            iteration=self.trained.iteration,
            evaluated=self.batches.evaluated_tasks if config.eval_iters else [],
            peak_tflops=self.speed.peak_tflops,
        )

    def _introduction(self) -> Iterator[str]:
        """What a run says before its first step, besides its banner."""
        trained, last = self.trained, self.config.last_iteration
        yield self.batches.describe()
        if self.config.seq_length > self.hf.max_position_embeddings:
            yield (
                f"seq_length={self.config.seq_length}: the base knows {self.hf.max_position_embeddings} positions "
                "(max_position_embeddings), and does worse beyond them; lower it, or take a base with a longer context"
            )
        yield from self.notes
        if self.start:
            at = f"at iteration {trained.iteration}" if trained.iteration else "with a fresh optimizer"
            yield f"loaded {self.start.directory}, going on {at}"
        if trained.iteration >= last:
            key = "train_iters" if last == self.config.train_iters else "exit_interval"
            yield f"nothing to do: iteration {trained.iteration} is reached and {key}={last}; raise {key}"
