"""What the server of warm.py imports, once: all that training needs."""

# ruff: noqa: F401
import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import matplotlib.pyplot
import torch.distributed.tensor
import yaml

import tinsmith.cli
import tinsmith.train.trainer
import tinsmith.verbs.train
