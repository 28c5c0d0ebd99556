"""Shared code of the reinforcement-learning objectives: rollouts, advantages, metrics, tools."""
