"""The other side of every comparison: the whole model with plain `peft`, a row at a time, one argmax after another."""

import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from tests.parity.reference import whole_model


class Plain:
    """A whole model with a run's adapter."""

    def __init__(self, model: Path, run: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self._model = PeftModel.from_pretrained(whole_model(model), run / "adapter").eval()

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def conversation(self, *turns: tuple[str, str]) -> str:
        """Turns of role and content as the template writes them, with the words that ask for an answer."""
        messages: Any = [{"role": role, "content": content} for role, content in turns]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def after(self, text: str | list[int], new_tokens: int) -> str:
        """What the model adds, greedily."""
        ids = self.ids(text) if isinstance(text, str) else list(text)
        began = len(ids)
        while len(ids) < began + new_tokens and ids[-1] != self.tokenizer.eos_token_id:
            ids.append(int(self._logits(ids)[-1].argmax()))
        return str(self.tokenizer.decode(ids[began:], skip_special_tokens=True))

    def likelihood(self, prompt: str, end: str) -> float:
        """Log-likelihood of a text after a prompt, in nats."""
        before, all_ = self.ids(prompt), self.ids(prompt + end)
        log_probs = self._logits(all_).double().log_softmax(-1)
        return math.fsum(float(log_probs[at - 1, all_[at]]) for at in range(len(before), len(all_)))

    @torch.no_grad()
    def _logits(self, ids: list[int]) -> torch.Tensor:
        logits: torch.Tensor = self._model(torch.tensor([ids]), use_cache=False).logits[0]
        return logits
