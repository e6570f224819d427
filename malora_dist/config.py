"""The configuration of a training run: its keys, and the checks of keys that must agree.

Keys are flat and named as in Megatron-LM, ms-swift and PEFT. What a single key may hold stands in its field
(:mod:`malora_dist.fields`); the functions below the classes check keys against each other. The classes are the sections
of docs/config.md, which is generated from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from malora_dist.errors import ConfigError
from malora_dist.fields import check_fields, key
from malora_dist.files import is_regular_file
from malora_dist.methods.spec import AdapterSpec

#: What an evaluation measures, and whether more of it is better; of one task with ``/TASK`` behind it.
VALIDATION_METRICS = {"lm loss validation": False, "accuracy validation": True}

_OFF_AT_0 = "set 0 to switch it off"
_OFF_AT_1 = "set 1 to switch it off"


@dataclass
class TaskConfig:
    """One named task: its files and its share of the training mixture."""

    name: str = key("", "task name in logs and tables; default: the file's stem")
    path: str = key(
        "",
        "a local .json/.jsonl file, or a hub data set name",
        required=True,
        cure="name a .json/.jsonl file or a hub data set",
    )
    validation_path: str = key("", "file of the validation split; default: validation_samples held out of path")
    weight: float = key(
        1.0, "mixing weight, relative to the other tasks", above=0, cure="remove the task to leave it out"
    )
    format: str = key(
        "auto",
        "what the records look like; auto reads it off the columns",
        choices=("auto", "alpaca", "gsm8k", "completion", "messages"),
    )
    split: str = key("train", "split of a hub data set")
    prompt_template: str = key("", "Python format string over the record's columns; replaces the format's prompt")

    @property
    def label(self) -> str:
        """The task's name, given or from its path."""
        return self.name or Path(self.path).stem


@dataclass
class ModelConfig:
    """The frozen base."""

    pretrained_checkpoint: str = key(
        "",
        "base model, as written by `tools/convert_hf.py import`",
        required=True,
        cure="make one with `python tools/convert_hf.py import`",
    )
    bf16: bool = key(False, "hold the frozen base and compute in bfloat16; adapters and optimizer stay float32")


@dataclass
class ParallelConfig:
    """Layout. TP * PP * DP is the world size; EP divides DP."""

    tensor_model_parallel_size: int = key(1, "TP; above 1 needs sequence_parallel", minimum=1, cure=_OFF_AT_1)
    pipeline_model_parallel_size: int = key(1, "PP, number of pipeline stages", minimum=1, cure=_OFF_AT_1)
    virtual_pipeline_model_parallel_size: int = key(
        1,
        "model chunks per pipeline rank; above 1 the stages are interleaved, which shortens the pipeline's bubble",
        minimum=1,
        cure=_OFF_AT_1,
    )
    decoder_first_pipeline_num_layers: int = key(
        0,
        "layers on the first pipeline rank; 0: as many as on the others",
        minimum=0,
        cure="set 0 for equal stages",
    )
    decoder_last_pipeline_num_layers: int = key(
        0,
        "layers on the last pipeline rank; 0: as many as on the others",
        minimum=0,
        cure="set 0 for equal stages",
    )
    expert_model_parallel_size: int = key(
        1, "EP, ranks that share the experts; divides DP and num_lora_experts", minimum=1, cure=_OFF_AT_1
    )
    sequence_parallel: bool = key(False, "shard activations over the sequence between TP regions")
    dispatch: str = key(
        "auto",
        "`local`; `all_to_all`: tokens travel to their experts; `gather_experts`: experts travel to the tokens, once a "
        "step; `fastmoe`; `auto`: local at EP=1, else by linear whichever sends fewer bytes and holds no large copies",
    )
    expert_compute: str = key(
        "auto",
        "`gated_block`: all experts as one LoRA with gates; `grouped`: tokens sorted by expert; `auto`: by "
        "num_lora_experts, topk and rank",
        choices=("auto", "gated_block", "grouped"),
    )
    device: str = key("auto", "`cpu` (gloo) or `cuda` (nccl); auto: a GPU if any", choices=("auto", "cpu", "cuda"))
    attention_implementation: str = key(
        "auto", "`sdpa` (torch's) or `transformer_engine` (CUDA, bf16)", choices=("auto", "sdpa", "transformer_engine")
    )
    use_distributed_optimizer: bool = key(False, "shard the optimizer's state over the data-parallel ranks (ZeRO 1)")
    recompute_granularity: str = key(
        "none",
        "`full`: keep the inputs of whole layers and run them again in backward; `selective`: of parts",
        choices=("none", "full", "selective"),
    )
    recompute_method: str = key(
        "uniform", "full: `uniform` (all layers, in units) or `block` (the first layers)", choices=("uniform", "block")
    )
    recompute_num_layers: int = key(
        1, "full: layers per unit (uniform), or layers recomputed per stage (block)", minimum=1
    )
    recompute_modules: list[str] = key(
        ["core_attn"],
        "selective: `core_attn`, `mlp` (with its norm) or both",
        choices=("core_attn", "mlp"),
        cure="remove it",
    )
    distributed_timeout_minutes: float = key(
        10.0, "collectives that wait longer abort the run", above=0, cure="10 is a usual value"
    )


@dataclass
class DataConfig:
    """Tasks and how their samples become sequences."""

    data: list[TaskConfig] = key(
        [], "list of tasks, see the task keys", required=True, cure="add at least one task: `data: [{path: FILE}]`"
    )
    seq_length: int = key(512, "longest sequence in tokens, prompt and answer together", minimum=2)
    overlong: str = key(
        "truncate",
        "samples above seq_length: `truncate` the prompt's start, `drop`, or `error`",
        choices=("truncate", "drop", "error"),
    )
    corrupt_data: str = key(
        "refuse",
        "records that cannot be used (malformed JSON, a missing column, a wrong type): `refuse`, or `skip` and say so",
        choices=("refuse", "skip"),
    )
    packing: bool = key(False, "put several samples into one row of seq_length positions; they do not see one another")
    validation_samples: int = key(
        64, "samples held out per task that names no validation_path; 0: none", minimum=0, cure="set 0 for none"
    )


@dataclass
class TrainConfig:
    """Optimisation, evaluation, checkpoints and logging."""

    train_iters: int = key(1000, "optimizer steps", minimum=1)
    micro_batch_size: int = key(1, "rows per rank and forward pass; a row is a sample, with packing several", minimum=1)
    global_batch_size: int = key(8, "samples per optimizer step, over all ranks", minimum=1)
    lr: float = key(3e-4, "peak learning rate", above=0, cure="3e-4 is a usual value")
    min_lr: float = key(0.0, "learning rate at the end of the decay", minimum=0)
    lr_decay_style: str = key("cosine", "what follows the warm-up", choices=("constant", "linear", "cosine"))
    lr_warmup_iters: int = key(0, "steps of linear warm-up", minimum=0, cure=_OFF_AT_0)
    weight_decay: float = key(0.0, "AdamW's decoupled weight decay", minimum=0, cure=_OFF_AT_0)
    adam_beta1: float = key(0.9, "AdamW's beta1", minimum=0, below=1, cure="0.9 is the usual value")
    adam_beta2: float = key(0.999, "AdamW's beta2", minimum=0, below=1, cure="0.999 is the usual value")
    adam_eps: float = key(1e-8, "AdamW's epsilon", above=0, cure="1e-8 is the usual value")
    adam_implementation: str = key(
        "auto",
        "`torch`, or the FusedAdam of `transformer_engine` or `apex` (CUDA)",
        choices=("auto", "torch", "transformer_engine", "apex"),
    )
    clip_grad: float = key(1.0, "clip the global gradient norm to this; 0: off", minimum=0, cure=_OFF_AT_0)
    max_skipped_steps: int = key(
        3,
        "end the run when so many steps in a row had a gradient that is not finite; each is skipped; 0: go on",
        minimum=0,
        cure="set 0 to go on whatever happens",
    )
    check_replicas_interval: int = key(
        100,
        "steps between checks that what ranks hold in common is equal on them bit by bit; it is checked before every "
        "save, too; 0: never",
        minimum=0,
        cure=_OFF_AT_0,
    )
    seed: int = key(1234, "seeds start values, data order and dropout", minimum=0, cure="1234 is as good as any")
    eval_interval: int = key(
        100, "steps between evaluations; 0: only at the end", minimum=0, cure="set 0 for the end only"
    )
    eval_iters: int = key(
        8,
        "microbatches per task and evaluation, over all data-parallel ranks; 0: no evaluation",
        minimum=0,
        cure=_OFF_AT_0,
    )
    early_stopping_patience: int = key(
        0,
        "end the run after so many evaluations in a row without a better early_stopping_metric; 0: never",
        minimum=0,
        cure=_OFF_AT_0,
    )
    early_stopping_metric: str = key(
        "lm loss validation",
        "what makes an evaluation the best: `lm loss validation` or `accuracy validation`, means over the answer "
        "tokens of all tasks, or that of one task: `lm loss validation/TASK`",
    )
    early_stopping_threshold: float = key(
        0.0, "how much better an evaluation must be to count as an improvement", minimum=0, cure=_OFF_AT_0
    )
    log_interval: int = key(10, "steps between log lines", minimum=1)
    save: str = key("", "directory for adapter checkpoints; empty: save nothing")
    load: str = key("", "directory of adapter checkpoints to start or go on from")
    resume: str = key(
        "off",
        "`auto`: go on from the newest checkpoint in `save` if there is one, else start as `load` says",
        choices=("off", "auto"),
    )
    overwrite: bool = key(False, "a run that starts anew removes the checkpoints that another one has left in `save`")
    keep_last: int = key(0, "newest checkpoints that are kept; 0: all", minimum=0, cure="set 0 to keep all")
    keep_best: bool = key(
        False, "also save after every evaluation that is the best by early_stopping_metric, and never remove that one"
    )
    async_save: bool = key(
        False, "write checkpoints while training goes on; a step waits only for a copy to host memory"
    )
    on_save_error: str = key(
        "stop",
        "when a checkpoint cannot be written: `stop`, or `continue` to the next one; the last one of a run has to be",
        choices=("stop", "continue"),
    )
    allow_changed_data: bool = key(
        False, "go on from a checkpoint although samples of validation may now be in training, and the reverse"
    )
    save_interval: int = key(
        0, "steps between checkpoints; 0: only at the end", minimum=0, cure="set 0 for the end only"
    )
    exit_interval: int = key(0, "stop (and save) after this step; 0: run all train_iters", minimum=0, cure=_OFF_AT_0)
    tensorboard_dir: str = key("", "TensorBoard log directory; default: save/tensorboard")

    @property
    def last_iteration(self) -> int:
        """The step after which the run ends."""
        return min(self.train_iters, self.exit_interval or self.train_iters)


@dataclass
class Config(AdapterSpec, ModelConfig, ParallelConfig, DataConfig, TrainConfig):
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

    def data_parallel_size(self, world_size: int) -> int:
        """DP = world size / (TP * PP)."""
        return world_size // (self.tensor_model_parallel_size * self.pipeline_model_parallel_size)


#: Sections of the generated table of config keys, in order.
SECTIONS: tuple[type, ...] = (ModelConfig, AdapterSpec, ParallelConfig, DataConfig, TaskConfig, TrainConfig)


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


def _check_early_stopping(c: Config) -> None:
    patience = c.early_stopping_patience
    _require(not patience or c.eval_iters > 0, c, "early_stopping_patience", "needs evaluations", "set eval_iters=8")
    kind = c.early_stopping_metric.partition("/")[0]
    rule = f"must be one of {', '.join(VALIDATION_METRICS)}, or one of them with /TASK"
    _require(kind in VALIDATION_METRICS, c, "early_stopping_metric", rule, "choose one of them")
    evaluated = [task.label for task in c.data if task.validation_path or c.validation_samples]
    check_evaluated(c, evaluated)


def check_evaluated(c: TrainConfig, tasks: Sequence[str]) -> None:
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
