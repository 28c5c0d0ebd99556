"""Reward functions and reward models, and the `rewards:` list of a recipe."""
