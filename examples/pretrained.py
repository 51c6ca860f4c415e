"""The pretrained model of four examples, small enough to train without a GPU."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


def load_upper_half(name: str) -> tuple[Any, Any]:
    """Tokenizer and model of a folder or hub name: float32, and only the upper half of the layers trains."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    model.get_input_embeddings().requires_grad_(False)  # tied to the head, in SmolLM2
    layers = model.get_decoder().layers
    layers[: len(layers) // 2].requires_grad_(False)
    return tokenizer, model
