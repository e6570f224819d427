"""A tiny random Llama, its adapters and its inputs, for the tests of malora_dist.hf."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from malora_dist.hf import MaloraConfig

VOCABULARY, PAD = 64, 0


def tiny_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Two random layers, grouped-query attention, width 32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype)


def adapter_config(method: str = "malora", **changes: Any) -> MaloraConfig:
    fields = dict(
        method=method, lora_rank=4, num_lora_experts=4, topk=2, shared_dim=6, task_type="CAUSAL_LM", aux_loss_coeff=0.1
    )
    return MaloraConfig(**(fields | changes))


def randomise(model: torch.nn.Module, seed: int = 1, adapter: str = "default") -> None:
    """Give B values, so that the adapters do something and every parameter has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(f"malora_B.{adapter}"):
            parameter.data.normal_(std=0.2, generator=generator)


def adapted(method: str = "malora", dtype: torch.dtype = torch.float32, **changes: Any) -> PeftModel:
    model = get_peft_model(tiny_llama(dtype), adapter_config(method, **changes))
    randomise(model)
    return model


def batch(rows: int = 2, length: int = 7, seed: int = 2) -> dict[str, Tensor]:
    """Random tokens; the second row starts with two padding tokens."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def inputs(**given: Any) -> dict[str, Tensor]:
    return {k: v for k, v in batch(**given).items() if k != "labels"}


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs()).logits
