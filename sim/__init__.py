"""The simulator: predicts what the executor would do, with the executor's own scheduler and no torch."""
