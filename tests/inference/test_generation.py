"""`moerge generate`: the same tokens as transformers gives, for dense, native and sequence-routed checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers.command import moerge as command
from tests.helpers.tiny import EXPERTS, edit_config, make_models

torch = pytest.importorskip("torch", reason="needs moerge[models]")
transformers = pytest.importorskip("transformers", reason="needs moerge[models]")

pytestmark = pytest.mark.slow

PROMPT = "w5 w9 w33 w7"
IDS = torch.tensor([[5, 9, 33, 7]])


def words(ids: list[int]) -> str:
    return " ".join(f"w{token}" for token in ids if token > 2)


def greedy(folder: Path, tokens: int) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = IDS
    for _ in range(tokens):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], -1)
    return ids[0, IDS.shape[1] :].tolist()


@pytest.mark.parametrize("name", ["math", "native"])
def test_the_likeliest_tokens(checkpoints: Path, name: str) -> None:
    """Step by step, without a cache; the end token ends it."""
    result = command("generate", checkpoints / name, "--prompt", PROMPT, "--max-new-tokens", 6)
    expected = greedy(checkpoints / name, 6)
    if 2 in expected:
        expected = expected[: expected.index(2)]
    assert (result.code, result.out, result.err) == (0, words(expected) + "\n", "")


def test_sequence_routed(checkpoints: Path) -> None:
    from moerge.modeling import register

    register()
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoints / "routed").eval()
    expected = model.generate(IDS, max_new_tokens=6, do_sample=False)[0, IDS.shape[1] :].tolist()
    result = command("generate", checkpoints / "routed", "--prompt", PROMPT, "--max-new-tokens", 6, "--json")
    assert (result.code, result.err) == (0, "")
    assert result.json.keys() == {"checkpoint", "prompt", "text", "prompt_tokens", "tokens", "seconds", "routing"}
    assert (result.json["text"], result.json["prompt_tokens"], result.json["tokens"]) == (words(expected), 4, len(expected))
    assert list(result.json["routing"]) == ["base", *EXPERTS]
    assert list(result.json["routing"].values()) == pytest.approx(model.route(IDS).alpha[0].tolist())


def test_sampling_follows_the_seed_and_leaves_torch_s_alone(checkpoints: Path) -> None:
    def sample(seed: int) -> str:
        options = ("--max-new-tokens", 12, "--temperature", 1.5, "--seed", seed)
        return command("generate", checkpoints / "math", "--prompt", PROMPT, *options).out

    before = torch.get_rng_state()
    samples = [sample(seed) for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_run(checkpoints: Path, tmp_path: Path) -> None:
    result = command("generate", tmp_path / "nothing", "--prompt", "w5")
    assert (result.code, result.out) == (2, "")
    assert result.err == f"moerge: there is no checkpoint folder {tmp_path / 'nothing'}: check the path\n"
    result = command("generate", checkpoints / "math", "--prompt", "")
    assert (result.code, result.err) == (2, "moerge: the text '' has no tokens: give a longer one\n")
    assert "--prompt" in command("generate", checkpoints / "math").err
    assert command("generate", checkpoints / "math", "--prompt", "w5", "--temperature", -1).code == 2


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_pickles_and_files_elsewhere_are_not_loaded(checkpoints: Path, tmp_path: Path) -> None:
    pickled = copied(checkpoints / "math", tmp_path / "pickled")
    torch.save(transformers.AutoModelForCausalLM.from_pretrained(pickled).state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    outside = copied(checkpoints / "math", tmp_path / "outside")
    weights = outside / "model.safetensors"
    names = transformers.AutoModelForCausalLM.from_pretrained(outside).state_dict()
    for name, file in {"up": "../pickled.safetensors", "absolute": str(weights)}.items():
        folder = copied(checkpoints / "math", tmp_path / name)
        (folder / "model.safetensors").rename(tmp_path / "pickled.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, file)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        refused = command("generate", folder, "--prompt", PROMPT)
        assert refused.err == (
            f"moerge: {folder / 'model.safetensors.index.json'} names {file!r}, which is not a file in its own folder: "
            "refusing to read it\n"
        )
    (tmp_path / "a.txt").write_text(PROMPT)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(outside)}))
    (adapter / "adapter_model.bin").write_bytes((pickled / "pytorch_model.bin").read_bytes())
    refused = command("generate", adapter, "--prompt", PROMPT)
    assert refused.code == 2 and "holds adapter_model.bin, a pickle, which moerge does not load" in refused.err
    for arguments in (("generate", pickled, "--prompt", PROMPT), ("route", pickled, "--text", f"a={tmp_path / 'a.txt'}")):
        refused = command(*arguments)
        assert (refused.code, refused.out) == (2, "")
        assert f"{pickled} holds pytorch_model.bin, a pickle, which moerge does not load" in refused.err


def test_element_types_that_only_merging_does_not_read(checkpoints: Path, tmp_path: Path) -> None:
    folder = copied(checkpoints / "math", tmp_path / "complex")
    phases = {"model.phases": torch.ones(4, dtype=torch.complex64)}
    save_file(load_file(folder / "model.safetensors") | phases, folder / "model.safetensors", {"format": "pt"})
    assert "has the element type 'C64', which moerge does not read" in command("inspect", folder).err
    assert command("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 1).code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", "1e-40"), "temperature is 1e-40: use 0 for the likeliest token, or at least 0.001"),
        (("--seed", 2**64), "--seed"),
        (("--prompt", "a\udcff"), r"the text 'a\udcff' has \udcff, half of a character: write it whole, or remove it"),
    ],
)
def test_figures_and_texts_that_no_model_takes(options: tuple[Any, ...], message: str, checkpoints: Path) -> None:
    result = command("generate", checkpoints / "math", *(() if "--prompt" in options else ("--prompt", PROMPT)), *options)
    assert (result.code, result.out) == (2, "") and message in result.err, result


def test_a_routing_that_is_none_is_said_in_a_sentence(checkpoints: Path, tmp_path: Path) -> None:
    folder = copied(checkpoints / "routed", tmp_path / "odd")
    edit_config(folder, routing=[1])
    result = command("generate", folder, "--prompt", PROMPT)
    assert result.code == 2 and result.err.startswith(f"moerge: transformers cannot load {folder}: ")
    assert len(result.err.splitlines()) == 1


def test_code_of_others_runs_only_when_it_is_trusted(tmp_path: Path) -> None:
    make_models(tmp_path, experts=["math"], dtype="F32")
    folder = tmp_path / "math"
    mapping = {"AutoConfig": "configuration_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    edit_config(folder, model_type="odd", auto_map=mapping)
    (folder / "configuration_odd.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OddConfig(LlamaConfig):\n    model_type = 'odd'\n"
    )
    (folder / "modeling_odd.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_odd import OddConfig\n\n\n"
        "class OddForCausalLM(LlamaForCausalLM):\n    config_class = OddConfig\n"
    )
    refused = command("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 3)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == f"moerge: {folder} comes with code of its own: look at it, then run it with --trust-remote-code\n"
    trusted = command("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 3, "--trust-remote-code", "--json")
    assert trusted.code == 0, trusted.err
    assert trusted.json["tokens"] == 3


def test_an_older_transformers_runs_all_but_sequence_routed_models(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old() -> None:
        raise ImportError("the sequence-routed model needs transformers 5.5 or newer, and this is 4.57.6")

    monkeypatch.setattr("moerge.modeling.register", too_old)
    refused = command("generate", checkpoints / "routed", "--prompt", PROMPT)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == (
        f"moerge: {checkpoints / 'routed'}: the sequence-routed model needs transformers 5.5 or newer, and this is 4.57.6: "
        "pip install --upgrade transformers\n"
    )
    assert command("generate", checkpoints / "native", "--prompt", PROMPT, "--max-new-tokens", 1).code == 0


def test_registering_with_an_older_transformers_says_so() -> None:
    script = (
        "import transformers\n"
        "class PretrainedConfig: pass\n"
        "transformers.PretrainedConfig, transformers.__version__ = PretrainedConfig, '4.57.6'\n"
        "from moerge.modeling import register\n"
        "register()"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stderr.splitlines()[-1] == (
        "ImportError: the sequence-routed model needs transformers 5.5 or newer, and this is 4.57.6"
    )
