"""Checkpoints of the sequence-routed model: files, names, loading here, loading where moerge is not installed."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moerge.modeling import AUTO_MAP, MoergeConfig, MoergeForCausalLM, MoergeModel, code_files, register, separate_name
from moerge.modeling.versions_moerge import CACHE
from tests.modeling.routed_models import CONFIGS, NAMES, check_without_moerge, dense_experts, padded, prompts, routed

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    register()
    register()  # again does no harm


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_saved_model_loads_and_computes_the_same(tmp_path: Path, tied: bool) -> None:
    separate = ["ffn", "embedding", "head"]
    model = routed(dense_experts("qwen2", tied=tied), separate=separate, mix="output")
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    stored = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    dense = dense_experts("qwen2", tied=tied)[0].state_dict()
    expected = {
        separate_name(name, expert)
        for name in dense
        for expert in range(3 if any(part in name for part in (".mlp.", "embed", "head")) else 1)
        if not (tied and name == "lm_head.weight")
    }
    assert stored.keys() == expected
    assert {name for name in expected if "norm" in name} == {
        *(f"model.layers.{i}.{norm}.0.weight" for i in (0, 1) for norm in ("input_layernorm", "post_attention_layernorm")),
        "model.norm.0.weight",
    }
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is MoergeForCausalLM
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all((loaded.lm_head[i].weight is loaded.model.embed_tokens[i].weight) == tied for i in range(3))
    ids, mask = padded(prompts(7, 4), "left")
    assert torch.equal(loaded(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)


@torch.no_grad()
def test_the_dtype_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    model = routed(routing={"kind": "learned"}).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == loaded.router.weight.dtype == torch.bfloat16
    ids = torch.stack(prompts(5))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    as_eager = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    assert as_eager.dtype == torch.float32
    assert as_eager.model.layers[0].mlp[1].config._attn_implementation == "eager"


@torch.no_grad()
def test_the_model_without_heads(tmp_path: Path) -> None:
    model = routed(separate=["ffn"], routing={"kind": "uniform"})
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is MoergeModel
    ids = torch.stack(prompts(5, 5))
    torch.testing.assert_close(model.lm_head[0](body(ids).last_hidden_state), model(ids).logits)
    first = body(ids[:, :3])
    second = body(ids[:, 3:], **{CACHE: first[CACHE]})
    states = torch.cat([first.last_hidden_state, second.last_hidden_state], 1)
    torch.testing.assert_close(model.lm_head[0](states), model(ids).logits, atol=1e-5, rtol=1e-5)
    body.config.routing = {"kind": "perplexity", "top_k": 2, "temperature": 1.0}
    with pytest.raises(ValueError, match="perplexity routing needs the heads: pass a routing or use the causal LM"):
        body(ids)


@torch.no_grad()
def test_layers_may_lie_on_different_devices(tmp_path: Path) -> None:
    """Here: in memory and on disk, which moves every weight to where it is used."""
    pytest.importorskip("accelerate")
    model = routed(separate=["ffn", "attention"])
    model.save_pretrained(tmp_path / "model")
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1.self_attn": "cpu"}
    devices |= {f"model.layers.1.{part}": "cpu" for part in ("input_layernorm", "post_attention_layernorm")}
    devices |= {"model.layers.1.mlp": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=devices, offload_folder=tmp_path / "offload")
    assert loaded.model.layers[0].mlp[0].up_proj.weight.device.type == "meta"
    ids, mask = padded(prompts(6, 4), "left")
    assert torch.equal(loaded(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(loaded.generate(ids, attention_mask=mask, **options), model.generate(ids, attention_mask=mask, **options))


def test_a_checkpoint_assembled_by_hand_loads(tmp_path: Path) -> None:
    """What a merge writes: tensors by name, config.json with `auto_map`, the code files."""
    model = routed(separate=["ffn"])
    model.save_pretrained(tmp_path)
    for path in [*tmp_path.glob("*.py"), tmp_path / "config.json", tmp_path / "generation_config.json"]:
        path.unlink()
    written = {
        "model_type": "moerge",
        "architectures": ["MoergeForCausalLM"],
        "auto_map": AUTO_MAP,
        "expert_config": {**CONFIGS["llama"]().to_dict(), "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"},
        "expert_names": NAMES,
        "separate": ["ffn"],
        "mix": "layer",
        "routing": {"kind": "perplexity", "top_k": 2},
        "dtype": "float32",
        "eos_token_id": 2,  # where generation_config.json is missing, generate reads these at the top level
    }
    (tmp_path / "config.json").write_text(json.dumps(written))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MoergeForCausalLM and isinstance(AutoConfig.from_pretrained(tmp_path), MoergeConfig)
    assert loaded.config.to_dict() == {**model.config.to_dict(), **loaded.config.to_dict()}
    assert loaded.generation_config.top_k is None and loaded.generation_config.eos_token_id == 2
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


@torch.no_grad()
def test_it_loads_where_moerge_is_not_installed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    model = routed(separate=["ffn", "attention"], mix="output")
    model.save_pretrained(folder)
    assert {path.name for path in folder.glob("*.py")} == set(code_files())
    assert json.loads((folder / "config.json").read_text())["auto_map"].items() <= AUTO_MAP.items()
    check_without_moerge(model, folder)


def test_the_code_that_travels_needs_only_torch_and_transformers() -> None:
    files = code_files()
    assert {home.split(".")[0] + ".py" for home in AUTO_MAP.values()} <= files.keys()
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and f"{node.module}.py" in files, name
            elif isinstance(node, ast.Import | ast.ImportFrom):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                roots = {str(module).partition(".")[0] for module in modules}
                assert roots <= {"torch", "transformers", *sys.stdlib_module_names}, name


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    program = "import sys, moerge.modeling; print(*sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
