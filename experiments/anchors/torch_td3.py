"""Meta-Q-Learning's update in plain PyTorch, for `make bench-anchor`: it imports nothing of ours.

Reads a JSON object of sizes from its input (see `run`) and writes one of updates a second. The same
work as `jmql.td3`: batches of windows gathered from a full replay, GRU contexts of their own for
actor and critic, twin critics, targets, Adam, one actor step in `policy_delay`. Steps before the
episode are zeros to `nn.GRU`, as in the authors' release, which is faster than to skip them.
"""

import copy
import json
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn


class Replay:
    """Rings [rows, slots, ...] of made-up transitions in episodes of `length` steps."""

    def __init__(self, rows: int, slots: int, observation: int, action: int, length: int):
        self.observation = torch.randn(rows, slots, observation)
        self.action = torch.rand(rows, slots, action) * 2 - 1
        self.reward = torch.randn(rows, slots, 1)
        self.step = (torch.arange(slots) % length).expand(rows, slots)

    def sample(self, num: int, history: int) -> tuple[Tensor, ...]:
        """Returns o, a, r, o' [num, ...] and the windows before and after, [H, num, A + 1 + O]."""
        rows, slots = self.step.shape
        row = torch.randint(rows, (num,))
        slot = torch.randint(history, slots - 1, (num,))
        back = torch.arange(history, -1, -1)
        places = slot[:, None] - back
        parts = (self.action, self.reward, self.observation)
        window = torch.cat([x[row[:, None], places] for x in parts], dim=-1)
        window = window * (back <= self.step[row, slot][:, None])[..., None]
        window = window.transpose(0, 1)
        now = (x[row, slot] for x in (self.observation, self.action, self.reward))
        return *now, self.observation[row, slot + 1], window[:-1], window[1:]


def mlp(inputs: int, hidden: list[int], outputs: int) -> nn.Sequential:
    """ReLU layers and a linear output."""
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(inputs, size), nn.ReLU()]
        inputs = size
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class Actor(nn.Module):
    """u(s, z) with its own GRU."""

    def __init__(self, observation: int, action: int, context: int, hidden: list[int]):
        super().__init__()
        self.encoder = nn.GRU(action + 1 + observation, context)
        self.policy = mlp(observation + context, hidden, action)

    def forward(self, observation: Tensor, window: Tensor) -> Tensor:
        """Returns actions [B, A]."""
        context = self.encoder(window)[0][-1]
        return torch.tanh(self.policy(torch.cat([observation, context], dim=-1)))


class Critic(nn.Module):
    """Q1 and Q2 (s, a, z) on one GRU."""

    def __init__(self, observation: int, action: int, context: int, hidden: list[int]):
        super().__init__()
        self.encoder = nn.GRU(action + 1 + observation, context)
        self.q1 = mlp(observation + action + context, hidden, 1)
        self.q2 = mlp(observation + action + context, hidden, 1)

    def forward(self, observation: Tensor, window: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Returns both values, [B, 1] each."""
        inputs = torch.cat([observation, action, self.encoder(window)[0][-1]], dim=-1)
        return self.q1(inputs), self.q2(inputs)


class Learner:
    """TD3 with the numbers that cost nothing fixed."""

    def __init__(self, size: dict[str, Any]):
        shape = size["observation"], size["action"], size["context"], size["hidden"]
        self.actor, self.critic = Actor(*shape), Critic(*shape)
        self.old_actor, self.old_critic = copy.deepcopy((self.actor, self.critic))
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), 3e-4)
        self.critic_adam = torch.optim.Adam(self.critic.parameters(), 3e-4)

    def update(self, batch: tuple[Tensor, ...], move_actor: bool) -> None:
        """Takes a critic step and, if `move_actor`, an actor step and a step of the targets."""
        observation, action, reward, successor, window, next_window = batch
        with torch.no_grad():
            noise = (0.2 * torch.randn_like(action)).clamp(-0.5, 0.5)
            chosen = (self.old_actor(successor, next_window) + noise).clamp(-1, 1)
            target = reward + 0.99 * torch.min(*self.old_critic(successor, next_window, chosen))
        q1, q2 = self.critic(observation, window, action)
        loss = ((q1 - target) ** 2).mean() + ((q2 - target) ** 2).mean()
        self.critic_adam.zero_grad(set_to_none=True)
        loss.backward()
        self.critic_adam.step()
        if not move_actor:
            return
        loss = -self.critic(observation, window, self.actor(observation, window))[0].mean()
        self.actor_adam.zero_grad(set_to_none=True)
        loss.backward()
        self.actor_adam.step()
        with torch.no_grad():
            for net, old in ((self.actor, self.old_actor), (self.critic, self.old_critic)):
                new = [x.detach() for x in net.parameters()]
                torch._foreach_lerp_(list(old.parameters()), new, 0.005)


def run(size: dict[str, Any]) -> list[float]:
    """Returns updates a second of each of `repeats` timed calls of `updates` updates."""
    torch.manual_seed(0)
    torch.set_num_threads(size["threads"])
    learner = Learner(size)
    replay = Replay(size["rows"], size["slots"], size["observation"], size["action"], 200)
    speeds = []
    for _ in range(1 + size["repeats"]):
        begun = time.perf_counter()
        for i in range(size["updates"]):
            batch = replay.sample(size["batch"], size["history"])
            learner.update(batch, i % size["policy_delay"] == 0)
        speeds.append(size["updates"] / (time.perf_counter() - begun))
    return speeds[1:]


if __name__ == "__main__":
    print(json.dumps({"torch": torch.__version__, "speeds": run(json.load(sys.stdin))}))
