"""``noise``: latent-space steering (DSRL): SAC moves the noise, the reference stays as it is.

    w = mu + exp(s) * z,    z ~ N(0, I),    x = ODE_ref(w)
    max_(mu, s)  E[ Q(w) ] - alpha KL(N(mu, exp(2 s)) || N(0, I)),      Q = argmin E (Q(w) - judgement)^2

Wagenmaker et al. 2025 (arXiv 2506.15799), with Stable-Baselines3's own SAC (Haarnoja et al. 2018, 1812.05905) on
``control="noise"``: an episode is one step, its action the noise. The state is the condition. An unconditional
generator has none to steer by: the environment's observation is just a fresh noise, so the actor sees a constant,
and what it learns is a law of the noise. Model B must stay a distribution: the noise given to ``sample`` is the
``z`` of the actor's reparametrised head, mean and std both learned.

Two things differ from SB3's default, by its own extension points. The head is not squashed: DSRL's tanh onto
[-1.5, 1.5] cannot make N(0, I), so model B would leave the reference before it has learned anything; here it
begins as exactly A. And the entropy is relative to the reference's noise, ``-KL(N(mu, exp(2 s)) || N(0, I))`` in
closed form, so that SAC's temperature alpha, tuned as ever, holds the KL at ``kl`` nats. What a map does to its
input cannot make two laws easier to tell apart, so this is a bound of KL(B || A) too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium.spaces import Box
from stable_baselines3 import SAC
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.vec_env import VecExtractDictObs
from stable_baselines3.sac.policies import Actor, SACPolicy
from torch import Tensor

from prefenv.agent import Agent, Metrics
from prefenv.envs import Control
from prefenv.flow import RectifiedFlow
from prefenv.sb3 import AnsweredReplay, FlowVecEnv, begin, seeded
from prefenv.tasks.conditions import to_device


def noise_kl(mean: Tensor, log_std: Tensor) -> Tensor:
    """``KL(N(mean, exp(2 log_std)) || N(0, I)) = sum (mean^2 + std^2 - 1) / 2 - log std`` in nats, ``(n,)``."""
    return ((mean.square() + (2 * log_std).exp() - 1) / 2 - log_std).sum(-1)


class NoiseActor(Actor):
    """SAC's actor with an affine head, ``w = mu + std z`` in units of the bound; it begins as ``w = z``."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.bound = float(self.action_space.high.max())
        for name, parameter in self.named_parameters():
            assert name.startswith(("mu.", "log_std."))
            torch.nn.init.zeros_(parameter)

    def steer(self, obs: Any, z: Tensor) -> Tensor:
        """The noise ``(n, D)`` that a standard normal ``z`` becomes."""
        mean, log_std, _ = self.get_action_dist_params(obs)
        return mean + log_std.exp() * z

    def forward(self, obs: Any, deterministic: bool = False) -> Tensor:
        z = torch.zeros(len(obs), *self.action_space.shape, device=obs.device)
        return self.steer(obs, z if deterministic else torch.randn_like(z)) / self.bound

    def action_log_prob(self, obs: Any) -> tuple[Tensor, Tensor]:
        mean, log_std, _ = self.get_action_dist_params(obs)
        return self.forward(obs), noise_kl(mean, log_std)


class NoiseCritic(ContinuousCritic):
    """SAC's critics, which see the noise itself and not its share of the bound."""

    action_space: Box

    def forward(self, obs: Any, actions: Tensor) -> tuple[Tensor, ...]:
        return super().forward(obs, actions * float(self.action_space.high.max()))


class NoisePolicy(SACPolicy):
    """SAC's networks with our head."""

    def make_actor(self, features_extractor: Any = None) -> Actor:
        return NoiseActor(**self._update_features_extractor(self.actor_kwargs, features_extractor))

    def make_critic(self, features_extractor: Any = None) -> ContinuousCritic:
        return NoiseCritic(
            **self._update_features_extractor(self.critic_kwargs, features_extractor)
        )


class NoiseSAC(Agent):
    """DSRL: Stable-Baselines3's SAC on the initial noise."""

    @dataclass(frozen=True)
    class Config:
        """Settings of ``noise``.

        Args:
            lr: Adam's learning rate, of actor, critics and temperature alike.
            kl: Nats that the noise may leave N(0, I), held by the temperature.
            alpha: The temperature to begin with.
            gradient_steps: Optimiser steps per round.
            batch_size: Answers of a step.
            buffer_size: Answers that are kept, the newest.
            width: Units of the critics' two hidden layers.
            n_critics: Critics; the actor follows the least of them.
            weight_decay: Decoupled weight decay, of the critics and (toward N(0, I)) of the actor.
        """

        lr: float = 4.45e-4
        kl: float = 4.0
        alpha: float = 0.02
        gradient_steps: int = 19
        batch_size: int = 256
        buffer_size: int = 16384
        width: int = 318
        n_critics: int = 2
        weight_decay: float = 0.1

    name: ClassVar[str] = "noise"
    control: ClassVar[Control] = "noise"
    persistent: ClassVar[tuple[str, ...]] = (
        "actor_critic",
        "actor_optimizer",
        "critic_optimizer",
        "alpha_optimizer",
        "alpha",
        "replay",
    )

    def build(self) -> None:
        cfg = self.config
        self.face = FlowVecEnv(self.env)
        # Without conditions the state is t, which is always 0: the noise tells nothing.
        asked = "t" if self.env.task.condition is None else "condition"
        self.blind = VecExtractDictObs(self.face, asked)
        self.sac = SAC(
            NoisePolicy,
            self.blind,
            learning_rate=cfg.lr,
            buffer_size=cfg.buffer_size,
            learning_starts=0,
            replay_buffer_class=AnsweredReplay,
            ent_coef=f"auto_{cfg.alpha}",
            target_entropy=-cfg.kl,
            policy_kwargs={
                "net_arch": {"pi": [], "qf": [cfg.width, cfg.width]},
                "n_critics": cfg.n_critics,
                "optimizer_class": torch.optim.AdamW,
                "optimizer_kwargs": {"weight_decay": cfg.weight_decay},
            },
            device=self.device,
        )
        self.callback = begin(self.sac)
        assert (
            isinstance(self.sac.replay_buffer, AnsweredReplay) and self.sac.log_ent_coef is not None
        )
        self.replay, self.log_alpha = self.sac.replay_buffer, self.sac.log_ent_coef
        self.actor_critic, self.alpha_optimizer = self.sac.policy, self.sac.ent_coef_optimizer
        assert isinstance(self.sac.actor, NoiseActor)
        self.actor, self.actor_optimizer = self.sac.actor, self.sac.actor.optimizer
        self.critic_optimizer = self.sac.critic.optimizer

    @property
    def alpha(self) -> Tensor:
        """The temperature, ``(1,)``, as its logarithm: that is what SAC learns."""
        return self.log_alpha.detach()

    @alpha.setter
    def alpha(self, value: Tensor) -> None:
        with torch.no_grad():
            self.log_alpha.copy_(value)

    def round(self) -> tuple[Tensor, Metrics]:
        cfg, sac = self.config, self.sac
        sac._last_obs = self.blind.reset()
        once = TrainFreq(1, TrainFrequencyUnit.STEP)
        with seeded(self.generator):
            sac.collect_rollouts(self.blind, self.callback, once, self.replay)
            if self.replay.size():
                sac.train(cfg.gradient_steps, cfg.batch_size)
        logged = {k: float(v) for k, v in sac.logger.name_to_value.items()}
        names = ("critic_loss", "actor_loss", "ent_coef")
        metrics = {n: logged[f"train/{n}"] for n in names if f"train/{n}" in logged}
        judgement = torch.as_tensor(self.face.judgement, device=self.device)
        return judgement, {**metrics, "kl_bound": self.kl_bound()}

    @torch.no_grad()
    def steer(self, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        """The noises that the reference starts from instead of the given ones, ``(n, *event_shape)``."""
        z = noise.to(self.device).flatten(1)
        state = z.new_zeros(len(z), 1) if condition is None else condition
        return self.actor.steer(state, z).view(noise.shape)

    def sample(self, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        condition = to_device(condition, self.device)
        return self.env.reference.sample(self.steer(noise, condition), condition)

    def predict(
        self,
        observation: dict[str, Any],
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = True,
    ) -> tuple[Any, Any]:
        """The steered noise; the one observed is what is steered."""
        given = observation["x"]
        x = torch.as_tensor(given, dtype=torch.float32, device=self.device)
        asked = observation.get("condition")
        if asked is not None and (kind := self.env.task.condition) is not None:
            asked = kind.tensor(asked).to(self.device).reshape(-1, *kind.shape)
        action = self.steer(x.reshape(-1, *self.env.task.event_shape), asked).view(x.shape)
        return (action.cpu().numpy() if isinstance(given, np.ndarray) else action), state

    def chain(self) -> list[RectifiedFlow]:
        """None: the noise is no longer N(0, I)."""
        return []

    @torch.no_grad()
    def kl_bound(self) -> float:
        task, state = self.env.task, torch.zeros(1, 1, device=self.device)
        if task.condition is not None:
            state = task.fixed_conditions().to(self.device)
        return float(noise_kl(*self.actor.get_action_dist_params(state)[:2]).mean())
