r"""Dialogues written as one text, "\n\nHuman: ...\n\nAssistant: ...", whose beginning is their prompt."""

__all__ = ["ASSISTANT", "dialogue_prompt"]

ASSISTANT = "\n\nAssistant:"


def dialogue_prompt(chosen: str, rejected: str) -> str | None:
    r"""The common beginning of two dialogues up to the last "\n\nAssistant:" in it; None where they share none.

    Answers that begin alike part where they begin, not where they differ.

    >>> dialogue_prompt("\n\nHuman: Hi\n\nAssistant: Ho, you", "\n\nHuman: Hi\n\nAssistant: Ho")
    '\n\nHuman: Hi\n\nAssistant:'
    """
    start = chosen.rfind(ASSISTANT)
    while start >= 0:
        prompt = chosen[: start + len(ASSISTANT)]
        if rejected.startswith(prompt):
            return prompt
        start = chosen.rfind(ASSISTANT, 0, start)
    return None
