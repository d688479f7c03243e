"""Analytic environments whose values are known exactly: each isolates one thing to get right.

They are for tests, and are not among the families of `envs.make`. Q is the discounted sum of
rewards under the best policy, `discount` its factor for one step.
"""

import jax
import jax.numpy as jnp

from envs.base import Array, Environment, Ranges, Task


class Probe(Environment):
    """One action, one number to see, one task, and no randomness unless a probe says so."""

    action_size = 1
    worst_reward = -3.0

    def draw_task(self, key: Array, ranges: Ranges) -> Task:
        """The only task, which has nothing to say."""
        return {}

    def start(self, key: Array, task: Task) -> Array:
        """[]: how many steps were taken."""
        return jnp.zeros(())

    def advance(self, physics: Array, action: Array, task: Task) -> Array:
        """Counts the step."""
        return physics + 1.0

    def observe(self, physics: Array, task: Task) -> Array:
        """[1]: nothing."""
        return jnp.zeros(1)


class ConstantReward(Probe):
    """Reward 1 and the end: Q = 1."""

    def reward(self, before: Array, after: Array, action: Array, task: Task) -> Array:
        """1."""
        return jnp.ones(())

    def unhealthy(self, physics: Array) -> Array:
        """After one step."""
        return physics >= 1.0


class ObservationReward(Probe):
    """The observation is -1 or +1 and is the reward of the only step: Q = observation."""

    def start(self, key: Array, task: Task) -> Array:
        """[]: -1 or +1."""
        return jax.random.rademacher(key, (), jnp.float32)

    def advance(self, physics: Array, action: Array, task: Task) -> Array:
        """0, which stands for the end."""
        return jnp.zeros(())

    def observe(self, physics: Array, task: Task) -> Array:
        """[1]: the reward to come."""
        return physics[None]

    def reward(self, before: Array, after: Array, action: Array, task: Task) -> Array:
        """What was seen."""
        return before

    def unhealthy(self, physics: Array) -> Array:
        """After one step."""
        return physics == 0.0


class TwoStep(Probe):
    """Sees 0 then 1, is paid 0 then 1, and ends: Q = discount, then 1."""

    def observe(self, physics: Array, task: Task) -> Array:
        """[1]: how many steps were taken."""
        return physics[None]

    def reward(self, before: Array, after: Array, action: Array, task: Task) -> Array:
        """0, then 1."""
        return before

    def unhealthy(self, physics: Array) -> Array:
        """After two steps."""
        return physics >= 2.0


class Endless(Probe):
    """Reward 1 for ever, only the time limit stops it: Q = 1 / (1 - discount)."""

    def reward(self, before: Array, after: Array, action: Array, task: Task) -> Array:
        """1."""
        return jnp.ones(())


class ActionReward(Probe):
    """One step, reward -(action - 0.5)^2: the best action is 0.5, and Q is 0 there."""

    def reward(self, before: Array, after: Array, action: Array, task: Task) -> Array:
        """Highest at 0.5."""
        return -jnp.square(action[0] - 0.5)

    def unhealthy(self, physics: Array) -> Array:
        """After one step."""
        return physics >= 1.0


class HiddenBandit(Probe):
    """Task `goal`, -1 or +1, which is never seen: reward is action * goal.

    Only past rewards tell the goal. Over both goals the first step of any policy earns 0 in the
    mean, so the best mean return is `episode_length` - 1 with a memory, and 0 without: what a
    policy that sees nothing earns on one goal it loses on the other.
    """

    def draw_task(self, key: Array, ranges: Ranges) -> Task:
        """Draws a goal."""
        return {"goal": jax.random.rademacher(key, (), jnp.float32)}

    def sample_tasks(self, key: Array, num: int, ranges: Ranges | None = None) -> Task:
        """Returns both goals in turn."""
        return {"goal": jnp.resize(jnp.array([-1.0, 1.0]), (num,))}

    def reward(self, before: Array, after: Array, action: Array, task: Task) -> Array:
        """Positive on the side of the goal."""
        return action[0] * task["goal"]


class ReversedBandit(Probe):
    """Task `goal`: reward is -(action - goal)^2; seven tasks in eight have goals near 0.5, one
    has its goal near -0.5.

    What is seen gives the goal away, but so faintly that networks trained for a short while act
    on the majority. On a task of the minority they are wrong: action 0.5 earns -1 a step at goal
    -0.5, where the best is 0. A classifier that scales its features tells the two kinds apart,
    so that replay weighted by it teaches the minority's action, and unweighted replay does not.
    """

    def draw_task(self, key: Array, ranges: Ranges) -> Task:
        """Draws a goal, one in eight of the minority."""
        kind_key, size_key = jax.random.split(key)
        minority = jax.random.bernoulli(kind_key, 1 / 8)
        size = jax.random.uniform(size_key, minval=0.3, maxval=0.7)
        return {"goal": jnp.where(minority, -size, size)}

    def sample_tasks(self, key: Array, num: int, ranges: Ranges | None = None) -> Task:
        """Returns seven tasks of the majority, then one of the minority, and so on."""
        size = jax.random.uniform(key, (num,), minval=0.3, maxval=0.7)
        return {"goal": jnp.where(jnp.arange(num) % 8 == 7, -size, size)}

    def start(self, key: Array, task: Task) -> Array:
        """[]: what blurs the goal over an episode, U(-0.2, 0.2)."""
        return jax.random.uniform(key, minval=-0.2, maxval=0.2)

    def advance(self, physics: Array, action: Array, task: Task) -> Array:
        """Nothing changes."""
        return physics

    def observe(self, physics: Array, task: Task) -> Array:
        """[1]: the goal, blurred and faint."""
        return 0.01 * (task["goal"] + physics)[None]

    def reward(self, before: Array, after: Array, action: Array, task: Task) -> Array:
        """Highest at the goal."""
        return -jnp.square(action[0] - task["goal"])
