"""The policy behind a socket: robots without a GPU share one. Nothing in here imports torch."""
