"""Real megatron models on a CPU load what `import_hf` writes, at two layouts."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch.multiprocessing import start_processes
from transformers import LlamaConfig, LlamaForCausalLM

from malora_dist.adapters.spec import AdapterSpec
from malora_dist.checkpoint.base import checkpoint_dir, hf_dir, read_base_info
from malora_dist.checkpoint.convert import import_hf
from malora_dist.checkpoint.tensor_files import HfWeights, TorchDistReader
from malora_dist.models.hf_config import read_llama_config
from malora_dist.models.hf_conversion import conversion_map

if TYPE_CHECKING:
    from malora_dist.parallel.topology import Topology

TOKENS = [[3, 14, 15, 92, 65, 35, 89, 79]]


def make_llama(directory: Path, **fields: object) -> Path:
    """A tiny random Llama; the vocabulary is odd, so that TP=2 has to pad it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    config = LlamaConfig(**sizes | {"num_attention_heads": 4, "num_key_value_heads": 2} | fields)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def launch(directory: Path, tp: int, pp: int) -> None:
    """Run the worker on tp * pp processes, forked from a server that has imported megatron once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(["torch", "transformers", "malora_dist.checkpoint.adapter"])
    start_processes(worker, (directory, tp, pp, port), nprocs=tp * pp, start_method="forkserver")


LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
MODELS: dict[str, dict] = {
    "tied-gqa": {"tie_word_embeddings": True},
    "mha-head_dim-llama3": {
        "num_key_value_heads": 4, "head_dim": 16, "rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 128
    },
}  # fmt: skip


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """{name: directory with the model in hf/ and its conversion in base/}."""
    for name, fields in MODELS.items():
        import_hf(make_llama(tmp_path / name / "hf", **fields), tmp_path / name / "base")
    return {name: tmp_path / name for name in MODELS}


def test_megatron_computes_the_same_logits(tmp_path: Path, models: dict[str, Path]) -> None:
    launch(tmp_path, tp=1, pp=1)
    for name, directory in models.items():
        with torch.no_grad():
            expected = LlamaForCausalLM.from_pretrained(directory / "hf")(torch.tensor(TOKENS)).logits
        found = torch.load(directory / "out" / "logits.pt")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_any_layout_loads_the_same_bits(tmp_path: Path, models: dict[str, Path]) -> None:
    """TP=2 x PP=2 loads the base and saves it in its own chunks; read back, they are the Hugging Face tensors."""
    launch(tmp_path, tp=2, pp=2)
    for name, directory in models.items():
        weights = HfWeights(directory / "hf")
        resaved = TorchDistReader(directory / "out")
        assert resaved.tensors.keys() == TorchDistReader(checkpoint_dir(directory / "base")).tensors.keys()
        for chunk in conversion_map(read_llama_config(directory / "hf")):
            for key, tensor in chunk.split(resaved.read(chunk.key, chunk.offset, chunk.shape)).items():
                assert torch.equal(tensor, weights.read(key)), (name, key)
        embedding = resaved.read("embedding.word_embeddings.weight")
        assert embedding.shape[0] == 102, "TP=2 pads the vocabulary"
        assert not embedding[101].any()


def worker(rank: int, directory: Path, tp: int, pp: int, port: int) -> None:
    """At one layout, for each model: load the base; at one process write logits, else save it again."""
    from malora_dist.config import ParallelConfig
    from malora_dist.parallel import topology as topologies

    torch.set_num_threads(1)
    rendezvous = {"RANK": rank, "WORLD_SIZE": tp * pp, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in rendezvous.items()})
    config = ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, sequence_parallel=tp > 1, device="cpu"
    )
    topology = topologies.initialize(config)
    for name in MODELS:
        load_and_write(directory / name / "base", directory / name / "out", topology)
    topologies.destroy()


def load_and_write(base: Path, out: Path, topology: Topology) -> None:
    """The worker's part for one model."""
    from megatron.core import dist_checkpointing

    from malora_dist.checkpoint.adapter import load_base_weights
    from malora_dist.dispatch.factory import make_dispatcher
    from malora_dist.models.adapted_linear import AdapterSettings, is_adapter_key
    from malora_dist.models.llama import build_llama, transformer_config
    from malora_dist.models.routing_context import RoutingContext

    read_base_info(base)
    hf = read_llama_config(hf_dir(base))
    spec = AdapterSpec()
    dispatcher = make_dispatcher("local", spec.num_experts, topology.ep_group, topology.device)
    settings = AdapterSettings(spec, topology, dispatcher, RoutingContext(), seed=0)
    model = build_llama(hf, transformer_config(hf, topology, topology.tp_size > 1, bf16=False), settings, 64)

    def base_shards() -> dict:
        sharded = model.sharded_state_dict(metadata={"dp_cp_group": topology.dp_group})
        return {key: value for key, value in sharded.items() if not is_adapter_key(key)}

    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))  # what is not loaded shows
    # Every key of the base is on disk, megatron's empty `_extra_state` objects included.
    dist_checkpointing.load(base_shards(), str(checkpoint_dir(base)))
    load_base_weights(checkpoint_dir(base), model, topology)
    out.mkdir(exist_ok=True)
    if topology.world_size > 1:
        torch.distributed.barrier()
        dist_checkpointing.save(base_shards(), str(out))
        return
    for name, parameter in model.named_parameters():
        if is_adapter_key(name):
            parameter.data.zero_()
    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        torch.save(model(tokens, torch.arange(tokens.shape[1])[None], None), out / "logits.pt")
