"""Recipe keys and values that were renamed in 0.2.0. They are refused with their new name."""

KEYS: dict[str, tuple[str, ...]] = {
    "accumulate": ("grad_accum_steps",),
    "align": ("alignment_weight",),
    "answers": ("num_generations",),
    "bad_steps": ("max_nonfinite_steps",),
    "below": ("max_val_loss",),
    "beta": ("kl_coef",),
    "bias_rate": ("bias_update_speed",),
    "checkpointing": ("activation_checkpointing",),
    "clip": ("max_grad_norm",),
    "context": ("seq_len",),
    "dark_room_guard": ("inactive_expert_guard",),
    "decode_rows": ("generation_batch_size",),
    "estimator": ("kl_estimator",),
    "final": ("min_lr_ratio",),
    "first_answers": ("warmup_samples",),
    "groups": ("n_group",),
    "half": ("kl_half_life",),
    "hard": ("ce_weight",),
    "hidden": ("hidden_dim",),
    "high_factor": ("high_freq_factor",),
    "highest": ("reward_max",),
    "hint": ("privileged_prompt",),
    "keep": ("index_topk",),
    "kept_groups": ("topk_group",),
    "largest": ("max_grid_size",),
    "low_factor": ("low_freq_factor",),
    "lowest": ("reward_min",),
    "max_context": ("max_seq_len",),
    "max_moved": ("target_kl",),
    "max_new": ("max_new_tokens",),
    "minibatches": ("num_minibatches",),
    "mistakes": ("error_rate",),
    "new_tokens": ("max_new_tokens",),
    "order": ("shuffle_demonstrations",),
    "original_context": ("original_max_seq_len",),
    "penalty": ("truncation_penalty",),
    "renormalise": ("norm_topk_prob",),
    "rows": ("batch_size", "max_samples"),
    "sampling": ("sampling_temperature",),
    "scale": ("routed_scaling_factor",),
    "share": ("on_policy_fraction",),
    "shared": ("n_shared_experts",),
    "smallest": ("min_grid_size",),
    "tagged": ("answer_tags",),
    "temperature": ("distill_temperature",),
    "thoughts": ("reasoning",),
    "trained": ("trainable",),
    "truncated": ("mask_truncated",),
    "turns": ("max_turns",),
    "updates": ("num_epochs",),
}
"""Old key -> its new names. The message names the one that the section has."""

VALUES: dict[str, str] = {
    "exact": "exact_match",
    "model": "reward_model",
    "replicate": "ddp",
    "tests": "unit_tests",
    "variety": "distinct_ngrams",
}
"""Old `kind` -> new `kind`."""


def new_key(old: str, known: list[str]) -> str | None:
    """Return the new name of a recipe key among the keys `known` to its section, or None."""
    return next((new for new in KEYS.get(old, ()) if new in known), None)


def new_kind(old: object, known: list[str]) -> str | None:
    """Return the new name of a `kind` among those `known` in this section, or None."""
    new = VALUES.get(old) if isinstance(old, str) else None
    return new if new in known else None
