"""The doctor: quiet on sound batches, and on each planted defect one finding, named and no other."""

import math

import pytest
import torch
import torch.nn.functional as F

import rlloss
from rlloss import Diagnosis, Finding, doctor, doctor_rows

VOCABULARY = 100


def policy_batch(seed, rows=8, columns=96, side="right"):
    """A sound batch of a group-relative step: sampled from softmaxes of mixed sharpness, scored by near policies."""
    rng = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    lengths = torch.randint(40, columns - 4, (rows,), generator=rng)
    lengths[0], lengths[1] = columns, columns - 3
    prompts = torch.randint(2, 12, (rows,), generator=rng)
    at = torch.arange(columns)
    if side == "right":
        attention = at < lengths[:, None]
        first = prompts
    else:
        attention = at >= columns - lengths[:, None]
        first = columns - lengths + prompts
    answer = attention & (at >= first[:, None])
    input_ids = torch.randint(5, VOCABULARY, (rows, columns), generator=rng)
    sharpness = 0.5 + 4 * torch.rand((rows, columns, 1), generator=rng, dtype=torch.float64)
    scores = noise(rows, columns, VOCABULARY) * sharpness
    drawn = torch.multinomial(scores.softmax(-1).flatten(0, 1), 1, generator=rng).view(rows, columns)
    ids, loss_mask = rlloss.shift(input_ids, answer)
    ids = torch.where(loss_mask, drawn, ids)
    input_ids[:, 1:] = torch.where(loss_mask[:, :-1], drawn[:, :-1], input_ids[:, 1:])
    input_ids = torch.where(attention, input_ids, 0)
    ids, loss_mask = rlloss.shift(input_ids, answer)
    exact = scores.log_softmax(-1)
    logprobs = exact.gather(-1, ids[..., None])[..., 0]
    entropy = -(exact.exp() * exact).sum(-1)
    uncertain = 1 - logprobs.exp()

    def near(x, size):
        return torch.where(loss_mask, (x + size * uncertain * noise(rows, columns)).clamp(max=0), 0).float()

    group_ids = torch.arange(rows) // 4
    rewards = torch.rand(rows, generator=rng)
    return {
        "input_ids": input_ids,
        "attention_mask": attention,
        "ids": ids,
        "loss_mask": loss_mask,
        "logprobs": near(logprobs, 0),
        "old_logprobs": near(logprobs, 0),
        "rollout_logprobs": near(logprobs, 0.01),
        "ref_logprobs": near(logprobs, 0.3),
        "entropy": entropy.float(),
        "rewards": rewards,
        "group_ids": group_ids,
        "advantages": rlloss.group_advantages(rewards, group_ids),
    }


def packed(batch):
    real = batch["attention_mask"]
    lengths = real.sum(-1)
    made = {name: x[real] if x.ndim == 2 else x for name, x in batch.items()}
    return made | {"cu_seqlens": F.pad(lengths.cumsum(0), (1, 0))}


def critic_batch(seed):
    batch = policy_batch(seed)
    rng = torch.Generator().manual_seed(seed)
    shape = batch["loss_mask"].shape
    returns, values = (torch.randn(shape, generator=rng) for _ in range(2))
    advantages = rlloss.whiten(returns - values, batch["loss_mask"])
    del batch["group_ids"]
    moved = batch["logprobs"] * (1 + 0.02 * torch.randn(shape, generator=rng))
    return batch | {"returns": returns, "values": values, "advantages": advantages, "logprobs": moved}


def pair_batch(seed, rows=12):
    rng = torch.Generator().manual_seed(seed)
    names = ["chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"]
    ids = {f"{side}_ids": torch.randint(1, 50, (rows, 20), generator=rng) for side in ("chosen", "rejected")}
    return {name: -50 * torch.rand(rows, generator=rng) - 1 for name in names} | ids


def label_batch(seed, rows=12):
    rng = torch.Generator().manual_seed(seed)
    desirable = torch.arange(rows) % 3 == 0
    return {name: -50 * torch.rand(rows, generator=rng) - 1 for name in ("logps", "ref_logps")} | {
        "desirable": desirable,
        "kl": torch.tensor(0.3),
    }


def certain_batch(seed):
    """A policy that is sure of most of its tokens, whose log-probs are then exactly 0, at ends of rows too."""
    batch = policy_batch(seed)
    rng = torch.Generator().manual_seed(seed)
    sure = torch.rand(batch["loss_mask"].shape, generator=rng) < 0.7
    for name in ("logprobs", "old_logprobs", "rollout_logprobs", "ref_logprobs"):
        batch[name] = torch.where(sure, 0.0, batch[name])
    return batch


def answers_alone(seed):
    """Log-probs of the last columns only, as systems have them that do not score the prompt."""
    batch = policy_batch(seed)
    width = batch["loss_mask"].shape[1] - 1
    whole = ("input_ids", "attention_mask")
    return {name: x if x.ndim == 1 or name in whole else x[:, :width] for name, x in batch.items() if name != "entropy"}


KINDS = {
    "right": policy_batch,
    "left": lambda seed: policy_batch(seed, side="left"),
    "packed": lambda seed: packed(policy_batch(seed)),
    "critic": critic_batch,
    "certain": certain_batch,
    "answers": answers_alone,
    "pairs": pair_batch,
    "labels": label_batch,
}


@pytest.mark.parametrize("kind", KINDS)
def test_sound_batches_raise_no_alarm(kind):
    for seed in range(25):
        seen = doctor(KINDS[kind](seed))
        assert seen.ok, f"seed {seed}:\n{seen}"


def test_a_sound_batch_is_told_in_one_line():
    batch = policy_batch(0)
    batch["rollout_logprobs"] = batch["logprobs"]
    assert str(doctor(batch)) == (
        "rlloss.doctor looked at a padded batch of 8 rows with "
        f"{int(batch['loss_mask'].sum())} trained tokens: nothing stands out."
    )


DEFECTS = {}


def defect(name, *, severity, rows=None, base=policy_batch):
    """Registers a function that plants one defect into a sound batch; the doctor must name that and nothing else."""

    def registered(plant):
        assert plant.__name__ not in DEFECTS
        DEFECTS[plant.__name__] = (name, severity, rows, base, plant)
        return plant

    return registered


def planted(base, plant, seed):
    batch = base(seed)
    return plant(batch) or batch


@defect("unknown_name", severity="warning")
def another_systems_name(batch):
    batch["sampling_logprobs"] = batch.pop("rollout_logprobs")


@defect("unknown_name", severity="warning")
def a_misspelt_name(batch):
    batch["advantage"] = batch.pop("advantages")


@defect("not_a_tensor", severity="error")
def a_ragged_list(batch):
    batch["returns"] = [[0.1], [0.2, 0.3]]


@defect("shape_mismatch", severity="error")
def a_column_cut_on_one_side(batch):
    batch["old_logprobs"] = batch["old_logprobs"][:, 1:]


@defect("shape_mismatch", severity="error")
def rewards_of_another_batch(batch):
    batch["finished"] = torch.tensor([True] * 7)


@defect("mask_not_bool", severity="error")
def an_integer_mask(batch):
    batch["loss_mask"] = batch["loss_mask"].long()


@defect("half_precision", severity="error")
def half_precision(batch):
    batch["ref_logprobs"] = batch["ref_logprobs"].half()


@defect("bf16_logprobs", severity="warning")
def log_softmax_in_bfloat16(batch):
    batch["logprobs"] = batch["logprobs"].bfloat16().float()


@defect("bad_boundaries", severity="error", base=lambda seed: packed(policy_batch(seed)))
def lengths_for_boundaries(batch):
    batch["cu_seqlens"] = batch["cu_seqlens"].diff()


def last_trained(batch, row):
    return int(batch["loss_mask"][row].nonzero()[-1])


@defect("not_finite", severity="error", rows=(2,))
def a_nan(batch):
    batch["logprobs"][2, last_trained(batch, 2)] = math.nan


@defect("not_finite", severity="error", rows=(3,))
def minus_infinity(batch):
    batch["rollout_logprobs"][3, last_trained(batch, 3)] = -math.inf


@defect("not_finite", severity="error", rows=(5,))
def an_infinite_advantage(batch):
    batch["advantages"][5] = math.inf


@defect("not_finite", severity="error", rows=(4,), base=pair_batch)
def a_nan_in_a_pair(batch):
    batch["ref_chosen_logps"][4] = math.nan


@defect("positive_logprobs", severity="error", rows=(1,))
def a_logit_among_log_probs(batch):
    batch["old_logprobs"][1, last_trained(batch, 1)] = 3.5


@defect("positive_logprobs", severity="error")
def negated(batch):
    for name in ("logprobs", "old_logprobs", "rollout_logprobs", "ref_logprobs"):
        batch[name] = -batch[name]


@defect("positive_logprobs", severity="error", base=pair_batch)
def negated_sums(batch):
    batch["chosen_logps"] = -batch["chosen_logps"]


@defect("filler_logprobs", severity="error", rows=(0, 3))
def ones_for_missing(batch):
    for row in (0, 3):
        batch["rollout_logprobs"][row, last_trained(batch, row)] = 1.0


@defect("filler_logprobs", severity="error", rows=(2,))
def a_large_negative_constant(batch):
    end = last_trained(batch, 2)
    batch["ref_logprobs"][2, end - 2 : end] = -1234.5


@defect("placeholder_logprobs", severity="error")
def never_computed(batch):
    batch["old_logprobs"] = torch.zeros_like(batch["old_logprobs"])


@defect("constant_tail", severity="error")
def everything_is_trained(batch):
    del batch["attention_mask"], batch["ids"], batch["input_ids"]
    batch["loss_mask"][:, 20:] = True


@defect("constant_tail", severity="error", rows=(6,))
def one_padded_tail(batch):
    end = last_trained(batch, 6)
    for name in ("logprobs", "old_logprobs", "rollout_logprobs", "ref_logprobs"):
        batch[name][6, end - 5 : end + 1] = -7.25


@defect("zero_logprobs", severity="error", rows=(4,))
def unscored_tokens(batch):
    batch["rollout_logprobs"][4, (batch["logprobs"][4] < -1).nonzero().flatten()[:4]] = 0


@defect("padding_trained", severity="error", rows=(2, 5))
def two_rows_with_padding(batch):
    behind = ~batch["attention_mask"]
    for row in (2, 5):
        batch["loss_mask"][row, behind[row].nonzero().flatten()[:3]] = True


@defect("padding_trained", severity="error")
def the_whole_rectangle(batch):
    batch["loss_mask"] = batch["loss_mask"] | ~batch["attention_mask"]


@defect("unshifted_mask", severity="error")
def only_the_ids_are_shifted(batch):
    batch["loss_mask"] = batch["loss_mask"].roll(1, -1)
    scored = {name: batch[name] for name in ("logprobs", "old_logprobs", "rollout_logprobs", "ref_logprobs")}
    for name, x in scored.items():  # a tensor that is scored over every position
        batch[name] = torch.where(x == 0, batch["ref_logprobs"].min() * torch.rand(x.shape), x)
    for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs"):
        batch[name] = batch["logprobs"].clone()


@defect("unshifted_ids", severity="error")
def ids_are_the_input(batch):
    batch["ids"] = batch["input_ids"].clone()


@defect("shifted_logprobs", severity="error")
def the_sampler_is_late(batch):
    batch["rollout_logprobs"] = batch["rollout_logprobs"].roll(1, -1)


@defect("shifted_logprobs", severity="error")
def the_policy_is_early(batch):
    batch["logprobs"] = batch["logprobs"].roll(-1, -1)


@defect("shifted_logprobs", severity="error", base=lambda seed: packed(policy_batch(seed)))
def shifted_in_a_pack(batch):
    batch["old_logprobs"] = batch["old_logprobs"].roll(-1)


@defect("empty_rows", severity="warning", rows=(3,))
def a_row_without_answer(batch):
    batch["loss_mask"][3] = False


@defect("empty_rows", severity="error", rows=tuple(range(8)))
def no_answer_at_all(batch):
    batch["loss_mask"][:] = False


def copied(batch, to, source):
    for name in ("input_ids", "attention_mask", "ids", "loss_mask", "logprobs", "old_logprobs", "rollout_logprobs"):
        if name in batch:
            batch[name][to] = batch[name][source]
    batch["ref_logprobs"][to] = batch["ref_logprobs"][source]


@defect("duplicated_rows", severity="warning", rows=(6,))
def a_row_of_another_group_twice(batch):
    copied(batch, 6, 1)


@defect("duplicated_rows", severity="warning", rows=(7,))
def a_row_twice_by_its_log_probs(batch):
    del batch["input_ids"], batch["ids"], batch["group_ids"]
    copied(batch, 7, 2)


@defect("repeated_answers", severity="note", rows=(2,))
def an_answer_twice_in_its_group(batch):
    copied(batch, 2, 1)


@defect("noisy_logprobs", severity="warning")
def dropout(batch):
    x = batch["logprobs"]
    batch["logprobs"] = (x + 0.3 * (1 - x.exp()).sqrt() * torch.randn_like(x)).clamp(max=0)


@defect("ratio_not_one", severity="warning")
def other_weights(batch):
    x = batch["rollout_logprobs"]
    batch["rollout_logprobs"] = x - torch.rand_like(x).abs()


@defect("ratio_not_one", severity="note")
def other_kernels(batch):
    x = batch["logprobs"]
    batch["logprobs"] = x - 1e-4 * torch.rand_like(x)
    batch["rollout_logprobs"] = batch["old_logprobs"]


@defect("groups_of_one", severity="warning", rows=(7,))
def a_lonely_answer(batch):
    batch["group_ids"][7] = 9


@defect("groups_of_one", severity="warning", rows=tuple(range(8)))
def rows_numbered(batch):
    batch["group_ids"] = torch.arange(8)


@defect("groups_without_signal", severity="note", rows=(4, 5, 6, 7))
def a_solved_prompt(batch):
    batch["rewards"][4:] = 1.0


@defect("groups_without_signal", severity="warning", rows=tuple(range(8)))
def nothing_was_solved(batch):
    batch["rewards"][:] = 0


@defect("groups_without_signal", severity="warning", rows=tuple(range(8)))
def nothing_was_solved_by_advantages(batch):
    del batch["rewards"]
    batch["advantages"][:] = 0


@defect("zero_advantages", severity="warning")
def advantages_never_written(batch):
    del batch["group_ids"]
    batch["advantages"][:] = 0


@defect("truncated_rows", severity="warning", rows=(0, 1, 2, 3, 4, 6))
def cut_by_the_limit(batch):
    batch["finished"] = torch.tensor([False] * 5 + [True, False, True])


@defect("truncated_rows", severity="warning")
def all_of_one_length(batch):
    del batch["attention_mask"], batch["ids"], batch["input_ids"]
    whole = batch["loss_mask"].all(-1, keepdim=True) | (torch.arange(96) >= 50)
    batch["loss_mask"] = whole.expand(8, 96).clone()
    x = -3 * torch.rand(8, 96)
    batch |= dict.fromkeys(("logprobs", "old_logprobs", "rollout_logprobs", "ref_logprobs"), x)
    return batch


@defect("identical_pairs", severity="warning", rows=(1, 5), base=pair_batch)
def the_same_tokens(batch):
    batch["rejected_ids"][[1, 5]] = batch["chosen_ids"][[1, 5]]


@defect("identical_pairs", severity="warning", rows=(2,), base=pair_batch)
def the_same_log_probs(batch):
    del batch["chosen_ids"], batch["rejected_ids"]
    batch["rejected_logps"][2] = batch["chosen_logps"][2]
    batch["ref_rejected_logps"][2] = batch["ref_chosen_logps"][2]


@defect("advantages_not_centred", severity="warning", base=lambda seed: policy_batch(seed, rows=16))
def rewards_for_advantages(batch):
    batch["advantages"] = batch["rewards"] + 0.1


@defect("huge_advantages", severity="warning", rows=(3,))
def divided_by_next_to_nothing(batch):
    batch["advantages"][3] = 4000.0


@defect("advantages_at_masked_positions", severity="note", base=critic_batch)
def advantages_behind_the_mask(batch):
    batch["advantages"][:, 0] = 0.5


@defect("missing_rewards", severity="warning", rows=(1,))
def a_reward_of_none(batch):
    batch["rewards"] = [None if i == 1 else float(r) for i, r in enumerate(batch["rewards"])]


@defect("missing_rewards", severity="error", rows=tuple(range(8)))
def no_reward_at_all(batch):
    batch["rewards"] = torch.full((8,), math.nan)


@defect("one_label", severity="warning", base=label_batch)
def thumbs_up_only(batch):
    batch["desirable"][:] = True


@defect("no_loss_mask", severity="note")
def no_mask(batch):
    batch["attention_mask"] = batch.pop("loss_mask")


@pytest.mark.parametrize("case", DEFECTS)
def test_a_planted_defect_is_the_one_that_is_named(case):
    name, severity, rows, base, plant = DEFECTS[case]
    for seed in range(3):
        seen = doctor(planted(base, plant, seed))
        told = [finding for finding in seen.findings if finding.severity != "note" or severity == "note"]
        told = [finding for finding in told if finding.name != "ratio_not_one" or name == "ratio_not_one"]
        assert {finding.name for finding in told} == {name}, f"{plant.__name__}, seed {seed}:\n{seen}"
        assert {finding.severity for finding in told} == {severity}
        assert rows is None or told[0].rows == rows, str(seen)


def sampled(change, seed, size=600):
    """Log-probs of tokens that a changed distribution has drawn, under it and under the honest one, and the entropy."""
    rng = torch.Generator().manual_seed(seed)
    sharpness = 0.5 + 5 * torch.rand((size, 1), generator=rng, dtype=torch.float64)
    scores = sharpness * torch.randn((size, 1000), generator=rng, dtype=torch.float64)
    drawn_from = change(scores).log_softmax(-1)
    drawn = torch.multinomial(drawn_from.exp(), 1, generator=rng)
    honest = scores.log_softmax(-1)
    entropy = -(honest.exp() * honest).sum(-1)
    mask = torch.ones(6, size // 6, dtype=torch.bool)
    mask[1:, -1], mask[2:, -2:] = False, False
    rows = [x.view(6, -1).float() for x in (drawn_from.gather(-1, drawn), honest.gather(-1, drawn), entropy)]
    return dict(zip(("rollout_logprobs", "old_logprobs", "entropy"), rows, strict=True)) | {"loss_mask": mask}


def noisy(rollout):
    noise = torch.Generator().manual_seed(1)
    return rollout + 0.005 * (1 - rollout.exp()) * torch.randn(rollout.shape, generator=noise)


@pytest.mark.parametrize("temperature", [0.6, 0.8, 0.9, 1.1, 1.3, 1.6])
def test_a_temperature_is_seen_and_with_the_entropy_measured(temperature):
    for seed in range(3):
        batch = sampled(lambda scores: scores / temperature, seed)
        batch["rollout_logprobs"] = noisy(batch["rollout_logprobs"]).clamp(max=0)
        [finding] = doctor(batch).findings
        assert finding.name == "sampler_temperature"
        assert ("sharper" in finding.why) == (temperature < 1)
        told = float(finding.why.partition("(about ")[2].partition(")")[0])
        assert abs(math.log(told / temperature)) < 0.5 * abs(math.log(temperature))
        del batch["entropy"]
        assert doctor(batch).names == ["sampler_temperature"]


def nucleus(scores, p=0.9):
    ordered, order = scores.softmax(-1).sort(-1, descending=True)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, ordered.cumsum(-1) - ordered < p)
    return scores.masked_fill(~kept, -math.inf)


def top_k(scores, k=20):
    return scores.masked_fill(scores < scores.topk(k).values[:, -1:], -math.inf)


@pytest.mark.parametrize("cut", [nucleus, top_k])
def test_top_p_and_top_k_are_seen_under_the_noise_of_kernels(cut):
    for seed in range(3):
        batch = sampled(cut, seed)
        batch["rollout_logprobs"] = noisy(batch["rollout_logprobs"]).clamp(max=0)
        [finding] = doctor(batch).findings
        assert finding.name == "truncated_sampling"
        if cut is nucleus:
            assert "down to 0.9" in finding.why or "down to 0.89" in finding.why


def test_a_bfloat16_head_is_a_note():
    batch = sampled(lambda scores: scores.bfloat16().double(), 0)
    [finding] = doctor(batch).findings
    assert (finding.severity, finding.name) == ("note", "ratio_not_one")
    assert "bfloat16 head" in finding.why


def test_a_pack_is_told_as_the_padded_batch():
    for plant in (ones_for_missing, unscored_tokens, a_lonely_answer, a_nan, the_same_row):
        batch = policy_batch(0)
        plant(batch)
        padded, unpadded = doctor(batch), doctor(packed(batch))
        assert [(f.name, f.rows) for f in padded.findings] == [(f.name, f.rows) for f in unpadded.findings]


def the_same_row(batch):
    copied(batch, 6, 1)


def test_several_defects_are_all_told_errors_first():
    batch = policy_batch(0)
    a_solved_prompt(batch)
    another_systems_name(batch)
    a_nan(batch)
    seen = doctor(batch)
    assert seen.names == ["not_finite", "unknown_name", "groups_without_signal"]
    assert not seen.ok


def test_the_doctor_changes_nothing_and_takes_what_needs_a_gradient():
    batch = policy_batch(0)
    everything_is_trained(batch)
    batch["logprobs"].requires_grad_()
    before = {name: x.detach().clone() for name, x in batch.items()}
    doctor(batch)
    assert all(torch.equal(batch[name].detach(), x) for name, x in before.items())


def test_odd_mappings_are_no_crash():
    assert doctor({}).ok
    assert doctor({"logprobs": None, "loss_mask": None}).ok
    assert doctor({"prompts": ["a", "b"]}).ok
    assert doctor({"rewards": [1.0, 0.0], "group_ids": [0, 0]}).ok
    assert not doctor({"logprobs": torch.tensor(0.5)}).ok
    assert not doctor({"logprobs": torch.zeros(3), "cu_seqlens": [0, 5]}).ok
    assert doctor({"loss_mask": torch.zeros(0, 4, dtype=torch.bool), "logprobs": torch.zeros(0, 4)}).names == []
    assert doctor({"logprobs": torch.zeros(2, 0)}).ok
    assert doctor({"chosen_logps": torch.zeros(0), "rejected_logps": torch.zeros(0)}).ok


@pytest.mark.parametrize("seed", range(40))
def test_bad_data_are_told_and_never_raised(seed):
    rng = torch.Generator().manual_seed(seed)

    def one_of(*choices):
        return choices[int(torch.randint(len(choices), (), generator=rng))]

    batch = one_of(*KINDS.values())(seed)
    for name in list(batch):
        x = batch[name]
        change = one_of(
            *[lambda x: x] * 8,
            lambda x: x[:0],
            lambda x: x[..., :0],
            lambda x: x[1:],
            lambda x: x.long(),
            lambda x: x.half(),
            lambda x: x[None],
            lambda x: x.tolist(),
            lambda x: None,
            lambda x: x.float() * math.nan,
            lambda x: x == 0,
            lambda x: "a text",
            lambda x: x.numpy(),
        )
        batch[name] = change(x) if x.ndim else x
    assert str(doctor(batch)).startswith("rlloss.doctor looked at ")


def test_a_report_reads_line_by_line():
    finding = Finding("warning", "a_name", "seen " * 30, "why", "fix", tuple(range(40)))
    report = str(Diagnosis("a batch", (finding,)))
    assert report.startswith("rlloss.doctor looked at a batch: 1 warning.\n\nWARNING: a_name\n  seen   seen seen")
    assert report.endswith("  rows   0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 28 more")
    assert max(map(len, report.splitlines())) <= 100


def pair_rows():
    return [{"prompt": f"question {i}", "chosen": f"right {i}", "rejected": f"wrong {i}"} for i in range(60)]


def label_rows():
    return [{"prompt": f"question {i // 2}", "completion": f"answer {i}", "label": i % 2 == 0} for i in range(30)]


def message_rows():
    ask, say = {"role": "user", "content": "Hi"}, "Hello number"
    return [{"messages": [ask, {"role": "assistant", "content": f"{say} {i}"}]} for i in range(30)]


def tool_rows():
    def dialogue(i):
        return [
            {"role": "system", "content": "Use tools."},
            {"role": "user", "content": f"What is {i} + {i}?"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": [i, i]}}]},
            {"role": "tool", "content": str(2 * i)},
            {"role": "tool", "content": "done"},
            {"role": "assistant", "content": f"It is {2 * i}."},
        ]

    return [{"messages": dialogue(i)} for i in range(30)]


def answer_rows():
    user = [{"role": "user", "content": "Which?"}]
    said = [[{"role": "assistant", "content": f"{side} {i}"}] for i in range(30) for side in ("this", "that")]
    pairs = zip(said[::2], said[1::2], strict=True)
    return [{"prompt": user, "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]


def prompt_rows():
    return [{"prompt": f"question {i}", "answer": str(i)} for i in range(30)]


SOUND_ROWS = [pair_rows, label_rows, message_rows, tool_rows, answer_rows, prompt_rows]


@pytest.mark.parametrize("rows", SOUND_ROWS)
def test_sound_rows_raise_no_alarm(rows):
    assert doctor_rows(rows()).names == []


ROW_DEFECTS = {
    "a_pair_of_one": ("identical_pairs", pair_rows, {4: {"rejected": "right 4 "}}, (4,)),
    "blank": ("empty_answers", pair_rows, {7: {"chosen": "  "}}, (7,)),
    "lost": ("empty_answers", pair_rows, {7: {"rejected": None}}, (7,)),
    "no_words": (
        "empty_answers",
        message_rows,
        {2: {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}]}},
        (2,),
    ),
    "unasked": ("empty_prompts", label_rows, {3: {"prompt": ""}}, (3,)),
    "twice": ("duplicated_rows", label_rows, {9: label_rows()[2]}, (9,)),
    "both_labels": ("contradicting_labels", label_rows, {6: label_rows()[8] | {"label": False}}, (6, 8)),
    "both_orders": (
        "contradicting_labels",
        pair_rows,
        {6: {"prompt": "question 8", "chosen": "wrong 8", "rejected": "right 8"}},
        (6, 8),
    ),
    "one_label": ("one_label", label_rows, {i: {"label": True} for i in range(30)}, ()),
    "a_grade": ("odd_labels", label_rows, {5: {"label": "good"}}, (5,)),
    "a_dump": ("odd_lengths", pair_rows, {8: {"chosen": "word " * 500}}, (8,)),
    "longer": ("length_tells", pair_rows, {i: {"chosen": f"a longer answer {i}"} for i in range(60)}, ()),
    "no_row": ("not_a_row", pair_rows, {8: "a text"}, (8,)),
}
USER, ASSISTANT, SYSTEM = ({"role": role, "content": "Hm"} for role in ("user", "assistant", "system"))
ORDERS = {
    "two_users": [USER, USER, ASSISTANT],
    "late_system": [USER, SYSTEM, ASSISTANT],
    "unanswered": [USER, ASSISTANT, USER],
    "assistant_first": [ASSISTANT, USER, ASSISTANT],
    "foreign": [{"role": "human", "content": "Hm"}, ASSISTANT],
    "uncalled": [USER, {"role": "tool", "content": "4"}, ASSISTANT],
}
ROW_DEFECTS |= {name: ("roles_out_of_order", message_rows, {3: {"messages": m}}, (3,)) for name, m in ORDERS.items()}


@pytest.mark.parametrize("case", ROW_DEFECTS)
def test_a_planted_row_is_the_one_that_is_named(case):
    name, sound, changes, numbers = ROW_DEFECTS[case]
    rows = [
        (row | changes.get(i, {})) if isinstance(changes.get(i, {}), dict) else changes[i]
        for i, row in enumerate(sound())
    ]
    seen = doctor_rows(rows)
    assert [(finding.name, finding.rows) for finding in seen.findings] == [(name, numbers)], str(seen)


def test_columns_of_other_names_are_asked_about():
    assert doctor_rows([{"promt": "a", "solution": "b"}]).names == ["no_known_column", "unknown_name"]
    assert doctor_rows([{"question": "a", "solution": "b"}]).names == ["no_known_column"]


def test_roles_of_other_systems_are_translated():
    seen = doctor_rows([{"messages": [{"role": "human", "content": "Hi"}, {"role": "gpt", "content": "Ho"}]}])
    assert "here called 'user'" in seen.findings[0].what
