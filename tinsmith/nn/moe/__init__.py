"""Routers, dispatch and experts of mixtures of experts."""
