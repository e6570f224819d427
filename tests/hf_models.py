"""A tiny random Llama, its adapters and inputs, and the methods' formulas, for the tests of malora_dist.hf."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from malora_dist.hf import MaloraConfig, MaloraLayer
from malora_dist.methods.spec import AdapterSpec

VOCABULARY, PAD = 64, 0

#: {method: its parameters in stock PEFT}, {method of the tuner: its parameters}.
STOCK = {"lora": ("A", "B"), "asymmetric_lora": ("A", "B"), "dora": ("A", "B", "magnitude")}
TUNED = {
    "molora": ("router", "A", "B"),
    "mo_asymmetric_lora": ("router", "A", "B"),
    "molora_equal_start": ("router", "A", "B"),
    "hydralora": ("router", "A", "B"),
    "malora": ("router", "S", "P", "B"),
    "malora_unshared": ("router", "S", "P", "B"),
    "malora_b": ("router", "A", "P", "S"),
}
PARAMETERS = {**STOCK, **TUNED}


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


def formula(
    spec: AdapterSpec, params: Mapping[str, Tensor], x_TI: Tensor, weight_OI: Tensor, valid_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """README.md's table, token by token and expert by expert: (output [T, O], load-balancing loss [])."""
    assert spec.lora_rank is not None
    assert spec.lora_alpha is not None
    s = spec.lora_alpha / (math.sqrt(spec.lora_rank) if spec.use_rslora else spec.lora_rank)
    if spec.method in STOCK:
        whole = weight_OI + s * params["B"] @ params["A"]
        if spec.method == "dora":
            whole = params["magnitude"][:, None] * whole / whole.detach().norm(dim=1, keepdim=True)
        return x_TI @ whole.t(), torch.zeros(())
    rows = []
    counts, sums = torch.zeros(spec.num_lora_experts), torch.zeros(spec.num_lora_experts)
    valid_T = torch.ones(len(x_TI), dtype=torch.bool) if valid_T is None else valid_T
    for x, valid in zip(x_TI, valid_T, strict=True):
        p = torch.softmax(params["router"].float() @ x.float(), dim=0)
        chosen = p.argsort(descending=True)[: spec.topk]
        gates = p[chosen] / p[chosen].sum() if spec.norm_topk_prob and spec.topk > 1 else p[chosen]
        added = [gate * (expert_matrix(spec.method, params, int(e)) @ x) for gate, e in zip(gates, chosen, strict=True)]
        rows.append(weight_OI @ x + s * torch.stack(added).sum(dim=0))
        if valid:
            counts[chosen] += 1 / spec.topk
            sums = sums + p
    shares = counts / valid_T.sum() * (sums / valid_T.sum())
    return torch.stack(rows), spec.aux_loss_coeff * spec.num_lora_experts * shares.sum()


def expert_matrix(method: str, p: Mapping[str, Tensor], e: int) -> Tensor:
    """What one expert multiplies x with. [O, I]"""
    if method == "malora":
        return p["B"][e] @ p["P"][e] @ p["S"]
    if method == "malora_unshared":
        return p["B"][e] @ p["P"][e] @ p["S"][e]
    if method == "malora_b":
        return p["S"] @ p["P"][e] @ p["A"][e]
    if method == "hydralora":
        return p["B"][e] @ p["A"]
    return p["B"][e] @ p["A"][e]


def adapter_config(method: str = "malora", **changes: Any) -> MaloraConfig:
    fields = dict(
        method=method, lora_rank=4, num_lora_experts=4, topk=2, shared_dim=8, task_type="CAUSAL_LM", aux_loss_coeff=0.1
    )
    return MaloraConfig(**(fields | changes))


def randomise(model: torch.nn.Module, seed: int = 1, adapter: str = "default") -> None:
    """Give values to what starts at zero, so that the adapters do something and every parameter has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "malora_" in name and name.endswith(f".{adapter}") and not parameter.any():
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


def parameters_of(layer: MaloraLayer, adapter: str = "default") -> dict[str, Tensor]:
    """An adapter's parameters by the method's names."""
    method = layer.adapter_configs[adapter].method
    return {name: getattr(layer, f"malora_{name}")[adapter] for name in TUNED[method]}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=tolerance, atol=tolerance * 0.1, msg=name)
