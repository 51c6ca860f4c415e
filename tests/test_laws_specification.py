"""Law 6: the specification in rlloss.reference, written independently, agrees in value, gradient and metrics."""

import inspect

import pytest
import torch

import rlloss

EXACT = 1e-12


def reference_of(case):
    return case.reference or getattr(rlloss.reference, case.file)


def specification(case, step, **frozen):
    options = {"max_completion_length" if k == "max_length" else k: v for k, v in case.options.items()}
    return reference_of(case)(**{k: x.numpy() for k, x in step.items()}, **options, **frozen)


def test_law_6_the_specification_agrees(case):
    for seed in range(3):
        step = case.step(seed=seed)
        limit = EXACT * case.absolute_terms(step)
        for layout in (step, step.packed()):
            assert abs(case()(**layout).loss - specification(case, layout)) <= limit


def test_law_6_the_specification_agrees_beyond_the_bound(case):
    step = case.step()
    for name in step.keys() & {"old_logprobs", "ref_logprobs"}:
        for nats in (30.0, -30.0):
            far = step.but(**{name: step[name] + nats})
            assert abs(case()(**far).loss - specification(case, far)) <= EXACT * case.absolute_terms(far)


def test_law_6_differences_of_the_specification_are_the_gradient(case):
    step = case.step(rows=4, columns=4)
    olds = [{"old_logprobs": step[name].clone()} for name in ("old_logprobs", "logprobs") if "old_logprobs" in step]
    for old in olds or [{}]:
        step = step.but(**old)
        known = inspect.signature(reference_of(case)).parameters
        stops = {"logprobs"} if old else set()
        stops |= {name for name in step if f"frozen_{name}" in known}
        frozen = {f"frozen_{name}": step[name].numpy() for name in stops}
        if isinstance(case(), rlloss.StepStatisticLoss):
            frozen |= {name: x.numpy() for name, x in case().statistics(**step).items()}
        for name, grad in case.run(step)[1].items():
            slopes = torch.zeros_like(grad)
            for index in step.mask.nonzero().unbind():
                step_up, step_down = step[name].clone(), step[name].clone()
                step_up[tuple(index)] += 1e-6
                step_down[tuple(index)] -= 1e-6
                rise = specification(case, step.but(**{name: step_up}), **frozen)
                fall = specification(case, step.but(**{name: step_down}), **frozen)
                slopes[tuple(index)] = (rise - fall) / 2e-6
            torch.testing.assert_close(grad, slopes, rtol=0, atol=1e-8, msg=name)


def test_law_6_the_specification_has_our_metrics(case):
    step, loss_fn = case.step(), case()
    if not isinstance(loss_fn, rlloss.PolicyLoss):
        pytest.skip("policy losses alone have metrics there")
    step.pop("token_weights", None)
    clip = {
        name: getattr(loss_fn, name) for name in ("clip_eps_low", "clip_eps_high", "dual_clip") if name in vars(loss_fn)
    }
    expected = rlloss.reference.policy_metrics(
        **{k: x.numpy() for k, x in step.items() if k != "rollout_logprobs"}, **clip, ratio_level=loss_fn.ratio_level
    )
    if not clip:
        del expected["clip_frac"]
    else:
        assert expected["clip_frac"] > 0
    metrics = rlloss.scalars(loss_fn(**step).metrics)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=EXACT, abs=EXACT), name
