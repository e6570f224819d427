"""The PEFT tuner against the formulas, and every behaviour PEFT users expect of a tuner."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from malora_dist.errors import CheckpointError, ConfigError, MaloraError
from malora_dist.hf import MaloraConfig, MaloraLayer
from malora_dist.methods.base import METHODS
from malora_dist.methods.initial import initial_parameter
from tests.hf_models import (
    PAD,
    PARAMETERS,
    TUNED,
    adapted,
    adapter_config,
    assert_same_gradients,
    batch,
    formula,
    inputs,
    logits,
    parameters_of,
    randomise,
    tiny_llama,
)


@contextlib.contextmanager
def literal_forward(model: PeftModel, valid_T: Tensor) -> Iterator[list[Tensor]]:
    """Replace the layers' maths by the formulas; yields the list of load-balancing losses."""
    losses: list[Tensor] = []

    def forward(layer: MaloraLayer, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        params, x_TI = parameters_of(layer), args[0].flatten(0, 1)
        y, loss = formula(layer.adapter_configs["default"], params, x_TI, layer.base_layer.weight, valid_T)
        losses.append(loss)
        return y.view_as(output)

    layers = [m for m in model.modules() if isinstance(m, MaloraLayer)]
    hooks = [layer.register_forward_hook(forward) for layer in layers]
    try:
        yield losses
    finally:
        for hook in hooks:
            hook.remove()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_these_are_all_the_methods() -> None:
    ours = {name: method for name, method in METHODS.items() if method.__module__.startswith("malora_dist.methods.")}
    assert {name: set(method.parameters) for name, method in ours.items()} == {k: {*v} for k, v in PARAMETERS.items()}
    assert {name for name, method in ours.items() if method.peft is None} == set(TUNED)


@pytest.mark.parametrize(
    ("method", "changes", "frozen"),
    [
        *((method, {}, "A" if method == "mo_asymmetric_lora" else "") for method in TUNED),
        ("malora", {"topk": 1}, ""),
        ("malora", {"norm_topk_prob": False, "use_rslora": True, "lora_alpha": 6.0}, ""),
        ("malora", {"freeze": ["S"]}, "S"),
    ],
)
def test_forward_loss_and_gradients_equal_the_formulas(method: str, changes: dict[str, Any], frozen: str) -> None:
    model, data = adapted(method, **changes).train(), batch()
    ours = model(**data)
    ours.loss.backward()
    our_gradients = gradients(model)
    with literal_forward(model, data["attention_mask"].flatten().bool()) as losses:
        theirs = model.get_base_model()(**data)  # the base's own loss, without the tuner's addition
        total = theirs.loss + sum(losses)
    total.backward()
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.loss, total)
    assert len(losses) == 2 * 7
    assert_same_gradients(our_gradients, gradients(model))
    assert {name.split(".")[-2] for name in our_gradients} == {f"malora_{n}" for n in TUNED[method] if n != frozen}
    assert len(our_gradients) == 2 * 7 * (len(TUNED[method]) - bool(frozen))
    assert all(g.abs().max() > 0 for g in our_gradients.values())


@pytest.mark.parametrize("method", TUNED)
def test_start_values_are_those_of_the_other_side_and_leave_the_base_unchanged(method: str) -> None:
    base = logits(tiny_llama())
    config = adapter_config(method, seed=7, beta=0.5)
    model = get_peft_model(tiny_llama(torch.bfloat16), config)
    for name, value in parameters_of(model.get_base_model().model.layers[1].mlp.down_proj).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, initial_parameter(config.declared, name, 48, 32, 7, 1, "down_proj"))
    assert torch.equal(logits(get_peft_model(tiny_llama(), adapter_config(method))), base)


def test_ranks_and_scalings_have_the_method_s_defaults() -> None:
    def settings(method: str) -> tuple[object, ...]:
        config = MaloraConfig(method=method)
        return config.lora_rank, config.lora_alpha, config.shared_dim, config.beta

    assert settings("malora") == (12, 24.0, 32, 1.0)
    assert settings("hydralora")[:2] == (8, 16.0)


def test_only_adapters_train_and_saved_target_modules_are_sorted(tmp_path: Path) -> None:
    model = adapted(target_modules={"v_proj", "linear_fc2", "q_proj"})
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {
        "malora_router",
        "malora_S",
        "malora_P",
        "malora_B",
    }
    model.save_pretrained(tmp_path)
    assert MaloraConfig.from_pretrained(tmp_path).target_modules == ["down_proj", "q_proj", "v_proj"]
    linears = [
        f"layers.{i}.{linear}" for i in (0, 1) for linear in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    ]
    keys = {
        f"base_model.model.model.{linear}.malora_{name}" for linear in linears for name in ("router", "S", "P", "B")
    }
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == keys


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lora"}, r"method='lora': .*use peft.LoraConfig\(use_dora=False\)"),
        ({"method": "dora"}, r"method='dora': .*use peft.LoraConfig\(use_dora=True\)"),
        ({"method": "qlora"}, "method='qlora': must be one of asymmetric_lora, dora, "),
        ({"method": "malora_unshared", "shared_dim": 6}, "shared_dim=6: must be divisible by num_lora_experts=4"),
        ({"freeze": ["A"]}, "freeze='A': is no parameter of method=malora"),
        ({"fuse_projections": True}, "fuse_projections=True: must be false"),
        ({"beta": 0.0}, "beta=0.0: must be above 0"),
        ({"rank_expansion": 1.25}, "rank_expansion=1.25: is of MALoRA in a former form of this project"),
        ({"target_modules": "q_.*"}, "target_modules='q_.*': must be a list"),
        ({"target_modules": ["lm_head"]}, "target_modules='lm_head': must be one of q_proj"),
        ({"topk": 9}, "topk=9: must not exceed num_lora_experts=4"),
    ],
)
def test_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapter_config(**changes)


@pytest.mark.parametrize(
    "loader", ["PeftModel", "AutoPeftModelForCausalLM", "AutoModelForCausalLM", "load_adapter", "low_cpu_mem"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_logits_are_bit_identical(loader: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_llama(dtype).save_pretrained(tmp_path / "base")

    def base() -> LlamaForCausalLM:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)

    model = get_peft_model(base(), adapter_config(base_fingerprint="abc"))
    randomise(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    if loader == "AutoPeftModelForCausalLM":
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=dtype)
        assert loaded.peft_config["default"].base_fingerprint == "abc"
    elif loader == "AutoModelForCausalLM":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=dtype)
    elif loader == "load_adapter":
        loaded = get_peft_model(base(), adapter_config("molora"))
        loaded.load_adapter(tmp_path / "adapter", "second")
        loaded.set_adapter("second")
    else:
        low = loader == "low_cpu_mem"
        loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter", low_cpu_mem_usage=low)
    assert torch.equal(logits(loaded), expected)
    assert not torch.equal(logits(base()), expected)


def drop_one(tensors: dict[str, Tensor]) -> None:
    del tensors["base_model.model.model.layers.1.mlp.gate_proj.malora_P"]


def add_one(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.layers.9.mlp.up_proj.malora_P"] = torch.ones(1)


def narrow_one(tensors: dict[str, Tensor]) -> None:
    key = "base_model.model.model.layers.0.mlp.up_proj.malora_S"
    tensors[key] = tensors[key][:, :1].clone()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_one, r"1 missing: .*1\.mlp\.gate_proj\.malora_P"),
        (add_one, r"1 unexpected: .*layers\.9"),
        (narrow_one, r"1 of another shape: .*up_proj.malora_S.* is \[8, 1\] instead of \[8, 32\]"),
    ],
)
@pytest.mark.parametrize("through", ["from_pretrained", "load_adapter"])
def test_loading_is_strict(
    through: str, damage: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    load = {
        "from_pretrained": lambda: PeftModel.from_pretrained(tiny_llama(), tmp_path),
        "load_adapter": lambda: model.load_adapter(tmp_path, "second"),
    }
    with pytest.raises(CheckpointError, match=message):
        load[through]()


def test_several_adapters_switch_disable_and_delete() -> None:
    base = logits(tiny_llama())
    model = adapted("malora")
    first = logits(model)
    model.add_adapter("second", adapter_config("molora", target_modules=["q_proj", "up_proj"]))
    randomise(model, adapter="second")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.allclose(second, first, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("default")
    assert "default" not in model.get_base_model().model.layers[0].self_attn.q_proj.adapter_configs
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    assert torch.equal(logits(model.unload()), base)


def test_modules_to_save_travel_with_the_adapter(tmp_path: Path) -> None:
    model = adapted(modules_to_save=["lm_head"])
    assert model.get_base_model().lm_head.weight.requires_grad
    model.get_base_model().lm_head.weight.data.mul_(2.0)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), expected)


@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_adapter(),
        lambda model: model.get_base_model().model.layers[0].mlp.up_proj.merge(),
    ],
)
def test_merging_is_refused(merge: Callable[[PeftModel], None]) -> None:
    model = adapted(modules_to_save=["embed_tokens"])
    modules = str(model)
    with pytest.raises(MaloraError, match="no static merged weight"):
        merge(model)
    assert str(model) == modules


def test_generation_with_a_cache_equals_generation_without() -> None:
    model, data = adapted().eval(), inputs(length=5)
    with torch.no_grad():
        cached, plain = (
            model.generate(**data, max_new_tokens=8, do_sample=False, eos_token_id=None, use_cache=use_cache)
            for use_cache in (True, False)
        )
    assert cached.shape == (2, 13)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_reentrant_checkpointing_changes_nothing(dtype: torch.dtype) -> None:
    model, data = adapted(dtype=dtype, lora_dropout=0.3).train(), batch()
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        losses = [model(**data).loss, model(**batch(seed=3)).loss]  # two graphs at once: no state may be shared
        sum(losses).backward()
        found.append((torch.stack(losses), gradients(model)))
        assert not any(m.routing_log for m in model.modules() if isinstance(m, MaloraLayer))
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(found[0][0], found[1][0])
    assert_same_gradients(found[0][1], found[1][1], tolerance=1e-6)


def test_reentrant_checkpointing_is_refused() -> None:
    model = adapted().train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ConfigError, match="use_reentrant"):
        model(**batch())


def test_auxiliary_loss_ignores_padding_and_cached_tokens() -> None:
    model = adapted().train()
    short = batch(rows=1, length=6)
    short["labels"][:, 0] = -100  # never a target, also not behind padding
    fill = {"input_ids": PAD, "attention_mask": 0, "labels": -100}
    padded = {k: torch.nn.functional.pad(v, (3, 0), value=fill[k]) for k, v in short.items()}
    torch.testing.assert_close(model(**padded).loss, model(**short).loss)
    with pytest.raises(ConfigError, match="attention_mask"):
        model(**batch(rows=1, length=4) | {"attention_mask": torch.ones(1, 4, 4, 4, dtype=torch.bool)})


def test_auxiliary_loss_only_in_training_and_only_with_the_adapter() -> None:
    model, data = adapted().train(), batch()
    with_it, as_tuple = model(**data).loss, model(**data, return_dict=False)[0]
    assert torch.equal(with_it, as_tuple)
    ids, mask, labels = data.values()
    assert torch.equal(with_it, model.base_model(ids, mask, None, None, None, labels).loss)
    without = model.eval()(**data).loss
    # 14 linears, each at least coeff (f and p both uniform)
    assert with_it - without >= 14 * 0.1 * 0.99
    with model.train().disable_adapter():
        assert torch.equal(model(**data).loss, tiny_llama()(**data).loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_router_in_float32(dtype: torch.dtype) -> None:
    layer = adapted().get_base_model().model.layers[0].self_attn.q_proj
    layer.routing_log = []
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert layer(x).dtype == dtype
    router = layer.malora_router["default"].detach()
    # Another order of summation in float32; bfloat16 would be off by 1e-3.
    expected = (x @ router.T).softmax(dim=-1)
    torch.testing.assert_close(layer.routing_log[0].routing.probs_TN, expected, rtol=1e-5, atol=1e-6)


def test_a_hook_on_the_base_sees_the_base_alone() -> None:
    """Adapters add to the base's output in place, but not to one that somebody may have kept."""
    layer = adapted().get_base_model().model.layers[0].self_attn.q_proj
    torch.nn.init.ones_(layer.malora_B["default"])
    kept: list[Tensor] = []
    layer.base_layer.register_forward_hook(lambda _module, _args, output: kept.append(output))
    x = torch.randn(3, 32)
    with torch.no_grad():
        assert not torch.equal(layer(x), kept[0])
        assert torch.equal(torch.nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias), kept[0])
