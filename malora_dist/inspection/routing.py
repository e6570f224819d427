"""Which experts the tokens of real samples take: one forward pass of the Hugging Face model with the adapter."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from malora_dist.checkpoint.convert import fingerprint_hf
from malora_dist.data.segments import Example
from malora_dist.data.tokenization import TokenizedExample, encode_example, fit
from malora_dist.errors import CheckpointError, ConfigError
from malora_dist.hf.evaluate import load_adapter, load_base, load_tasks
from malora_dist.hf.export import write_peft_adapter
from malora_dist.hf.layer import MaloraLayer, RoutedTokens
from malora_dist.inspection.source import Adapter
from malora_dist.methods.routing import Routing, mutual_information, routing_sums

#: Where a layer's number stands in the name of a linear.
_SITE = re.compile(r"\blayers\.(\d+)\.\w+\.(\w+)$")
#: (0-based layer, projection).
Site = tuple[int, str]
Track = Callable[[Sequence[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class Samples:
    """What is read of the data.

    Attributes:
        per_task: at most so many samples of each task, spread over its file.
        seq_length: longer samples lose the start of their prompt, as in training; None: the model's context.
        shown: so many of them are coloured.
    """

    per_task: int = 64
    seq_length: int | None = None
    shown: int = 2
    batch_size: int = 8


class Token(NamedTuple):
    """One token of a coloured sample.

    Attributes:
        experts: those it went to, that of the largest gate first, with their gates.
        is_answer: whether training takes a loss on it.
    """

    text: str
    experts: tuple[tuple[int, float], ...]
    is_answer: bool


class ColouredSample(NamedTuple):
    """A sample, token by token."""

    task: str
    source: str
    tokens: list[Token]


@dataclass(frozen=True)
class Routed:
    """How the tokens of some samples were routed.

    Attributes:
        tasks: {task: (samples, tokens)}.
        slots: tokens' top-k slots that went to each expert. [tasks, layers, projections, N]
        site: (layer, projection) that the samples are coloured by.
        samples: coloured.
    """

    tasks: dict[str, tuple[int, int]]
    slots: np.ndarray
    site: Site
    samples: list[ColouredSample]

    @property
    def information(self) -> np.ndarray:
        """I(task; expert) in bits. [layers, projections]"""
        return information_of(self.slots)

    @property
    def telling(self) -> np.ndarray:
        """What chooses a site: the above, or of one task how uneven its routing is. [layers, projections]"""
        return telling_of(self.slots)

    @property
    def shares(self) -> np.ndarray:
        """Of each task's slots, those that went to each expert. [tasks, layers, projections, N]"""
        return self.slots / self.slots.sum(axis=-1, keepdims=True)


def information_of(slots: np.ndarray) -> np.ndarray:
    """I(task; expert) in bits of slots [tasks, layers, projections, N]. [layers, projections]"""
    return mutual_information(torch.from_numpy(np.moveaxis(slots, 0, -2))).numpy()


def telling_of(slots: np.ndarray) -> np.ndarray:
    """How much a site's routing has to tell, of slots [tasks, layers, projections, N]. [layers, projections]"""
    if len(slots) > 1:
        return information_of(slots)
    shares = slots[0] / slots[0].sum(axis=-1, keepdims=True)
    return np.square(shares).sum(axis=-1)


def route_samples(
    adapter: Adapter, hf_model: Path, files: Sequence[Path], samples: Samples, site: Site | None, track: Track
) -> Routed:
    """Run some samples of each file through the model.

    Args:
        files: a task each, in the formats that training reads.
        site: (layer, projection) to colour tokens by; None: where routing tells most of the task, or with one task
            where it is least even.

    Raises:
        CheckpointError: `hf_model` is not the adapter's base.
        DataError: a file cannot be used.
        ConfigError: the adapter has no such site.
    """
    if site is not None:
        check_site(adapter, site)
    model, tokenizer = load_model(adapter, hf_model)
    context = int(model.config.max_position_embeddings)
    length = min(samples.seq_length or context, context)
    tasks = {
        name: [_encoded(example, tokenizer, length) for example in spread(examples, samples.per_task)]
        for name, examples in load_tasks(files, tokenizer, None)
    }
    slots = np.stack([_count(adapter, model, rows, samples.batch_size, track, name) for name, rows in tasks.items()])
    site = site or most_telling(adapter, slots)
    chosen = [(name, row) for name, rows in tasks.items() for row in rows[: samples.shown]]
    coloured = [_colour(model, tokenizer, name, row, site) for name, row in track(chosen, "colour samples")]
    counts = {name: (len(rows), sum(len(row.token_ids) for row in rows)) for name, rows in tasks.items()}
    return Routed(counts, slots, site, coloured)


def check_site(adapter: Adapter, site: Site) -> None:
    """Refuse a site that the adapter has not.

    Raises:
        ConfigError: naming option and value.
    """
    layer, projection = site
    if not 0 <= layer < adapter.num_layers:
        rule = f"must lie in [0, {adapter.num_layers - 1}]"
        raise ConfigError("--layer", layer, rule, "name one of the adapter's layers")
    if projection not in adapter.spec.projections:
        rule = f"must be one of {', '.join(adapter.spec.projections)}"
        raise ConfigError("--projection", projection, rule, "name one that the adapter is on")


def load_model(adapter: Adapter, hf_model: Path) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The base with the adapter on it, on the GPU if there is one.

    Raises:
        CheckpointError: `hf_model` is no model, or not the adapter's base.
    """
    base, tokenizer = load_base(hf_model)
    if adapter.base_fingerprint and (found := fingerprint_hf(hf_model)) != adapter.base_fingerprint:
        raise CheckpointError(
            f"--hf-model {hf_model}: has fingerprint {found[:12]}, but the adapter was trained on "
            f"{adapter.base_model_name_or_path} with {adapter.base_fingerprint[:12]}; name that model"
        )
    with tempfile.TemporaryDirectory(prefix="malora-inspect-") as scratch:
        exported = Path(scratch) / "peft"
        origin = adapter.base_model_name_or_path, adapter.base_fingerprint
        write_peft_adapter(exported, adapter.spec, adapter.tensors, *origin)
        model: Any = load_adapter(base, exported)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """At most so many, at even distances: files are often sorted."""
    if len(examples) <= count:
        return list(examples)
    return [examples[i * len(examples) // count] for i in range(count)]


def most_telling(adapter: Adapter, slots: np.ndarray) -> Site:
    """The site of the highest mutual information of task and expert; of one task, that with the fewest experts in use.

    Args:
        slots: [tasks, layers, projections, N]
    """
    score = telling_of(slots)
    layer, projection = np.unravel_index(int(score.argmax()), score.shape)
    return int(layer), adapter.spec.projections[int(projection)]


def _encoded(example: Example, tokenizer: PreTrainedTokenizerBase, length: int) -> TokenizedExample:
    fitted = fit(encode_example(example, tokenizer), length, "truncate")
    assert fitted is not None  # only overlong="drop" gives None
    return fitted


@contextmanager
def recorded(model: torch.nn.Module) -> Iterator[Mapping[Site, list[RoutedTokens]]]:
    """Inside it every adapted linear notes its routings under its site."""
    layers = {
        (int(found[1]), found[2]): module
        for name, module in model.named_modules()
        if isinstance(module, MaloraLayer) and (found := _SITE.search(name))
    }
    log: dict[Site, list[RoutedTokens]] = {site: [] for site in layers}
    for site, layer in layers.items():
        layer.routing_log = log[site]
    try:
        yield log
    finally:
        for layer in layers.values():
            layer.routing_log = None


def _count(
    adapter: Adapter, model: PeftModel, rows: Sequence[TokenizedExample], batch_size: int, track: Track, name: str
) -> np.ndarray:
    """Slots of one task. [layers, projections, N]"""
    slots = np.zeros((adapter.num_layers, len(adapter.spec.projections), adapter.method.num_experts))
    order = sorted(rows, key=lambda row: len(row.token_ids))  # little padding
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for batch in track(batches, f"route {name}"):
        routings, valid_T = _forward(model, batch)
        for (layer, projection), routing in routings.items():
            found, _ = routing_sums(routing, valid_T)
            slots[layer, adapter.spec.projections.index(projection)] += found.cpu().numpy()
    return slots


@torch.inference_mode()
def _forward(model: PeftModel, rows: Sequence[TokenizedExample]) -> tuple[dict[Site, Routing], Tensor]:
    """({site: routing of [rows * longest] tokens}, False on padding)."""
    longest = max(len(row.token_ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row.token_ids)] = torch.tensor(row.token_ids)
        mask[i, : len(row.token_ids)] = 1
    language_model: Any = model.get_base_model()
    device = next(model.parameters()).device
    with recorded(model) as log:  # without the output layer, whose logits would be the largest tensor
        language_model.base_model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
    return {site: notes[0].routing for site, notes in log.items()}, mask.reshape(-1).bool().to(device)


def _colour(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, task: str, row: TokenizedExample, site: Site
) -> ColouredSample:
    routings, _ = _forward(model, [row])
    routing = routings[site]
    experts = [
        tuple(zip(experts, gates, strict=True))
        for experts, gates in zip(routing.experts_TK.tolist(), routing.gates_TK.tolist(), strict=True)
    ]
    texts = pieces(tokenizer, row.token_ids)
    return ColouredSample(task, row.source, [Token(*token) for token in zip(texts, experts, row.trained, strict=True)])


def pieces(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; joined they are the whole of it.

    Decoded by themselves, tokens would lose their spaces, and a character of several tokens would be none.
    """
    found, before = [], ""
    for end in range(1, len(token_ids) + 1):
        text = tokenizer.decode(list(token_ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(token_ids):
            found.append("")  # the first bytes of a character: the token that ends it shows it
            continue
        found.append(text.removeprefix(before) if text.startswith(before) else text[len(before) :])
        before = text
    return found
