"""``sb3-ppo``: Stable-Baselines3's own PPO, the flow its policy: any SB3 user's entry, our control for ``ppo``.

    a ~ N(m, std^2),     m = the kernel's mean of the flow's step,  std = the kernel's,     A = R - V(x_t, t)
    L = E[max(-A rho, -A clip(rho, 1 - c, 1 + c))] + v E (V - R)^2 + e E |v_theta - v_ref|^2

Schulman et al. 2017 (arXiv 1707.06347), Raffin et al. 2021 (JMLR 22-268); A is standardised in each minibatch, and
gamma = lambda = 1, so every step's return R is the sample's judgement, and the env's KL cost where it has one
(``kl_coef``). What ``ppo`` has and SB3 has not: advantages without a critic, and rows without an answer left out.
To SB3 no answer is a reward of 0, as the environment says it; a round without any answer is skipped. The anchor on
the steps without noise takes the place of SB3's entropy bonus (``prefenv.sb3.FlowActorCritic``): with
``ent_coef=0`` the late steps, which no log-probability reaches, drift until the shapes are gone (measured: 12
times the reference's residual).

SB3's ``save`` holds pickles, so it is not used: weights and optimiser are saved like every agent's. It draws from
the global generators of torch and NumPy, which ``prefenv.sb3.seeded`` lends to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from prefenv.agent import Agent, Metrics, Requires
from prefenv.kernels import Kernel
from prefenv.sb3 import FlowVecEnv, make_ppo, seeded

LOGGED = ("policy_gradient_loss", "value_loss", "approx_kl", "clip_fraction")


class SB3PPO(Agent):
    """Stable-Baselines3's PPO on the flow's steps."""

    @dataclass(frozen=True)
    class Config:
        """Settings of ``sb3-ppo``; those that SB3 has, under SB3's names, are SB3's.

        Args:
            lr: Adam's, of flow and critic alike.
            batch_size: Transitions of a minibatch.
            n_epochs: Passes over each round.
            clip_range: How far a ratio may move before its gradient stops.
            ent_coef: Weight of the anchor, which stands for the entropy.
            vf_coef: Weight of the critic's loss.
            max_grad_norm: Largest gradient norm.
            kernel: The stochastic step, by default ``ppo``'s: noise where the class is decided, none after.
        """

        lr: float = 2e-4
        batch_size: int = 1024
        n_epochs: int = 2
        clip_range: float = 0.2
        ent_coef: float = 20.0
        vf_coef: float = 0.5
        max_grad_norm: float = 1.0
        kernel: Kernel = Kernel("flow-sde", 0.7, (0.0, 0.3125))

    name: ClassVar[str] = "sb3-ppo"
    requires: ClassVar[Requires] = Requires(log_prob=True)
    persistent: ClassVar[tuple[str, ...]] = ("actor_critic", "optimizer")

    def build(self) -> None:
        cfg, env = self.config, self.env
        self.ppo, self.collect = make_ppo(
            env,
            min(cfg.batch_size, env.num_envs * env.steps),
            cfg.n_epochs,
            cfg.lr,
            reference=env.policy(self.reference, self.kernel()),
            clip_range=cfg.clip_range,
            ent_coef=cfg.ent_coef,
            vf_coef=cfg.vf_coef,
            max_grad_norm=cfg.max_grad_norm,
        )
        self.actor_critic, self.optimizer = self.ppo.policy, self.ppo.policy.optimizer
        self.model = self.actor_critic.flow

    def round(self) -> tuple[Tensor, Metrics]:
        env, ppo = self.env, self.ppo
        assert isinstance(ppo.env, FlowVecEnv)
        # Fresh noises: those that the last round's autoreset drew are in no saved state.
        ppo._last_obs = ppo.env.reset()
        with seeded(self.generator):
            self.collect()
            judgement = torch.as_tensor(ppo.env.judgement, device=self.device)
            if bool(judgement.isnan().all()):
                return judgement, {}
            ppo.train()
        anchored = env.steps - len(self.policy.stochastic_steps) if self.config.ent_coef else 0
        env.ledger.nfe += self.config.n_epochs * env.num_envs * (env.steps + anchored)
        logged = ppo.logger.name_to_value
        return judgement, {name: float(np.asarray(logged[f"train/{name}"])) for name in LOGGED}
