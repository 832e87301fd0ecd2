"""`moerge extract`: truncated decompositions, what they keep, and what peft makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerge import system
from moerge.checkpoint.adapter import apply_adapter
from moerge.checkpoint.header import read_header
from moerge.checkpoint.locate import locate
from moerge.errors import InputError
from moerge.extraction import Extraction, extract
from moerge.merging.pipeline import merge
from moerge.tensors.linalg import leading_svd
from moerge.tensors.views.low_rank import read_float32
from tests.helpers.adapters import low_rank, write_adapter
from tests.helpers.command import moerge
from tests.helpers.recorded import Recorded
from tests.helpers.tiny import (
    edit_config,
    llama_config,
    llama_tensors,
    make_models,
    read_values,
    write_checkpoint,
    write_tokenizer,
)

Q = "model.layers.0.self_attn.q_proj"


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(0, 50))
def test_leading_svd_is_the_best_approximation(rows: int, columns: int, rank: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    matrix *= (0.7 ** np.arange(columns)).astype(np.float32)
    left, sigma, right = leading_svd(matrix, rank)
    kept = min(rank, rows, columns)
    assert (left.shape, sigma.shape, right.shape) == ((rows, kept), (kept,), (kept, columns))
    expected = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(sigma, expected[:kept], rtol=1e-3, atol=1e-5 * expected[0])
    lost = np.linalg.norm(matrix - (left * sigma) @ right)
    np.testing.assert_allclose(lost, np.linalg.norm(expected[kept:]), rtol=1e-3, atol=1e-5 * expected[0])


def task_vectors(models: dict[str, Path]) -> dict[str, np.ndarray]:
    base, expert = read_values(models["base"]), read_values(models["math"])
    return {name: expert[name].astype(np.float64) - base[name] for name in base}


def applied(out: Path, base: Path) -> dict[str, np.ndarray]:
    found = apply_adapter(locate(str(out)), locate(str(base)))
    return {name: read_float32(tensor) for name, tensor in found.tensors.items()}


def assert_share(found: Extraction, out: Path, models: dict[str, Path]) -> None:
    """The share that is reported is that of base plus adapter."""
    base, expert, made = read_values(models["base"]), read_values(models["math"]), applied(out, models["base"])
    lost = sum(np.square(made[name].astype(np.float64) - expert[name]).sum() for name in base)
    total = sum(np.square(tau).sum() for tau in task_vectors(models).values())
    assert found.share == pytest.approx(1 - lost / total, abs=2e-6)
    assert found.total == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_each_matrix_keeps_what_its_rank_can(tmp_path: Path, dtype: str) -> None:
    models = make_models(tmp_path, experts=("math",), dtype=dtype)
    out = tmp_path / "lora"
    found = extract(str(models["math"]), out, base=str(models["base"]), rank=3)
    assert_share(found, out, models)
    taus = task_vectors(models)
    roles = {role.role: role for role in found.roles}
    for role, part in (("attention.q", "self_attn.q_proj"), ("ffn.down", "mlp.down_proj")):
        matrices = [tau for name, tau in taus.items() if part in name]
        squares = [np.square(np.linalg.svd(tau, compute_uv=False)) for tau in matrices]
        best = sum(square[:3].sum() for square in squares) / sum(square.sum() for square in squares)
        assert roles[f"layers.*.{role}"].share == pytest.approx(best, abs=1e-2)
        assert roles[f"layers.*.{role}"].share <= best + 1e-6
        assert roles[f"layers.*.{role}"].ranks == (3, 3)
    assert [roles[role].kind for role in ("embedding", "norm.final", "head")] == ["left out"] * 3
    assert found.parameters == sum(tensor.size for tensor in read_header(out / "adapter_model.safetensors").values())


def test_a_lora_of_rank_r_comes_back_at_rank_r(tmp_path: Path) -> None:
    models = make_models(tmp_path, experts=(), dtype="F32")
    factors = {}
    for module, shape in ((Q, (16, 16)), ("model.layers.1.mlp.up_proj", (24, 16)), ("model.layers.1.mlp.down_proj", (16, 24))):
        factors |= low_rank(module, shape, rank=4)
    write_adapter(tmp_path / "made", factors, r=4, lora_alpha=12)
    expert = applied(tmp_path / "made", models["base"])
    models["math"] = write_checkpoint(tmp_path / "math", expert, dtype="F32")
    for options in ({"rank": 4}, {"energy": 0.9999}):
        out = tmp_path / f"lora-{next(iter(options))}"
        found = extract(str(models["math"]), out, base=str(models["base"]), **options)  # type: ignore[arg-type]
        assert found.share > 1 - 1e-9
        assert {role.ranks for role in found.roles} == {None, (4, 4)}
        for name, value in applied(out, models["base"]).items():
            np.testing.assert_allclose(value, expert[name], rtol=1e-5, atol=1e-6, err_msg=name)
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["target_modules"] == sorted(name.split(".lora_")[0] for name in factors if "lora_A" in name)
        assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 4, {})
    # an adapter is an expert like any other
    again = extract(str(tmp_path / "made"), tmp_path / "again", base=str(models["base"]), rank=4)
    assert again.share > 1 - 1e-9


@pytest.mark.parametrize("energy", [0.3, 0.8, 1.0])
def test_energy_takes_the_smallest_rank_that_keeps_it(tmp_path: Path, energy: float) -> None:
    models = make_models(tmp_path, experts=("math",), dtype="F32")
    out = tmp_path / "lora"
    found = extract(str(models["math"]), out, base=str(models["base"]), energy=energy)
    assert_share(found, out, models)
    assert found.share_of_modules >= energy - 1e-6
    config = json.loads((out / "adapter_config.json").read_text())
    stored = read_header(out / "adapter_model.safetensors")
    for name, tau in task_vectors(models).items():
        if "proj" not in name:
            continue
        module = name.removesuffix(".weight")
        rank = stored[f"base_model.model.{module}.lora_A.weight"].shape[0]
        squares = np.cumsum(np.square(np.linalg.svd(tau, compute_uv=False))) / np.square(tau).sum()
        assert squares[rank - 1] >= energy - 1e-5
        assert rank == 1 or squares[rank - 2] < energy + 1e-2
        assert (
            config["rank_pattern"].get(module, config["r"]) == config["alpha_pattern"].get(module, config["lora_alpha"]) == rank
        )


def test_rank_limits_energy(tmp_path: Path) -> None:
    models = make_models(tmp_path, experts=("math",))
    found = extract(str(models["math"]), tmp_path / "lora", base=str(models["base"]), energy=0.5, rank=2)
    assert found.rank == 2 and found.share_of_modules < 0.5


def test_what_is_asked_for(tmp_path: Path) -> None:
    models = make_models(tmp_path, experts=("math",))
    out = tmp_path / "lora"
    options: dict[str, Any] = {"modules": ["layers.0.attention", "embedding"], "modules_to_save": ["norm", "head"]}
    found = extract(str(models["math"]), out, base=str(models["base"]), rank=2, dtype="bfloat16", **options)
    assert_share(found, out, models)
    kinds = {role.role: role.kind for role in found.roles if role.kind != "left out"}
    attention = {f"layers.*.attention.{part}": "lora" for part in "qkvo"}
    norms = dict.fromkeys(("layers.*.norm.attention", "layers.*.norm.ffn", "norm.final", "head"), "whole")
    assert kinds == {"embedding": "embedding", **attention, **norms}
    config = json.loads((out / "adapter_config.json").read_text())
    assert set(config["modules_to_save"]) >= {"model.norm", "lm_head", "model.layers.1.input_layernorm"}
    assert Q in config["target_modules"] and "model.layers.1.self_attn.q_proj" not in config["target_modules"]
    assert {tensor.dtype.name for tensor in read_header(out / "adapter_model.safetensors").values()} == {"BF16"}
    np.testing.assert_array_equal(
        applied(out, models["base"])["model.norm.weight"], read_values(models["math"])["model.norm.weight"]
    )


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    models = make_models(tmp_path, experts=("math",), tied=True)
    out = tmp_path / "lora"
    found = extract(str(models["math"]), out, base=str(models["base"]), rank=2, modules_to_save=["embedding"])
    assert_share(found, out, models)
    assert json.loads((out / "adapter_config.json").read_text())["ensure_weight_tying"] is True
    with pytest.raises(
        InputError, match=r"--modules: 'embedding' matches tensor 'model\.embed_tokens\.weight', which the base ties"
    ):
        extract(str(models["math"]), tmp_path / "other", base=str(models["base"]), modules=["embedding"])


def test_the_same_bytes_whatever_the_threads(tmp_path: Path) -> None:
    config = llama_config(hidden_size=64, intermediate_size=1100, num_hidden_layers=1)
    models = make_models(tmp_path, experts=("math",), config=config)
    files = []
    for threads in (1, 3):
        out = tmp_path / f"lora-{threads}"
        extract(str(models["math"]), out, base=str(models["base"]), rank=5, threads=threads)
        files.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert files[0] == files[1]
    assert set(files[0]) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def test_what_a_person_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    models = make_models(tmp_path, experts=("math",))
    out = tmp_path / "lora"
    result = moerge(
        "extract", models["math"], out, "--base", models["base"], "--rank", 16, "--modules", "ffn", "--modules", "attention"
    )
    assert result.code == 0
    row = next(line for line in result.out.splitlines() if line.startswith("layers.*.ffn.up"))
    assert row.split()[:4] == ["layers.*.ffn.up", "lora", "2", "16"] and row.split()[-1] == "100.00%"
    assert result.err.startswith("warning: ") and "are left out: " in result.err and result.err.count("\n") == 1
    card = (out / "README.md").read_text()
    assert f"as an adapter of {models['base']}" in card and "base_model" not in card  # a folder is no name on the Hub
    found = moerge("extract", models["math"], tmp_path / "other", "--base", models["base"], "--energy", 0.5, "--json").json
    assert found["adapter"] == str(tmp_path / "other")
    assert 0.5 <= found["share_kept_of_modules"] < 1 and found["share_kept"] < found["share_kept_of_modules"]
    assert sum(role["share_of_task_vector"] for role in found["roles"]) == pytest.approx(1)
    assert moerge("extract", models["math"], tmp_path / "third", "--base", models["base"], "--quiet").out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--energy", "1.5"), "energy is 1.5: it is a share, above 0 and at most 1"),
        (("--energy", "nan"), "energy is nan"),
        (("--modules", "atention"), "--modules: 'atention' matches no tensor, did you mean 'attention"),
        (("--modules", "norm"), "matches tensor 'model.layers.0.input_layernorm.weight', which is no matrix: name it with"),
        (("--modules-to-save", "heads"), "--modules-to-save: 'heads' matches no tensor, did you mean 'head'?"),
    ],
)
def test_wrong_options(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    models = make_models(tmp_path, experts=("math",))
    before = sorted(tmp_path.iterdir())
    result = moerge("extract", models["math"], tmp_path / "lora", "--base", models["base"], *options)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert message in result.err
    assert sorted(tmp_path.iterdir()) == before


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    models = make_models(tmp_path, experts=("math",))
    out = tmp_path / "lora"

    def refused(message: str, expert: Path = models["math"], to: Path = out) -> None:
        before = sorted(tmp_path.iterdir())
        result = moerge("extract", expert, to, "--base", models["base"])
        assert (result.code, result.err.count("\n")) == (2, 1), result
        assert message in result.err
        assert sorted(tmp_path.iterdir()) == before

    refused(f"{models['math']} already exists: choose another folder", to=models["math"])
    refused("equals", expert=models["base"])
    refused("there is no folder", expert=tmp_path / "nothing")
    tensors = llama_tensors(llama_config(), expert=0)
    tensors["lm_head.weight"][0, 0] = np.inf
    refused(
        "expert: tensor 'lm_head.weight' holds NaN or infinity: repair it first",
        expert=write_checkpoint(tmp_path / "nan", tensors),
    )
    edit_config(models["math"], num_key_value_heads=4)
    refused("do not have the same shape")


def test_an_unknown_family_goes_by_names(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"embed.weight": (9, 4), "blocks.0.mix.weight": (6, 4), "blocks.0.norm.weight": (4,), "blocks.0.mix.bias": (6,)}
    for name in ("base", "expert"):
        tensors = {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}
        write_checkpoint(tmp_path / name, tensors, {"model_type": "novel", "vocab_size": 9})
    found = extract(str(tmp_path / "expert"), tmp_path / "lora", base=str(tmp_path / "base"), rank=4)
    assert {role.role: role.kind for role in found.roles if role.kind == "lora"} == {"blocks.*.mix.weight": "lora"}
    assert {role.role: round(role.share, 6) for role in found.roles}["blocks.*.mix.weight"] == 1


def test_experts_that_were_not_trained_are_left_out(tmp_path: Path) -> None:
    models = make_models(tmp_path, experts=("math", "code"))
    for scale in (0.2, 0.4):
        experts = {name: str(models[name]) for name in ("math", "code")}
        recipe = {
            "base": str(models["base"]),
            "experts": experts,
            "merge": {"method": "task_arithmetic", "scale": scale},
            "moe": {},
        }
        merge(recipe, tmp_path / f"moe-{scale}")
    base, expert = str(tmp_path / "moe-0.2"), str(tmp_path / "moe-0.4")
    found = extract(expert, tmp_path / "lora", base=base)
    assert {role.role for role in found.roles if role.kind == "lora"} == {f"layers.*.attention.{part}" for part in "qkvo"}
    with pytest.raises(InputError, match="nothing to extract"):
        extract(expert, tmp_path / "other", base=base, modules=["ffn"])


def test_an_interrupted_extraction_leaves_nothing(tmp_path: Path) -> None:
    models = make_models(tmp_path, experts=("math",))
    before = sorted(tmp_path.iterdir())

    def interrupt(nbytes: int) -> None:
        assert progress.totals("bytes")[0] > nbytes
        assert len(list(tmp_path.iterdir())) == len(before) + 1
        raise KeyboardInterrupt

    progress = Recorded(interrupt)
    with pytest.raises(KeyboardInterrupt):
        extract(str(models["math"]), tmp_path / "lora", base=str(models["base"]), progress=progress)
    assert sorted(tmp_path.iterdir()) == before


def test_what_a_killed_extraction_left_goes_with_the_next_one(tmp_path: Path) -> None:
    models = make_models(tmp_path, experts=("math",))
    names = ("lora.moerge-partial-abcd_123", "lora.moerge-partial-abcd_124", "x")
    left, alive, others = (tmp_path / f".{name}" for name in names)
    for folder in (left, alive, others):
        folder.mkdir()
        (folder / "adapter_model.safetensors").touch()
    with open(alive / "lock", "wb") as file:
        assert system.lock(file)
        extract(str(models["math"]), tmp_path / "lora", base=str(models["base"]), rank=1)
    assert sorted(folder.name for folder in tmp_path.iterdir() if folder.name.startswith(".")) == [alive.name, others.name]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = make_models(tmp_path, experts=("math",))
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    result = moerge("extract", models["math"], tmp_path / "lora", "--base", models["base"], "--quiet")
    message = f"moerge: cannot write {tmp_path / 'lora'}: No space left on device: nothing of it is left, run it again\n"
    assert (result.code, result.out, result.err) == (1, "", message)
    assert sorted(tmp_path.iterdir()) == before


def test_too_large_for_float16(tmp_path: Path) -> None:
    tensors = llama_tensors(llama_config())
    base = write_checkpoint(tmp_path / "base", tensors, dtype="F32")
    far = {name: value + np.float32(1e12) * ("q_proj" in name) for name, value in tensors.items()}
    expert = write_checkpoint(tmp_path / "far", far, dtype="F32")
    result = moerge("extract", expert, tmp_path / "lora", "--base", base, "--dtype", "float16")
    assert result.code == 2 and "is too large for float16: choose another --dtype" in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "far"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("llama", True), ("gpt2", False), ("gpt2", True), ("neox", False)]
)
def test_peft_loads_and_merges_it(tmp_path: Path, family: str, tied: bool) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'moerge[dev]')")
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": tied}
    config = {
        "llama": lambda: transformers.LlamaConfig(**sizes, intermediate_size=24, num_key_value_heads=1),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=50,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=32,
            tie_word_embeddings=tied,
            bos_token_id=0,
            eos_token_id=0,
        ),
        "neox": lambda: transformers.GPTNeoXConfig(**sizes, intermediate_size=24),
    }[family]()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name in ("base", "expert"):
        for parameter in model.parameters():
            parameter.data = parameter.data + 0.05 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / name)
    base, expert = str(tmp_path / "base"), str(tmp_path / "expert")
    whole = ["norm"] if family == "neox" else ["norm", "embedding"]
    modules = ["attention", "ffn", *(["head"] if family == "llama" and not tied else [])]
    found = extract(expert, tmp_path / "lora", base=base, energy=0.8, modules=modules, modules_to_save=whole)

    def weights(folder: str) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    before, wanted = ({name: value.clone() for name, value in weights(folder).state_dict().items()} for folder in (base, expert))
    with_adapter = peft.PeftModel.from_pretrained(weights(base), tmp_path / "lora")
    made = with_adapter.merge_and_unload().state_dict()
    if tied:
        assert torch.equal(made["lm_head.weight"], wanted["lm_head.weight"])
        for state in (before, wanted, made):
            del state["lm_head.weight"]
    lost = sum(float((made[name] - wanted[name]).double().square().sum()) for name in wanted)
    total = sum(float((before[name] - wanted[name]).double().square().sum()) for name in wanted)
    assert found.share == pytest.approx(1 - lost / total, abs=1e-6)
    assert 0.5 < found.share < 0.99


def test_gpt_neox_head_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = transformers.AutoModelForCausalLM.from_config(transformers.GPTNeoXConfig(**sizes))
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(
        InputError, match=r"'embed_out\.weight', the head or tied to it: leave it out, since GPT-NeoX' head is called"
    ):
        extract(str(tmp_path / "base"), tmp_path / "lora", base=str(tmp_path / "base"), modules=["head"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gemma3", "qwen2_vl", "mistral3", "qwen2_5_vl"])
def test_peft_finds_the_modules_of_a_multimodal_model(tmp_path: Path, kind: str) -> None:
    """In memory they have other names than in files; an adapter under those has no effect."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'moerge[dev]')")
    from tests.helpers.hf_models import load, logits, random_model, save
    from tests.helpers.multimodal import MULTIMODAL

    base = random_model(MULTIMODAL[kind](), 1)
    save(base, tmp_path / "base")
    for name, value in base.named_parameters():
        if name.endswith("proj.weight") and "s.0." in name:
            value.data += 0.05 * torch.randn(value.shape[0], 2) @ torch.randn(2, value.shape[1])
    save(base, tmp_path / "expert")
    found = extract(str(tmp_path / "expert"), tmp_path / "lora", base=str(tmp_path / "base"), rank=2)
    assert found.share > 0.99999
    with_adapter = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "lora").eval()
    np.testing.assert_allclose(logits(with_adapter), logits(load(tmp_path / "expert")), rtol=0, atol=2e-4)
    assert not np.allclose(logits(load(tmp_path / "base")), logits(load(tmp_path / "expert")), atol=1e-2)
    changed = applied(tmp_path / "lora", tmp_path / "base")
    for name, value in read_values(tmp_path / "expert").items():
        np.testing.assert_allclose(changed[name], value, rtol=0, atol=1e-4, err_msg=name)


def test_an_expert_with_more_tokens(tmp_path: Path) -> None:
    models = make_models(tmp_path, experts=("chat",))
    config = llama_config(vocab_size=66)
    write_checkpoint(models["chat"], llama_tensors(config, expert=1), config, tokenizer=False)
    write_tokenizer(models["chat"], ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, 64)), "<x>", "<y>"])
    found = extract(str(models["chat"]), tmp_path / "lora", base=str(models["base"]), rank=2)
    assert any("has 2 tokens that the base lacks" in warning for warning in found.warnings)
    assert all(value.shape[0] != 66 for value in applied(tmp_path / "lora", models["base"]).values())
