"""Runs `tinsmith` with two dead experts on ranks that compare weights and optimizer state at the
end: `python expert_reset_worker.py train ...`. test_expert_resets.py starts it.
"""

import torch
import torch.distributed as dist

from tinsmith.cli import main
from tinsmith.nn.moe.cosine_router import CosineRouter
from tinsmith.train import parallel, trainer

original_init, export_run = CosineRouter.__init__, trainer.export_run


def init_with_dead_experts(self, *arguments):
    """Start with thresholds that no token reaches for experts 1 and 4."""
    original_init(self, *arguments)
    with torch.no_grad():
        self.thresholds[[1, 4]] = 2.0


def compare_ranks_and_export(run):
    """Print the name of every tensor that differs between ranks, then export the run."""
    tensors = parallel.full_tensors(run.policy) | run.optimizers.state_tensors()
    for name, tensor in sorted(tensors.items()):
        local = tensor.double().contiguous()
        gathered = [torch.empty_like(local) for _ in range(run.ranks.world_size)]
        dist.all_gather(gathered, local)
        if not torch.equal(gathered[0], gathered[1]):
            print(f"differs: {name}", flush=True)
    if run.ranks.is_main:
        print(f"compared {len(tensors)} tensors", flush=True)
    export_run(run)


CosineRouter.__init__ = init_with_dead_experts
trainer.export_run = compare_ranks_and_export
main()
