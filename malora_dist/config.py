"""The configuration of a training run: all of its keys, and the checks of keys that must agree.

The keys stand in :mod:`malora_dist.config_sections` with what a single one may hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from malora_dist.config_sections import (
    VALIDATION_METRICS,
    DataConfig,
    LogConfig,
    ModelConfig,
    ParallelConfig,
    TaskConfig,
    TrainConfig,
)
from malora_dist.errors import ConfigError
from malora_dist.fields import check_fields
from malora_dist.files import is_regular_file
from malora_dist.methods.spec import AdapterSpec


@dataclass
class Config(AdapterSpec, ModelConfig, ParallelConfig, DataConfig, TrainConfig, LogConfig):
    """Everything one run needs; flat, so that ``lr=1e-3`` on the command line is enough."""

    def validate(self, world_size: int) -> None:
        """Check every field, then the fields that must agree.

        Raises:
            ConfigError: the first violated rule.
        """
        check_fields(self)
        self.validate_adapter()
        _check_processes(self, world_size)
        _check_experts(self)
        _check_stages(self)
        _check_batch(self, self.data_parallel_size(world_size))
        _check_recompute(self)
        _check_tasks(self)
        _check_training(self)
        _check_profile(self)

    def data_parallel_size(self, world_size: int) -> int:
        """DP = world size / (TP * PP)."""
        return world_size // (self.tensor_model_parallel_size * self.pipeline_model_parallel_size)


#: Sections of the generated table of config keys, in order.
SECTIONS: tuple[type, ...] = (ModelConfig, AdapterSpec, ParallelConfig, DataConfig, TaskConfig, TrainConfig, LogConfig)


def _require(is_met: bool, config: Config, name: str, rule: str, cure: str) -> None:
    if not is_met:
        raise ConfigError(name, getattr(config, name), rule, cure)


def _check_processes(c: Config, world_size: int) -> None:
    tp, pp, ep = c.tensor_model_parallel_size, c.pipeline_model_parallel_size, c.expert_model_parallel_size
    _require(
        world_size % (tp * pp) == 0,
        c,
        "tensor_model_parallel_size",
        f"times pipeline_model_parallel_size={pp} must divide the world size {world_size}",
        f"start a multiple of {tp * pp} processes or lower one of the two",
    )
    dp = c.data_parallel_size(world_size)
    _require(
        dp % ep == 0,
        c,
        "expert_model_parallel_size",
        f"must divide the data-parallel size {dp} (world size {world_size} / TP {tp} / PP {pp})",
        f"start {ep * tp * pp} processes or a multiple, or lower it",
    )
    _require(
        tp == 1 or c.sequence_parallel,
        c,
        "sequence_parallel",
        f"must be true with tensor_model_parallel_size={tp}, as in megatron's own MoE",
        "set sequence_parallel=true",
    )
    _require(
        tp > 1 or not c.sequence_parallel,
        c,
        "sequence_parallel",
        "needs tensor_model_parallel_size above 1",
        "set sequence_parallel=false",
    )


def _check_experts(c: Config) -> None:
    ep = c.expert_model_parallel_size
    _require(
        c.is_mixture or ep == 1,
        c,
        "expert_model_parallel_size",
        f"method={c.method} has one expert and cannot be sharded",
        "set it to 1 (the ranks then work data-parallel)",
    )
    _require(
        c.num_experts % ep == 0,
        c,
        "num_lora_experts",
        f"must be divisible by expert_model_parallel_size={ep}",
        "change one of the two",
    )


def _check_stages(c: Config) -> None:
    """What needs no knowledge of the base; its number of layers is checked when it is read."""
    pp, vpp = c.pipeline_model_parallel_size, c.virtual_pipeline_model_parallel_size
    rule = "needs pipeline_model_parallel_size above 1"
    _require(vpp == 1 or pp > 1, c, "virtual_pipeline_model_parallel_size", rule, "set it to 1")
    for name in ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"):
        layers = getattr(c, name)
        _require(layers == 0 or pp > 1, c, name, rule, "set it to 0")
        multiple = f"must be divisible by virtual_pipeline_model_parallel_size={vpp}"
        _require(layers % vpp == 0, c, name, multiple, "choose a multiple")


def _check_batch(c: Config, dp: int) -> None:
    if c.packing:
        return  # the number of microbatches follows from the samples' lengths
    factors = f"micro_batch_size={c.micro_batch_size} times the data-parallel size {dp}"
    unit = c.micro_batch_size * dp
    if c.virtual_pipeline_model_parallel_size > 1:  # these stages take turns in rounds of PP microbatches
        factors += f" times pipeline_model_parallel_size={c.pipeline_model_parallel_size}, as stages are interleaved"
        unit *= c.pipeline_model_parallel_size
    _require(
        c.global_batch_size % unit == 0,
        c,
        "global_batch_size",
        f"must be a multiple of {factors}",
        f"a multiple of {unit} works",
    )


def _check_recompute(c: Config) -> None:
    if c.recompute_granularity != "selective":
        return
    _require(bool(c.recompute_modules), c, "recompute_modules", "needs core_attn or mlp", "name one or both")


def _check_tasks(c: Config) -> None:
    labels = [task.label for task in c.data]
    for i, label in enumerate(labels):
        if label in labels[:i]:
            rule = "is already used by another task"
            raise ConfigError(f"data[{i}].name", label, rule, "give each task its own name")


def _check_training(c: Config) -> None:
    _require(c.min_lr <= c.lr, c, "min_lr", f"must be at most lr={c.lr}", "lower it")
    warmup = f"must be below train_iters={c.train_iters}"
    _require(c.lr_warmup_iters < c.train_iters, c, "lr_warmup_iters", warmup, "lower it")
    for name in ("save", "tensorboard_dir"):
        _require(not is_regular_file(getattr(c, name)), c, name, "is a file, must be a directory", "name another")
    _check_early_stopping(c)
    _require(not c.keep_best or c.eval_iters > 0, c, "keep_best", "needs evaluations", "set eval_iters=8")
    _require(not c.save_interval or bool(c.save), c, "save_interval", "has no effect without save", "set save=DIR")


def _check_profile(c: Config) -> None:
    steps = c.profile_steps
    is_range = not steps or (len(steps) == 2 and steps[0] <= steps[1])
    cure = "write for example [10,15]"
    _require(is_range, c, "profile_steps", "must be two steps, the first one and the last one", cure)
    has_place = bool(c.save or c.tensorboard_dir)
    beyond = f"begins after train_iters={c.train_iters}"
    _require(not steps or steps[0] <= c.train_iters, c, "profile_steps", beyond, "choose earlier steps")
    _require(
        not steps or has_place, c, "profile_steps", "has no effect without save or tensorboard_dir", "set save=DIR"
    )


def _check_early_stopping(c: Config) -> None:
    patience = c.early_stopping_patience
    _require(not patience or c.eval_iters > 0, c, "early_stopping_patience", "needs evaluations", "set eval_iters=8")
    kind = c.early_stopping_metric.partition("/")[0]
    rule = f"must be one of {', '.join(VALIDATION_METRICS)}, or one of them with /TASK"
    _require(kind in VALIDATION_METRICS, c, "early_stopping_metric", rule, "choose one of them")
    evaluated = [task.label for task in c.data if task.validation_path or c.validation_samples]
    check_evaluated(c, evaluated)


def check_evaluated(c: Config, tasks: Sequence[str]) -> None:
    """Check that what early stopping goes by is evaluated.

    Args:
        tasks: those with a validation split.

    Raises:
        ConfigError: the metric is of another task, or there is none.
    """
    _, slash, name = c.early_stopping_metric.partition("/")
    if slash and name not in tasks:
        rule = f"{name!r} is no task with a validation split; these are: {', '.join(tasks) or 'none'}"
        raise ConfigError("early_stopping_metric", c.early_stopping_metric, rule, "name one of them, or none for all")
    for name in ("early_stopping_patience", "keep_best"):
        if getattr(c, name) and not tasks:
            cure = "raise validation_samples or set a task's validation_path"
            raise ConfigError(name, getattr(c, name), "needs a validation split", cure)
