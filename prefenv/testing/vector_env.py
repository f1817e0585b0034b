"""``check_vector_env``: what Gymnasium's ``check_env`` does for single envs, for vector envs."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from prefenv.testing.data import ContractError, copied, difference, need, row_of
from prefenv.testing.playing import Act, actions_of, play

Start = Callable[[Any, int], dict[str, Any]]


def same_start(observation: Any, row: int) -> dict[str, Any]:
    """``reset``'s options that start a single env as a row began: from its noise, and asked for the same."""
    options = {"noise": observation["x"][row]}
    if "condition" in observation:
        options["condition"] = observation["condition"][row]
    return options


def check_vector_env(
    make: Callable[[int], VectorEnv],
    make_single: Callable[[], gym.Env] | None = None,
    *,
    num_envs: int = 4,
    act: Act | None = None,
    start: Start | None = same_start,
    nondeterministic: bool = False,
    max_steps: int = 1000,
    seed: int = 0,
) -> None:
    """Check a vector env: spaces, shapes, dtypes, seeding, SAME_STEP autoreset, data reuse, pickling, closing.

    Args:
        make: Makes the env with so many rows, the same way every time.
        make_single: Makes its one-row view, compared with the vector env step by step. Rows must then be judged
            one by one: a panel is not what a single row sees.
        num_envs: Rows to test with.
        act: Actions for an env and its observations; None = samples of the action space.
        start: Options for the single env's ``reset`` that start it like row ``row`` of an observation; None =
            it has none, and only one row is compared, by seed.
        nondeterministic: Skip all comparisons of two runs (a person judges, say).
        max_steps: Steps in which every row must have finished once.
        seed: Seed of resets and actions.

    Raises:
        ContractError: The env breaks the contract.
    """
    env = make(num_envs)
    _check_spaces(env, num_envs)
    before = torch.get_rng_state()
    run = play(env, seed, act, max_steps=max_steps)
    untouched = torch.equal(before, torch.get_rng_state())
    observation, info = run[0]
    _check_data(observation, env.observation_space, "the observation of reset()")
    need(isinstance(info, dict), f"reset() returned {type(info).__name__} as info, not a dict")
    for number, step in enumerate(run[1:], 1):
        _check_step(env, step, f"step {number}")
    _check_render(env)
    if not nondeterministic:
        need(
            untouched,
            "the env draws from torch's global generator, or seeds it; use its own torch.Generator, seeded from "
            "self.np_random",
        )
        _check_seeding(env, make, run, seed, act)
        _check_pickle(env, seed, act, len(run) - 1)
        if make_single is not None:
            _check_single(make(1), [make_single()], seed, act, len(run) - 1, None)
            if start is not None:
                singles = [make_single() for _ in range(num_envs)]
                _check_single(make(num_envs), singles, seed, act, len(run) - 1, start)
    try:
        env.close()
        env.close()
    except Exception as error:
        raise ContractError(f"closing twice must be harmless, but raised {error!r}") from error


def _check_spaces(env: VectorEnv, num_envs: int) -> None:
    need(isinstance(env, VectorEnv), f"{type(env).__name__} is no gymnasium.vector.VectorEnv")
    need(env.num_envs == num_envs, f"asked for {num_envs} rows, num_envs says {env.num_envs}")
    for kind in ("observation", "action"):
        one, many = getattr(env, f"single_{kind}_space"), getattr(env, f"{kind}_space")
        need(
            many == batch_space(one, num_envs),
            f"{kind}_space is not batch_space(single_{kind}_space, num_envs)",
        )
    need(
        env.metadata.get("autoreset_mode") is AutoresetMode.SAME_STEP,
        "metadata['autoreset_mode'] must be AutoresetMode.SAME_STEP: a finished row starts anew in the same step",
    )


def _check_data(data: Any, space: gym.Space, what: str) -> None:
    """Data lies in its space, with the space's very dtype and shape."""
    if isinstance(space, gym.spaces.Dict):
        keys = set(data) if isinstance(data, dict) else None
        need(keys == set(space), f"{what} must be a dict with keys {set(space)}, not {keys}")
        for key, part in space.items():
            _check_data(data[key], part, f"{what}[{key!r}]")
        return
    value = np.asarray(data)
    need(value.dtype == space.dtype, f"{what} has dtype {value.dtype}, its space {space.dtype}")
    need(value.shape == space.shape, f"{what} has shape {value.shape}, its space {space.shape}")
    need(space.contains(value), f"{what} lies outside its space: clip it or widen the space")


def _check_step(env: VectorEnv, step: Any, where: str) -> None:
    """One step's data, by itself."""
    observation, reward, terminated, truncated, info = step
    n = env.num_envs
    _check_data(observation, env.observation_space, f"the observation of {where}")
    values = {"reward": reward, "terminated": terminated, "truncated": truncated}
    for name, value in values.items():
        kind = np.floating if name == "reward" else np.bool_
        dtype = getattr(value, "dtype", np.object_)
        need(
            np.issubdtype(dtype, kind) and value.shape == (n,),
            f"{name} of {where} must be an array of {n} {kind.__name__} values, not {value!r}",
        )
    need(np.isfinite(reward).all(), f"the reward of {where} is not finite; no answer counts 0")
    need(isinstance(info, dict), f"the info of {where} is {type(info).__name__}, not a dict")
    done = terminated | truncated
    for key in ("final_obs", "final_info"):
        mask = np.asarray(info.get(f"_{key}", np.zeros(n, bool)))
        need(
            np.array_equal(mask, done) and (key in info or not done.any()),
            f"in {where} info must hold {key!r}, and a mask '_{key}' that is true where a row is done and only "
            "there (SAME_STEP autoreset)",
        )
    for row in np.flatnonzero(done):
        final = row_of(info["final_obs"], row)
        _check_data(final, env.single_observation_space, f"final_obs[{row}] of {where}")
        need(
            difference(final, row_of(observation, row)) is not None,
            f"row {row} was done in {where}, but its observation is the final one: return the first of the next "
            "episode, and the final one in info['final_obs'] (SAME_STEP, not NEXT_STEP)",
        )


def _check_render(env: VectorEnv) -> None:
    if env.render_mode is None:
        return
    frames, n = env.render(), env.num_envs
    shown = frames is None or (isinstance(frames, tuple) and len(frames) == n)
    need(
        shown and (frames is None) == (env.render_mode == "human"),
        f"render() must return a tuple of {n} frames, and None in mode 'human'",
    )


def _check_seeding(
    env: VectorEnv, make: Callable[[int], VectorEnv], run: list[Any], seed: int, act: Act | None
) -> None:
    steps, first = len(run) - 1, run[0][0]
    twin = make(env.num_envs)
    for mend, again in (
        ("draw everything from self.np_random", play(env, seed, act, steps=steps)),
        ("what make() returns must not share state", play(twin, seed, act, steps=steps)),
        (
            "overwriting what was returned, or a used action, changed the env: keep copies inside",
            play(env, seed, act, steps=steps, spoiling=True),
        ),
    ):
        path = difference(run, again)
        need(path is None, f"two runs with the same seed and actions differ at {path}: {mend}")
    twin.close()
    need(
        difference(first, copied(env.reset(seed=seed + 1)[0])) is not None,
        "another seed gave the same first observation: call super().reset(seed=seed) and use self.np_random",
    )
    env.reset(seed=seed)
    need(
        difference(first, copied(env.reset()[0])) is not None,
        "reset() without a seed repeated the last episode: seed only when a seed is given",
    )
    rows = [row_of(first, row) for row in range(env.num_envs)]
    need(
        all(difference(rows[0], row) is not None for row in rows[1:]),
        "rows start alike: draw new noise for each row",
    )


def _check_pickle(env: VectorEnv, seed: int, act: Act | None, steps: int) -> None:
    observation, _ = env.reset(seed=seed)
    env.action_space.seed(seed)
    observation, *_ = env.step(actions_of(env, observation, act))
    try:
        twin = pickle.loads(pickle.dumps(env))
    except Exception as error:
        raise ContractError(
            f"the env cannot be pickled ({error}): leave windows, files and lambdas out in __getstate__"
        ) from error
    here, there = (play(e, None, act, steps=steps, first=observation) for e in (env, twin))
    path = difference(here, there)
    need(path is None, f"a pickled env went on differently, at {path}: __getstate__ forgets state")
    twin.close()


def _check_single(
    env: VectorEnv,
    singles: list[gym.Env],
    seed: int,
    act: Act | None,
    steps: int,
    start: Start | None,
) -> None:
    """The vector env's rows against single envs, started alike, through several episodes."""
    spaces = (env.single_observation_space, env.single_action_space)
    need(
        all((s.observation_space, s.action_space) == spaces for s in singles),
        "the single env's spaces are not single_observation_space and single_action_space",
    )

    def match(mine: Any, theirs: Any, row: int, what: str) -> None:
        path = difference(copied(mine), copied(theirs), 1e-4)
        need(path is None, f"{what} {path} of row {row} differs between vector and single env")

    def restart(observation: Any, row: int, seed: int | None = None) -> None:
        options = None if start is None else start(observation, row)
        first, _ = singles[row].reset(seed=seed, options=options)
        match(row_of(observation, row), first, row, "the first observation")

    env.action_space.seed(seed)
    observation, _ = env.reset(seed=seed)
    for row in range(len(singles)):
        restart(observation, row, seed)
    for number in range(1, steps + 1):
        actions = actions_of(env, observation, act)
        observation, reward, terminated, truncated, info = env.step(actions)
        for row, single in enumerate(singles):
            seen, value, ended, cut, facts = single.step(row_of(actions, row))
            need(
                isinstance(value, float) and isinstance(ended, bool) and isinstance(cut, bool),
                "the single env's reward must be a float, terminated and truncated bools",
            )
            done = ended or cut
            mine = (float(reward[row]), bool(terminated[row]), bool(truncated[row]))
            match(
                mine, (value, ended, cut), row, f"(reward, terminated, truncated) in step {number}"
            )
            last = row_of(info["final_obs"], row) if done else row_of(observation, row)
            match(last, seen, row, f"the observation in step {number}")
            batch = info["final_info"] if done else info
            missing = sorted(facts.keys() - batch.keys())
            need(not missing, f"the vector env's info lacks {missing}, the single env's has them")
            match(
                {key: row_of(batch[key], row) for key in facts},
                facts,
                row,
                f"info in step {number}",
            )
            if done:
                restart(observation, row)
    for closing in (env, *singles):
        closing.close()
