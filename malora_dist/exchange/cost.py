"""What expert parallelism moves, in bytes: the rule behind ``dispatch: auto``.

Either the tokens go to the experts (all_to_all) or the experts come to the tokens (gather_experts).
Bytes are those one rank sends in one optimizer step, forward and backward, for one adapter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from malora_dist.methods.spec import AdapterSpec

#: float32, of adapters and their gradients.
_PARAMETER_BYTES = 4
#: Copies of one adapter's experts that are too small to ask what they are beside.
_SMALL = 4 * 2**20


@dataclass(frozen=True)
class AdapterShape:
    """One adapter on one rank.

    Attributes:
        in_features, out_features: n and m of the projection (m of all of them, if several share the adapter).
        is_column: beside a column-parallel linear, whose output is sharded over TP; else row-parallel.
        tensor_parallel: TP.
    """

    in_features: int
    out_features: int
    is_column: bool
    tensor_parallel: int = 1


def expected_ranks(num_experts: int, topk: int, ep: int) -> float:
    """Ranks that hold at least one of a token's experts, on average over uniform routing; at most min(k, EP)."""
    elsewhere = math.comb(num_experts - num_experts // ep, topk) / math.comb(num_experts, topk)
    return ep * (1 - elsewhere)


def all_to_all_bytes(spec: AdapterSpec, shape: AdapterShape, ep: int, tokens: int, itemsize: int) -> float:
    """One row per (token, rank) out, one back, and their gradients.

    With R = expected_ranks: 2 T R (EP - 1) / EP (z + E + m) numbers, z = d for MALoRA and n for MoLoRA;
    under TP each rank sends for its sequence shard (row: T / TP, m) or its share of the output (column: T, m / TP).

    Args:
        tokens: T, of one data-parallel rank in one optimizer step.
        itemsize: bytes of an activation.
    """
    tp = shape.tensor_parallel
    gates = spec.num_experts // ep
    if shape.is_column:
        back = tokens * shape.out_features / tp
        out = (
            tokens * (spec.shared_dim + gates) if spec.method == "malora" else tokens / tp * (shape.in_features + gates)
        )
    else:
        back = tokens / tp * shape.out_features
        out = (
            tokens / tp * (spec.shared_dim + gates)
            if spec.method == "malora"
            else tokens * (shape.in_features / tp + gates)
        )
    rows = expected_ranks(spec.num_experts, spec.topk, ep) * (ep - 1) / ep
    return 2 * rows * (out + back) * itemsize


def gathered_numbers(spec: AdapterSpec, shape: AdapterShape) -> int:
    """Numbers in all experts' parameters of the adapter, on one tensor-parallel rank."""
    tp = shape.tensor_parallel
    inner = spec.num_experts * spec.expert_rank
    down = spec.shared_dim if spec.method == "malora" else shape.in_features // (1 if shape.is_column else tp)
    return inner * (down + shape.out_features // (tp if shape.is_column else 1))


def gather_experts_bytes(spec: AdapterSpec, shape: AdapterShape, ep: int) -> float:
    """All-gather of the weights and reduce-scatter of the gradients, once: 2 (EP - 1) / EP N r' (d + m) numbers."""
    return 2 * (ep - 1) / ep * gathered_numbers(spec, shape) * _PARAMETER_BYTES


def gathered_memory(spec: AdapterSpec, shape: AdapterShape) -> int:
    """Bytes of the full copy and its gradient that gather_experts keeps through a step."""
    return 2 * gathered_numbers(spec, shape) * _PARAMETER_BYTES


def cheaper_dispatch(spec: AdapterSpec, shape: AdapterShape, ep: int, tokens: int, itemsize: int) -> str:
    """``gather_experts`` where it sends fewer bytes and its copies are small, else ``all_to_all``.

    Small: no larger than the frozen linear beside the adapter, or than 4 MiB. For the arguments see
    :func:`all_to_all_bytes`.
    """
    frozen = shape.in_features * shape.out_features // shape.tensor_parallel * itemsize
    fits = gathered_memory(spec, shape) <= max(frozen, _SMALL)
    fewer = gather_experts_bytes(spec, shape, ep) <= all_to_all_bytes(spec, shape, ep, tokens, itemsize)
    return "gather_experts" if fits and fewer else "all_to_all"
