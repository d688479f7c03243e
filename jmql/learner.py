"""What meta-training and evaluation ask of an algorithm; `mql` and `p3o` fulfil it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jmql.replay import ReplayState
from jmql.types import Actor, Array, Key, Metrics, Policy, Task, Transition


class NewData(NamedTuple):
    """Episodes of a new task."""

    transitions: Transition  # [N, T, ...], one episode a row
    valid: Array  # [N, T] bool: False after the end of an episode, or where there is none yet


class Adapted(NamedTuple):
    """An agent on its way to a new task. Drop both to roll back."""

    step1: Any  # after learning from the new data alone
    agent: Any  # and then from replay, too


class Learner(NamedTuple):
    """An algorithm with its numbers, as pure functions.

    `agent` is a pytree of its own with a leaf `updates`, [] int32, of gradient steps so far;
    `actor` is the part of it that acts.
    """

    # (key, observation [O], action [A]) -> agent; observation and action serve for their shapes
    init: Callable[[Key, Array, Array], Any]
    # agent -> actor
    actor: Callable[[Any], Actor]
    # (actor, warmup [] bool) -> policy: explores; acts at random where `warmup`
    explore: Callable[[Actor, Array], Policy]
    # (actor, reach [], noise []) -> policy: acts as well as it can but for noise of that standard
    # deviation, and sees the last `reach` steps, or all where it is recurrent
    greedy: Callable[[Actor, Array, Array | float], Policy]
    # (agent, memory, tasks, key, active [] bool, updates [] int32) -> agent and sums over its
    # steps: learns from replay, whose newest steps are those of this round; no step where not
    # `active`. `tasks` are those of the rows that this device holds, leaves [E / size, ...].
    # `updates` is `agent.updates` where each round takes as many steps, apart: under vmap over
    # seeds it stays one number, so that what depends on it alone stays a branch.
    learn: Callable[[Any, ReplayState, Task, Key, Array, Array], tuple[Any, Any]]
    # the sums of no steps
    no_steps: Any
    # (agent, sums over any number of rounds) -> metrics [] by their names after `train/`
    metrics: Callable[[Any, Any], Metrics]
    # names of what evaluation reports after `eval/return_pre`: `step1` and one for each shot, or,
    # where there is no adaptation, one for each episode of a trial after the first
    stages: tuple[str, ...] = ()
    # agent -> the same, to begin adaptation with
    begin: Callable[[Any], Any] | None = None
    # (meta-trained agent, agent as adapted so far, all new data so far, memory, key, shot [] int32
    # from 0) -> the agents after the shot, and diagnostics [...] by their names after `adapt/`
    adapt: (
        Callable[[Any, Any, NewData, ReplayState, Key, Array], tuple[Adapted, Metrics]] | None
    ) = None
