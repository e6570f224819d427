"""Small finished directories, damaged in every byte, cut off, swapped: each damage must be noticed by name."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from malora_dist.checkpoint.base import TRACKER_FILE
from malora_dist.checkpoint.convert import import_hf
from malora_dist.checkpoint.inspection import inspect
from malora_dist.checkpoint.start import newest_sound
from malora_dist.errors import MaloraError
from tests.conftest import ROOT, write_llama
from tests.fuzzing import PROPERTIES
from tools.torture.findings import Findings

#: After how many flipped bytes a file is damaged in another way, and `inspect` asked too.
_OTHER_EVERY = 20


class Flip(NamedTuple):
    """A byte of a file."""

    file: Path
    position: int


class Files:
    """A converted base and a run's two checkpoints, the newer of which is damaged."""

    def __init__(self, folder: Path, findings: Findings, seed: int) -> None:
        self.findings, self._rng = findings, random.Random(seed)
        one_layer = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8}
        write_llama(folder / "small-llama", **one_layer, num_attention_heads=2, num_key_value_heads=1)
        self._base, self._save = folder / "small-base", folder / "small-save"
        import_hf(folder / "small-llama", self._base)
        _train(folder, self._base, self._save)
        self._files = sorted(file for file in self._base.rglob("*") if file.is_file())
        self._files += sorted(file for file in (self._save / "iter_0000002").iterdir())
        self._files.append(self._save / TRACKER_FILE)
        self._contents = {file: file.read_bytes() for file in self._files}
        flips = [Flip(file, at) for file, content in self._contents.items() for at in range(len(content))]
        self.total = len(flips)
        self._rng.shuffle(flips)
        self._flips: Iterator[Flip] = iter(flips)
        self.flipped = 0

    def damage_one(self) -> None:
        """Flip the next byte that was not flipped yet; now and then, or if there is none left, do something else."""
        self.findings.counts["torn"] += 1
        flip = next(self._flips, None) if self.findings.counts["torn"] % _OTHER_EVERY else None
        if flip is not None:
            self.flipped += 1
            content = bytearray(self._contents[flip.file])
            content[flip.position] ^= 1 << self._rng.randrange(8)
            self._try(flip.file, bytes(content), f"byte {flip.position} flipped")
            return
        file = self._rng.choice(self._files)
        content = self._contents[file]
        how, damaged = self._rng.choice(list(_DAMAGES.items()))
        result = damaged(self._rng, content)
        if result != content:
            self._try(file, result, how)

    def _try(self, file: Path, content: bytes | None, how: str) -> None:
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        try:
            is_noticed = self._base_says(file) if self._base in file.parents else self._save_says(file)
            text = "" if is_noticed else "it is not noticed"
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
            text = f"{error!r}"
        file.write_bytes(self._contents[file])
        if text:
            self.findings.fault("wrong", f"{file}: {how}: {text}")

    def _base_says(self, file: Path) -> bool:
        (finding,) = inspect(self._base)
        return file.name in finding.fault or "cannot be verified" in finding.report

    def _save_says(self, file: Path) -> bool:
        """The checkpoint before it is used, and why is said; a tracker file that is damaged costs nothing."""
        start = newest_sound(self._save)
        is_named = any(file.name in note for note in start.notes)
        if file.name == TRACKER_FILE:
            return is_named or (start.directory.name == "iter_0000002" and not start.notes)
        if not is_named or start.directory.name != "iter_0000001":
            return False
        return self.flipped % _OTHER_EVERY != 0 or any(file.name in f.fault for f in inspect(file.parent))


def _zeroed(rng: random.Random, content: bytes) -> bytes:
    """A block that never reached the disk."""
    at = rng.randrange(len(content) + 1)
    size = len(content[at : at + 512])
    return content[:at] + b"\0" * size + content[at + size :]


_DAMAGES: dict[str, Callable[[random.Random, bytes], bytes | None]] = {
    "cut off": lambda rng, content: content[: rng.randrange(len(content) + 1)],
    "emptied": lambda rng, content: b"",
    "removed": lambda rng, content: None,
    "zeroed in part": _zeroed,
    "prolonged": lambda rng, content: content + rng.randbytes(rng.randrange(1, 100)),
}


def _train(folder: Path, base: Path, save: Path) -> None:
    """A run of one process and two steps, with as small a checkpoint as can be."""
    data = folder / "small.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    keys = [
        f"pretrained_checkpoint={base}", f"data=[{{path: {data}}}]", "device=cpu", "seq_length=16",
        "validation_samples=0", "eval_iters=0", "global_batch_size=1", "num_lora_experts=2", "topk=1", "lora_rank=1",
        "shared_dim=2", "target_modules=[q_proj]", "train_iters=2", "save_interval=1", f"save={save}",
        f"tensorboard_dir={folder / 'small-tensorboard'}",
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "malora_dist.train", *keys], cwd=ROOT, check=True, capture_output=True)


def fuzz(findings: Findings, name: str, seed: int) -> None:
    """One damaged input of a property in tests/fuzzing.py."""
    findings.counts["fuzzed"] += 1
    with tempfile.TemporaryDirectory(prefix="malora-torture-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what is damaged on purpose
        try:
            PROPERTIES[name](random.Random(seed), Path(folder))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
            refused = "refused badly" if isinstance(error, MaloraError) else "raises"
            findings.fault("wrong", f"tests/fuzzing.py, {name}, random.Random({seed}): {refused} {error!r}"[:1000])
