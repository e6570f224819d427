"""The PEFT tuner against a literal loop, and every behaviour PEFT users expect of a tuner."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

from malora_dist.errors import CheckpointError, ConfigError, MaloraError
from malora_dist.hf import MaloraConfig, MaloraLayer
from malora_dist.hf.keys import saved_key
from malora_dist.methods.start import initial_parameter
from tests.hf_models import PAD, adapted, adapter_config, batch, inputs, logits, randomise, tiny_llama

METHODS = ("molora", "malora")


def literal_layer(
    config: MaloraConfig, params: dict[str, Tensor], x_TI: Tensor, valid_T: Tensor
) -> tuple[Tensor, Tensor]:
    """The formulas of README.md, token by token and expert by expert: (delta [T, M], load-balancing loss [])."""
    rows, counts, probabilities = [], torch.zeros(config.num_lora_experts), torch.zeros(config.num_lora_experts)
    for x, valid in zip(x_TI, valid_T, strict=True):
        p = torch.softmax(params["router"].float() @ x.float(), dim=0)
        chosen = p.argsort(descending=True)[: config.topk]
        gates = p[chosen] / p[chosen].sum() if config.norm_topk_prob and config.topk > 1 else p[chosen]
        down = params["P"] @ params["S"] if config.method == "malora" else params["A"]
        experts = zip(gates, chosen, strict=True)
        rows.append(sum(config.scaling * gate * (params["B"][e] @ (down[e] @ x)) for gate, e in experts))
        if valid:
            counts[chosen] += 1 / config.topk
            probabilities = probabilities + p
    share = counts / valid_T.sum() * (probabilities / valid_T.sum())
    return torch.stack(rows), config.aux_loss_coeff * config.num_lora_experts * share.sum()


@contextlib.contextmanager
def literal_forward(model: PeftModel, valid_T: Tensor) -> Iterator[list[Tensor]]:
    """Replace the layers' maths by the literal loop; yields the list of load-balancing losses."""
    losses: list[Tensor] = []

    def forward(layer: MaloraLayer, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        config = layer.adapter_configs["default"]
        params = {name: getattr(layer, f"malora_{name}")["default"] for name in config.parameter_names}
        delta, loss = literal_layer(config, params, args[0].flatten(0, 1), valid_T)
        losses.append(loss)
        return layer.base_layer(args[0]) + delta.view_as(output)

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


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=tolerance, atol=tolerance * 0.1, msg=name)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("malora", {}),
        ("molora", {}),
        ("malora", {"topk": 1}),
        ("malora", {"norm_topk_prob": False, "use_rslora": True}),
    ],
)
def test_forward_loss_and_gradients_equal_the_literal_loop(method: str, changes: dict[str, Any]) -> None:
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
    expected = {n for n, p in model.named_parameters() if "malora_" in n}
    assert our_gradients.keys() == expected
    assert all(g.abs().max() > 0 for g in our_gradients.values())


@pytest.mark.parametrize("method", METHODS)
def test_start_values_are_those_of_the_other_side_and_leave_the_base_unchanged(method: str) -> None:
    base = logits(tiny_llama())
    model = get_peft_model(tiny_llama(torch.bfloat16), adapter_config(method, seed=7))
    config = model.peft_config["default"]
    down = model.get_base_model().model.layers[1].mlp.down_proj
    for name in config.parameter_names:
        value = getattr(down, f"malora_{name}")["default"]
        assert value.dtype == torch.float32
        assert torch.equal(value, initial_parameter(config, name, 48, 32, 7, 1, "down_proj"))
    assert torch.equal(logits(get_peft_model(tiny_llama(), adapter_config(method))), base)


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
    config, keys = model.peft_config["default"], set(load_file(tmp_path / "adapter_model.safetensors"))
    linears = [(layer, projection) for layer in (0, 1) for projection in ("q_proj", "v_proj", "down_proj")]
    assert keys == {saved_key(config, *linear, name) for linear in linears for name in ("router", "S", "P", "B")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lora"}, "method='lora': .*LoraConfig"),
        ({"target_modules": "q_.*"}, "target_modules='q_.*': must be a list"),
        ({"target_modules": ["lm_head"]}, "target_modules='lm_head': matches no projection"),
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
        (narrow_one, r"1 of another shape: .*up_proj.malora_S.* is \[6, 1\] instead of \[6, 32\]"),
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


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, rows: list[dict[str, Tensor]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.rows[i]


def train(
    model: PeftModel, rows: list[dict[str, Tensor]], accumulation: int, directory: Path
) -> tuple[float, dict[str, Tensor]]:
    """One optimizer step of transformers' Trainer over all rows: (logged loss, trained parameters)."""
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=len(rows) // accumulation,
        max_steps=1,
        logging_steps=1,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        lr_scheduler_type="constant",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Samples(rows))
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return logged, {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_trainer_counts_the_auxiliary_loss_once_per_step(tmp_path: Path) -> None:
    """Four equal samples: the product of averages is then the same for one batch of 4 and for 4 microbatches of 1."""
    row = {k: v[0] for k, v in batch(rows=1, length=8).items()}
    row["labels"][:3] = -100
    results = [train(adapted(aux_loss_coeff=1.0), [row] * 4, steps, tmp_path) for steps in (1, 4)]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    assert_same_gradients(results[0][1], results[1][1])


def test_trainer_weights_microbatches_by_their_answer_tokens(tmp_path: Path) -> None:
    rows = [{k: v[0] for k, v in batch(rows=1, length=8, seed=s).items()} for s in (3, 4)]
    rows[0]["labels"][:6] = -100  # 2 and 7 answer tokens: position 0 is never a target
    model = adapted(aux_loss_coeff=1.0).train()
    both = [model(**{k: v.unsqueeze(0) for k, v in row.items()}).loss.item() for row in rows]
    logged, _ = train(copy.deepcopy(model), rows, 2, tmp_path)
    assert logged == pytest.approx((2 * both[0] + 7 * both[1]) / 9, rel=1e-3)
