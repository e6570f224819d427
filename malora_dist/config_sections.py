"""The keys of a training run's configuration: a class for each section of docs/config.md, which is generated from it.

Keys are flat and named as in Megatron-LM, ms-swift and PEFT. What a single key may hold stands in its field
(:mod:`malora_dist.fields`); what keys must agree on is checked in :mod:`malora_dist.config`.
"""

from __future__ import annotations

from dataclasses import dataclass

from malora_dist.fields import key
from malora_dist.files import stem_of

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
        "a local .json, .jsonl, .csv or .parquet file, also as .gz; or a folder or hub name of a data set",
        required=True,
        cure="name a data file or a hub data set",
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
    subset: str = key("", "subset (configuration) of a hub data set that has several")
    split: str = key("train", "split of a hub data set")
    prompt_template: str = key(
        "", "Python format string over the record's columns, null being empty; replaces the format's prompt"
    )

    @property
    def label(self) -> str:
        """The task's name, given or from its path."""
        return self.name or stem_of(self.path)


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
    allow_special_tokens_in_data: bool = key(
        True,
        "whether records may spell special tokens, as `</s>`, which the model reads as such; they are counted at the "
        "start. false: such records cannot be used, see corrupt_data",
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
    save: str = key("", "directory for adapter checkpoints; empty: save nothing")
    load: str = key("", "directory of adapter checkpoints to start or go on from")
    resume: str = key(
        "off",
        "`auto`: go on from the newest checkpoint in `save` if there is one, else start as `load` says",
        choices=("off", "auto"),
    )
    overwrite: bool = key(
        False, "a run that starts anew removes the checkpoints and reports that another one has left in `save`"
    )
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

    @property
    def last_iteration(self) -> int:
        """The step after which the run ends."""
        return min(self.train_iters, self.exit_interval or self.train_iters)


@dataclass
class LogConfig:
    """What is reported, how often, and where to."""

    log_interval: int = key(10, "steps between reports", minimum=1)
    loggers: list[str] = key(
        ["console", "tensorboard", "jsonl"],
        "where reports go: `console`; `tensorboard`; `jsonl`, a file of one line per report in `save`; `wandb` and "
        "`mlflow`, of the extras of these names",
    )
    tensorboard_dir: str = key("", "TensorBoard log directory; default: save/tensorboard")
    picture_interval: int = key(
        100, "steps between pictures of the routing; 0: only at the end", minimum=0, cure="set 0 for the end only"
    )
    log_sites: bool = key(False, "also report load and entropy of every adapted projection by itself")
    profile_steps: list[int] = key(
        [],
        "first and last step of a profile, which every rank writes to `profile` in tensorboard_dir or `save`; empty: "
        "none",
        minimum=1,
        cure="write for example [10,15]",
    )
    device_peak_tflops: float = key(
        0.0,
        "dense TFLOP/s of a device at its best, which `mfu` is a share of; 0: of the data sheet, for devices whose "
        "data sheet is known",
        minimum=0,
        cure="set 0 for that of the data sheet",
    )
    wandb_project: str = key("malora_dist", "project of Weights & Biases", required=True)
    wandb_name: str = key("", "what Weights & Biases calls the run; default: the last part of `save`")
    mlflow_tracking_uri: str = key(
        "",
        "MLflow's store: `sqlite:///FILE` or a server's address; default: as MLflow itself, $MLFLOW_TRACKING_URI or "
        "`mlflow.db` in the working directory",
    )
    mlflow_experiment: str = key("malora_dist", "experiment of MLflow", required=True)
