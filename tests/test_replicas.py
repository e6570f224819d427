"""Replicas that differ in one bit are noticed, named, and not saved."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from malora_dist.training.replicas import Replica, checksum, describe_differences
from tests.layouts import find
from tests.test_parity import overrides
from tests.workers import WorkerPool


@pytest.mark.parametrize(("dtype", "as_bits"), [(torch.float32, torch.int32), (torch.bfloat16, torch.int16)])
def test_every_flipped_bit_changes_the_checksum(dtype: torch.dtype, as_bits: torch.dtype) -> None:
    tensor = torch.randn(7, 5).to(dtype)
    width, bits = 8 * dtype.itemsize, tensor.view(-1).view(as_bits)
    expected = sum(int(value) * (2 * i + 1) for i, value in enumerate(bits)) % 2**64
    assert int(checksum(tensor)) % 2**64 == expected, "exact, modulo 2^64"
    found = {int(checksum(tensor))}
    for index in range(tensor.numel()):
        for bit in range(width):
            mask = torch.tensor(1 << bit, dtype=torch.int64).to(as_bits)
            bits[index] ^= mask
            found.add(int(checksum(tensor)))
            bits[index] ^= mask
    assert len(found) == 1 + width * tensor.numel()


def test_what_else_the_checksum_sees() -> None:
    tensor = torch.arange(12.0).view(3, 4)
    assert checksum(tensor) != checksum(tensor.flip(0)), "elements that change places"
    assert checksum(tensor.t()) == checksum(tensor.t().contiguous()), "values, not how they are stored"
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0])), "bits, not numbers"
    assert checksum(torch.full((2,), torch.nan)) == checksum(torch.full((2,), torch.nan))
    assert checksum(torch.empty(0)) == 0


def test_who_differs() -> None:
    """Of three or more the odd one out; of two, and where there is no majority, all that should be equal."""
    s, p = Replica("S", 0, 0), Replica("P", 0, 1)
    assert describe_differences([{s: 1}, {s: 1}, {s: 2}, {s: 1}]) == (
        "the copy of S on rank 2 differs from that on ranks 0, 1 and 3"
    )
    assert describe_differences([{s: 1}, {s: 2}]) == "the copies of S on ranks 0 and 1 should be equal and differ"
    assert describe_differences([{s: 1}, {s: 2, p: 4}, {s: 3}, {s: 1, p: 5}]) == (
        "the copy of S, and of 1 more parameters on ranks 1 and 2 differs from that on ranks 0 and 3"
    )
    assert describe_differences([{s: 1}, {s: 2}, {s: 1}, {s: 2}]).startswith("the copies of S on ranks 0, 1, 2 and 3 ")
    many = describe_differences([{s: int(rank == 19)} for rank in range(20)])
    assert many.endswith("on rank 19 differs from that on ranks 0, 1, 2, 3, 4, 5, 6, 7 and 11 more")


Q, O_PROJ = (
    "decoder.layers.{}.self_attention.linear_qkv.adapters.q_proj.{}",
    ("decoder.layers.{}.self_attention.linear_proj.adapters.o_proj.{}"),
)

#: (layout, [(rank, parameter, what is said)]); "" where nobody else has it.
FLIPPED = [
    (
        "DP 4, EP 2",
        [
            (2, Q.format(1, "S"), "on rank 2 differs from that on ranks 0, 1 and 3;"),
            (0, Q.format(0, "router"), "on rank 0 differs from that on ranks 1, 2 and 3;"),
            (3, Q.format(0, "P"), "on ranks 1 and 3 should be equal and differ;"),
            (0, O_PROJ.format(1, "B"), "on ranks 0 and 2 should be equal and differ;"),
        ],
    ),
    (
        "TP 2, EP 2",
        [
            (3, Q.format(1, "S"), "on rank 3 differs from that on ranks 0, 1 and 2;"),
            (1, Q.format(0, "P"), "on ranks 0 and 1 should be equal and differ;"),
            (1, Q.format(0, "B"), ""),  # its output is sharded, its experts are
            (3, O_PROJ.format(1, "S"), "on ranks 1 and 3 should be equal and differ;"),  # its input is sharded
            (2, O_PROJ.format(1, "B"), "on ranks 2 and 3 should be equal and differ;"),
        ],
    ),
    ("PP 2", [(1, Q.format(1, "S"), "")]),
]


@pytest.mark.parametrize(("name", "flips"), FLIPPED, ids=[name for name, _ in FLIPPED])
def test_one_flipped_bit_is_named_and_not_saved(
    name: str, flips: list[tuple[int, str, str]], workers: WorkerPool, base_dir: Path, task_files: list[Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    layout, rng = find(name), random.Random(0)
    settings = overrides(base_dir, task_files, *layout.settings, "eval_iters=0", f"save={tmp_path}")
    settings.append(f"use_distributed_optimizer={str(layout.dp > 2).lower()}")
    flipped = [(rank, parameter, rng.randrange(32)) for rank, parameter, _ in flips]
    for said in workers.run("jobs_guards:replicas_after_flips", layout.processes, overrides=settings, flips=flipped):
        for (_, parameter, expected), error in zip(flips, said, strict=True):
            assert expected in error, error
            assert bool(expected) == bool(error), error
            assert not error or f" of {parameter} on rank" in error, error
    assert len(list(tmp_path.glob("iter_*"))) == sum(not expected for *_, expected in flips)
