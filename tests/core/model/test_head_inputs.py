"""A head that reads the running mean of states as well, against a loop over transformers' own states."""

import json
from dataclasses import replace

import numpy as np
import pytest
import ranks
import torch
from ranks import on_ranks
from safetensors.torch import load_file
from sklearn.linear_model import Ridge
from support import StopAfter, branching_rollouts, newest, readable_rollouts, small_config, write_shard
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from critic_train.errors import ConfigError, ModelError
from critic_train.events import run_to_end
from critic_train.export import export as exporting
from critic_train.inference import load_critic as critic_in_memory
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.head_inputs import running_mean, states_and_means
from critic_train.model.microbatches import predict_values
from critic_train.model.selfcheck import use_stock_attention
from critic_train.rollouts import Rollouts
from critic_train.settings import ExportSettings, FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.exact_head import _heads, of_last_state, second_moments
from critic_train.training.fit import fit
from critic_train.training.train_step import LossRecipe, accumulate_gradient
from critic_train.weights.loading import build_critic, load_critic, read_model
from critic_train.weights.saving import save_critic

CPU = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=10_000)


def rollouts() -> Rollouts:
    """Branching ones, of which one that begins as another has its first response tokens masked out, as a tool's."""
    made = branching_rollouts()
    mask = made.response_mask.copy()
    start, stop = made.offsets[1], made.offsets[2]
    chosen = start + np.flatnonzero(mask[start:stop])
    mask[chosen[: len(chosen) // 2]] = False
    return replace(made, response_mask=mask)


def two_input_critic() -> Critic:
    critic = build_critic(small_config("Llama"), seed=0, head_inputs="last+mean")
    with torch.no_grad():
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    critic.head.set_linear(critic.head.weight.flatten().clone(), 0.25)
    return critic


def critic_of_last() -> Critic:
    return build_critic(small_config("Llama"), seed=0)


def states_by_hand(critic: Critic, made: Rollouts) -> np.ndarray:
    """float64 [M, 2 * hidden_size]: last state and mean of the response's states so far, token by token."""
    use_stock_attention(critic)
    rows = []
    for start, stop in zip(made.offsets[:-1].tolist(), made.offsets[1:].tolist(), strict=True):
        ids = torch.from_numpy(made.input_ids[start:stop].astype(np.int64))[None]
        with torch.no_grad():
            hidden = critic.trunk(input_ids=ids).last_hidden_state[0].double().numpy()
        read = []
        for token in range(stop - start):
            if made.response_mask[start + token]:
                read.append(hidden[token - 1])
                rows.append(np.concatenate([read[-1], np.mean(read, axis=0)]))
    return np.array(rows)


@pytest.mark.parametrize(("forest", "max_tokens"), [(True, 10_000), (True, 40), (False, 90)])
def test_values_are_those_of_a_loop_however_they_are_packed(forest, max_tokens):
    critic, made = two_input_critic(), rollouts()
    weight = critic.head.weight.detach().double().numpy().ravel()
    if not forest:
        use_stock_attention(critic)
    values = predict_values(critic, made, replace(CPU, max_tokens=max_tokens), forest=forest)
    by_hand = states_by_hand(critic, made) @ weight + 0.25
    assert np.abs(values[made.response_mask] - by_hand).max() < 1e-5
    assert not values[~made.response_mask].any()


def test_running_means_are_taken_within_each_rollout():
    numbers, index = torch.tensor([2.0, 4.0, 9.0, 1e6, 1.0, 2.0]), torch.tensor([0, 1, 2, 0, 0, 1])
    assert running_mean(numbers, index).tolist() == [2.0, 3.0, 5.0, 1e6, 1.0, 1.5]
    states, value_index = torch.tensor([[2.0, 0.0], [4.0, 6.0], [1.0, 1.0]]), torch.tensor([0, 1, 2, 0, 2])
    for rows in (1, 2, 5):  # a part may end within a rollout
        found = torch.cat([*states_and_means(states, value_index, torch.tensor([0, 1, 2, 0, 1]), rows)])
        assert found[:, 2:].tolist() == [[2.0, 0.0], [3.0, 3.0], pytest.approx([7 / 3, 7 / 3]), [2.0, 0.0], [1.5, 0.5]]
        assert found[:, :2].tolist() == states[value_index].tolist()


def test_the_gradient_does_not_depend_on_packing():
    recipe, made = LossRecipe(cliprange_value=None, mode="token-mean", scale_factor=None), rollouts()
    gradients = []
    for forest, max_tokens in ((True, 10_000), (True, 40), (False, 90)):
        critic = two_input_critic()
        if not forest:
            use_stock_attention(critic)
        compute = replace(CPU, max_tokens=max_tokens)
        accumulate_gradient(critic, made, recipe, compute, forest=forest, stop=StopRequest())
        gradients.append(torch.cat([p.grad.flatten() for p in critic.parameters()]))
    # By hand for the head: the mean over tokens of error times what the head reads.
    critic = two_input_critic()
    read = states_by_hand(critic, made)
    error = read @ critic.head.weight.detach().double().numpy().ravel() + 0.25 - made.returns[made.response_mask]
    by_hand = torch.from_numpy(error @ read / len(read)).float()
    torch.testing.assert_close(critic.head.weight.numel(), len(by_hand))
    torch.testing.assert_close(gradients[0][-len(by_hand) - 2 : -2], by_hand, rtol=1e-4, atol=1e-5)
    for other in gradients[1:]:
        torch.testing.assert_close(gradients[0], other, rtol=1e-4, atol=1e-5)


def test_the_exact_head_is_ridge_on_both(tmp_path):
    made, critic = rollouts(), two_input_critic()
    weights = np.repeat(np.random.default_rng(0).uniform(0.5, 2.0, len(made)), made.lengths)
    moments = second_moments(critic, made, weights, replace(CPU, max_tokens=60), forest=True, stop=StopRequest())
    read, of_token = states_by_hand(critic, made), weights[made.response_mask]
    returns, total = made.returns[made.response_mask].astype(np.float64), of_token.sum()
    centred = read - of_token @ read / total
    mean_eigenvalue = np.trace((centred * of_token[:, None]).T @ centred) / total / read.shape[1]
    weight, bias = np.split(_heads(moments, [0.1])[0].numpy(), [read.shape[1]])
    reference = Ridge(alpha=0.1 * mean_eigenvalue * total, solver="svd").fit(read, returns, sample_weight=of_token)
    np.testing.assert_allclose(read @ weight + bias, reference.predict(read), atol=1e-6)
    alone = second_moments(critic_of_last(), made, weights, CPU, forest=True, stop=StopRequest())
    torch.testing.assert_close(of_last_state(moments), alone, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_says_what_its_head_reads(tmp_path):
    critic, made = two_input_critic(), branching_rollouts()
    save_critic(critic, tmp_path, None)
    source = read_model(tmp_path)
    assert source.head_inputs == "last+mean"
    values = predict_values(critic, made, CPU, forest=True)
    again = predict_values(load_critic(source), made, CPU, forest=True)
    np.testing.assert_array_equal(values, again)
    # transformers has two scores, of which the value is made as the docs say.
    model = AutoModelForTokenClassification.from_pretrained(tmp_path).eval()
    ids = made.input_ids[: made.offsets[1]].astype(np.int64)
    with torch.no_grad():
        own, averaged = model(input_ids=torch.from_numpy(ids)[None]).logits[0].double().numpy().T
    at = np.flatnonzero(made.response_mask[: len(ids)]) - 1
    by_hand = own[at] + np.cumsum(averaged[at]) / np.arange(1, len(at) + 1)
    np.testing.assert_allclose(by_hand, values[: len(ids)][at + 1], atol=1e-5)
    # What does not know of it, as older versions and other programs, expects one row.
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        AutoModelForTokenClassification.from_pretrained(tmp_path, num_labels=1)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("value_head_inputs", "unknown"))
    with pytest.raises(ModelError, match=r"shape \[2, 64\]; a value head that reads last has"):
        read_model(tmp_path)
    config.write_text(config.read_text().replace('"unknown": "last+mean"', '"value_head_inputs": "last+median"'))
    with pytest.raises(ModelError, match="value_head_inputs is 'last\\+median'; known are last, last\\+mean"):
        read_model(tmp_path)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> FitSettings:
    folder = tmp_path_factory.mktemp("two_inputs")
    write_shard(folder / "data" / "a.parquet", readable_rollouts(24, seed=1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(small_config("Llama", num_hidden_layers=2)).save_pretrained(folder / "base")
    return FitSettings(
        data=[str(folder / "data")],
        out=str(folder / "unused"),
        model=str(folder / "base"),
        head_inputs="last+mean",
        batch_size=16,
        max_tokens=120,
        no_clip=True,
        no_report=True,
        device="cpu",
    )


@pytest.mark.parametrize("train", ["head", "last-1", pytest.param("lora", marks=pytest.mark.slow)])
def test_runs_train_it_and_go_on_with_it(train, settings, tmp_path):
    """From kept states and from tokens; resumed, and as the --model of another run."""
    given = settings.replace(train=train, epochs=2, lr=1e-3, checkpoint_every=1)
    list(fit(given.replace(out=str(tmp_path / "whole")), StopRequest()))
    stopped = given.replace(out=str(tmp_path / "stopped"))
    for looks in (25, 40, 60):
        list(fit(stopped, StopAfter(looks=looks)))
    list(fit(stopped, StopRequest()))
    whole, resumed = (load_file(newest(tmp_path / name) / "model.safetensors") for name in ("whole", "stopped"))
    assert whole["score.weight"].shape == (2, 64)
    assert whole["score.weight"].abs().sum(1).all()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    made = readable_rollouts(4, seed=2)
    critic = load_critic(read_model(newest(tmp_path / "whole")))
    expected = predict_values(critic, made, CPU, forest=True)[made.response_mask]
    ids = np.split(made.input_ids, made.offsets[1:-1])
    prompts = [int(part.argmax()) for part in np.split(made.response_mask, made.offsets[1:-1])]
    found = critic_in_memory(newest(tmp_path / "whole"), device="cpu").values(ids, prompts)
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-5)


def test_what_cannot_take_it_refuses_it(settings, tmp_path):
    list(fit(settings.replace(out=str(tmp_path / "run"), train="head"), StopRequest()))
    critic = str(tmp_path / "run")
    solved = json.loads((tmp_path / "run" / "result.json").read_text())["exact_head"]
    assert solved["explained_variance"] > 0.5 < solved["explained_variance_last"]
    asked = settings.replace(model=critic, out=str(tmp_path / "other"), head_inputs="last")
    with pytest.raises(ConfigError, match=r"its value head reads last\+mean, and --head-inputs is last"):
        list(fit(asked, StopRequest()))
    export = ExportSettings(paths=[critic, str(tmp_path / "export")], to="verl", device="cpu")
    with pytest.raises(ModelError, match=r"the value head reads last\+mean.*verl 0.9.1 does not compute") as refused:
        run_to_end(exporting.export(export))
    assert not (tmp_path / "export").exists()
    # The hint works: a head that reads the last state alone, on the same trunk, is exported.
    assert "--head-init exact --head-inputs last" in (refused.value.hint or "")
    list(fit(asked.replace(head_init="exact", train="head"), StopRequest()))
    plain = ExportSettings(paths=[str(tmp_path / "other"), str(tmp_path / "export")], to="verl", device="cpu")
    assert run_to_end(exporting.export(plain)).result["class"] == "LlamaForTokenClassification"
    assert '"value_head_inputs"' not in (tmp_path / "export" / "config.json").read_text()


@pytest.mark.slow
def test_ranks_solve_and_keep_it_together(settings, tmp_path):
    given = settings.replace(train="last-1", max_steps=2, lr=1e-3)
    list(fit(given.replace(out=str(tmp_path / "alone")), StopRequest()))
    answers = on_ranks(2, ranks.fit_run, given.replace(out=str(tmp_path / "ranks")))
    assert all("fault" not in answer for answer in answers), answers
    alone, several = (load_file(newest(tmp_path / name) / "model.safetensors") for name in ("alone", "ranks"))
    torch.testing.assert_close(several["score.weight"], alone["score.weight"], rtol=1e-3, atol=1e-4)
    assert read_model(newest(tmp_path / "ranks")).head_inputs == "last+mean"
