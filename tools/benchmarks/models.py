"""What the benchmarks train: random Llamas, samples of one exact length, trainers in one process or several."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import random
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from logging import ERROR, getLogger
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from malora_dist.checkpoint.convert import import_hf
from malora_dist.config_file import load_config
from malora_dist.parallel import topology as layout
from malora_dist.parallel.device import without_expected_warnings
from malora_dist.parallel.topology import Topology

if TYPE_CHECKING:
    from malora_dist.training.trainer import Trainer

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def llama_config(hidden: int, layers: int, ffn: int, heads: int, kv_heads: int, vocab: int) -> LlamaConfig:
    """A Llama of these widths, embeddings untied."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=1 << 16,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def llama_like(hidden: int, layers: int, vocab: int = 1024, head_dim: int = 128) -> LlamaConfig:
    """A Llama with Llama 2's proportions at another width: ffn 8/3 of hidden, rounded up to a multiple of 256."""
    heads = max(hidden // head_dim, 1)
    return llama_config(hidden, layers, -(-8 * hidden // (3 * 256)) * 256, heads, heads, vocab)


def write_llama(config: LlamaConfig, directory: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A random Llama in Hugging Face's format, with a tokenizer of one token per space-separated number."""
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(directory)
    words = [*SPECIAL_TOKENS, *map(str, range(len(SPECIAL_TOKENS), config.vocab_size))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, bos, eos = SPECIAL_TOKENS
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, bos_token=bos, eos_token=eos).save_pretrained(
        directory
    )
    return directory


def write_samples(
    file: Path, vocab: int, positions: int, samples: int = 32, answers: float = 1.0, seed: int = 0
) -> Path:
    """A task whose every sample takes ``positions`` positions, a share of them (``answers``) with a loss.

    A sample is ``positions`` + 1 tokens, EOS included: the last one is only a label.
    """
    prompt = positions + 1 - round(positions * answers)
    rng = random.Random(seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as out:
        for _ in range(samples):
            words = [str(rng.randrange(len(SPECIAL_TOKENS), vocab)) for _ in range(positions)]
            record = {"prompt": " ".join(words[:prompt]), "completion": " " + " ".join(words[prompt:])}
            out.write(json.dumps(record) + "\n")
    return file


@dataclass(frozen=True)
class Inputs:
    """Files of one benchmark model.

    Attributes:
        hf: the Llama in Hugging Face's format.
        base: the same, converted for megatron.
        task: the samples.
        positions: of each sample.
    """

    hf: Path
    base: Path
    task: Path
    positions: int
    dtype: torch.dtype

    def overrides(self, *more: str, micro_batch_size: int = 1, global_batch_size: int = 1) -> list[str]:
        """Config keys of a run on these files without padding, evaluation or checkpoints; ``more`` come last."""
        return [
            f"pretrained_checkpoint={self.base}",
            f"data=[{{path: '{self.task}'}}]",
            f"seq_length={self.positions + 1}",
            f"bf16={str(self.dtype is torch.bfloat16).lower()}",
            "validation_samples=0",
            "eval_iters=0",
            f"micro_batch_size={micro_batch_size}",
            f"global_batch_size={global_batch_size}",
            *more,
        ]


def write_inputs(
    directory: Path,
    config: LlamaConfig,
    positions: int,
    dtype: torch.dtype = torch.float32,
    samples: int = 32,
    answers: float = 1.0,
) -> Inputs:
    """Write a random Llama, its conversion and its samples below ``directory``."""
    hf = write_llama(config, directory / "hf", dtype)
    import_hf(hf, directory / "base")
    task = write_samples(directory / "task.jsonl", config.vocab_size, positions, samples, answers)
    return Inputs(hf, directory / "base", task, positions, dtype)


def build_trainer(overrides: Sequence[str], topology: Topology | None = None) -> Trainer:
    """A trainer of these config keys.

    Args:
        topology: of a trainer built before in this process, for one more on the same layout; None: join the process
            group. Whoever built the first one calls ``malora_dist.parallel.topology.destroy()`` at the end.

    Raises:
        MaloraError: config keys or files that cannot work.
    """
    getLogger("megatron").setLevel(ERROR)
    config = load_config(None, overrides)
    config.validate(layout.world_size_from_env())
    with without_expected_warnings():
        topology = topology or layout.initialize(config, config.seed)
        from malora_dist.training.trainer import Trainer  # after initialize, which adapts megatron to the device

        return Trainer(config, topology)


def resident(field: str) -> int:
    """Bytes in a field of /proc/self/status: VmRSS now, VmHWM at its highest. Linux only."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes held at the highest point of ``run``, above what was held before it.

    On a CPU resident memory, which includes what the allocator keeps of freed tensors: measure in a process from
    ``spawn(..., for_memory=True)``.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    CLEAR_REFS.write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


class Processes:
    """Processes on this machine that live until :func:`spawn` ends; each holds one object of the same class."""

    def __init__(self, pipes: Sequence[Connection]) -> None:
        self._pipes = pipes

    def call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call a method of every process's object at the same time; the results by rank.

        Raises:
            RuntimeError: it failed on a rank, with that rank's traceback; or a process ended.
        """
        for pipe in self._pipes:
            pipe.send((method, args, kwargs))
        return self.results()

    def results(self) -> list[Any]:
        """What every process sent last, by rank; a failure as soon as it comes, since the others may wait for it."""
        results: dict[int, Any] = {}
        while len(results) < len(self._pipes):
            for pipe in wait([pipe for rank, pipe in enumerate(self._pipes) if rank not in results]):
                assert isinstance(pipe, Connection)
                rank = self._pipes.index(pipe)
                try:
                    is_ok, value = pipe.recv()
                except EOFError as error:
                    raise RuntimeError(f"process {rank} of {len(self._pipes)} ended without an answer") from error
                if not is_ok:
                    raise RuntimeError(f"process {rank} of {len(self._pipes)} failed:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(len(self._pipes))]


@contextlib.contextmanager
def spawn(worker: Callable[[], Any], processes: int, threads: int = 1, for_memory: bool = False) -> Iterator[Processes]:
    """Start processes in which torch.distributed finds its rendezvous, and make an object in each.

    Args:
        worker: a class (or function) of a module's top level that makes the object.
        threads: of torch in each process.
        for_memory: glibc returns freed blocks of 128 KB and more at once. That is its default until it meets larger
            ones; what it then keeps varies by a fifth from run to run.

    Raises:
        RuntimeError: the object could not be made.
    """
    if for_memory:  # children inherit it; this process has read it already
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(128 << 10)
    context = multiprocessing.get_context("spawn")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    children, pipes = [], []
    try:
        for rank in range(processes):
            here, there = context.Pipe()
            environment = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": str(threads),
            }  # fmt: skip
            child = context.Process(target=_serve, args=(there, worker, environment, threads))
            child.start()
            there.close()
            children.append(child)
            pipes.append(here)
        started = Processes(pipes)
        started.results()
        yield started
    finally:
        for pipe in pipes:
            pipe.close()
        for child in children:
            child.join(timeout=20)
            if child.is_alive():  # stuck in a collective that another rank never joins
                child.terminate()
                child.join()


def _serve(pipe: Connection, worker: Callable[[], Any], environment: dict[str, str], threads: int) -> None:
    """A process's life: make the object, then answer calls until the parent closes the pipe."""
    os.environ.update(environment)
    torch.set_num_threads(threads)
    is_ok, made = _attempt(worker)
    with contextlib.suppress(EOFError, OSError):
        pipe.send((is_ok, None if is_ok else made))
        while True:
            method, args, kwargs = pipe.recv()
            pipe.send(_attempt(lambda: getattr(made, method)(*args, **kwargs)))  # noqa: B023  called at once
    if torch.distributed.is_initialized():
        layout.destroy()


def _attempt(function: Callable[[], Any]) -> tuple[bool, Any]:
    """(True, its result) or (False, the traceback)."""
    try:
        return True, function()
    except Exception:  # noqa: BLE001  whatever it is, the parent shall see it
        return False, traceback.format_exc()
