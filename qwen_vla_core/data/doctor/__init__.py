"""Finds what is wrong with a dataset before a training run does: examine every episode once, then diagnose."""
