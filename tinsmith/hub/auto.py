"""Register `model_type: tinsmith` with transformers' Auto classes; importing this module does it.

    import tinsmith.hub.auto
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)

Logits and loss equal those of the Tinsmith model. `generate` runs without a KV cache, so it suits
small tests only; `tinsmith generate` uses Tinsmith's own engine, which is much faster.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

from tinsmith.hub.from_hf import TINSMITH_MODEL_TYPE, config_from_hf
from tinsmith.nn.model import LM
from tinsmith.nn.moe.dead_experts import UsageWindow


class TinsmithConfig(PretrainedConfig):
    """`config.json` whose key `tinsmith` holds Tinsmith's own description of the model."""

    model_type = TINSMITH_MODEL_TYPE


class TinsmithForCausalLM(PreTrainedModel, GenerationMixin):
    """A Tinsmith model with the interface of transformers' causal language models."""

    config_class = TinsmithConfig
    base_model_prefix = "lm"
    main_input_name = "input_ids"
    _tied_weights_keys = {"lm.head.weight": "lm.embed.weight"}

    def __init__(self, config: TinsmithConfig):
        super().__init__(config)
        self.lm = LM(config_from_hf(config.to_dict()))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """Map ids (B, T) to logits (B, T, V); `attention_mask` is 0 at padding.

        Other keyword arguments of transformers (`use_cache`, `return_dict`, ...) are ignored.
        """
        segments = None if attention_mask is None else attention_mask.long() - 1
        logits = self.lm(input_ids, positions=position_ids, segments=segments).logits
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.lm.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        """Return the whole sequence at every step, because there is no cache."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embedding layer."""
        return self.lm.embed

    def get_output_embeddings(self) -> nn.Linear:
        """Return the output head."""
        return self.lm.head

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Set usage counters, which no folder stores, to 0. `LM` has already initialised the
        weights.
        """
        if isinstance(module, UsageWindow):
            for counter in module.buffers(recurse=False):
                counter.zero_()


AutoConfig.register(TINSMITH_MODEL_TYPE, TinsmithConfig)
AutoModelForCausalLM.register(TinsmithConfig, TinsmithForCausalLM)
