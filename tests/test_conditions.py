"""Conditions through the house: spaces, resets, oracles, networks, guidance, training, files."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from probes import noises

from oracles.jury import Jury
from oracles.teacher import Teacher
from prefenv.envs import FlowEnv, FlowVectorEnv
from prefenv.errors import ConfigError, FeedbackError
from prefenv.feedback import FeedbackStore, Judgement
from prefenv.feedback.files import dump
from prefenv.flow import RectifiedFlow
from prefenv.networks import GuidedVelocity, VelocityField, VelocityMLP
from prefenv.offline import make_samples, rounds
from prefenv.oracle import Oracle
from prefenv.policy import FlowPolicy
from prefenv.registry import lookup, make_task
from prefenv.reward import train_reward
from prefenv.rollout import collect
from prefenv.tasks import Classes, Task, TrainConfig, Vector
from prefenv.tasks.conditions import from_texts, panels_of, to_text
from prefenv.testing import check_oracle, check_vector_env
from prefenv.testing.probe import ConditionalProbe, Toward, probe_env
from prefenv.train import dropped, measure, train_reference

TASKS = {"classes": ConditionalProbe(), "vector": ConditionalProbe(condition=Vector(2))}
every_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def make(task, num_envs=8, panel_size=4, **settings):
    """An env of a conditional probe with its linear oracle."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = RectifiedFlow(task.network())
    return FlowVectorEnv(
        num_envs,
        **{
            "task": task,
            "oracle": Toward(task),
            "panel_size": panel_size,
            "steps": 4,
            "reference": flow,
            "device": "cpu",
            **settings,
        },
    )


def single(task, **settings):
    env = make(task, 1, 1)
    return FlowEnv(
        task=task, oracle=Toward(task), steps=4, reference=env.reference.flow, device="cpu", **settings
    )  # fmt: skip


# The environment


@every_task
@pytest.mark.parametrize("control", ["state", "noise"])
@pytest.mark.parametrize("array", ["numpy", "torch"])
def test_the_env_keeps_its_contract(task, control, array):
    check_vector_env(
        lambda n: make(task, n, 1, control=control, array=array),
        lambda: single(task, control=control),
    )


@every_task
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gymnasium_and_sb3_take_the_single_env(task):
    check_env(single(task))
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    checker.check_env(single(task))


@every_task
def test_a_panel_has_one_condition_drawn_apart_from_the_noise(task):
    env, other = make(task), make(ConditionalProbe(condition=Classes(3)))
    first, _ = env.reset(seed=3)
    assert env.observation_space.contains(first)
    c = first["condition"].reshape(2, 4, -1)
    assert (c == c[:, :1]).all(), "one prompt for the samples that are compared"
    assert np.array_equal(first["x"], other.reset(seed=3)[0]["x"]), "a generator of its own"
    again = [env.reset()[0]["condition"] for _ in range(20)]
    assert len(np.unique(np.concatenate([a.reshape(8, -1) for a in again]), axis=0)) > 2
    assert np.array_equal(env.reset(seed=3)[0]["condition"], first["condition"])


def test_reset_asks_for_conditions():
    env = make(TASKS["classes"])
    assert env.reset(options={"condition": 2})[0]["condition"].tolist() == [2] * 8
    rows = [0, 0, 0, 0, 1, 1, 1, 1]
    assert env.reset(options={"condition": rows})[0]["condition"].tolist() == rows
    env = make(TASKS["vector"])
    assert env.reset(options={"condition": [0.5, -1]})[0]["condition"].tolist() == [[0.5, -1]] * 8


@pytest.mark.parametrize(
    ("task", "condition", "words"),
    [
        ("classes", [0, 1, 0, 0, 1, 1, 1, 1], "one condition"),
        ("classes", 3, "classes 0 to 2"),
        ("classes", 0.5, "fractions"),
        ("classes", [0, 1], "shape"),
        ("vector", [math.nan, 0], "finite"),
        ("vector", [[0, 1]], "shape"),
    ],
)
def test_wrong_conditions_are_refused(task, condition, words):
    env = make(TASKS[task])
    before, _ = env.reset(seed=0)
    with pytest.raises(ConfigError, match=words):
        env.reset(options={"condition": condition})
    assert torch.equal(env._x.flatten(1), torch.as_tensor(before["x"])), "nothing was begun"


def test_tasks_without_conditions_take_none():
    env, oracle = probe_env()
    with pytest.raises(ConfigError, match="no conditions"):
        env.reset(options={"condition": 1})
    assert set(env.reset()[0]) == {"x", "t"} and not oracle.conditional
    with pytest.raises(ConfigError, match="has none"):
        probe_env(task=TASKS["classes"])[1].__class__(TASKS["classes"])
        FlowVectorEnv(
            4, task=env.task, oracle=Toward(TASKS["classes"]), reference=env.reference.flow
        )
    with pytest.raises(ConfigError, match="wants one for each"):
        make(TASKS["classes"]).judge(torch.zeros(4, 2))


def test_final_observations_tell_the_condition_that_was_asked_for():
    env = make(TASKS["classes"], 4)
    first, _ = env.reset(seed=0, options={"condition": 2})
    for _ in range(4):
        observation, reward, *_, info = env.step(env.reference.predict(first)[0])
        final = info.get("final_obs")
        first = observation
    assert [row["condition"] for row in final] == [2] * 4
    x = torch.tensor(np.stack([row["x"] for row in final]))
    assert reward == pytest.approx(
        TASKS["classes"].toward(x, torch.full((4,), 2)).numpy(), rel=1e-5
    )


@every_task
def test_the_reference_follows_the_condition(task):
    """As a policy in the env, by ``sample`` and in noise control: the same sample, at its own centre."""
    env, steered = make(task, 60, 4), make(task, 60, 4, control="noise")
    observation, _ = env.reset(seed=1)
    steered.reset(options={"condition": observation["condition"]})
    state, condition = torch.tensor(observation["x"]), torch.tensor(observation["condition"])
    for _ in range(4):
        action, _ = env.reference.predict(observation, deterministic=True)
        observation, *_, info = env.step(action)
    end = torch.tensor(np.stack([row["x"] for row in info["final_obs"]]))
    torch.testing.assert_close(end, env.reference.sample(state, condition))
    _, judgement, *_, info = steered.step(state)
    torch.testing.assert_close(torch.tensor(np.stack([r["x"] for r in info["final_obs"]])), end)
    assert judgement == pytest.approx(task.toward(end, condition).numpy(), abs=1e-5)
    assert float((end - task.centre(condition)).norm(dim=1).mean()) < 0.6


def test_reward_gradients_are_of_the_condition():
    task = TASKS["classes"]
    env = make(task, 6, 1)
    rollout = collect(env, env.reference, gradient=True)
    m = task.centre(rollout.condition)
    torch.testing.assert_close(rollout.gradient, torch.stack([-m[:, 1], m[:, 0]], 1) / task.std)


# Oracles


class Old(Oracle):
    """Written before there were conditions."""

    def judge(self, panels):
        return panels[..., 0]


def test_oracles_of_one_argument_judge_conditional_tasks():
    env = make(TASKS["classes"], oracle=Old(TASKS["classes"]))
    rollout = collect(env, env.reference)
    assert torch.equal(rollout.judgement, rollout.samples[:, 0])


@every_task
def test_the_oracle_contract_covers_conditions(task):
    x, condition = task.data(24, torch.Generator().manual_seed(0))
    check_oracle(Toward(task), x, condition)
    with pytest.raises(AssertionError, match="checked with conditions"):
        check_oracle(Toward(task), x)


def test_wrappers_hand_the_condition_on():
    task = TASKS["classes"]
    x, _ = task.data(12, torch.Generator().manual_seed(0))
    panels, condition = x.unflatten(0, (3, 4)), torch.arange(3)
    want = task.toward(panels, condition[:, None].expand(3, 4))
    best = (want == want.amax(1, keepdim=True)).float()
    assert torch.equal(Teacher(Toward(task)).judge(panels, condition), best)
    assert torch.equal(Toward(task, "best").judge(panels, condition), best)
    jury = Jury(task, [Toward(task), Old(task)], "mean")
    torch.testing.assert_close(jury.judge(panels, condition), (want + panels[..., 0]) / 2)
    assert jury.conditional and Teacher(Toward(task)).conditional


def test_who_does_not_see_conditions_is_refused():
    task = TASKS["classes"]
    blind = Old(task)
    blind.unconditional = True
    for oracle in (blind, Teacher(blind), Jury(task, [blind])):
        with pytest.raises(ConfigError, match="does not see conditions"):
            make(task, oracle=oracle)
    assert lookup("oracle", "web").unconditional and lookup("oracle", "terminal").unconditional


# Networks, training, guidance


def test_a_conditional_network_wants_its_condition():
    for options in ({"classes": 3}, {"vector": 2}):
        with pytest.raises(ConfigError, match="conditional"):
            VelocityMLP((2,), 8, 1, **options)(torch.zeros(1, 2), torch.tensor(0.5))


def test_vectors_reach_the_network_and_nan_is_none():
    torch.manual_seed(0)
    field = VelocityMLP((2,), 8, 1, vector=3)
    torch.nn.init.normal_(field.out.weight)
    x, c = torch.randn(4, 2), torch.randn(4, 3)
    c[3] = torch.nan
    v = field(x, torch.tensor(0.3), c)
    for f in (
        field.at(torch.tensor([0.3]), c)[0],
        torch.no_grad()(field.at)(torch.tensor([0.3]), c)[0],
    ):
        torch.testing.assert_close(f(x), v, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        field.given.weight.zero_(), field.given.bias.zero_()
    without = field(x, torch.tensor(0.3), c)
    assert torch.equal(without[3], v[3]) and not torch.allclose(without[:3], v[:3])


class Level(VelocityField):
    """Velocity = 10 c, and 1 for the null class 3."""

    def forward(self, x, t, condition=None):
        v = torch.where(condition == 3, 1.0, 10.0 * condition)
        return v[:, None].expand_as(x) + t.reshape(-1, 1)


def test_guidance_is_the_formula():
    field, c = Level((2,)), torch.tensor([0, 1, 2, 3])
    x = torch.zeros(4, 2)
    plain = torch.tensor([0.0, 10, 20, 1]) + 0.5
    for weight in (1.0, 0.0, 2.5):
        guided = GuidedVelocity(field, Classes(3).null, weight)
        want = 1.5 + weight * (plain - 1.5)
        for t in (torch.tensor(0.5), torch.full((4,), 0.5)):
            torch.testing.assert_close(guided(x, t, c)[:, 0], want)
        torch.testing.assert_close(guided.at(torch.tensor([0.5]), c)[0](x)[:, 0], want)
    assert guided.plain() is field


@every_task
def test_training_drops_the_share_of_conditions(task):
    _, c = task.data(20_000, torch.Generator().manual_seed(0))
    assert dropped(task, TrainConfig(), c, torch.Generator()) is c
    got = dropped(task, TrainConfig(drop=0.2), c, torch.Generator().manual_seed(0))
    null = got.isnan().all(1) if got.is_floating_point() else got == 3
    assert float(null.float().mean()) == pytest.approx(0.2, abs=0.01)
    assert torch.equal(got[~null], c[~null])
    assert dropped(probe_env()[0].task, TrainConfig(drop=0.2), c, torch.Generator()) is None


class Small(ConditionalProbe):
    """The conditional probe with a small network that must learn everything."""

    def network(self):
        field = VelocityMLP((2,), 64, 1, **self.kind.network(True))
        return GuidedVelocity(field, self.kind.null, self.guidance)


@every_task
def test_a_conditional_reference_learns_each_condition(task):
    config = TrainConfig(iterations=400, batch=128, drop=0.2)
    task = Small(condition=task.condition, train=config, guidance=3.0, samples=256)
    trained = train_reference(task, seed=0, device="cpu", progress=False)
    field = trained.flow.field.plain()
    plain = FlowPolicy(RectifiedFlow(field))
    asked = task.fixed_conditions()
    x = plain.sample(noises(64 * len(asked)), asked.repeat_interleave(64, 0))
    gap = (x.view(-1, 64, 2).mean(1) - task.centre(asked)).norm(dim=1)
    assert float(gap.mean()) < 0.2, "each condition's samples lie around its own centre"
    silent = task.condition.null(asked[:1]).expand(512, *task.condition.shape)
    null = FlowPolicy(trained.flow).sample(noises(512), silent)
    assert float(null.mean(0).norm()) < 0.2 and float(null.std()) > 0.5, "the null makes all"
    x, t, c = (
        noises(4),
        torch.full((4,), 0.3),
        task.draw_conditions(4, torch.Generator().manual_seed(0)),
    )
    with torch.no_grad():
        told, unsaid = field(x, t, c), field(x, t, task.condition.null(c))
        torch.testing.assert_close(trained.flow.velocity(x, t, c), unsaid + 3 * (told - unsaid))
    assert math.isfinite(measure(trained.flow, task, 4)["log_likelihood_nats"])


def test_tasks_make_the_network_that_their_training_wants():
    for drop, labels in ((0.0, 3), (0.1, 4)):
        task = ConditionalProbe(train=TrainConfig(drop=drop), guidance=2.0)
        field = Task.network(task)
        assert isinstance(field, GuidedVelocity) == (drop > 0)
        assert field.plain().label.num_embeddings == labels
    assert field.weight == 2.0


@pytest.mark.parametrize("task", ["shapes", "gaussians", "clouds", "segments"])
def test_guidance_that_was_not_trained_for_is_refused(task):
    for weight in (3.0, 0.0):
        with pytest.raises(ConfigError, match=f"task '{task}' takes no guidance"):
            make_task(f"{task}:guidance={weight}")
    assert make_task(f"{task}:guidance=1").guidance == 1
    assert make_task("digits:guidance=3.0").guidance == 3.0


# Files


@every_task
def test_conditions_are_written_and_read(task):
    _, c = task.data(5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(from_texts([to_text(x) for x in c], task.condition), c)
    for broken in ([None], ["x"], ["[1, 2, 3]"], ["7" if c.dim() == 1 else "[99, 0]"]):
        with pytest.raises(ConfigError, match=r"condition"):
            from_texts(broken, task.condition)
    assert torch.equal(panels_of(c.repeat_interleave(3, 0), 3), c)


@every_task
def test_offline_rounds_have_the_conditions_of_their_samples(task, tmp_path):
    agent = lookup("agent", "flow-dpo")(make(task), seed=0)
    policy = agent.env.policy(agent.reference, agent.kernel())
    with FeedbackStore(tmp_path / "f.sqlite") as store:
        make_samples(store, policy, 16, 4, seed=2, task=task)
        for panel in store.panels():
            store.answer(Judgement(panel.samples, (1.0, 0.0, 0.0, 0.0)))
        feedback = dump(store)
    got = rounds(feedback, agent)
    assert len(got) == 2 and len({s.condition for s in feedback.samples}) > 1
    for rollout in got:
        again = policy.sample(rollout.noise, rollout.condition)
        torch.testing.assert_close(again, rollout.samples, rtol=1e-5, atol=1e-5)
        panels_of(rollout.condition, 4)
    with pytest.raises(FeedbackError, match="no conditions"):
        train_reward(feedback)
