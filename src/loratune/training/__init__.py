"""How training runs: one loop, its schedule, checkpoints, events and self-checks."""
