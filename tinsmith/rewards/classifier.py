"""Rewards from a sequence classifier of Hugging Face."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinsmith.core.errors import UserError
from tinsmith.data.formats.prompts import Prompt, read_prompt
from tinsmith.rewards.functions import Response

_WHERE = "objective.rewards:"


class Classifier:
    """Score completions by a sequence classifier: its only logit, or of two, the second minus the
    first.

    It reads the conversation in its tokenizer's chat template, or, if it has none, prompt and
    completion as a pair of texts; `batch_size` at a time if it supports padding, otherwise one. The
    score of an input longer than its positions is NaN. Nothing is downloaded and no code of the
    folder is executed. UserError if the folder holds no such classifier.
    """

    def __init__(self, folder: str, batch_size: int = 64):
        from safetensors import SafetensorError
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if not Path(folder).is_dir():
            raise UserError(f"{_WHERE} {folder}: no such folder")
        load_options = {"local_files_only": True, "trust_remote_code": False}
        from_pretrained = AutoModelForSequenceClassification.from_pretrained
        try:
            info_options = {"output_loading_info": True, "use_safetensors": True}
            self._model, loading_info = from_pretrained(folder, **info_options, **load_options)
            self._tokenizer = AutoTokenizer.from_pretrained(folder, **load_options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{_WHERE} {folder}: {str(error).strip().splitlines()[0]}") from None
        config = self._model.eval().config
        if loading_info["missing_keys"]:
            missing = ", ".join(sorted(loading_info["missing_keys"]))
            raise UserError(f"{_WHERE} {folder} is no classifier: it lacks {missing}")
        if config.num_labels not in (1, 2):
            raise UserError(
                f"{_WHERE} {folder}: a classifier of {config.num_labels} labels is no reward; it "
                "must have 1 or 2"
            )
        if len(self._tokenizer) > config.get_text_config().vocab_size:
            raise UserError(f"{_WHERE} {folder}: its tokenizer has more ids than its model")
        pad_id = self._tokenizer.pad_token_id
        # every config maps this name to its own name of the number of positions
        positions = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
        self._max_length = min(positions, self._tokenizer.model_max_length)
        self._batch_size = batch_size if pad_id is not None and pad_id == config.pad_token_id else 1

    def __call__(self, responses: Sequence[Response]) -> list[float]:
        """Return the score of every completion."""
        starts = range(0, len(responses), self._batch_size)
        return [
            score
            for start in starts
            for score in self._score(responses[start : start + self._batch_size])
        ]

    def _score(self, responses: Sequence[Response]) -> list[float]:
        import torch

        inputs = self._tokenize(responses)
        are_short = [
            length <= self._max_length for length in inputs["attention_mask"].sum(1).tolist()
        ]
        if not all(are_short):
            short = [
                response
                for response, is_short in zip(responses, are_short, strict=True)
                if is_short
            ]
            scores = iter(self(short))
            return [next(scores) if is_short else math.nan for is_short in are_short]
        with torch.no_grad():
            logits = self._model(**inputs).logits.double()
        return (logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]).tolist()

    def _tokenize(self, responses: Sequence[Response]) -> Any:
        chats = [_messages(response.prompt) for response in responses]
        options = {"return_tensors": "pt", "padding": len(responses) > 1}
        if not self._tokenizer.chat_template:
            prompts = ["\n\n".join(message["content"] for message in chat) for chat in chats]
            return self._tokenizer(prompts, [response.text for response in responses], **options)
        replies = [{"role": "assistant", "content": response.text} for response in responses]
        texts = [
            self._tokenizer.apply_chat_template([*chat, reply], tokenize=False)
            for chat, reply in zip(chats, replies, strict=True)
        ]
        return self._tokenizer(texts, add_special_tokens=False, **options)


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    """Return the messages of a prompt as role and content."""
    messages = read_prompt(prompt.record).prompt.messages
    return [{"role": message.role, "content": message.content} for message in messages]
