"""What each system loads: its class and key names, and where the bias is; loaded by its own code where it is there."""

import importlib
import importlib.machinery
import sys
import types

import pytest
import torch
from small_critics import BIAS, config_of, critic_of, tensors_of, token_ids, values_of
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification

from critic_train.export.systems import SLIME_SCRIPT, SYSTEMS
from critic_train.weights.saving import save_critic

HEADS = {
    "transformers": {"score.weight", "score.bias"},
    "verl": {"score.weight", "score.bias"},
    "openrlhf": {"score.weight"},
    "trl": {"v_head.summary.weight", "v_head.summary.bias"},
    "slime": {"score.weight", "score.bias"},
    "vllm": {"score.weight", "score.bias"},
}
CLASSES = {
    "transformers": "LlamaForTokenClassification",
    "verl": "LlamaForTokenClassification",
    "openrlhf": "CriticModel",
    "trl": "LlamaForCausalLM",
    "slime": "LlamaForCausalLM",
    "vllm": "LlamaForSequenceClassification",
}


def written(to, family, folder, bias=BIAS):
    """(critic, the directory of a system's form of it)."""
    critic = critic_of(family, bias)
    folder.mkdir(parents=True, exist_ok=True)
    save_critic(critic, folder, None)
    SYSTEMS[to].adapt(folder, critic)
    return critic, folder


@pytest.mark.parametrize("to", HEADS)
def test_class_and_key_names(to, tmp_path):
    _, folder = written(to, "Llama", tmp_path)
    names = set(tensors_of(folder))
    assert {name for name in names if not name.startswith("model.")} == HEADS[to]
    assert "model.embed_tokens.weight" in names
    assert config_of(folder)["architectures"] == [CLASSES[to]]


@pytest.mark.parametrize("to", ["openrlhf", "trl", "slime", "vllm"])
def test_without_a_token_classification_class_the_trunk_has_its_causal_lms_names(to, tmp_path):
    """As a Gemma3 trunk, which is saved by itself and without prefix."""
    _, folder = written(to, "Gemma3Text", tmp_path)
    assert {name for name in tensors_of(folder) if not name.startswith("model.")} == HEADS[to]
    model = AutoModelForCausalLM.from_pretrained(folder)
    stored = tensors_of(folder)
    for name, parameter in model.model.named_parameters():
        torch.testing.assert_close(parameter, stored[f"model.{name}"], rtol=0, atol=0)


def test_openrlhfs_bias_is_the_mean_of_its_configuration(tmp_path):
    """OpenRLHF: values = (h w - mean) / std."""
    critic, folder = written("openrlhf", "Llama", tmp_path)
    config = config_of(folder)
    trunk = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        values = (trunk(input_ids=token_ids()).last_hidden_state @ tensors_of(folder)["score.weight"].T)[:, :-1, 0]
    found = (values - config["mean"]) / config["std"]
    torch.testing.assert_close(found, values_of(critic), rtol=0, atol=1e-5)
    assert config["value_head_prefix"] == "score"


def test_no_bias_needs_no_mean(tmp_path):
    _, folder = written("openrlhf", "Llama", tmp_path, bias=0.0)
    assert not {"mean", "std"} & config_of(folder).keys()


def test_vllm_takes_no_activation_of_a_regression(tmp_path):
    _, folder = written("vllm", "Llama", tmp_path)
    assert (config_of(folder)["problem_type"], AutoConfig.from_pretrained(folder).num_labels) == ("regression", 1)


def test_trls_vocabulary_head_is_not_drawn(tmp_path):
    _, folder = written("trl", "Llama", tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert set(report["unexpected_keys"]) == HEADS["trl"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert config_of(folder)["summary_dropout_prob"] == 0.0


def test_nemo_rls_layout(tmp_path):
    critic = critic_of("Llama")
    save_critic(critic, tmp_path, None)
    (tmp_path / "tokenizer.json").write_text("{}")
    SYSTEMS["nemo-rl"].adapt(tmp_path, critic)
    assert [path.name for path in tmp_path.iterdir()] == ["value"]
    weights = tmp_path / "value" / "weights" / "model"
    assert {path.name for path in weights.iterdir()} == {"config.json", "model.safetensors"}
    assert (tmp_path / "value" / "tokenizer" / "tokenizer.json").is_file()
    model = AutoModelForTokenClassification.from_pretrained(weights).eval()
    with torch.no_grad():
        found = model(input_ids=token_ids()).logits[:, :-1, 0]
    torch.testing.assert_close(found, values_of(critic), rtol=0, atol=1e-5)


def test_verls_own_loader(tmp_path, monkeypatch):
    """`load_valuehead_model` asks for flash attention, which needs a GPU: here it gets torch's."""
    loader = pytest.importorskip("verl.utils.model")
    critic, folder = written("verl", "Llama", tmp_path)
    real = AutoModelForTokenClassification.from_pretrained
    monkeypatch.setattr(
        AutoModelForTokenClassification,
        "from_pretrained",
        lambda *args, **more: real(*args, **(more | {"attn_implementation": "sdpa"})),
    )
    model = loader.load_valuehead_model(str(folder), torch.float32, AutoConfig.from_pretrained(folder), False).eval()
    with torch.no_grad():
        found = model(input_ids=token_ids()).logits[:, :-1, 0]
    torch.testing.assert_close(found, values_of(critic), rtol=0, atol=1e-5)


def test_trls_own_class(tmp_path):
    trl = pytest.importorskip("trl")
    try:
        kind = importlib.import_module("trl.experimental.ppo").AutoModelForCausalLMWithValueHead
    except (ImportError, AttributeError):
        kind = getattr(trl, "AutoModelForCausalLMWithValueHead", None) or pytest.skip("TRL 1.13 has removed it")
    critic, folder = written("trl", "Llama", tmp_path)
    model = kind.from_pretrained(str(folder)).eval()
    with torch.no_grad():
        found = model(input_ids=token_ids(), attention_mask=torch.ones_like(token_ids()))[2][:, :-1]
    torch.testing.assert_close(found, values_of(critic), rtol=0, atol=1e-5)


def stand_in_for_flash_attention(monkeypatch):
    """OpenRLHF imports it at its top, and uses it on packed samples alone."""
    names = ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed")
    for name in names:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        for used in ("index_first_axis", "pad_input", "rearrange", "unpad_input", "all_gather"):
            setattr(module, used, None)
        monkeypatch.setitem(sys.modules, name, module)


def test_openrlhfs_own_class(tmp_path, monkeypatch):
    """Without a bias: what it normalises with is uninitialised memory in transformers 5."""
    if importlib.util.find_spec("openrlhf") is None:
        pytest.skip("OpenRLHF is not installed")
    stand_in_for_flash_attention(monkeypatch)
    models = importlib.import_module("openrlhf.models.model")
    monkeypatch.setattr(
        importlib.import_module("openrlhf.utils.utils"), "convert_to_torch_dtype", lambda _: torch.float32
    )
    critic, folder = written("openrlhf", "Llama", tmp_path, bias=0.0)
    model = models.get_llm_for_sequence_regression(str(folder), "critic", attn_implementation="sdpa").eval()
    ids = token_ids()
    with torch.no_grad():
        found = model(ids, action_mask=torch.ones_like(ids)[:, 1:], attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(found, values_of(critic), rtol=0, atol=1e-5)


class Parameters:
    """What slime calls a model here: names as Megatron has them, with shapes of a Llama of SHAPE."""

    def __init__(self, hidden: int) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden))
        self.bias = torch.nn.Parameter(torch.zeros(1))
        self.norm = torch.nn.Parameter(torch.zeros(hidden))


def test_slimes_script_fills_the_critics_output_layer(tmp_path, monkeypatch):
    """With stand-ins for the functions of slime that it calls, by the signatures of slime 624b824."""
    critic, folder = written("slime", "Llama", tmp_path)
    assert (folder / "to_torch_dist.py").read_text() == SLIME_SCRIPT
    model = Parameters(64)
    named = [("module.module.output_layer.weight", model.weight), ("module.module.output_layer.bias", model.bias)]
    named.append(("module.module.decoder.final_layernorm.weight", model.norm))
    common = types.ModuleType("slime.backends.megatron_utils.hf_to_megatron.common")

    class Reader:
        def __init__(self, path):
            self.tensors = tensors_of(folder)

        def get_tensor(self, name):
            return self.tensors[name]

    common.SafetensorReader = Reader
    common.strip_mcore_wrappers = lambda name: name.replace("module.", "")
    common._pad_vocab = lambda args, name, tensor: tensor
    common.shard_mcore_tensor = lambda name, tensor, parameter: tensor
    package = types.ModuleType("slime.backends.megatron_utils.hf_to_megatron")
    package.common = common
    package._LOADERS = {"llama": lambda name, reader, config: reader.get_tensor("model.norm.weight")}
    update = types.ModuleType("slime.backends.megatron_utils.update_weight.common")
    update.named_params_and_buffers = lambda args, model: iter(named)
    for module in (common, package, update):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in (
        "slime",
        "slime.backends",
        "slime.backends.megatron_utils",
        "slime.backends.megatron_utils.update_weight",
    ):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    script: dict = {"__name__": "script"}
    exec(SLIME_SCRIPT, script)
    script["load_critic_weights"](None, model, str(folder))
    torch.testing.assert_close(model.weight, critic.head.weight)
    torch.testing.assert_close(model.bias, critic.head.bias)
    torch.testing.assert_close(model.norm, critic.trunk.norm.weight)
