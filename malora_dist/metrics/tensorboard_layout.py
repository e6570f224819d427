"""What TensorBoard shows besides bare figures: the page of custom scalars, and the table of hyperparameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from malora_dist.metrics.loggers.base import RunDescription

#: The figures that runs are compared by.
COMPARED_FIGURES = ("lm loss", "lm loss validation", "accuracy validation", "tokens-per-second")
#: The settings that TensorBoard shows first.
FIRST_KEYS = ("method", "lora_rank", "num_lora_experts", "topk", "lr")
#: All of them; those of experts and of a shared subspace say something of the methods that have them alone.
_OF_ALL = (
    "method", "lora_rank", "lora_alpha", "lora_dropout", "lr", "lr_decay_style", "weight_decay", "train_iters",
    "global_batch_size", "micro_batch_size", "seq_length", "packing", "seed", "bf16", "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
)  # fmt: skip
_OF_EXPERTS = ("num_lora_experts", "topk", "aux_loss_coeff", "expert_model_parallel_size", "dispatch")
_OF_SHARED = ("shared_dim", "beta")


class Chart(NamedTuple):
    """Lines in one picture.

    Attributes:
        title: what it shows.
        tags: a regular expression; TensorBoard matches it from the start of a tag.
    """

    title: str
    tags: str


def charts(run: RunDescription) -> dict[str, list[Chart]]:
    """{question: what answers it}; a chart of figures that the run will not have is left out."""
    groups = {
        "Is it learning?": _learning(run),
        "Are the experts balanced?": _balance(run),
        "How fast is it?": _speed(run),
        "What does it move and hold?": _resources(run),
    }
    return {question: found for question, of_group in groups.items() if (found := list(of_group))}


def layout(run: RunDescription) -> dict[str, dict[str, list[object]]]:
    """The charts as torch.utils.tensorboard wants them."""
    return {
        question: {chart.title: ["Multiline", [chart.tags]] for chart in found}
        for question, found in charts(run).items()
    }


def _learning(run: RunDescription) -> Iterator[Chart]:
    yield Chart("training loss, by task", r"lm loss(/.*)?$")
    if run.evaluated:
        yield Chart("validation loss, by task", r"lm loss validation(/.*)?$")
        yield Chart("answer tokens right (accuracy validation), by task", r"accuracy validation(/.*)?$")


def _balance(run: RunDescription) -> Iterator[Chart]:
    if not run.config.is_mixture:
        return
    yield Chart("load of the busiest expert over the mean (1: even)", r"malora/balance/(median|p90|max)$")
    yield Chart("variation of the loads (0: even)", r"malora/load variation$")
    yield Chart("effective share of experts (1: even)", r"malora/effective experts$")
    yield Chart("share of experts without a token (dead)", r"malora/dead experts$")
    yield Chart("load-balancing loss, and its value at even loads", r"malora/(ideal )?aux loss$")
    if len(run.tasks) > 1:
        yield Chart("bits that the expert tells about the task", r"malora/task information( of the best site)?$")


def _speed(run: RunDescription) -> Iterator[Chart]:
    yield Chart("tokens per second", r"tokens-per-second(-per-device)?$")
    yield Chart("TFLOP/s per device", r"throughput$")
    if run.peak_tflops:
        yield Chart("model FLOPs utilisation", r"mfu$")
    yield Chart("seconds per step", r"iteration-time$")
    yield Chart("shares of a step's time", r"time share/")


def _resources(run: RunDescription) -> Iterator[Chart]:
    if run.world_size > 1:
        yield Chart("bytes that one rank moves in a step, by group", r"malora/bytes/")
    yield Chart("peak memory in GiB, of the fullest rank", r"memory/peak GiB$")


def compared(run: RunDescription, with_unused: bool = False) -> dict[str, str | int | float | bool]:
    """{key: value} of the settings that runs are compared by.

    Args:
        with_unused: also those that the run's method makes no use of.
    """
    config = run.config
    keys = list(_OF_ALL)
    if with_unused or config.is_mixture:
        keys += _OF_EXPERTS
    if with_unused or config.declared.uses("shared"):
        keys += _OF_SHARED
    return {key: getattr(config, key) for key in keys} | {"world_size": run.world_size}
