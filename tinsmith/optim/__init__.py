"""Parameters to roles, roles to optimizers, steps to learning rates."""
