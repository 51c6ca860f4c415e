"""A reward for what a language model finds likely."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rlloss._checks import check_count, check_range
from rlloss.logprobs import sequence_mean_logps
from rlloss.models import model_logprobs
from rlloss.rewards.prompts import prompt_ids
from rlloss.rewards.reward import Columns, Reward
from rlloss.rewards.window import Window

__all__ = ["Coherence"]


class Coherence(Reward):
    """Inverse perplexity of the completion under a frozen causal LM: (0, 1], and 0 for an empty completion.

        exp(1/T sum_t log p(token t | prompt, tokens before t))

    So it is the geometric mean of the tokens' probabilities, at temperature 1 and without an end of sequence. Likely is
    not true, and a text that repeats itself grows ever likelier: weigh it beside `repetition`.

    A prompt of messages is written by the chat template, where the tokenizer has one, else by what they say.

    Args:
        model: Any Hugging Face causal LM, put in eval mode and never trained: `frozen_copy(policy)`, or a better one.
        tokenizer: That model's.
        batch_size: Completions per forward pass; those of similar length go together.
        max_length: Tokens that the model reads of a row, its `max_position_embeddings` where None. A longer row loses
            the beginning of its prompt, and a completion that alone is longer its end; the first cut is logged.
    """

    __name__ = "coherence"

    def __init__(
        self, *, model: Any = None, tokenizer: Any = None, batch_size: int = 16, max_length: int | None = None
    ) -> None:
        if not isinstance(model, nn.Module) or tokenizer is None:
            raise ValueError(
                f"coherence: needs a loaded causal LM and its tokenizer, got model={model!r:.60} and "
                f"tokenizer={tokenizer!r:.60}; in place of the name, pass "
                "get_reward('coherence', model=frozen_copy(policy), tokenizer=tokenizer)"
            )
        check_count(self.__name__, "batch_size", batch_size)
        self.model: Any = model.eval()
        if max_length is not None:  # one token to score, and one before it
            check_range(self.__name__, "max_length", max_length, 2)
        self.tokenizer, self.batch_size, self.max_length = tokenizer, batch_size, max_length
        self._window = Window(self.__name__, max_length, model)

    @torch.no_grad()
    def scores(self, prompts: Sequence[Any], completions: Sequence[str], columns: Columns) -> list[float]:
        """One number per completion."""
        from rlloss.loop.batch import collate
        from rlloss.loop.data import Tokens
        from rlloss.loop.encoding import answered

        written, rows = [], []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            after = list(self.tokenizer(completion, add_special_tokens=False)["input_ids"])
            if after:
                before = self._before(prompt)
                ids, mask = answered(before, after)
                if not self._window.fits(len(ids)):
                    kept = self._window.kept(len(ids), start=len(before) - 1)
                    ids, mask = ids[kept], mask[kept]
                written.append(i)
                rows.append(Tokens(ids, mask))
        self._window.report()
        scores = torch.zeros(len(completions), dtype=torch.float64)
        if not rows:
            return scores.tolist()
        batch, device = collate(rows), next(self.model.parameters()).device
        for chunk in batch.lengths.argsort(descending=True).split(self.batch_size):
            part = batch.select(chunk, device)
            logprobs = model_logprobs(
                self.model, part.input_ids, part.ids, part.loss_mask, attention_mask=part.attention_mask
            ).logprobs
            assert logprobs is not None
            mean_logps = sequence_mean_logps(logprobs, part.loss_mask)
            scores[torch.tensor(written)[chunk]] = mean_logps.exp().double().cpu()
        return scores.tolist()

    def _before(self, prompt: Any) -> list[int]:
        """The prompt's tokens; of none, the token that begins or ends a text, so that the first one can be scored."""
        marks = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        before = prompt_ids(prompt, self.tokenizer) or [mark for mark in marks if mark is not None][:1]
        if not before:
            raise ValueError(
                "coherence: nothing stands before the first token of a completion without a prompt, so it cannot be "
                "scored; set tokenizer.bos_token"
            )
        return before
