"""A sequence classifier from Hugging Face, as a reward."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinsmith.core.errors import UserError
from tinsmith.data.formats.prompts import Prompt, read_prompt
from tinsmith.rewards.functions import Response

_WHERE = "objective.rewards:"


class Classifier:
    """A Hugging Face sequence classifier's opinion: its only logit, or, of two, the second minus
    the first.

    It reads the conversation by its tokenizer's chat template, or, where it has none, prompt and
    answer as a pair of texts; `rows` at a time where it knows of padding, else one. What is longer
    than it has positions for is no number. Nothing is fetched and no code of the folder is run.
    UserError where the folder holds no such thing.
    """

    def __init__(self, folder: str, batch_size: int = 64):
        from safetensors import SafetensorError
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if not Path(folder).is_dir():
            raise UserError(f"{_WHERE} {folder}: no such folder")
        local = {"local_files_only": True, "trust_remote_code": False}
        opened = AutoModelForSequenceClassification.from_pretrained
        try:
            reported = {"output_loading_info": True, "use_safetensors": True}
            self._model, facts = opened(folder, **reported, **local)
            self._tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{_WHERE} {folder}: {str(error).strip().splitlines()[0]}") from None
        config = self._model.eval().config
        if facts["missing_keys"]:
            missing = ", ".join(sorted(facts["missing_keys"]))
            raise UserError(f"{_WHERE} {folder} is no classifier: it has no {missing}")
        if config.num_labels not in (1, 2):
            raise UserError(
                f"{_WHERE} {folder}: a classifier of {config.num_labels} labels is no reward; 1 or "
                "2 are"
            )
        if len(self._tokenizer) > config.get_text_config().vocab_size:
            raise UserError(f"{_WHERE} {folder}: its tokenizer has more ids than its model")
        pads = self._tokenizer.pad_token_id
        # families name their positions as they like, and answer to this name
        positions = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
        self._room = min(positions, self._tokenizer.model_max_length)
        self._rows = batch_size if pads is not None and pads == config.pad_token_id else 1

    def __call__(self, answers: Sequence[Response]) -> list[float]:
        """The score of every answer."""
        starts = range(0, len(answers), self._rows)
        return [one for start in starts for one in self._some(answers[start : start + self._rows])]

    def _some(self, answers: Sequence[Response]) -> list[float]:
        import torch

        read = self._read(answers)
        fits = [length <= self._room for length in read["attention_mask"].sum(1).tolist()]
        if not all(fits):
            kept = [answer for answer, fit in zip(answers, fits, strict=True) if fit]
            scores = iter(self(kept))
            return [next(scores) if fit else math.nan for fit in fits]
        with torch.no_grad():
            logits = self._model(**read).logits.double()
        return (logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]).tolist()

    def _read(self, answers: Sequence[Response]) -> Any:
        talks = [_messages(answer.prompt) for answer in answers]
        reported = {"return_tensors": "pt", "padding": len(answers) > 1}
        if not self._tokenizer.chat_template:
            requested = ["\n\n".join(message["content"] for message in talk) for talk in talks]
            return self._tokenizer(requested, [answer.text for answer in answers], **reported)
        output = [{"role": "assistant", "content": answer.text} for answer in answers]
        texts = [
            self._tokenizer.apply_chat_template([*talk, last], tokenize=False)
            for talk, last in zip(talks, output, strict=True)
        ]
        return self._tokenizer(texts, add_special_tokens=False, **reported)


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    """What a prompt's row asks, as role and content."""
    requested = read_prompt(prompt.record).prompt.messages
    return [{"role": message.role, "content": message.content} for message in requested]
