"""Single-stream Policy Optimization (2509.13232)."""

from tinsmith.objectives.tracker import Tracker

__all__ = ["Tracker"]
