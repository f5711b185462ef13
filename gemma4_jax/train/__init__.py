"""Training: optimiser, sharding, state, the one step and the one loop, metrics and checkpoints."""
