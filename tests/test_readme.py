"""The README keeps its promises: its loop runs as printed, and its index is complete."""

import re
from pathlib import Path

import torch

import rlloss
from rlloss.registry import _LOSSES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippet():
    (code,) = re.findall(r"## Your own loop\n.*?```python\n(.*?)```", README, flags=re.DOTALL)
    return code


def test_own_loop_is_short_and_trains():
    code = snippet()
    assert len(code.strip().splitlines()) <= 25
    torch.manual_seed(0)
    scope = {}
    exec(code, scope)
    # one more step on the same data: the first has moved the policy towards what was rewarded
    new = scope["logprobs"](slice(None)).detach()
    gain = ((new - scope["old_logprobs"]) * scope["advantages"][:, None] * scope["mask"]).sum()
    assert gain > 0
    assert set(scope["metrics"]) >= {"clip_frac", "ratio", "approx_kl"}


def test_index_lists_every_loss_and_its_file():
    rows = dict(re.findall(r"^\| `(\w+Loss)` \| \[.*?\]\((.*?)\)", README, flags=re.MULTILINE))
    assert set(rows) == {loss.__name__ for loss in _LOSSES.values()}
    for name, file in rows.items():
        assert f"class {name}(" in (ROOT / file).read_text(encoding="utf-8")
        assert hasattr(rlloss, name)


def test_links_lead_to_files():
    for target in re.findall(r"\]\((?!http|#)(.*?)\)", README):
        assert (ROOT / target).exists(), target
