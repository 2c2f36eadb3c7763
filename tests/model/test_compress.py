"""Quantised and pruned copies: values on their grid, patterns that hold, drafts and targets that stay lossless."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from specdec_kernels.wna16_matmul import dequantize

from experiments import common
from specdec import LLM, SamplingParams
from specdec.config_schemas import GROUP_SIZES, PRUNERS, QUANTIZATIONS
from specdec.drafter import make_drafter
from specdec.drafter.draft_model import DraftModelDrafter
from specdec.model import prune, quantize
from specdec.model.prune import prune_model
from specdec.model.quantize import LINEAR, quantize_model, quantize_weight, quantized
from specdec.model.weights import LoadedModel, load_model
from tests.helpers.models import VOCAB_SIZE, tiny_model_dir
from tests.test_configs import build

PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose inputs divide into groups."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return tiny_model_dir("llama", tmp_path_factory.mktemp("grouped"), seed=3, **shape)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(model_dir, request) -> LoadedModel:
    return load_model(model_dir, dtype=getattr(torch, request.param))


def linear(model: LoadedModel) -> dict[str, torch.Tensor]:
    named = {name: weight for name, weight in model.weights.items() if name.rpartition(".")[2] in LINEAR}
    assert len(named) == model.config.num_layers * 7
    return named


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB_SIZE, (9,), generator=generator).tolist() for _ in range(4)]


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 32), (4, 64), (8, 64)])
def test_values_lie_on_their_groups_grid(model, bits, group_size):
    copy = quantize_model(model, bits, group_size)
    for name, weight in linear(model).items():
        stored = quantize.quantize(weight, bits, group_size)
        assert stored.minimums is not None
        scales, minimums = (part.t().double()[..., None] for part in (stored.scales, stored.minimums))
        got, was = (tensor.double().unflatten(1, (-1, group_size)) for tensor in (copy.weights[name], weight))
        rounding = torch.finfo(weight.dtype).eps * was.abs().amax(dim=-1, keepdim=True)
        codes = (got - minimums) / scales
        assert ((codes - codes.round()).abs() * scales <= rounding).all()
        assert codes.round().min() == 0 and codes.round().max() == 2**bits - 1
        # Half a step of a grid that just spans the group, but for float16 scales and minimums.
        low, high = was.aminmax(dim=-1, keepdim=True)
        step = (high - low) / (2**bits - 1) * (1 + 2**-9) + 2**-9 * was.abs().amax() / (2**bits - 1)
        assert ((got - was).abs() <= step / 2 + rounding).all()
        assert copy.weights[name].dtype == weight.dtype


def test_only_linear_layers_change_and_the_original_stays(model):
    before = {name: weight.clone() for name, weight in model.weights.items()}
    copy = quantize_model(model)
    for name, weight in model.weights.items():
        assert torch.equal(weight, before[name])
        is_linear = name.rpartition(".")[2] in LINEAR
        assert torch.equal(copy.weights[name], weight) != is_linear, name
    with_head = quantize_model(model, 8, head=True)
    assert not torch.equal(with_head.weights["embed"], model.weights["embed"])
    assert torch.equal(with_head.weights["final_norm"], model.weights["final_norm"])
    assert quantized(model, None) is model


def test_quantising_again_changes_nothing(model_dir):
    once = quantize_model(load_model(model_dir, dtype=torch.float32), 4, 32)
    again = quantize_model(once, 4, 32)
    for name, weight in linear(once).items():
        # The ends of the grid are in the group or not: where they are not, the second grid is a smaller one.
        is_same = (again.weights[name] == weight).float().mean()
        assert is_same > 0.9, name


def test_a_constant_group_stays_what_it_is():
    weight = torch.full((2, 32), 0.375)
    assert torch.equal(dequantize(quantize_weight("q", weight, 4, 32)), weight)
    assert torch.equal(dequantize(quantize_weight("q", torch.zeros(2, 64), 8, 32)), torch.zeros(2, 64))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_magnitude_pruning_takes_the_smallest(model, sparsity):
    pruned = prune_model(model, {"name": "magnitude", "sparsity": sparsity})
    for name, weight in linear(model).items():
        got, kept = pruned.weights[name], pruned.weights[name] != 0
        assert int((~kept).sum()) == int(sparsity * weight.numel())
        assert torch.equal(got[kept], weight[kept])
        if sparsity > 0.0:
            assert weight[~kept].abs().max() <= weight[kept].abs().min()


def test_two_of_four(model):
    pruned = prune_model(model, {"name": "semi_structured"})
    for name, weight in linear(model).items():
        groups, was = (tensor.unflatten(1, (-1, 4)) for tensor in (pruned.weights[name], weight))
        assert ((groups != 0).sum(dim=-1) == 2).all()
        assert (groups.abs().sum(dim=-1) >= was.abs().topk(2).values.sum(dim=-1) * 0.999).all()
        assert torch.equal(groups[groups != 0], was[groups != 0])
    one = prune_model(model, {"name": "semi_structured", "keep": 1, "group": 8})
    assert all(((weight != 0).unflatten(1, (-1, 8)).sum(-1) == 1).all() for weight in linear(one).values())


def test_dropped_layers_leave_the_others_in_order(model):
    short = prune_model(model, {"name": "layers", "drop": [0, 2]})
    assert short.config.num_layers == 2 and len(short.config.rope_theta) == 2
    assert torch.equal(short.weights["layers.0.q"], model.weights["layers.1.q"])
    assert torch.equal(short.weights["layers.1.down"], model.weights["layers.3.down"])
    assert torch.equal(short.weights["embed"], model.weights["embed"])
    assert not any(name.startswith("layers.2.") for name in short.weights)
    middle = prune_model(model, {"name": "layers", "num_drop": 2})
    assert torch.equal(middle.weights["layers.1.q"], model.weights["layers.3.q"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "magnitud"}, "unknown pruning 'magnitud': did you mean magnitude"),
        ({"name": "magnitude", "sparsty": 0.5}, "did you mean sparsity"),
        ({"name": "magnitude", "sparsity": 1.0}, r"sparsity=1.0 must lie in \[0, 1\)"),
        ({"name": "semi_structured", "keep": 5}, "keep=5 of group=4"),
        ({"name": "semi_structured", "group": 5}, "do not divide into groups of 5"),
        ({"name": "layers"}, "give num_drop or drop"),
        ({"name": "layers", "drop": [4]}, r"drops layers \[4\] of a model with 4"),
        ({"name": "layers", "num_drop": 4}, "keep at least one layer"),
    ],
)
def test_wrong_pruning_is_refused(options, message, model):
    with pytest.raises(ValueError, match=message):
        prune_model(model, options)


def test_wrong_quantisation_is_refused(model, tiny_llama_dir):
    with pytest.raises(ValueError, match="3 bits"):
        quantize_model(model, 3)
    with pytest.raises(ValueError, match=r"group_size=48 must be one of 32, 64, 128"):
        quantize_model(model, 4, 48)
    with pytest.raises(ValueError, match=r"has 64 inputs.*group_size=128: use group_size=32"):
        quantize_model(model, 4, 128)
    with pytest.raises(ValueError, match="this model cannot be quantised in groups"):
        quantize_model(load_model(tiny_llama_dir), 4, 32)
    released = load_model(tiny_llama_dir)
    released.weights = {}
    with pytest.raises(ValueError, match="were released"):
        quantize_model(released)
    with pytest.raises(ValueError, match="unknown quantization 'int3': did you mean int"):
        make_drafter({"name": "draft_model", "model": "x", "quantization": "int3"})
    with pytest.raises(ValueError, match="group_size=32 is for quantisation only"):
        LLM(str(tiny_llama_dir), group_size=32)
    with pytest.raises(ValueError, match="unknown pruning 'half'"):
        make_drafter({"name": "draft_model", "model": "x", "pruning": {"name": "half"}})


def accepted(outputs) -> float:
    return sum(out.num_accepted for out in outputs) / sum(out.num_steps for out in outputs)


def test_drafts_of_compressed_copies_are_lossless_and_more_bits_are_accepted_more(model_dir):
    llm = LLM(str(model_dir), dtype="float32", max_model_len=128, max_num_seqs=4)
    plain = [out.token_ids for out in llm.generate(prompts(), PARAMS)]
    rates: dict[str, float] = {}
    for name, options in {
        "int4": {"quantization": "int4", "group_size": 64},
        "int8": {"quantization": "int8"},
        "short": {"pruning": {"name": "layers", "num_drop": 1}},
        "sparse int8": {"pruning": {"name": "semi_structured"}, "quantization": "int8"},
    }.items():
        llm.configure({"name": "draft_model", "model": str(model_dir), **options}, num_drafts=4)
        outputs = llm.generate(prompts(), PARAMS)
        assert [out.token_ids for out in outputs] == plain, name
        rates[name] = accepted(outputs)
    assert rates["int8"] > rates["int4"] > 0.0
    assert rates["int8"] > rates["sparse int8"]


def test_a_quantised_target_is_the_quantised_model(model_dir):
    """Its output is that of the copy, not of the original; a draft by the same copy is always right."""
    copy = quantize_model(load_model(model_dir, dtype=torch.float32), 4, 64)
    limits = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 4}
    expected = [out.token_ids for out in LLM(copy, **limits).generate(prompts(), PARAMS)]
    llm = LLM(str(model_dir), quantization="int4", group_size=64, **limits)
    assert [out.token_ids for out in llm.generate(prompts(), PARAMS)] == expected
    original = [out.token_ids for out in LLM(str(model_dir), **limits).generate(prompts(), PARAMS)]
    assert original != expected
    same = {"name": "draft_model", "model": str(model_dir), "quantization": "int4", "group_size": 64}
    llm.configure(same, num_drafts=3)
    outputs = llm.generate(prompts(), PARAMS)
    assert [out.token_ids for out in outputs] == expected
    assert all(out.num_accepted == out.num_drafted for out in outputs)


def test_options_compose(model_dir):
    given = "drafter=draft_model drafter.quantization=int4 drafter.group_size=64".split()
    config = build(*given, f"drafter.model={model_dir}", "drafter.pruning={name: layers, num_drop: 1}")
    options = common.drafter_options(config)
    assert options["pruning"] == {"name": "layers", "num_drop": 1} and options["group_size"] == 64
    assert "tree" not in options
    drafter = make_drafter(options)
    assert isinstance(drafter, DraftModelDrafter)
    assert (drafter.quantization, drafter.group_size) == ("int4", 64)
    small = ("model.dtype=float32", "drafter=none", "engine.max_model_len=128")
    config = build(f"model.name={model_dir}", "model.quantization=int8", *small)
    llm = common.build_llm(config)
    weight = quantize_model(load_model(model_dir, dtype=torch.float32), 8).weights["layers.0.o"]
    assert torch.equal(llm.runner.model.weights["layers.0.o"], weight)
    sweep = build(experiment="draft_sweep").experiment
    for name in ("int4", "int8"):
        assert sweep.drafters[name] == {"name": "draft_model", "quantization": name, "model": "smollm2-135m"}
        assert name not in sweep.only
        make_drafter(sweep.drafters[name])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.quantization=int5"], "model.quantization"),
        (["model.group_size=64"], "for quantisation only: add model.quantization=int4"),
        (["drafter=draft_model", "drafter.quantization=int4", "drafter.group_size=16"], "must be one of"),
        (["model.quantization=fp8", "model.group_size=64"], "model.group_size=64: fp8 has one scale"),
        (["drafter=draft_model", "drafter.pruning={name: layer}"], "did you mean layers"),
    ],
)
def test_wrong_options_are_refused_by_name(overrides, message):
    with pytest.raises(ValueError, match=message):
        build(*overrides)


def test_names_in_the_schemas_are_those_of_the_code():
    assert quantize.QUANTIZATIONS == QUANTIZATIONS and GROUP_SIZES == quantize.GROUP_SIZES
    assert tuple(prune.PRUNERS) == PRUNERS
