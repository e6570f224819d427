"""The configuration of a training run: dataclasses, YAML + ``key=value`` overrides, all checks.

Keys are flat and named as in Megatron-LM, ms-swift and PEFT. The groups below are the sections of
the table of config keys in docs/config.md, which is generated from these dataclasses.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from malora_dist.errors import ConfigError
from malora_dist.methods.spec import AdapterSpec

EXPERT_COMPUTES = ("auto", "gated_block", "grouped")
ADAMS = ("auto", "torch", "transformer_engine", "apex")
ATTENTIONS = ("auto", "sdpa", "transformer_engine")
DATA_FORMATS = ("auto", "alpaca", "gsm8k", "completion", "messages")
LR_DECAY_STYLES = ("constant", "linear", "cosine")

#: How a key of a task is written: data[0].weight.
_TASK_KEY = re.compile(r"data\[(?P<index>\d+)\]\.(?P<name>\w+)")
#: {type of a field: (what its values are, an example)}.
_TYPES = {
    "int": ("a whole number", "8"),
    "int | None": ("a whole number", "8"),
    "float | None": ("a number", "16"),
    "float": ("a number", "0.01"),
    "bool": ("true or false", "true"),
    "str": ("a text", "'text'"),
    "list[str]": ("a list of names", "[q_proj,v_proj]"),
    "list[TaskConfig]": ("a list of tasks", "[{path: FILE}]"),
}

#: Keys of earlier versions: {name: what to write instead}.
_RETIRED = {
    "rank_expansion": "an expert's rank is lora_rank itself: write lora_rank=round(rank_expansion * lora_rank) and "
    "shared_dim, beta only scales the start"
}


def _key(default: Any, help_text: str) -> Any:
    """A config field with its help text; a list default becomes a factory."""
    metadata = {"help": help_text}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TaskConfig:
    """One named task: its files and its share of the training mixture."""

    name: str = _key("", "task name in logs and tables; default: the file's stem")
    path: str = _key("", "a local .json/.jsonl file, or a hub data set name")
    validation_path: str = _key("", "file of the validation split; default: validation_samples held out of path")
    weight: float = _key(1.0, "mixing weight, relative to the other tasks")
    format: str = _key("auto", "`auto`, `alpaca`, `gsm8k`, `completion` or `messages`; auto reads it off the columns")
    split: str = _key("train", "split of a hub data set")
    prompt_template: str = _key("", "Python format string over the record's columns; replaces the format's prompt")


@dataclass
class ModelConfig:
    """The frozen base."""

    pretrained_checkpoint: str = _key("", "base model, as written by `tools/convert_hf.py import`")
    bf16: bool = _key(False, "hold the frozen base and compute in bfloat16; adapters and optimizer stay float32")


@dataclass
class ParallelConfig:
    """Layout. TP * PP * DP is the world size; EP divides DP."""

    tensor_model_parallel_size: int = _key(1, "TP; above 1 needs sequence_parallel")
    pipeline_model_parallel_size: int = _key(1, "PP, number of pipeline stages")
    virtual_pipeline_model_parallel_size: int = _key(
        1, "model chunks per pipeline rank; above 1 the stages are interleaved, which shortens the pipeline's bubble"
    )
    decoder_first_pipeline_num_layers: int = _key(0, "layers on the first pipeline rank; 0: as many as on the others")
    decoder_last_pipeline_num_layers: int = _key(0, "layers on the last pipeline rank; 0: as many as on the others")
    expert_model_parallel_size: int = _key(1, "EP, ranks that share the experts; divides DP and num_lora_experts")
    sequence_parallel: bool = _key(False, "shard activations over the sequence between TP regions")
    dispatch: str = _key(
        "auto",
        "`local`; `all_to_all`: tokens travel to their experts; `gather_experts`: experts travel to the tokens, once a "
        "step; `fastmoe`; `auto`: local at EP=1, else by linear whichever of the two sends fewer bytes",
    )
    expert_compute: str = _key(
        "auto",
        "`gated_block`: all experts as one LoRA with gates; `grouped`: tokens sorted by expert; `auto`: by "
        "num_lora_experts, topk and rank",
    )
    device: str = _key("auto", "`auto`, `cpu` (gloo) or `cuda` (nccl)")
    attention_implementation: str = _key("auto", "`auto`, `sdpa` (torch's) or `transformer_engine` (CUDA, bf16)")
    use_distributed_optimizer: bool = _key(False, "shard the optimizer's state over the data-parallel ranks (ZeRO 1)")
    recompute_granularity: str = _key(
        "none", "`none`; `full`: keep the inputs of whole layers and run them again in backward; `selective`: of parts"
    )
    recompute_method: str = _key("uniform", "full: `uniform` (all layers, in units) or `block` (the first layers)")
    recompute_num_layers: int = _key(1, "full: layers per unit (uniform), or layers recomputed per stage (block)")
    recompute_modules: list[str] = _key(
        ["core_attn"], "selective: `core_attn`, `mlp` (without pipeline stages) or both"
    )
    distributed_timeout_minutes: int = _key(10, "collectives that wait longer abort the run")


@dataclass
class DataConfig:
    """Tasks and how their samples become sequences."""

    data: list[TaskConfig] = _key([], "list of tasks, see the task keys")
    seq_length: int = _key(512, "longest sequence in tokens, prompt and answer together")
    overlong: str = _key("truncate", "samples above seq_length: `truncate` the prompt's start, `drop`, or `error`")
    packing: bool = _key(False, "put several samples into one row of seq_length positions; they do not see one another")
    validation_samples: int = _key(64, "samples held out per task that names no validation_path; 0: none")


@dataclass
class TrainConfig:
    """Optimisation, evaluation, checkpoints and logging."""

    train_iters: int = _key(1000, "optimizer steps")
    micro_batch_size: int = _key(1, "rows per rank and forward pass; a row is a sample, with packing several")
    global_batch_size: int = _key(8, "samples per optimizer step, over all ranks")
    lr: float = _key(3e-4, "peak learning rate")
    min_lr: float = _key(0.0, "learning rate at the end of the decay")
    lr_decay_style: str = _key("cosine", "`constant`, `linear` or `cosine`")
    lr_warmup_iters: int = _key(0, "steps of linear warm-up")
    weight_decay: float = _key(0.0, "AdamW's decoupled weight decay")
    adam_beta1: float = _key(0.9, "AdamW's beta1")
    adam_beta2: float = _key(0.999, "AdamW's beta2")
    adam_eps: float = _key(1e-8, "AdamW's epsilon")
    adam_implementation: str = _key("auto", "`auto`, `torch`, `transformer_engine` or `apex` (FusedAdam, CUDA)")
    clip_grad: float = _key(1.0, "clip the global gradient norm to this; 0: off")
    seed: int = _key(1234, "seeds start values, data order and dropout")
    eval_interval: int = _key(100, "steps between evaluations; 0: only at the end")
    eval_iters: int = _key(8, "microbatches per task and evaluation, over all data-parallel ranks; 0: no evaluation")
    log_interval: int = _key(10, "steps between log lines")
    save: str = _key("", "directory for adapter checkpoints; empty: save nothing")
    load: str = _key("", "directory of adapter checkpoints to resume from")
    save_interval: int = _key(0, "steps between checkpoints; 0: only at the end")
    exit_interval: int = _key(0, "stop (and save) after this step; 0: run all train_iters")
    tensorboard_dir: str = _key("", "TensorBoard log directory; default: save/tensorboard")


@dataclass
class Config(AdapterSpec, ModelConfig, ParallelConfig, DataConfig, TrainConfig):
    """Everything one run needs; flat, so that ``lr=1e-3`` on the command line is enough."""

    def validate(self, world_size: int) -> None:
        """Check every field and every pair of fields that must agree.

        Raises:
            ConfigError: the first violated rule.
        """
        self.validate_adapter()
        _check_layout(self, world_size)
        _check_pipeline(self, self.data_parallel_size(world_size))
        _check_recompute(self)
        _check_data(self)
        _check_training(self)

    def data_parallel_size(self, world_size: int) -> int:
        """DP = world size / (TP * PP)."""
        return world_size // (self.tensor_model_parallel_size * self.pipeline_model_parallel_size)


#: Sections of the generated table of config keys, in order.
SECTIONS: tuple[type, ...] = (ModelConfig, AdapterSpec, ParallelConfig, DataConfig, TaskConfig, TrainConfig)


def _check_layout(c: Config, world_size: int) -> None:
    tp, pp, ep = c.tensor_model_parallel_size, c.pipeline_model_parallel_size, c.expert_model_parallel_size
    for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"):
        if getattr(c, key) < 1:
            raise ConfigError(key, getattr(c, key), "must be at least 1", "set 1 to switch it off")
    if world_size % (tp * pp):
        raise ConfigError(
            "tensor_model_parallel_size",
            tp,
            f"times pipeline_model_parallel_size={pp} must divide the world size {world_size}",
            f"start a multiple of {tp * pp} processes or lower one of the two",
        )
    dp = c.data_parallel_size(world_size)
    if dp % ep:
        raise ConfigError(
            "expert_model_parallel_size",
            ep,
            f"must divide the data-parallel size {dp} (world size {world_size} / TP {tp} / PP {pp})",
            f"start {ep * tp * pp} processes or a multiple, or lower it",
        )
    if c.num_experts % ep:
        if not c.is_mixture:
            raise ConfigError(
                "expert_model_parallel_size",
                ep,
                f"method={c.method} has one expert and cannot be sharded",
                "set it to 1 (the ranks then work data-parallel)",
            )
        raise ConfigError(
            "num_lora_experts",
            c.num_lora_experts,
            f"must be divisible by expert_model_parallel_size={ep}",
            "change one of the two",
        )
    if tp > 1 and not c.sequence_parallel:
        raise ConfigError(
            "sequence_parallel",
            False,
            f"must be true with tensor_model_parallel_size={tp}, as in megatron's own MoE",
            "set sequence_parallel=true",
        )
    if tp == 1 and c.sequence_parallel:
        raise ConfigError(
            "sequence_parallel", True, "needs tensor_model_parallel_size above 1", "set sequence_parallel=false"
        )
    _check_one_of(c, "expert_compute", EXPERT_COMPUTES)
    if c.device not in ("auto", "cpu", "cuda"):
        raise ConfigError("device", c.device, "must be auto, cpu or cuda", "choose one of them")
    _check_one_of(c, "attention_implementation", ATTENTIONS)
    if c.micro_batch_size < 1:
        raise ConfigError("micro_batch_size", c.micro_batch_size, "must be at least 1", "raise it")
    if c.packing:  # the number of microbatches follows from the samples' lengths
        if c.global_batch_size < 1:
            raise ConfigError("global_batch_size", c.global_batch_size, "must be at least 1", "raise it")
    elif c.global_batch_size < 1 or c.global_batch_size % (c.micro_batch_size * dp):
        raise ConfigError(
            "global_batch_size",
            c.global_batch_size,
            f"must be a positive multiple of micro_batch_size={c.micro_batch_size} times the data-parallel size {dp}",
            f"a multiple of {c.micro_batch_size * dp} works",
        )


def _check_one_of(c: Config, key: str, values: Sequence[str]) -> None:
    if getattr(c, key) not in values:
        raise ConfigError(key, getattr(c, key), f"must be one of {', '.join(values)}", "choose one of them")


def _check_pipeline(c: Config, dp: int) -> None:
    """What needs no knowledge of the base; its number of layers is checked when it is read."""
    pp, vpp = c.pipeline_model_parallel_size, c.virtual_pipeline_model_parallel_size
    if vpp < 1:
        raise ConfigError("virtual_pipeline_model_parallel_size", vpp, "must be at least 1", "set 1 to switch it off")
    for key in ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"):
        layers = getattr(c, key)
        if layers < 0:
            raise ConfigError(key, layers, "must not be negative", "set 0 for equal stages")
        if layers and pp == 1:
            raise ConfigError(key, layers, "needs pipeline_model_parallel_size above 1", "set it to 0")
        if layers % vpp:
            cure = "choose a multiple"
            raise ConfigError(key, layers, f"must be divisible by virtual_pipeline_model_parallel_size={vpp}", cure)
    if vpp == 1:
        return
    if pp == 1:
        cure = "set it to 1"
        raise ConfigError(
            "virtual_pipeline_model_parallel_size", vpp, "needs pipeline_model_parallel_size above 1", cure
        )
    unit = c.micro_batch_size * dp * pp
    if not c.packing and c.global_batch_size % unit:
        raise ConfigError(
            "global_batch_size",
            c.global_batch_size,
            f"must, with interleaved stages, be a multiple of micro_batch_size={c.micro_batch_size} times the "
            f"data-parallel size {dp} times pipeline_model_parallel_size={pp}",
            f"a multiple of {unit} works",
        )


def _check_recompute(c: Config) -> None:
    choices = {
        "recompute_granularity": ("none", "full", "selective"),
        "recompute_method": ("uniform", "block"),
    }
    for key, allowed in choices.items():
        if getattr(c, key) not in allowed:
            raise ConfigError(key, getattr(c, key), f"must be one of {', '.join(allowed)}", "choose one of them")
    if c.recompute_num_layers < 1:
        raise ConfigError("recompute_num_layers", c.recompute_num_layers, "must be at least 1", "raise it")
    for module in c.recompute_modules:
        if module not in ("core_attn", "mlp"):
            raise ConfigError("recompute_modules", module, "must be core_attn or mlp", "remove it")
    if c.recompute_granularity != "selective":
        return
    if not c.recompute_modules:
        raise ConfigError("recompute_modules", [], "needs core_attn or mlp", "name one or both")
    if "mlp" in c.recompute_modules and c.pipeline_model_parallel_size > 1:
        # By then the stage has gone on to other microbatches, whose padding the adapters would count.
        raise ConfigError(
            "recompute_modules",
            "mlp",
            f"cannot be recomputed with pipeline_model_parallel_size={c.pipeline_model_parallel_size}",
            "use recompute_granularity=full",
        )


def _check_data(c: Config) -> None:
    if not c.pretrained_checkpoint:
        raise ConfigError(
            "pretrained_checkpoint", "", "is required", "make one with `python tools/convert_hf.py import`"
        )
    if not c.data:
        raise ConfigError("data", [], "needs at least one task", "add `data: [{path: FILE}]`")
    for i, task in enumerate(c.data):
        if not task.path:
            raise ConfigError(f"data[{i}].path", "", "is required", "name a .json/.jsonl file or a hub data set")
        if not task.weight > 0:
            raise ConfigError(f"data[{i}].weight", task.weight, "must be positive", "remove the task to leave it out")
        if task.format not in DATA_FORMATS:
            raise ConfigError(
                f"data[{i}].format", task.format, f"must be one of {', '.join(DATA_FORMATS)}", "choose one of them"
            )
        task.name = task.name or Path(task.path).stem
    names = [t.name for t in c.data]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ConfigError(f"data[{i}].name", name, "is already used by another task", "give each task its own name")
    if c.overlong not in ("truncate", "drop", "error"):
        raise ConfigError("overlong", c.overlong, "must be truncate, drop or error", "choose one of them")
    if c.seq_length < 2:
        raise ConfigError("seq_length", c.seq_length, "must be at least 2", "raise it")
    if c.validation_samples < 0:
        raise ConfigError("validation_samples", c.validation_samples, "must not be negative", "set 0 for none")


def _check_training(c: Config) -> None:
    if c.lr_decay_style not in LR_DECAY_STYLES:
        raise ConfigError(
            "lr_decay_style", c.lr_decay_style, f"must be one of {', '.join(LR_DECAY_STYLES)}", "choose one of them"
        )
    _check_one_of(c, "adam_implementation", ADAMS)
    if not (c.lr > 0 and math.isfinite(c.lr)):
        raise ConfigError("lr", c.lr, "must be positive and finite", "3e-4 is a usual value")
    if not 0 <= c.min_lr <= c.lr:
        raise ConfigError("min_lr", c.min_lr, f"must lie in [0, lr={c.lr}]", "lower it")
    for key in ("train_iters", "log_interval"):
        if getattr(c, key) < 1:
            raise ConfigError(key, getattr(c, key), "must be at least 1", "raise it")
    for key in (
        "lr_warmup_iters",
        "eval_interval",
        "eval_iters",
        "save_interval",
        "exit_interval",
        "clip_grad",
        "weight_decay",
    ):
        if getattr(c, key) < 0:
            raise ConfigError(key, getattr(c, key), "must not be negative", "set 0 to switch it off")
    if c.lr_warmup_iters >= c.train_iters:
        raise ConfigError(
            "lr_warmup_iters", c.lr_warmup_iters, f"must be below train_iters={c.train_iters}", "lower it"
        )
    for key in ("save", "tensorboard_dir"):
        if Path(getattr(c, key)).is_file():
            raise ConfigError(key, getattr(c, key), "is a file, must be a directory", "name another")
    if c.save_interval and not c.save:
        raise ConfigError("save_interval", c.save_interval, "has no effect without save", "set save=DIR")


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply ``key=value`` overrides; ``data[1].weight=2`` reaches into the tasks.

    Relative paths in the file and on the command line are taken as they are, from the working
    directory.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, or a value of the wrong type.
    """
    config = OmegaConf.structured(Config)
    for key, value in _read_yaml(Path(path)).items() if path is not None else ():
        _assign(config, str(key), value)
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError("command line", item, "is not of the form key=value", "write for example lr=1e-3")
        _assign(config, key, _parse_value(key, text) if text else "")
    try:
        loaded = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # a ${...} that leads nowhere
        raise ConfigError(str(error.full_key), "${...}", _first_line(error), "write the value itself") from error
    assert isinstance(loaded, Config)
    return loaded


def _read_yaml(file: Path, includers: tuple[Path, ...] = ()) -> dict[Any, Any]:
    """The top level of a YAML file, on top of that of the file it may ``include``; ``${...}`` unresolved.

    Args:
        includers: the files whose ``include`` led here.
    """
    if not file.is_file():
        raise ConfigError("--config", str(file), "is not a file", "name a YAML file, for example one of configs/")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(file))
    except yaml.MarkedYAMLError as error:
        place = f"{file}:{error.problem_mark.line + 1}" if error.problem_mark else str(file)
        raise ConfigError("--config", place, f"is not valid YAML ({error.problem})", "mend the line") from error
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        rule = f"cannot be read as YAML ({_first_line(error)})"
        raise ConfigError("--config", str(file), rule, "name a text file of `key: value` lines") from error
    if not isinstance(loaded, dict):
        raise ConfigError("--config", str(file), "holds a list", "write `key: value` lines")
    if "include" not in loaded:
        return loaded
    included = file.parent / str(loaded.pop("include"))
    if not included.is_file():
        raise ConfigError("include", str(included), f"is not a file, but {file} names it", "write it relative to there")
    chain = (*includers, file.resolve())
    if included.resolve() in chain:
        raise ConfigError("include", str(included), "leads back to itself", f"take it out of {file}")
    return _read_yaml(included, chain) | loaded


def _parse_value(key: str, text: str) -> Any:
    """The value of an override, read as YAML, ``${...}`` unresolved."""
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        rule = f"is not valid YAML ({_first_line(error)})"
        raise ConfigError(key, text, rule, "close brackets and quotes") from error
    assert isinstance(parsed, dict)
    return parsed["value"]


def _assign(config: DictConfig, key: str, value: Any) -> None:
    """Set one key; `data` task by task, so that an error names the key inside."""
    if key == "data" and isinstance(value, list) and all(isinstance(task, dict) for task in value):
        OmegaConf.update(config, key, [{} for _ in value])
        for i, task in enumerate(value):
            for name, inner in task.items():
                _assign(config, f"data[{i}].{name}", inner)
        return
    rule, example = _TYPES[str(_find_field(config, key, value).type)]
    try:
        OmegaConf.update(config, key, value)
    except OmegaConfBaseException as error:
        raise ConfigError(key, value, f"must be {rule}", f"write for example {key}={example}") from error


def _find_field(config: DictConfig, key: str, value: Any) -> dataclasses.Field[Any]:
    """The field that a key names: of the config, or of one of its tasks."""
    match = _TASK_KEY.fullmatch(key)
    fields = {f.name: f for f in dataclasses.fields(TaskConfig if match else Config)}
    name = match["name"] if match else key
    if key in _RETIRED:
        raise ConfigError(key, value, "is no config key any more", _RETIRED[key])
    if name not in fields:
        close = difflib.get_close_matches(name, fields, n=1)
        cure = f"did you mean {close[0]}?" if close else "docs/config.md lists them all"
        raise ConfigError(key, value, "is not a config key", cure)
    if match and int(match["index"]) >= len(config.data):
        raise ConfigError(key, value, f"there are {len(config.data)} tasks, counted from 0", "add it to `data`")
    return fields[name]


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    OmegaConf.save(OmegaConf.structured(config), path)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
