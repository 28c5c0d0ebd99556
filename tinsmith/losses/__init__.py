"""Loss formulas from tensors to tensors."""
