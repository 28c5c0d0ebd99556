"""The model: a contract (`contract.py`, read it first), slots, and one file per variant."""
