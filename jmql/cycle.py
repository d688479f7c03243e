"""The unit that is compiled: meta-training for some rounds, then evaluation."""

import jax

from jmql import train
from jmql.config import Config
from jmql.evaluate import evaluate, summarize, zeros
from jmql.keys import derive
from jmql.learner import Learner
from jmql.train import TrainState
from jmql.types import Array, Env, Metrics, Task


def cycle(
    config: Config,
    env: Env,
    learner: Learner,
    held_out: Task,
    state: TrainState,
    rounds: Array,
    warmup: Array,
    measured: Array,
    updates: Array,
) -> tuple[TrainState, Metrics, Metrics]:
    """Trains for `rounds` rounds and evaluates on the held-out tasks.

    With `warmup` the rounds fill the replay and the evaluation is that of the untrained agent.

    Args:
        config, env, learner: what is trained.
        held_out: tasks, leaves [K, ...].
        state: before; meant to be donated.
        rounds: [] int32.
        warmup: [] bool.
        measured: [] bool. False: there is no evaluation, and what would come of it is zeros.
        updates: [] int32, what `state.agent.updates` is, see `Learner.learn`.

    Returns:
        The state after, the reported metrics [], and the metrics of every task [K].
    """
    state, metrics = train.epoch(config, env, learner, state, rounds, warmup, updates)
    # The state's key stays as it is: where evaluations fall does not change what is learned.
    key = derive(state.key, "evaluation")

    @jax.jit  # traced once, although its shapes are asked for too
    def measure(state: TrainState) -> Metrics:
        return evaluate(config, env, learner, state.agent, state.memory, held_out, key)[0]

    def skip(state: TrainState) -> Metrics:
        return dict(zeros(jax.eval_shape(measure, state)))

    per_task = jax.lax.cond(measured, measure, skip, state)
    counts = {"rounds": state.rounds, "updates": state.agent.updates}
    return state, metrics | summarize(learner, per_task) | counts, per_task
