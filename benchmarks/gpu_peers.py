"""What only a GPU runs of the libraries that we are held against, beside what peers.py has of them."""

from dataclasses import replace
from functools import partial

import plain
from cases import Case
from implementations import Call, Implementation, naive_gae
from inputs import Inputs
from peers import implementations as of_any_device
from peers import imported, jsd_beta, liger_grpo, trl_head
from torch import Tensor


def liger_flce(case: Case, x: Inputs) -> Call:
    """As its users call it: the mean, whose gradients the forward pass makes, or one loss per token."""
    module = imported("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss(reduction="mean" if case.mean else "none")
    return lambda: (-loss(x.weight, x.hidden, x.ids),)


def liger_jsd(case: Case, x: Inputs) -> Call:
    module = imported("liger_kernel.transformers.fused_linear_jsd")
    loss = module.LigerFusedLinearJSD(jsd_beta=jsd_beta(case))
    return lambda: (loss(x.hidden, x.weight, x.ref_hidden, x.ref_weight, None),)


def trl_grpo(case: Case, x: Inputs) -> Call:
    """Its chunked log-probs and the plain loss, as in its trainer."""
    score = trl_head(replace(case, entropy=False), x)

    def call() -> tuple[Tensor, ...]:
        rows = score()[0].view(case.rows, -1)
        return (plain.grpo_loss(rows, x.old_logprobs.view_as(rows), x.advantages),)

    return call


MORE = {
    "head": {"liger-flce": Implementation(liger_flce, gives_entropy=False)},
    "kl": {"liger-jsd": Implementation(liger_jsd)},
    "grpo": {
        "trl": Implementation(trl_grpo),
        "liger-compiled": Implementation(partial(liger_grpo, compiled=True), compiles=True),
    },
    "gae": {"naive": Implementation(naive_gae, rounds=3)},
}


def implementations(case: Case, names: tuple[str, ...] = ()) -> dict[str, Implementation]:
    """All that can compute the case on a GPU, ours first, as `peers.implementations`."""
    return of_any_device(case, names, MORE.get(case.kind))
