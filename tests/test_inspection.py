"""tools/inspect_adapter.py: its numbers against hand-made adapters, its page, and its errors."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from malora_dist.checkpoint.adapter_import import write_adapter_weights
from malora_dist.checkpoint.convert import AdapterWeights, fingerprint_hf
from malora_dist.hf.export import write_peft_adapter
from malora_dist.hf.keys import TensorKey
from malora_dist.inspection.geometry import Geometry, geometry_of
from malora_dist.inspection.page import Colouring, render
from malora_dist.inspection.report import LAYOUT, PAGE, Request, inspect_adapter, write_report
from malora_dist.inspection.routing import ColouredSample, Samples, Token, pieces, route_samples
from malora_dist.inspection.sections import Section, effective_rank
from malora_dist.inspection.sizes import size_table
from malora_dist.inspection.source import read_adapter
from malora_dist.inspection.subspaces import basis, overlap, spectrum
from malora_dist.methods.base import METHODS, Param
from malora_dist.methods.factors import product_norms, two_factors
from malora_dist.methods.malora import Malora
from malora_dist.methods.routing import mutual_information
from malora_dist.methods.spec import AdapterSpec
from tests.hf_models import PARAMETERS, STOCK, expert_matrix
from tests.test_docs import tool
from tests.test_new_method import ToyWide

WIDTHS = {"q_proj": (32, 32), "v_proj": (32, 16), "down_proj": (48, 32)}
EXPERTS, RANK, SHARED = 4, 3, 8
Change = Callable[[TensorKey, Tensor], None]


def quiet(items: Sequence[Any], doing: str) -> Sequence[Any]:
    """No progress bar."""
    return items


def spec_of(method: str, targets: Sequence[str] = tuple(WIDTHS), **changes: Any) -> AdapterSpec:
    fields = {"lora_rank": RANK, "lora_alpha": 6.0, "num_lora_experts": EXPERTS, "shared_dim": SHARED, "topk": 2}
    return AdapterSpec(method=method, target_modules=list(targets), **fields | changes)


def tensors_of(spec: AdapterSpec, change: Change | None = None) -> dict[TensorKey, Tensor]:
    """Random ones of two layers; `change` writes what a test wants into them."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        (layer, projection, name): torch.randn(
            spec.declared.shape(name, *WIDTHS[projection]), generator=generator
        )
        for layer in (0, 1)
        for projection in spec.projections
        for name in spec.declared.parameters
    }  # fmt: skip
    for key, tensor in tensors.items():
        if change is not None:
            change(key, tensor)
    return tensors


@pytest.fixture
def adapter(tmp_path: Path, llama_dir: Path) -> Callable[..., Path]:
    """Writes a PEFT adapter of the tiny Llama."""

    def write(method: str = "malora", change: Change | None = None, base: str = "", **changes: Any) -> Path:
        spec = spec_of(method, **changes)
        write_peft_adapter(tmp_path / "peft", spec, tensors_of(spec, change), str(llama_dir), base)
        return tmp_path / "peft"

    return write


def geometry(path: Path) -> Geometry:
    found = geometry_of(read_adapter(path))
    assert found is not None
    return found


# ---- subspaces.py


def test_overlap_of_spaces() -> None:
    """Of the planes xy and xz of three dimensions: one common direction of two."""
    xy, xz = torch.tensor([[1.0, 0, 0], [1, 2, 0]]), torch.tensor([[1.0, 0, 0], [0, 0, 5]])
    assert overlap(basis(xy), basis(xz)) == pytest.approx((0.5, 2 / 3))
    assert overlap(basis(xy), basis(xy[:1])) == pytest.approx((1.0, 2 / 3))
    assert basis(torch.tensor([[1.0, 1], [2, 2]])).shape == (1, 2)
    assert math.isnan(overlap(basis(xy), basis(torch.zeros(2, 3))).found)
    assert spectrum(torch.eye(6).view(2, 3, 6)).tolist() == pytest.approx([1.0] * 6)


def test_random_spaces_overlap_by_chance() -> None:
    torch.manual_seed(1)
    found = [overlap(*(basis(torch.randn(rank, 32)) for rank in (3, 5))) for _ in range(300)]
    assert np.mean([one.found for one in found]) == pytest.approx(found[0].by_chance, abs=0.01)
    assert found[0].by_chance == 5 / 32


# ---- methods/factors.py


@pytest.mark.parametrize("method", PARAMETERS)
def test_factors_are_what_an_expert_multiplies_with(method: str) -> None:
    spec = spec_of(method)
    factors = two_factors(spec.declared)
    assert factors is not None
    tensors = tensors_of(spec)
    p = {name: tensors[1, "down_proj", name].double() for name in spec.declared.parameters}
    matrices = factors.of(p)
    assert matrices.down.shape == (spec.num_experts, RANK, 48)
    assert matrices.up.shape == (spec.num_experts, RANK, 32)
    norms = product_norms(matrices)
    for e in range(spec.num_experts):
        expected = p["B"] @ p["A"] if method in STOCK else expert_matrix(method, p, e)
        torch.testing.assert_close(matrices.up[e].t() @ matrices.down[e], expected)
        assert float(norms[e]) == pytest.approx(float(expected.norm()))


class Turned(Malora):
    """MALoRA with P_t kept the other way round."""

    P = Param("expert", "shared", "rank")

    def expert(self, p: Mapping[str, Tensor], z_TD: Tensor) -> Tensor:
        return z_TD @ p["P"] @ p["B"].t()


def test_factors_have_a_parameter_the_way_it_is_declared() -> None:
    method = Turned(spec_of("malora"))
    p = {name: torch.randn(method.shape(name, 16, 24), dtype=torch.float64) for name in method.parameters}
    factors = two_factors(method)
    assert factors is not None
    torch.testing.assert_close(factors.of(p).down, p["P"].mT @ p["S"])


def test_every_method_has_factors_and_one_that_is_no_product_has_none() -> None:
    assert set(METHODS) == set(PARAMETERS), "the test above goes over all methods"
    assert two_factors(ToyWide(spec_of("molora"))) is None, "relu(A x) is not A x"


# ---- geometry.py


def test_equal_experts_are_alike_and_orthogonal_ones_are_not(adapter: Callable[..., Path]) -> None:
    """Experts 0 and 1 read from one space, 2 and 3 from others; B of expert 3 is still zero."""

    def change(key: TensorKey, tensor: Tensor) -> None:
        if key[2] == "A":
            rows = torch.eye(tensor.shape[-1])[: EXPERTS * RANK].view(EXPERTS, RANK, -1)
            tensor.copy_(rows)
            tensor[1] = torch.randn(RANK, RANK) @ rows[0]
        if key[2] == "B":
            tensor[3] = 0

    found = geometry(adapter("molora", change))
    pairs = found.likeness["down"].pairs
    assert pairs.shape == (2, len(WIDTHS), EXPERTS, EXPERTS)
    assert pairs[..., 0, 1] == pytest.approx(1.0)
    others = [pairs[..., i, j] for i in range(EXPERTS) for j in range(i) if (i, j) != (1, 0)]
    assert np.stack(others) == pytest.approx(0.0)
    assert found.likeness["down"].means == pytest.approx(1 / 6), "one pair of six"
    assert found.likeness["down"].by_chance[0] == pytest.approx([RANK / 32, RANK / 32, RANK / 48])
    assert np.isnan(found.likeness["up"].pairs[..., 3, :]).all()
    assert np.isfinite(found.likeness["up"].means).all(), "means leave out what is zero"
    assert (found.norms[..., 3] == 0).all()
    assert (found.norms[..., :3] > 0).all()
    assert len(found.spectra["down"]["q_proj"]) == EXPERTS * RANK
    assert effective_rank(found.spectra["down"]["q_proj"]) < (EXPERTS - 1) * RANK + 0.01, "two of four share a space"


def test_norms_have_the_scaling(adapter: Callable[..., Path]) -> None:
    found, read = geometry(adapter("malora")), read_adapter(adapter("malora"))
    p = read.parameters(1, "v_proj")
    expected = [6.0 / RANK * float((p["B"][e] @ p["P"][e] @ p["S"]).norm()) for e in range(EXPERTS)]
    assert found.norms[1, read.spec.projections.index("v_proj")] == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_compared_is_told(adapter: Callable[..., Path]) -> None:
    assert set(geometry(adapter("hydralora")).likeness) == {"up"}
    assert "share one down-projection" in geometry(adapter("hydralora")).left_out["down"]
    assert geometry(adapter("dora")).likeness == {}
    assert geometry(adapter("malora")).likeness["down"].within == pytest.approx(RANK / SHARED)
    assert geometry(adapter("malora_b")).likeness["up"].within == pytest.approx(RANK / SHARED)
    assert geometry(adapter("malora_b")).likeness["down"].within is None


# ---- routing.py


def test_mutual_information_by_hand() -> None:
    def bits(*slots: Sequence[float]) -> float:
        return float(mutual_information(torch.tensor(slots)))

    assert bits([8.0, 0], [0, 2.0]) == pytest.approx(1.0), "task A to expert 0, B to 1; sizes do not count"
    assert bits([9.0, 0], [4.0, 0]) == 0.0, "all to one expert"
    assert bits([5.0, 5], [1.0, 1]) == pytest.approx(0.0, abs=1e-12), "all even"
    assert bits([9.0, 0, 1], [0, 9.0, 1]) == pytest.approx(0.9)
    assert bits([8.0, 0], [0, 2.0], [0, 0]) == pytest.approx(1.0), "a task without tokens tells nothing"
    assert mutual_information(torch.tensor([[[8.0, 0], [0, 2.0]], [[1.0, 0], [1.0, 0]]])).tolist() == [1.0, 0.0]


@pytest.fixture
def telling_base(llama_dir: Path, tmp_path: Path) -> Path:
    """The tiny Llama with letters, digits and all else along axes of their own, and all tokens along a fourth."""
    model = LlamaForCausalLM.from_pretrained(llama_dir)
    embedding = model.get_input_embeddings().weight.data
    embedding[:] = torch.eye(32)[3]
    kinds = [0 if 3 <= i < 29 else 1 if 29 <= i < 39 else 2 for i in range(50)]  # as tests.conftest.ALPHABET has them
    embedding[range(50), kinds] = 1.0
    shutil.copytree(llama_dir, tmp_path / "telling")
    model.save_pretrained(tmp_path / "telling")
    return tmp_path / "telling"


@pytest.fixture
def telling_data(tmp_path: Path) -> list[Path]:
    """Letters of two lengths, so that batches are padded, and digits; the end of a sample is one token in ten."""
    files = []
    for name, texts in (("letters", ["abcdefghi", "jklm"]), ("digits", ["123456789", "1234"])):
        file = tmp_path / f"{name}.jsonl"
        rows = [{"prompt": text[:2], "completion": text[2:]} for text in texts]
        rows[1]["completion"] += rows[1]["completion"]
        file.write_text("\n".join(map(json.dumps, rows)))
        files.append(file)
    return files


def routed(path: Path, base: Path, data: Sequence[Path], **samples: Any) -> Any:
    return route_samples(read_adapter(path), base, data, Samples(**samples), None, quiet)


def test_routing_of_tokens_by_hand(adapter: Callable[..., Path], telling_base: Path, telling_data: list[Path]) -> None:
    """Layer 0 of q_proj sees the token alone: letters take expert 0, digits 1, the end of a sample 2."""

    def telling(key: TensorKey, tensor: Tensor) -> None:
        if key[2] == "router":
            tensor.copy_(10 * torch.eye(32)[:EXPERTS])
            tensor[3] = 0

    found = routed(adapter("molora", telling, targets=["q_proj"], topk=1), telling_base, telling_data, shown=1)
    (letters, digits), tokens = found.slots[:, 0, 0], [t for _, t in found.tasks.values()]
    assert tokens == [10 + 7, 10 + 7], "padding is not counted"
    assert letters.tolist() == [15, 0, 2, 0]
    assert digits.tolist() == [0, 15, 2, 0]
    assert found.information[0, 0] == pytest.approx(15 / 17)
    assert found.site == (0, "q_proj")
    assert [[t.experts[0][0] for t in sample.tokens] for sample in found.samples] == [[0] * 9 + [2], [1] * 9 + [2]]
    assert [t.is_answer for t in found.samples[0].tokens] == [False] * 2 + [True] * 8
    assert found.samples[0].tokens[0].experts == ((0, pytest.approx(1.0, abs=0.02)),)

    def one_for_all(key: TensorKey, tensor: Tensor) -> None:
        if key[2] == "router":
            tensor.zero_()
            tensor[3, 3] = 10.0

    found = routed(adapter("molora", one_for_all, targets=["q_proj"], topk=1), telling_base, telling_data)
    assert found.slots[:, 0, 0].tolist() == [[0, 0, 0, 17]] * 2
    assert found.information[0, 0] == 0.0


def test_pieces_join_to_the_text() -> None:
    """A character of two tokens is shown by the second; spaces stay."""

    class Bytes:
        def decode(self, ids: Sequence[int], **_: Any) -> str:
            return bytes(ids).decode(errors="replace")

    assert pieces(Bytes(), "a é".encode()) == ["a", " ", "", "é"]  # type: ignore[arg-type]
    assert pieces(Bytes(), "é".encode()[:1]) == ["\N{REPLACEMENT CHARACTER}"]  # type: ignore[arg-type]


# ---- sizes.py


def test_sizes_name_the_rank_that_makes_others_as_large(adapter: Callable[..., Path]) -> None:
    read = read_adapter(adapter("molora"))
    rows = {row.method: row for row in size_table(read)}
    assert rows["molora"].trained == sum(t.numel() for t in read.tensors.values())
    lora = dataclasses.replace(read.spec, method="lora", lora_rank=rows["lora"].equal_rank)
    inputs_and_outputs = 2 * sum(sum(widths) for widths in WIDTHS.values())
    assert lora.lora_rank == rows["molora"].trained // inputs_and_outputs
    assert rows["lora"].trained == RANK * inputs_and_outputs


# ---- the whole


class Page(HTMLParser):
    """What a page loads, its ids, and whether its elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.alts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.loads += [str(found[name]) for name in ("src", "srcset", "href", "data", "action") if name in found]
        self.alts += [str(found.get("alt"))] if tag == "img" else []
        if tag not in ("meta", "img", "source", "input"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def check_page(file: Path) -> Page:
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert all(load.startswith(("data:image/png;base64,", "#")) for load in page.loads)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert all(len(alt) > 20 for alt in page.alts)
    return page


def test_checkpoint_and_peft_adapter_give_the_same_numbers(
    adapter: Callable[..., Path], llama_dir: Path, task_files: list[Path], tmp_path: Path
) -> None:
    """And the page of one of them is whole."""
    spec, fingerprint = spec_of("malora"), fingerprint_hf(llama_dir)
    save = tmp_path / "save"
    write_adapter_weights(save, AdapterWeights(spec, tensors_of(spec), str(llama_dir), fingerprint, 70))
    samples = Samples(per_task=6, shown=1)
    requests = [Request(path, None, llama_dir, task_files, samples) for path in (save, adapter(base=fingerprint))]
    inspections = [inspect_adapter(request, quiet) for request in requests]
    found = [inspection.numbers for inspection in inspections]
    assert (found[0]["adapter"].pop("Iteration"), found[0]["adapter"].pop("Files")[:9]) == ("70", "verified:")
    for one in found:
        assert one.pop("adapter")["Base"] == str(llama_dir)
    assert found[0] == found[1]
    json.dumps(found[0], allow_nan=False)
    assert found[0]["routing"]["tasks"]["add"]["samples"] == 6

    page = write_report(requests[0], inspections[0], quiet)
    assert page == tmp_path / "save-inspection" / PAGE
    assert {file.name for file in page.parent.iterdir()} == LAYOUT
    assert check_page(page).tags.count("img") == len(LAYOUT) - 1
    assert 'class="token e' in page.read_text(encoding="utf-8")


class Nonlinear(ToyWide):
    """No product of two matrices."""


@pytest.mark.parametrize("method", ["dora", "nonlinear"])
def test_what_makes_no_sense_is_left_out_and_told(method: str, tmp_path: Path) -> None:
    """Also: an earlier result is replaced, with nothing left of it."""
    (tmp_path / "peft-inspection").mkdir()
    (tmp_path / "peft-inspection" / "routing_layers.png").touch()
    request = Request(tmp_path / "peft")
    with METHODS.registered(nonlinear=Nonlinear):
        spec = spec_of(method)
        write_peft_adapter(tmp_path / "peft", spec, tensors_of(spec), "some/base", "")
        inspection = inspect_adapter(request, quiet)
    page = write_report(request, inspection, quiet)
    check_page(page)
    assert not (page.parent / "routing_layers.png").exists()
    numbers, text = inspection.numbers, page.read_text(encoding="utf-8")
    assert numbers["similarity"] == numbers["routing"] == {}
    if method == "dora":
        assert "dora has no router" in text
        assert "dora has one expert" in text
        assert np.array(numbers["norms"]["by_layer_projection_expert"]).shape == (2, 3, 1)
    else:
        assert text.count("nonlinear is not a product of a down- and an up-projection") == 3, (
            "similarity, spectra, norms"
        )
        assert numbers["norms"] == {}


def test_text_of_others_is_escaped(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script><img src="http://x">'
    token = Token(evil, ((0, 1.0),), False)
    colouring = Colouring(0, "q_proj", evil, [1.0], [ColouredSample(evil, evil, [token])])
    sections = [Section("sizes", evil, evil, left_out=[evil])]
    (tmp_path / PAGE).write_text(render(evil, {evil: evil}, [evil], sections, {}, colouring, {evil: evil}))
    assert "img" not in check_page(tmp_path / PAGE).tags


# ---- errors


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the tool, which has to end with one line; returns it."""
    module = tool("inspect_adapter")

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["inspect_adapter.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as error:
            module.main()
        assert error.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


def test_errors_are_one_line(
    adapter: Callable[..., Path], fails: Callable[..., str], llama_dir: Path, task_files: list[Path], tmp_path: Path
) -> None:
    path = adapter("malora", base="f00d")
    assert "nowhere: is not a directory" in fails(tmp_path / "nowhere")
    assert "neither a run's checkpoints" in fails(llama_dir)
    assert "name the adapter's base with --hf-model" in fails(path, "--data", task_files[0])
    with_data = ("--hf-model", llama_dir, "--data", task_files[0])
    assert "was trained on" in fails(path, *with_data)
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((llama_dir / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    assert "has a down_proj of 64 -> 32, the adapter one of 48 -> 32" in fails(path, "--hf-model", other)
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "has 3 layers, the adapter 2" in fails(path, "--hf-model", other)
    assert "--layer=0: names half of a site" in fails(path, *with_data, "--layer", 0)
    assert "--layer=7: must lie in [0, 1]" in fails(path, *with_data, "--layer", 7, "--projection", "q_proj")
    assert "--projection='o_proj': must be one of" in fails(path, *with_data, "--layer", 0, "--projection", "o_proj")
    assert "--json=" in fails(path, "--json", tmp_path / "no" / "where.json")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    assert "is not an earlier result" in fails(path, "--out", tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "precious"
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is not a whole safetensors file" in fails(path)
    assert not (tmp_path / "peft-inspection").exists()
