"""Conditions through the house: spaces, resets, oracles, agents, matching, training, evaluation, files."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from probes import Chain, euler_gain, gaussian_kl, noises, quick

from agents.best_of_n import BestOfN
from agents.pfm import PFM, transport_pairs, within
from oracles.jury import Jury
from oracles.teacher import Teacher
from prefenv.envs import FlowEnv, FlowVectorEnv
from prefenv.errors import ConfigError, FeedbackError
from prefenv.evaluation import Judge
from prefenv.feedback import FeedbackStore, Judgement
from prefenv.feedback.files import dump
from prefenv.flow import RectifiedFlow
from prefenv.networks import GuidedVelocity, VelocityField, VelocityMLP
from prefenv.offline import make_samples, rounds
from prefenv.optimum import energy_square, frontier, frontier_kl
from prefenv.oracle import Oracle
from prefenv.policy import FlowPolicy
from prefenv.registry import AGENTS, lookup
from prefenv.reward import train_reward
from prefenv.rollout import collect
from prefenv.tasks import Classes, Task, TrainConfig, Vector
from prefenv.tasks.conditions import from_texts, panels_of, to_text
from prefenv.testing import check_oracle, check_vector_env
from prefenv.testing.probe import ConditionalProbe, Toward, probe_env, turn
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


# Agents


def test_matching_never_crosses_conditions():
    g = torch.Generator().manual_seed(0)
    c = torch.randint(3, (64,), generator=g)
    source, target = torch.randn(64, 2, generator=g), torch.randn(64, 2, generator=g)
    # The condition is written into the samples, far less than what the transport would gain by crossing.
    source[:, 1], target[:, 1] = 0.01 * c, 0.01 * c
    y0, y1 = transport_pairs(source, target, c)
    assert torch.equal((100 * y0[:, 1]).round(), (100 * y1[:, 1]).round())
    assert torch.equal(y0, source) and torch.equal(y1.sort(0).values, target.sort(0).values)
    crossing = transport_pairs(source, target)
    assert not torch.equal((100 * crossing[0][:, 1]).round(), (100 * crossing[1][:, 1]).round())
    for i in range(3):
        want = transport_pairs(source[c == i], target[c == i])[1]
        assert torch.equal(y1[c == i], want), "the optimum within each condition"


@every_task
def test_partners_are_of_the_same_condition_evenly(task):
    c = task.fixed_conditions()[:3]
    source = c[torch.tensor([0, 1, 2, 0, 1, 0])]
    wanted = c[torch.tensor([1, 0, 2])].repeat(3000, *[1] * (c.dim() - 1))
    rows = within(source, wanted, torch.Generator().manual_seed(0))
    assert torch.equal(source[rows], wanted)
    share = rows.bincount(minlength=6) / 3000
    for group in ([0, 3, 5], [1, 4], [2]):
        assert share[group].tolist() == pytest.approx([1 / len(group)] * len(group), abs=0.04)


@pytest.mark.parametrize("coupling", ["pair", "pool", "ot"])
@pytest.mark.parametrize("source", ["reference", "rejected"])
def test_pfm_keeps_sources_and_targets_of_one_condition(coupling, source, monkeypatch):
    """Centres are far apart, so a pair that crossed conditions would be longer than any that did not."""
    agent = PFM(make_probe(0.01), PFM.Config(coupling=coupling, source=source, updates=3), seed=0)
    seen = []
    monkeypatch.setattr(
        "agents.pfm.pfm_loss", lambda v, u: seen.append(u) or (v - u).square().mean(1)
    )
    agent.learn(128)
    assert len(seen) == 6 and max(float(u.norm(dim=1).max()) for u in seen) < 0.2


def test_pool_rows_keep_their_condition():
    task = ConditionalProbe(std=0.01)
    for name, key in (
        ("rft", "accepted"),
        ("best-of-n", "samples"),
        ("kto", "sample"),
        ("pfm", "target"),
    ):
        agent = lookup("agent", name)(make_probe(0.01), seed=0).learn(128)
        pool = agent.pool
        gap = pool[key] - task.centre(pool["condition"])
        assert len(gap) and float(gap.norm(dim=1).max()) < 0.1, name


def make_probe(std=0.3, rows=64):
    return probe_env(turn(1, std), rows, task=ConditionalProbe(std=std))[0]


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("name", AGENTS)
def test_agents_save_and_go_on_exactly(task, name, tmp_path):
    cls = quick(name)

    def env():
        return make(
            task, 8, max(4, cls.requires.panel_size), control=cls.control, kernel="flow-sde"
        )

    agent = cls(env(), seed=1).learn(8)
    agent.save(tmp_path / "a.zip")
    loaded = cls.load(tmp_path / "a.zip", env())
    x, asked = noises(6), task.draw_conditions(6, torch.Generator().manual_seed(0))
    for one in (agent, loaded):
        one.learn(8)
    assert torch.equal(agent.sample(x, asked), loaded.sample(x, asked))
    assert bool(agent.sample(x, asked).isfinite().all())
    observation, _ = agent.env.reset(seed=5)
    action, _ = agent.predict(observation)
    assert action.shape == observation["x"].shape and np.isfinite(action).all()


def test_who_cannot_learn_conditions_says_so():
    class OldSample(BestOfN):
        def sample(self, noise):
            return noise

    with pytest.raises(ConfigError, match="a task with conditions"):
        OldSample(make_probe())


# Evaluation


class Moved(VelocityField):
    """The exact velocity of each condition's Gaussian, moved left by ``shift`` standard deviations."""

    def __init__(self, task, shift):
        super().__init__((2,))
        self.field, self.shift = task.network(), shift

    def forward(self, x, t, condition=None):
        task = self.field.task
        m = task.centre(condition)
        by = self.shift * task.std * torch.stack([-m[:, 1], m[:, 0]], 1)
        return self.field(x - t.reshape(-1, 1) * by, t, condition) + by


def chain(task, shift):
    return RectifiedFlow(Moved(task, shift))


# Euler's 16 steps make the Gaussians narrower; in units of ``std``, the variance, and so the optimum's shift.
NARROW = (euler_gain(0.3) / 0.3) ** 2


class Model(Chain):
    """Flows that are told the condition."""

    def sample(self, noise, condition=None):
        for flow in self.flows:
            noise = FlowPolicy(flow, steps=self.steps).sample(noise, condition)
        return noise


@pytest.fixture(scope="module")
def judge():
    task = TASKS["classes"]
    return Judge(chain(task, 0.0), task, Toward(task), n_reference=24_000, n=1200)


def test_the_optimum_has_its_closed_form_under_each_condition(judge):
    """``p*_c = N(m_c + std left / beta, std^2)``; pooled over conditions the shifts cancel."""
    task, left = judge.task, judge.optimum_label
    n = len(judge.optimum)
    assert left.unique().tolist() == [0, 1, 2]
    told = task.toward(judge.optimum, left)
    assert float(told.mean()) == pytest.approx(NARROW, abs=5 / math.sqrt(n))
    for c in range(3):
        gap = judge.optimum[left == c].mean(0) - task.centre(torch.tensor(c))
        a = 2 * math.pi * c / 3
        want = NARROW * task.std * torch.tensor([-math.sin(a), math.cos(a)])
        assert float((gap - want).norm()) < 5 * task.std / math.sqrt(n / 3)
    assert judge.optimum_reward == pytest.approx(NARROW, rel=0.06)
    assert judge.optimum_kl == pytest.approx(NARROW / 2, rel=0.1)
    assert judge.optimum_score > 0.8


def test_models_are_scored_condition_by_condition(judge):
    task = judge.task
    model = Model(chain(task, NARROW))
    best = judge.evaluate(model)
    cov = task.std**2 * torch.eye(2)
    one = gaussian_kl(torch.tensor([NARROW * task.std, 0.0]), cov, torch.zeros(2), cov)
    assert abs(best.kl_nats - one) < 3 * best.kl_stderr < 0.3
    assert best.score > 0.8 and best.reward == pytest.approx(NARROW, abs=0.1)
    assert best.frontier_kl_nats == pytest.approx(NARROW / 2, rel=0.2)
    assert best.diversity == pytest.approx(1, abs=0.1)
    same = judge.evaluate(Model(chain(task, 0.0)), kl=False)
    assert abs(same.score) < 0.15 and same.frontier_kl_nats < 0.01

    class Crossed(Model):
        def sample(self, noise, condition=None):
            return super().sample(noise, (condition + 1) % 3)

    crossed = judge.evaluate(Crossed(chain(task, NARROW)), kl=False)
    assert crossed.score < -1, "the same samples altogether, but of other conditions"


def test_the_frontier_is_the_mean_over_conditions():
    """Two conditions, two rewards each: ``R(b)`` and ``KL(b)`` by hand, not those of the pooled rewards."""
    rewards, beta = torch.tensor([[0.0, 1.0], [4.0, 6.0]]), 0.8
    reward, kl = frontier(rewards, torch.tensor([beta]))
    want_r, want_kl = [], []
    for low, high in rewards.tolist():
        z = (math.exp(low / beta) + math.exp(high / beta)) / 2
        r = (low * math.exp(low / beta) + high * math.exp(high / beta)) / (2 * z)
        want_r.append(r)
        want_kl.append(r / beta - math.log(z))
    assert float(reward) == pytest.approx(sum(want_r) / 2)
    assert float(kl) == pytest.approx(sum(want_kl) / 2)
    assert frontier_kl(rewards, float(reward)) == pytest.approx(float(kl), rel=1e-6)
    assert frontier_kl(rewards, 3.5) == math.inf and frontier_kl(rewards.flatten(), 3.5) < 1


def test_vectors_are_evaluated_too():
    task = TASKS["vector"]
    judge = Judge(chain(task, 0.0), task, Toward(task), n_reference=8000, n=800)
    assert judge.conditions.shape == (16, 2) and len(judge.noise) == 800
    noise, asked = judge.shown(20)
    assert torch.equal(asked[:16], judge.conditions) and len(noise.unique(dim=0)) == 20
    assert judge.optimum_reward == pytest.approx(NARROW, abs=0.1)


def test_energy_squares_are_unbiased_under_the_mean():
    """Between alike samples they are positive and negative alike; a root of each would be biased up."""
    g = torch.Generator().manual_seed(0)
    squares = [
        energy_square(torch.randn(40, 2, generator=g), torch.randn(40, 2, generator=g))
        for _ in range(200)
    ]
    assert abs(np.mean(squares)) < 3 * np.std(squares) / math.sqrt(200) and min(squares) < 0


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
