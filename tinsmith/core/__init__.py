"""Ground that everything stands on: errors, files, random states, logs, signals. No neural
networks.
"""
