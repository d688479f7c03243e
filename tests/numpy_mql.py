"""Networks and update of MQL in NumPy and float64, written from the equations: the yardstick.

Weights are trees of the shape that `jmql` has them in. Gradients are central differences, so no
derivative here is anyone's work.
"""

import jax
import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gru_step(weights, hidden, x):
    """One step of PyTorch's GRU: hidden [B, Z], x [B, I]."""
    size = hidden.shape[-1]
    from_input = x @ weights["input_kernel"] + weights["input_bias"]
    from_hidden = hidden @ weights["hidden_kernel"] + weights["hidden_bias"]
    reset = sigmoid(from_input[:, :size] + from_hidden[:, :size])
    update = sigmoid(from_input[:, size : 2 * size] + from_hidden[:, size : 2 * size])
    new = np.tanh(from_input[:, 2 * size :] + reset * from_hidden[:, 2 * size :])
    return (1 - update) * new + update * hidden


def gru(weights, history):
    """The last hidden state [B, Z] of windows [B, H]."""
    batch, length = history.mask.shape
    hidden = np.zeros((batch, len(weights["hidden_kernel"])))
    for i in range(length):
        x = [history.action[:, i], history.reward[:, i, None], history.observation[:, i]]
        stepped = gru_step(weights, hidden, np.concatenate(x, axis=1))
        hidden = np.where(history.mask[:, i, None], stepped, hidden)
    return hidden


def mlp(weights, x):
    for i in range(len(weights)):
        layer = weights[f"Dense_{i}"]
        x = (np.maximum(x, 0) if i else x) @ layer["kernel"] + layer["bias"]
    return x


def actor(weights, observation, history):
    weights = weights["params"]
    context = gru(weights["encoder"], history)
    return np.tanh(mlp(weights["policy"], np.concatenate([observation, context], axis=1)))


def critic(weights, observation, history, action):
    weights = weights["params"]
    context = gru(weights["encoder"], history)
    x = np.concatenate([observation, action, context], axis=1)
    return mlp(weights["q1"], x)[:, 0], mlp(weights["q2"], x)[:, 0]


def flatten(weights):
    """Returns the weights as one vector, and the function that undoes it."""
    leaves, structure = jax.tree.flatten(weights)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def unflatten(vector):
        parts = np.split(vector, ends)
        return structure.unflatten(
            [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        )

    return np.concatenate([leaf.ravel() for leaf in leaves]), unflatten


def gradient(objective, vector, step=1e-6):
    """The gradient [P] of objective at vector [P]."""
    sides = [
        [objective(vector + sign * step * unit) for unit in np.eye(len(vector))] for sign in (1, -1)
    ]
    return (np.array(sides[0]) - np.array(sides[1])) / (2 * step)


def adam(vector, slope, moments, learning_rate):
    """One step of Adam with the usual numbers; moments are (first, second, steps so far)."""
    first, second, count = moments
    first, second, count = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2, count + 1
    scaled = (first / (1 - 0.9**count)) / (np.sqrt(second / (1 - 0.999**count)) + 1e-8)
    return vector - learning_rate * scaled, (first, second, count)


def learner(params, target_params):
    """Returns the state that `block` changes: weights and fresh Adam moments."""
    state = {"critic": params["critic"], "actor": params["actor"], "target": dict(target_params)}
    for name in ("critic", "actor"):
        zeros = np.zeros(len(flatten(params[name])[0]))
        state[f"{name} moments"] = (zeros, zeros, 0)
    return state


def block(config, state, batches, noise, learning_rate, anchor, coefs):
    """One block of TD3 on a list of batches [B]; returns metrics and changes the state."""

    def descend(name, loss, coef):
        vector, unflatten = flatten(state[name])
        centre = flatten(anchor[name])[0]

        def objective(vector):
            return loss(unflatten(vector)) + coef * np.sum((vector - centre) ** 2)

        slope = gradient(objective, vector)
        before = loss(state[name])
        moments = state[f"{name} moments"]
        vector, state[f"{name} moments"] = adam(vector, slope, moments, learning_rate)
        state[name] = unflatten(vector)
        return before

    critic_losses, values = [], []
    for i, (batch, draw, coef) in enumerate(zip(batches, noise, coefs, strict=True)):
        step, target = batch.transition, state["target"]
        clip = config.target_noise_clip
        action = actor(target["actor"], step.next_observation, batch.next_history)
        action = action + np.clip(config.target_noise * draw, -clip, clip)
        action = np.clip(action, -1, 1)
        following = critic(target["critic"], step.next_observation, batch.next_history, action)
        smaller = np.minimum(*following)
        goal = step.reward + config.discount * np.where(step.terminated, 0, smaller)

        def td_loss(weights, batch=batch, goal=goal):
            step = batch.transition
            q1, q2 = critic(weights, step.observation, batch.history, step.action)
            return np.mean(batch.weight * ((q1 - goal) ** 2 + (q2 - goal) ** 2))

        def policy_loss(weights, batch=batch):
            observation, history = batch.transition.observation, batch.history
            action = actor(weights, observation, history)
            q1, _ = critic(state["critic"], observation, history, action)
            return -np.mean(batch.weight * q1)

        q1, _ = critic(state["critic"], step.observation, batch.history, step.action)
        values.append(q1.mean())
        critic_losses.append(descend("critic", td_loss, coef))
        if i == 0:
            actor_loss = descend("actor", policy_loss, coef)
            for name in ("actor", "critic"):
                vector, unflatten = flatten(target[name])
                online = flatten(state[name])[0]
                target[name] = unflatten((1 - config.tau) * vector + config.tau * online)
    return {
        "critic_loss": np.mean(critic_losses),
        "actor_loss": actor_loss,
        "q": np.mean(values),
    }
