"""Meta-Q-Learning in JAX: pure functions from pytrees to pytrees."""
