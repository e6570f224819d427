"""Which device a run uses, and the one place that adapts megatron-core to a CPU.

megatron-core names CUDA in its code (``device="cuda"``, ``torch.cuda.current_device()``, CUDA RNG
states). On a CPU run the modules listed in ``_MODULES`` get a view of ``torch`` in which those
names mean the CPU; ``torch`` itself, and every other library, stays as it is. The tests show that
this is enough for DDP, the optimizers (also the distributed one), the pipeline schedule, sequence
parallelism and distributed checkpoints, with megatron-core 0.16.1 and 0.19.2.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from malora_dist.errors import BackendUnavailableError
from malora_dist.parallel.distributed_optimizer import for_cpu, resumable

#: Factory functions that megatron calls with ``device="cuda"``.
_FACTORIES = ("empty", "empty_like", "ones", "tensor", "zeros", "zeros_like")

#: megatron-core modules that name CUDA on the paths a CPU run takes.
_MODULES = (
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.distributed.distributed_data_parallel",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.models.common.embeddings.rotary_pos_embedding",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.optimizer",
    "megatron.core.parallel_state",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.layers",
    "megatron.core.tensor_parallel.mappings",
    "megatron.core.tensor_parallel.random",
    "megatron.core.tensor_parallel.utils",
    "megatron.core.transformer.attention",
    "megatron.core.utils",
)

#: Warnings megatron-core causes by itself: at import, that optional packages are missing, which is
#: the normal state of a CPU machine (the start-up banner states what is in use instead); and in its
#: checkpointing and its distributed optimizer, that it calls deprecated functions of torch.
_EXPECTED_WARNINGS = (
    ".*`load_state_dict` is deprecated.*|.*`save_state_dict` is deprecated.*",
    ".*The argument order of load has been changed.*|.*assuming the intent is to load in a single process.*",
    ".*we are deprecating ShardedTensor.*",
    ".*(all_gather|reduce_scatter)(_into|_tensor|_base).* is deprecated.*",
    ".*[Tt]ransformer[ _][Ee]ngine.*",
    ".*[Aa]pex.*",
    ".*ModelOpt.*|.*modelopt.*",
    ".*MimoModelConfig is experimental.*",
    ".*nvidia-resiliency-ext.*|.*nvidia_resiliency_ext.*",
    ".*causal_conv1d.*|.*mamba.*|.*flash.*",
)


class _CpuCuda:
    """Stands for ``torch.cuda`` inside megatron-core's modules on a CPU run."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def synchronize(*_: object) -> None:
        """Nothing runs asynchronously on a CPU."""

    @staticmethod
    def current_stream(*_: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @staticmethod
    def stream(*_: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @staticmethod
    def empty_cache() -> None:
        """No cache to empty."""

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    @staticmethod
    def get_rng_state(*_: object, **__: object) -> torch.Tensor:
        return torch.get_rng_state()


class _CpuTorch:
    """Stands for ``torch`` inside megatron-core's modules on a CPU run."""

    def __init__(self) -> None:
        self.cuda = _CpuCuda()
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapped(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return factory(*args, device="cpu" if device == "cuda" else device, **kwargs)

    return wrapped


def _clip_grad_by_total_norm(
    parameters: list[torch.Tensor], max_norm: float, total_norm: float, use_decoupled_grad: bool = False
) -> None:
    """megatron's clip_grad_by_total_norm_fp32 without its assertion that gradients are CUDA tensors."""
    clip_coeff = max_norm / (total_norm + 1.0e-6)
    if clip_coeff < 1.0:
        for param in parameters:
            if param.grad is not None:
                param.grad.mul_(clip_coeff)


def choose_device(device: str) -> torch.device:
    """The torch device of this process for the config key ``device``.

    Raises:
        BackendUnavailableError: ``cuda`` on a machine where torch sees no GPU.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise BackendUnavailableError("device='cuda': torch sees no GPU on this machine; use device=cpu or device=auto")
    if device == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@contextlib.contextmanager
def without_expected_warnings() -> Iterator[None]:
    """Import megatron-core and call its checkpointing inside this; all other warnings are shown."""
    # megatron-core 0.19 imports it, and it logs that a machine has CUDA's compiler but no GPU.
    extensions = logging.getLogger("torch.utils.cpp_extension")
    level = extensions.level
    extensions.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for pattern in _EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message=pattern)
            yield
    finally:
        extensions.setLevel(level)


def adapt_megatron(device: torch.device) -> None:
    """Make megatron-core run on ``device``: the adaptation above on a CPU, next to nothing on CUDA."""
    with without_expected_warnings():
        modules: dict[str, ModuleType] = {name: importlib.import_module(name) for name in _MODULES}
    distributed = resumable(modules["megatron.core.optimizer.distrib_optimizer"].DistributedOptimizer)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        distributed = for_cpu(distributed)
        view = _CpuTorch()
        for module in modules.values():
            vars(module)["torch"] = view
        random = vars(modules["megatron.core.tensor_parallel.random"])
        random["_get_cuda_rng_state"] = lambda *_, **__: torch.get_rng_state()
        random["_set_cuda_rng_state"] = lambda state, *_, **__: torch.set_rng_state(state)
        optimizer = vars(modules["megatron.core.optimizer.optimizer"])
        # Not Transformer Engine's or apex's, which are CUDA kernels, where these are installed.
        utils = modules["megatron.core.utils"]
        for part in (vars(modules["megatron.core.optimizer.clip_grads"]), optimizer):
            part["multi_tensor_applier"] = utils.local_multi_tensor_applier
            part["multi_tensor_scale_impl"] = utils.local_multi_tensor_scale
            part["l2_norm_impl"] = utils.local_multi_tensor_l2_norm
        optimizer["clip_grad_by_total_norm_fp32"] = _clip_grad_by_total_norm
    vars(sys.modules["megatron.core.optimizer"])["DistributedOptimizer"] = distributed


def device_name(device: torch.device) -> str:
    """What kind of device it is: ``cpu``, or as its driver calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest: on CUDA of tensors since this was asked before; on a CPU of the whole process so far."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
