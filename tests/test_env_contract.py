"""Every registered env keeps the contracts of Gymnasium, of Stable-Baselines3 and our own.

A new env is covered by existing: the tests run over all specs in ``gym.registry`` with our namespace. Run alone
with ``pytest tests/test_env_contract.py``.
"""

from __future__ import annotations

import pickle
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import DictInfoToList, RecordEpisodeStatistics

import prefenv
from prefenv.testing import check_vector_env

SPECS = [spec for spec in gym.registry.values() if spec.namespace == "prefenv"]
# What the checkers may warn of, and why it is meant so. Any other warning fails.
ALLOWED = {
    "gymnasium": {
        "For Box action spaces, we recommend using a symmetric and normalized space": (
            "the action is the next state, in the unit of the data: a box of +-1 would cut shapes off"
        ),
    },
    "sb3": {
        "We recommend you to use a symmetric and normalized Box action space": (
            "the same, in Stable-Baselines3's words"
        ),
    },
}
# A U-Net, and clouds of 400 points; the fast tests of conditions are in test_conditions.py.
SLOW = ("prefenv/Digits-v0", "prefenv/Clouds-v0")
every_spec = pytest.mark.parametrize(
    "spec",
    [pytest.param(s, marks=pytest.mark.slow if s.id in SLOW else (), id=s.id) for s in SPECS],
)
every_control = pytest.mark.parametrize("control", ["state", "noise"])
every_array = pytest.mark.parametrize("array", ["numpy", "torch"])


def started(observation):
    """``reset``'s options that start a vector env as another one did."""
    options = {"noise": observation["x"]}
    if "condition" in observation:
        options["condition"] = observation["condition"]
    return options


def by_the_reference(env, observation):
    """Actions that make shapes, so that judgements differ from row to row."""
    if env.unwrapped.control == "noise":
        x = observation["x"]
        return x.copy() if isinstance(x, np.ndarray) else x.clone()
    return env.unwrapped.reference.predict(observation, deterministic=True)[0]


def run_checker(name, check):
    """Run a checker; every warning must be listed, and every listed one must come."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check()
    texts = [str(w.message) for w in caught]
    assert [t for t in texts if not any(known in t for known in ALLOWED[name])] == []
    assert [known for known in ALLOWED[name] if not any(known in t for t in texts)] == []


# Every registered env


def test_importing_registers():
    gym.register_envs(prefenv)
    assert "prefenv/Shapes-v0" in {spec.id for spec in SPECS}
    gym.make("prefenv:prefenv/Shapes-v0").close()


@every_spec
@every_control
def test_gymnasium_check_env(spec, control):
    env = gym.make(spec.id, control=control, disable_env_checker=True)
    run_checker("gymnasium", lambda: gymnasium_check_env(env.unwrapped))


@every_spec
@every_control
def test_sb3_check_env(spec, control):
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    env = gym.make(spec.id, control=control, render_mode="rgb_array", disable_env_checker=True)
    run_checker("sb3", lambda: checker.check_env(env.unwrapped, skip_render_check=False))


@every_spec
@every_control
@every_array
@pytest.mark.parametrize("act", [None, by_the_reference], ids=["any-action", "reference"])
def test_check_vector_env(spec, control, array, act):
    check_vector_env(
        lambda n: gym.make_vec(spec.id, num_envs=n, control=control, array=array, steps=4),
        lambda: gym.make(spec.id, control=control, steps=4),
        act=act,
    )


@every_spec
def test_check_vector_env_with_kl_panels_and_pictures(spec):
    check_vector_env(
        lambda n: gym.make_vec(spec.id, num_envs=n, kl_coef=0.1, steps=4),
        lambda: gym.make(spec.id, kl_coef=0.1, steps=4),
    )
    for mode in ("rgb_array", "ansi", "human"):
        check_vector_env(
            lambda n, mode=mode: gym.make_vec(
                spec.id, num_envs=n, panel_size=2, steps=2, render_mode=mode
            ),
            num_envs=2,
        )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")
@every_spec
@every_control
@every_array
def test_check_vector_env_on_cuda(spec, control, array):
    check_vector_env(
        lambda n: gym.make_vec(spec.id, num_envs=n, control=control, array=array, device="cuda"),
        lambda: gym.make(spec.id, control=control, device="cuda"),
        act=by_the_reference,
    )


def same(one, other):
    """Nested data is equal, bit by bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, np.ndarray) and one.dtype == object:
        return all(same(a, b) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and np.array_equal(one, other)


@every_spec
@every_control
@pytest.mark.parametrize("rows", [0, 4], ids=["single", "vector"])
def test_determinism_rollout(spec, control, rows):
    """Two envs with one seed stay equal for 50 steps, and reset() in between draws the same new noises."""
    settings = {"control": control}
    envs = [
        gym.make_vec(spec.id, num_envs=rows, **settings) if rows else gym.make(spec.id, **settings)
        for _ in range(2)
    ]
    one, other = [env.reset(seed=7) for env in envs]
    assert same(one[0], other[0])
    envs[0].action_space.seed(7)
    starts = [one[0]["x"]]
    for _ in range(50):
        action = envs[0].action_space.sample()
        one, other = [env.step(action) for env in envs]
        for mine, theirs in zip(one, other, strict=True):
            assert same(mine, theirs)
        if not rows and one[2]:
            one, other = [env.reset() for env in envs]
            assert same(one[0], other[0])
            starts.append(one[0]["x"])
        elif rows and one[2].all():
            starts.append(one[0]["x"])
    assert len(starts) == (51 if control == "noise" else 4)
    assert len({start.tobytes() for start in starts}) == len(starts)


@every_spec
def test_the_single_env_can_be_pickled_and_closed_twice(spec):
    env = gym.make(spec.id, steps=3)
    start, _ = env.reset(seed=1)
    action, _ = env.unwrapped.reference.predict(start, deterministic=True)
    env.step(action)
    twin = pickle.loads(pickle.dumps(env))
    for _ in range(2):
        mine, theirs = env.step(action), twin.step(action)
        assert same(mine[0], theirs[0])
        assert mine[1:3] == theirs[1:3]
    assert same(env.reset()[0], twin.reset()[0])
    for each in (env, env.unwrapped, twin):
        each.close()
        each.close()


@every_spec
def test_the_spec_survives_json(spec):
    oracle = prefenv.make_task(spec.kwargs["task"]).default_oracle + ":answer=choose"
    env = gym.make(spec.id, oracle=oracle, control="noise", kernel="ode")
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    assert again.unwrapped.control == "noise"
    assert again.unwrapped.reference.kernel.name == "ode"
    vector = gym.make_vec(spec.id, num_envs=4, panel_size=2)
    assert EnvSpec.from_json(vector.spec.to_json()).kwargs["panel_size"] == 2


@every_spec
@every_control
def test_the_vector_env_is_a_sync_vector_env_of_singles(spec, control):
    n = 3
    sync = SyncVectorEnv(
        [lambda: gym.make(spec.id, control=control)] * n, autoreset_mode=AutoresetMode.SAME_STEP
    )
    vector = gym.make_vec(spec.id, num_envs=n, control=control)
    assert vector.metadata["autoreset_mode"] is sync.metadata["autoreset_mode"]
    for kind in ("observation_space", "action_space"):
        assert getattr(vector, kind) == getattr(sync, kind)
    theirs, _ = sync.reset(seed=3)
    mine, _ = vector.reset(options=started(theirs))
    for _ in range(2):
        done = False
        while not done:
            assert same(mine, theirs)
            action = by_the_reference(vector, mine)
            mine, my_reward, my_end, my_cut, my_info = vector.step(action)
            theirs, reward, end, cut, info = sync.step(action)
            np.testing.assert_allclose(my_reward, reward, rtol=1e-4, atol=1e-6)
            assert same(my_end, end)
            assert same(my_cut, cut)
            done = end.all()
        for key in ("final_obs", "_final_obs", "_final_info"):
            for a, b in zip(my_info[key], info[key], strict=True):
                if key == "final_obs":
                    np.testing.assert_allclose(a["x"], b["x"], rtol=1e-4, atol=1e-5)
                    assert same(a["t"], b["t"])
                else:
                    assert a == b
        for key, values in my_info["final_info"].items():
            assert same(values, info["final_info"][key].astype(values.dtype))
        mine, _ = vector.reset(options=started(theirs))


@every_spec
def test_gymnasiums_vector_wrappers(spec):
    env = RecordEpisodeStatistics(gym.make_vec(spec.id, num_envs=3))
    observation, _ = env.reset(seed=0)
    total = np.zeros(3)
    for step in range(32):
        observation, reward, end, _, info = env.step(by_the_reference(env, observation))
        total += reward
        assert ("episode" in info) == end.all() == (step % 16 == 15)
        if end.all():
            np.testing.assert_array_equal(info["episode"]["l"], 16)
            np.testing.assert_allclose(info["episode"]["r"], total)
            total[:] = 0
    assert env.episode_count == 6

    env = DictInfoToList(gym.make_vec(spec.id, num_envs=3, control="noise"))
    env.reset(seed=0)
    infos = env.step(env.action_space.sample())[-1]
    assert len(infos) == 3
    assert all(info["judged"] and info["final_info"]["judged"] for info in infos)


@every_spec
@pytest.mark.parametrize("mode", ["rgb_array", "human", "ansi"])
def test_every_render_mode_works_without_a_screen(spec, mode):
    env = gym.make(spec.id, render_mode=mode)
    vector = gym.make_vec(spec.id, num_envs=2, render_mode=mode)
    assert set(env.metadata["render_modes"]) == {"rgb_array", "human", "ansi"}
    assert env.metadata["render_fps"] > 0
    observation, _ = env.reset(seed=0)
    vector.reset(seed=0)
    env.step(observation["x"])
    frame, frames = env.render(), vector.render()
    if mode == "human":
        assert frame is None
        assert frames is None
    else:
        assert isinstance(frames, tuple)
        assert len(frames) == 2
        for picture in (frame, *frames):
            assert isinstance(picture, np.ndarray if mode == "rgb_array" else str)
    if mode == "rgb_array":
        assert frame.dtype == np.uint8
        assert frame.ndim == 3
        assert frame.shape[2] == 3
        assert frame.std() > 0
        assert not np.array_equal(*frames)
    env.close()
    vector.close()


@every_spec
def test_ppo_of_stable_baselines3_runs(spec):
    sb3 = pytest.importorskip("stable_baselines3")
    model = sb3.PPO(
        "MultiInputPolicy", gym.make(spec.id), n_steps=32, batch_size=32, n_epochs=1, device="cpu"
    )
    model.learn(64)
    assert model.num_timesteps == 64
    assert len(model.ep_info_buffer) == 4
