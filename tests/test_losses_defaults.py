"""Defaults that no equation shows."""

import torch

import rlloss
from rlloss import ConservativePPOLoss, PreferenceLoss
from rlloss.advantages.running import AdaptiveKLController


def test_conservative_ppo_has_the_defaults_of_ppo_and_of_its_hinge():
    assert repr(ConservativePPOLoss()) == (
        "ConservativePPOLoss(kl_coef=0.0, kl='k3', kl_grad='reverse', entropy_coef=0.0, max_log_ratio=20.0, "
        "clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=None, conservative_coef=0.1, max_kl=0.01, level='batch')"
    )


def test_a_loss_over_pairs_has_beta_a_tenth():
    assert PreferenceLoss().beta == 0.1


def test_a_kl_term_is_k3_and_descends_the_reverse_kl():
    new, old, ref = torch.tensor([-1.0, -3.0]), torch.tensor([-1.5, -2.5]), torch.tensor([-2.0, -2.0])
    assert torch.equal(rlloss.kl_term(new, old, ref), (new - old).exp() * rlloss.kl_k3(new, ref))


def test_the_controllers_horizon_is_10000_sequences():
    assert AdaptiveKLController(0.1, target_kl=6.0).horizon == 10000
