"""Scores of questions through the trainer's own model, in one process: each answer's loss, and whether it is right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from malora_dist.config_sections import TaskConfig
from malora_dist.data.batches import Sample, collate, pack
from malora_dist.data.formats import load_examples
from malora_dist.data.records import read_records
from malora_dist.data.segments import Example, Segment
from malora_dist.data.tokenization import TokenizedExample, encode_example, fit
from malora_dist.errors import DataError
from malora_dist.layers.token_info import TokenInfo
from malora_dist.training.trainer import Trainer


class Answers(NamedTuple):
    """Of every sample: the sum of its answer's losses, their number, and whether each token is the likeliest."""

    loss: Tensor
    tokens: Tensor
    greedy: Tensor


@torch.no_grad()
def score_samples(trainer: Trainer, samples: Sequence[TokenizedExample], pad: int, positions: int = 4096) -> Answers:
    """Teacher-forced answers; greedy decoding gives an answer exactly if each of its tokens, EOS too, is the likeliest.

    Args:
        positions: about so many go through the model at once.
    """
    (model,) = trainer.ddp
    model.eval()
    loss, tokens = torch.zeros(len(samples), dtype=torch.float64), torch.zeros(len(samples), dtype=torch.int64)
    greedy = torch.ones(len(samples), dtype=torch.bool)
    trainer.plan.begin_step()
    # The microbatch's "task" of a sample is its number here: that is how a position finds its sample again.
    numbered: list[Sample] = list(enumerate(samples))
    for rows in _batches(pack(numbered, max(len(sample.token_ids) for sample in samples)), positions):
        batch = collate(rows, pad, multiple_of=8)
        device = trainer.topology.device
        sample_L = batch.token_task_BS.t().flatten()[batch.answers_L] - 1
        info = TokenInfo(
            tasks_BS=batch.token_task_BS.clamp(max=1).to(device),
            documents_BS=None if batch.document_BS is None else batch.document_BS.to(device),
            answers_L=batch.answers_L.to(device),
        )
        logits = model(batch.tokens_BS.to(device), batch.position_ids_BS.to(device), None, packed_seq_params=info)
        logits_LV = logits.flatten(0, 1).float().cpu()
        labels_L = batch.labels_BS.t().flatten()[batch.answers_L]
        loss.index_add_(0, sample_L, F.cross_entropy(logits_LV, labels_L, reduction="none").double())
        tokens.index_add_(0, sample_L, torch.ones_like(sample_L))
        greedy[sample_L[logits_LV.argmax(-1) != labels_L]] = False
    trainer.plan.end_step(with_gradients=False)
    return Answers(loss, tokens, greedy)


def score_file(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, file: Path, kind: str, seq_length: int
) -> dict[str, Any]:
    """Scores of a test file.

    Returns:
        ``questions``; ``loss`` and ``tokens``, sums over the right answers; ``losses``, each question's
        mean; unless the kind is ``loss``, ``right``, a string of 0 and 1.
    """
    pad = int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    if kind == "choice":
        samples, starts, wanted = _options(file, tokenizer, seq_length)
        answers = score_samples(trainer, samples, pad)
        chosen = [int(answers.loss[a:b].argmin()) for a, b in zip(starts, [*starts[1:], len(samples)], strict=True)]
        right = [int(one == other) for one, other in zip(chosen, wanted, strict=True)]
        index = torch.tensor([start + one for start, one in zip(starts, wanted, strict=True)])
        answers = Answers(*(part[index] for part in answers))
    else:
        examples = load_examples(TaskConfig(name=file.stem, path=str(file)), tokenizer)
        answers = score_samples(trainer, [_encode(example, tokenizer, seq_length) for example in examples], pad)
        right = answers.greedy.int().tolist()
    means = answers.loss / answers.tokens
    scores = {
        "questions": len(means),
        "loss": float(answers.loss.sum()),
        "tokens": int(answers.tokens.sum()),
        "losses": [round(value, 4) for value in means.tolist()],
    }
    return scores if kind == "loss" else scores | {"right": "".join(map(str, right))}


def _batches(rows: Sequence[list[Sample]], positions: int) -> list[list[list[Sample]]]:
    """Rows in groups of about so many positions."""
    longest = max(sum(len(sample.token_ids) for _, sample in row) for row in rows)
    size = max(1, positions // longest)
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]


def _encode(example: Example, tokenizer: PreTrainedTokenizerBase, seq_length: int) -> TokenizedExample:
    fitted = fit(encode_example(example, tokenizer), seq_length, "truncate")
    assert fitted is not None  # only overlong="drop" gives None
    return fitted


def _options(
    file: Path, tokenizer: PreTrainedTokenizerBase, seq_length: int
) -> tuple[list[TokenizedExample], list[int], list[int]]:
    """(prompt and option of every question, where each question starts, the right option's number)."""
    samples: list[TokenizedExample] = []
    starts, wanted = [], []
    for where, record in read_records(str(file)):
        options, right = record["options"], record["right"]
        if not 0 <= right < len(options):
            raise DataError(f"{where}: right={right} is no option of {len(options)}; mend or remove the record")
        starts.append(len(samples))
        wanted.append(right)
        for option in options:
            segments = (Segment(record["prompt"], trained=False), Segment(option, trained=True))
            samples.append(_encode(Example(segments, reference="", source=where), tokenizer, seq_length))
    return samples, starts, wanted
