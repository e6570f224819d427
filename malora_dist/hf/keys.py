"""Names of an adapter's tensors in a Hugging Face model, and the strict comparison PEFT lacks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from malora_dist.errors import CheckpointError, first_few
from malora_dist.methods.spec import AdapterSpec

#: (0-based layer number, Hugging Face projection name, parameter name)
TensorKey = tuple[int, str, str]

#: Entries of an export's safetensors metadata: what a LoraConfig has no field for.
METADATA_BASE = "base_fingerprint"
METADATA_METHOD = "method"

#: What PEFT puts before the base model's own module names in a saved adapter.
SAVED_PREFIX = "base_model.model."

_SHOWN = 8


def saved_key(spec: AdapterSpec, layer_number: int, projection: str, name: str) -> str:
    """Key of one tensor in adapter_model.safetensors, e.g. ``....q_proj.malora_S`` or ``....q_proj.lora_A.weight``."""
    block = "self_attn" if projection in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    peft = spec.declared.peft
    suffix = f"malora_{name}" if peft is None else peft.names[name]
    return f"{SAVED_PREFIX}model.layers.{layer_number}.{block}.{projection}.{suffix}"


def check_complete(source: str, spec: AdapterSpec, tensors: Mapping[TensorKey, Tensor], cure: str) -> None:
    """Check keys and shapes of a whole adapter, the widths of a projection being those of its first complete layer.

    Raises:
        CheckpointError: as :func:`check_tensors`, with keys such as ``layers.0.q_proj.B``.
    """
    method = spec.declared
    layers = range(max((layer for layer, _, _ in tensors), default=0) + 1)
    expected: dict[str, tuple[int, ...]] = {}
    for projection in spec.projections:

        def width(axis: str, projection: str = projection) -> int:
            """Of the first tensor that shows it; 0 if none does."""
            for i, (name, param) in itertools.product(layers, method.parameters.items()):
                tensor = tensors.get((i, projection, name))
                if axis in param.axes and tensor is not None and tensor.dim() == len(param.axes):
                    return tensor.shape[param.axes.index(axis)]
            return 0

        for name in method.parameters:
            shape = method.shape(name, width("in"), width("out"))
            expected |= {_readable((i, projection, name)): shape for i in layers}
    check_tensors(source, expected, {_readable(key): t.shape for key, t in tensors.items()}, cure)


def _readable(key: TensorKey) -> str:
    return f"layers.{key[0]}.{key[1]}.{key[2]}"


def check_tensors(
    source: str, expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], cure: str
) -> None:
    """Check that `found` has exactly the expected keys and shapes.

    Args:
        source: what `found` is, the start of the error message.
        expected: {key: shape}. `found` likewise.
        cure: what the user can do about it, the end of the error message.

    Raises:
        CheckpointError: one line listing missing keys, unexpected keys and other shapes.
    """
    shapes = [
        f"{key} is {list(found[key])} instead of {list(shape)}"
        for key, shape in expected.items()
        if key in found and tuple(found[key]) != tuple(shape)
    ]
    problems = (
        _listing("missing", expected.keys() - found.keys()),
        _listing("unexpected", found.keys() - expected.keys()),
        _listing("of another shape", shapes),
    )
    if any(problems):
        raise CheckpointError(f"{source}: {'; '.join(filter(None, problems))}; {cure}")


def _listing(kind: str, items: Iterable[str]) -> str:
    names = sorted(items)
    if not names:
        return ""
    return f"{len(names)} {kind}: {first_few(names, _SHOWN)}"
