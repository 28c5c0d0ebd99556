"""The one trainer and what it stands on: checkpoints, precision, parallelism, reports."""
