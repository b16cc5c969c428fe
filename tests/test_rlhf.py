"""Learning from preferences: closed forms, gradients, enumerable toys with a known optimum, runs, resuming, bad input."""

import hashlib
import io
import itertools
import json
import math
import random
import sys
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F

import data
import finetune_sft
import gpt
import rlhf
import train
from lora import apply_lora, load_lora
from rlhf import Config, Pair, Policy, RewardModel
from tokenizer import CharTokenizer


class Letters:
    """A tokenizer of single letters for toys: a is 0, b is 1 ..., other characters are nothing, the last id ends."""

    def __init__(self, size):
        self.vocab_size, self.eot_id = size, size - 1

    def encode(self, text):
        return [ord(letter) - 97 for letter in text if letter.isalpha()]

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)

    def to_dict(self):
        return CharTokenizer.train(["abc"], specials=True).to_dict()  # only so that a checkpoint can be read


def toy(vocab_size=8, seed=0, sharp=1.0, **sizes):
    """Return a small model with a head `sharp` times as large."""
    torch.manual_seed(seed)
    sizes = {"context_length": 16, "emb_dim": 16, "n_heads": 2, "n_layers": 2, "drop_rate": 0.0, **sizes}
    model = gpt.GPTModel(gpt.GPTConfig(vocab_size, **sizes)).eval()
    with torch.no_grad():
        model.out_head.weight *= sharp
    return model


def options(**given):
    """Return a Config for toys: one micro-batch, no penalty for responses that do not stop, no ptx loss."""
    return Config(**{"batch_size": 32, "accumulate": 1, "temperature": 1.0, "no_stop_penalty": 0.0, "ptx_coef": 0.0,
                     "max_approxkl": 0.0, "warmup_steps": 0, "final_rate": 0.0, "max_steps": 1, "eval_every": 0,
                     "save_every": 0, "data": "toy", "init": "toy", "reward": "toy", **given})


def prefix_mask(*lengths):
    """Return a mask (B, R) with so many ones at the start of each row."""
    return torch.tensor([[float(t < n) for t in range(max(lengths))] for n in lengths])


# --- the mathematics, against closed forms


def test_gae_is_its_definition():
    """The backward recursion equals sum_k (gamma lam)^k delta_{t+k} computed term by term, ragged responses included."""
    torch.manual_seed(0)
    lengths = [7, 1, 4, 6]
    mask = prefix_mask(*lengths).double()
    rewards, values = torch.randn(2, 4, 7, dtype=torch.float64)
    for gamma, lam in ((1.0, 0.95), (0.9, 0.5), (0.97, 1.0), (1.0, 0.0)):
        advantages, returns = rlhf.gae(rewards, values, mask, gamma, lam)
        for row, n in enumerate(lengths):
            v = values[row, :n].tolist() + [0.0]
            delta = [rewards[row, t].item() + gamma * v[t + 1] - v[t] for t in range(n)]
            for t in range(n):
                expected = sum((gamma * lam) ** k * delta[t + k] for k in range(n - t))
                assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)
                assert returns[row, t].item() == pytest.approx(expected + v[t], abs=1e-12)
            assert advantages[row, n:].abs().sum() == returns[row, n:].abs().sum() == 0


def test_whitening_counts_only_what_the_mask_shows():
    """Mean 0 and variance 1 over masked entries, 0 elsewhere; hidden values change nothing."""
    torch.manual_seed(0)
    x, mask = torch.randn(5, 6) * 3 + 2, prefix_mask(6, 1, 3, 4, 2)
    white = rlhf.whiten(x, mask)
    kept = white[mask.bool()]
    assert kept.mean().item() == pytest.approx(0, abs=1e-6) and kept.var(unbiased=False).item() == pytest.approx(1, abs=1e-5)
    assert white[~mask.bool()].abs().max() == 0
    assert torch.equal(rlhf.whiten(x.masked_fill(mask == 0, 1e6), mask), white)


@pytest.mark.parametrize("high, advantage, ratio, loss, slope", [
    (0.2, 2.0, 1.5, -2.4, 0.0),  # good and already 50% likelier: no more gain
    (0.2, 2.0, 0.5, -1.0, -2.0),  # good and less likely: full gradient
    (0.2, -2.0, 1.5, 3.0, 2.0),  # bad and likelier: full gradient
    (0.2, -2.0, 0.5, 1.6, 0.0),  # bad and already half as likely: no more gain
    (0.28, 2.0, 1.25, -2.5, -2.0), (0.28, 2.0, 1.35, -2.56, 0.0),  # a higher upper bound moves that bound alone
    (0.28, -2.0, 0.75, 1.6, 0.0), (0.28, -2.0, 0.85, 1.7, 2.0)])
def test_the_policy_loss_clips_where_it_should(high, advantage, ratio, loss, slope):
    """The four quadrants give the loss and the derivative by the ratio that the paper's figure 1 shows."""
    new = torch.tensor([[-1.0 + math.log(ratio)]], requires_grad=True)
    got, metrics = rlhf.ppo_policy_loss(new, -torch.ones(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1), 0.2, high)
    got.backward()
    assert got.item() == pytest.approx(loss, abs=1e-5)
    assert new.grad.item() == pytest.approx(slope * ratio, abs=1e-5)  # d ratio / d new = ratio
    assert metrics["policy/clipfrac"] == (not 0.8 <= ratio <= 1 + high)
    assert metrics["policy/approxkl"] == pytest.approx(0.5 * math.log(ratio) ** 2)


def test_the_value_loss_takes_the_larger_error():
    """A value that ran past the clip is held to it; masked entries weigh nothing."""
    values = torch.tensor([[1.0, 1.0, 0.1, 9.0]], requires_grad=True)
    old, returns = torch.zeros(1, 4), torch.tensor([[2.0, 0.0, 1.0, 0.0]])
    loss = rlhf.ppo_value_loss(values, old, returns, torch.tensor([[1.0, 1.0, 1.0, 0.0]]), clip=0.2)
    loss.backward()
    # 1: clipped to .2, error 1.8^2 beats 1; no gradient. 2: 1 beats .2^2. 3: not clipped, .9^2
    assert loss.item() == pytest.approx(0.5 * (1.8**2 + 1.0 + 0.9**2) / 3)
    assert values.grad.tolist()[0] == pytest.approx([0, 1 / 3, -0.9 / 3, 0], abs=1e-6)


def test_the_kl_controller_follows_its_closed_form():
    """Three steps: far above the target, within 20% below it, far below it."""
    first = rlhf.kl_controller(0.1, 12.0, 6.0, 512, 10000)
    assert first == pytest.approx(0.1 * (1 + 0.2 * 512 / 10000))
    second = rlhf.kl_controller(first, 5.4, 6.0, 512, 10000)
    assert second == pytest.approx(first * (1 - 0.1 * 512 / 10000))
    assert rlhf.kl_controller(second, 0.0, 6.0, 1000, 1000) == pytest.approx(second * 0.8)
    assert rlhf.kl_controller(second, 5.0, 0.0, 1000, 1000) == second  # without a target
    assert rlhf.kl_controller(0.1, 0.0, 6.0, 800, 100) == pytest.approx(0.08)  # more episodes than the horizon


def test_reward_loss_identities():
    """Equal scores cost ln 2; a constant added to both changes nothing; it is the cross-entropy of a softmax over two."""
    chosen, rejected = torch.tensor([1.0, -2.0, 0.3]), torch.tensor([0.5, 1.0, 0.3])
    assert rlhf.reward_loss(chosen, chosen).item() == pytest.approx(math.log(2), abs=1e-7)
    loss = rlhf.reward_loss(chosen, rejected).item()
    assert rlhf.reward_loss(chosen + 7, rejected + 7).item() == pytest.approx(loss, abs=1e-6)
    assert F.cross_entropy(torch.stack([chosen, rejected], 1), torch.zeros(3, dtype=torch.long)).item() == pytest.approx(loss)


def test_dpo_starts_at_ln_2_with_the_gradient_of_the_paper():
    """At the reference the loss is ln 2 and its gradient -(beta / 2)(grad logp chosen - grad logp rejected)."""
    chosen, rejected = torch.tensor([-3.0, -5.0], requires_grad=True), torch.tensor([-4.0, -1.0], requires_grad=True)
    loss = rlhf.dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta=0.3)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert chosen.grad.tolist() == pytest.approx([-0.075, -0.075]) and rejected.grad.tolist() == pytest.approx([0.075] * 2)


LENGTHS = torch.tensor([4.0, 2.0]), torch.tensor([5.0, 8.0])  # tokens of the chosen and of the rejected answers


def test_ipo_draws_the_margin_to_half_the_inverse_of_beta():
    """By hand: margins of 1 and -2 nats, target 2.5 nats: (1.5^2 + 4.5^2) / 2; at the reference 1 / (4 beta^2), with a
    gradient of -1 / (beta B) on each chosen one; no gradient at the target, and back towards it beyond."""
    chosen = torch.tensor([-3.0, -5.0], requires_grad=True)
    rejected, ref = torch.tensor([-4.0, -1.0], requires_grad=True), (torch.tensor([-3.0, -4.0]), torch.tensor([-3.0, -2.0]))
    assert rlhf.ipo_loss(chosen, rejected, *ref, beta=0.2).item() == pytest.approx((1.5**2 + 4.5**2) / 2)
    loss = rlhf.ipo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(1 / (4 * 0.2**2))
    assert chosen.grad.tolist() == pytest.approx([-2.5] * 2) and rejected.grad.tolist() == pytest.approx([2.5] * 2)
    for margin, slope in ((2.5, 0.0), (3.5, 2.0)):
        x = torch.tensor([margin], requires_grad=True)
        rlhf.ipo_loss(x, *torch.zeros(3, 1), beta=0.2).backward()
        assert x.grad.item() == pytest.approx(slope, abs=1e-6)


def test_ipo_ends_where_its_paper_says_on_a_bandit():
    """Two arms, the first preferred with probability p: at the optimum the log-ratio's margin is (2 p - 1) / (2 beta)
    nats, where DPO's grows without limit as p comes near 1."""
    for share in (1.0, 0.75):
        margin = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.SGD([margin], lr=0.2)
        for _ in range(60):
            optimizer.zero_grad()
            first, second = (rlhf.ipo_loss(sign * margin, *torch.zeros(3, 1), beta=0.2) for sign in (1, -1))
            (share * first + (1 - share) * second).backward()
            optimizer.step()
        assert margin.item() == pytest.approx((2 * share - 1) / 0.4, abs=1e-4)


def test_simpo_compares_means_per_token_against_a_margin():
    """By hand: means of -1 and -0.8, and of -2 and -0.125 nats, beta 2, gamma 0.5; a mean does not see the length."""
    chosen, rejected = torch.tensor([-4.0, -4.0], requires_grad=True), torch.tensor([-4.0, -1.0], requires_grad=True)
    loss = rlhf.simpo_loss(chosen, rejected, *LENGTHS, beta=2.0, gamma=0.5)
    x = [2 * (-1 + 0.8) - 0.5, 2 * (-2 + 0.125) - 0.5]
    assert loss.item() == pytest.approx(sum(math.log(1 + math.exp(-v)) for v in x) / 2)
    loss.backward()
    slopes = [-1 / (1 + math.exp(v)) for v in x]  # of -log sigmoid
    assert chosen.grad.tolist() == pytest.approx([slopes[0] * 2 / 4 / 2, slopes[1] * 2 / 2 / 2])
    assert rejected.grad.tolist() == pytest.approx([-slopes[0] * 2 / 5 / 2, -slopes[1] * 2 / 8 / 2])
    doubled = rlhf.simpo_loss(2 * chosen, rejected, 2 * LENGTHS[0], LENGTHS[1], beta=2.0, gamma=0.5)
    assert doubled.item() == pytest.approx(loss.item())


def test_orpo_writes_the_chosen_answer_and_widens_the_odds():
    """By hand from probabilities per token p = 1/2 and 1/4: odds 1 and 1/3. Equal answers cost nats + beta ln 2."""
    chosen, rejected = torch.tensor([4 * math.log(0.5)], requires_grad=True), torch.tensor([2 * math.log(0.25)])
    four, two = torch.tensor([4.0]), torch.tensor([2.0])
    loss = rlhf.orpo_loss(chosen, rejected, four, two, beta=0.3)
    assert loss.item() == pytest.approx(math.log(2) + 0.3 * math.log(1 + 1 / 3))  # sigmoid(ln 3) = 3/4
    loss.backward()
    slope = -1 - 0.3 * (1 - 3 / 4) / (1 - 0.5)  # d log odds / d log p = 1 / (1 - p), of a mean over four tokens
    assert chosen.grad.item() == pytest.approx(slope / 4)
    same = rlhf.orpo_loss(chosen, chosen, four, four, beta=0.3)
    assert same.item() == pytest.approx(math.log(2) + 0.3 * math.log(2))
    certain = torch.zeros(1, requires_grad=True)  # an answer that is certain has infinite odds
    loss = rlhf.orpo_loss(certain, rejected, four, two)
    loss.backward()
    assert math.isfinite(loss.item()) and certain.grad.isfinite().all()


@pytest.mark.peer
def test_the_losses_and_advantages_are_trls():
    """TRL 1.12: ORPO's odds ratio, SimPO and IPO in CPOTrainer, whose log-probabilities are means per token there."""
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    torch.manual_seed(0)
    lengths = torch.randint(1, 30, (2, 16)).float()
    chosen, rejected, ref_chosen, ref_rejected = -torch.rand(4, 16) * 3 * lengths[[0, 1, 0, 1]]
    means = chosen / lengths[0], rejected / lengths[1]
    self = mock.Mock(beta=0.4, alpha=0.0, simpo_gamma=0.7, label_smoothing=0.0, loss_type="simpo")
    self.accelerator.device = "cpu"
    theirs = cpo.cpo_loss(self, *means)[0].mean().item()
    assert rlhf.simpo_loss(chosen, rejected, *lengths, 0.4, 0.7).item() == pytest.approx(theirs, rel=1e-5)
    theirs = -orpo.odds_ratio_loss(self, *means)[0].mean().item() - means[0].mean().item()
    assert rlhf.orpo_loss(chosen, rejected, *lengths, 0.4).item() == pytest.approx(theirs, rel=1e-5)
    self.loss_type = "ipo"
    ratios = (chosen - ref_chosen) / lengths[0], (rejected - ref_rejected) / lengths[1]
    theirs = cpo.cpo_loss(self, *ratios)[0].mean().item()
    assert rlhf.ipo_loss(*ratios, *torch.zeros(2, 16), beta=0.4).item() == pytest.approx(theirs, rel=1e-5)


def test_dpo_trains_by_every_loss(folder):
    """The first training loss is that of the start: ln 2, 1 / (4 beta^2), and those of SimPO, ORPO and SFT from the
    start's own log-probabilities; each falls, and margins grow; --beta is 2 for SimPO alone."""
    model, tokenizer, _ = gpt.load_checkpoint("start.safetensors")
    rows = rlhf.encode_pairs(rlhf.load_pairs(Config(data="pairs.json"))[0], tokenizer, "plain", 48)

    def said(prompt, answer):
        with torch.no_grad():
            return gpt.token_logprobs(model(torch.tensor([prompt + answer])), torch.tensor([prompt + answer]))[0, -len(answer):]

    pairs = [(said(row.prompt, row.chosen), said(row.prompt, row.rejected)) for row in rows]
    log_odds = lambda x: x - math.log1p(-math.exp(x))  # noqa: E731
    minus_log_sigmoid = lambda x: math.log1p(math.exp(-x))  # noqa: E731
    gaps = [(a.mean().item(), b.mean().item()) for a, b in pairs]
    first = {"dpo": math.log(2), "ipo": 1 / (4 * 0.1**2), "sft": -sum(a.sum().item() for a, _ in pairs) / len(pairs),
             "simpo": sum(minus_log_sigmoid(2 * (a - b) - 1) for a, b in gaps) / len(gaps),
             "orpo": sum(-a + 0.1 * minus_log_sigmoid(log_odds(a) - log_odds(b)) for a, b in gaps) / len(gaps)}
    for loss in rlhf.LOSSES:
        summary = run("dpo", "--loss", loss, "--epochs", 6, "--learning_rate", 3e-3, "--batch_size", len(rows), "--fresh")
        losses = [row["loss"] for row in logged("dpo") if "loss" in row]
        assert losses[0] == pytest.approx(first[loss], rel=1e-4) and losses[-1] < losses[0], loss
        assert [row["val_rewards/margins"] for row in logged("dpo") if "val_loss" in row][-1] > 0, loss
        assert summary["config"]["beta"] == (2.0 if loss == "simpo" else 0.1)


def test_group_advantages_and_the_dpo_loss_are_trls():
    """TRL's formulas in double precision: (r - mean) / (std + 1e-4) within groups; its sigmoid loss with smoothing."""
    torch.manual_seed(0)
    scores = torch.randn(24)
    grouped = scores.double().view(-1, 6)
    expected = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    assert torch.allclose(rlhf.group_advantages(scores, 6).double(), expected.flatten(), atol=3e-7)
    chosen, rejected, ref_chosen, ref_rejected = torch.randn(4, 16) * 3 - 20
    logits = (chosen.double() - rejected) - (ref_chosen.double() - ref_rejected)
    expected = -F.logsigmoid(0.1 * logits) * (1 - 0.2) - F.logsigmoid(-0.1 * logits) * 0.2
    got = rlhf.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.1, 0.2)
    assert got.item() == pytest.approx(expected.mean().item(), abs=3e-7)


def test_three_kinds_of_advantages_by_hand():
    """Scores 1, 0, 0, 3 in one group, all 5 in the other: divided by the deviation (sqrt 2), not divided, leave-one-out."""
    scores = torch.tensor([1.0, 0.0, 0.0, 3.0, 5.0, 5.0, 5.0, 5.0])
    by_hand = {"group": [0, -1 / math.sqrt(2), -1 / math.sqrt(2), 2 / math.sqrt(2)], "group-mean": [0, -1, -1, 2],
               "rloo": [1 - 3 / 3, 0 - 4 / 3, 0 - 4 / 3, 3 - 1 / 3]}
    for kind, expected in by_hand.items():
        assert rlhf.group_advantages(scores, 4, kind).tolist() == pytest.approx([*expected, 0, 0, 0, 0], abs=2e-4), kind


@pytest.mark.parametrize("value", [98765.4, 0.1, -3e7, 0.0])
def test_equal_scores_have_advantages_of_exactly_zero(value):
    """Whatever their size: rounding of a mean must not become an advantage, neither in GRPO nor in whitening."""
    for n, kind in itertools.product((4, 7, 8, 64), ("group", "group-mean", "rloo")):
        assert rlhf.group_advantages(torch.full((n,), value), n, kind).tolist() == [0] * n
        assert rlhf.whiten(torch.full((n, 1), value), torch.ones(n, 1)).abs().max() == 0
    near = torch.tensor([98765.4, 98765.5, 98765.6, 98765.7])
    assert rlhf.group_advantages(near, 4).tolist() == pytest.approx([-1.16, -0.39, 0.39, 1.16], abs=0.05)


def test_the_score_lands_on_the_stop_token_and_the_kl_on_every_token():
    """-kl_coef x (logp - ref) on real tokens, the score once, at the last of them, and nothing behind it."""
    logprobs, ref = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -9.0]]), torch.tensor([[-2.0, -2.0, -1.0], [0.0, -1.0, 9.0]])
    rewards = rlhf.token_rewards(torch.tensor([10.0, 20.0]), logprobs, ref, prefix_mask(3, 2), kl_coef=0.1)
    assert torch.allclose(rewards, torch.tensor([[-0.1, 0.0, 10.2], [0.1, 20.0, 0.0]]))


def test_exact_kl_agrees_with_its_estimates_from_samples():
    """Never negative, 0 for equal distributions, and the means of k1 and k3 over 20,000 samples agree with it."""
    torch.manual_seed(0)
    p, q = torch.log_softmax(torch.randn(2, 1, 1, 12), -1)
    exact = rlhf.exact_kl(p, q).item()
    assert exact == pytest.approx(F.kl_div(q, p, log_target=True, reduction="sum").item(), abs=1e-6)
    assert rlhf.exact_kl(p, p).abs().max() == 0 and rlhf.exact_kl(*torch.log_softmax(torch.randn(2, 9, 9, 12), -1)).min() >= 0
    ids = torch.multinomial(p.exp().flatten(), 20000, replacement=True)
    ratio = (q - p).flatten()[ids]
    for samples in (-ratio, ratio.exp() - 1 - ratio):
        assert abs(samples.mean().item() - exact) < 4 * samples.std().item() / math.sqrt(len(samples))


# --- responses, padding, gradients


def start_of(model, texts, chosen=""):
    """Return what rlhf.open_start gives, for prompts of letters."""
    pairs = [{"prompt": text, "chosen": chosen or rlhf.NO_ANSWER, "rejected": ""} for text in texts]
    return model, Letters(model.config.vocab_size), "plain", [pairs] * 3


def learn(model, texts, reward, folder, stage="ppo", seed=0, chosen="", **given):
    """Train a toy in place by rlhf.train_policy, as from the command line, and return the rows of its log."""
    advantage = given.pop("advantage", {"ppo": "gae", "grpo": "group"}[stage])
    config = options(out_dir=str(folder), fresh=True, seed=seed, eval_prompts=2, test_prompts=2, advantage=advantage, **given)
    torch.manual_seed(seed)
    with mock.patch.object(rlhf, "open_start", lambda *args, **named: start_of(model, texts, chosen)), \
            mock.patch.object(rlhf, "load_reward", lambda *args: reward):
        rlhf.train_policy(config)
    return train.read_log(folder)


def first_update(model, folder, texts=("ab", "c", "abcab", "ba"), reward=None, **given):
    """Return (gradients of the policy before the first update, the rollout, the logged figures) of a run of one step."""
    reward = reward or (lambda prompts, responses: [len(r) + 0.1 * ord((r or "a")[0]) for r in responses])
    gradients, rollouts, score, clip = [], [], rlhf.score_tokens, rlhf.clip_grad_norm_

    def clipped(parameters, norm):
        parameters = list(parameters)
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters])
        return clip(parameters, norm)

    def scored(policy, reference, rollout, config):
        score(policy, reference, rollout, config)
        rollouts.append(rollout)

    with mock.patch.object(rlhf, "clip_grad_norm_", clipped), mock.patch.object(rlhf, "score_tokens", scored), \
            mock.patch.object(rlhf, "finish_policy", lambda *args: None):
        rows = learn(model, texts, reward, folder, **{"batch_size": len(texts), "ppo_epochs": 1, "response_length": 6,
                                                      "learning_rate": 1e-3, **given})
    of_training = next(rollout for rollout in rollouts if rollout.scores.abs().sum() > 0)
    return gradients[0], of_training, next(row for row in rows if "val/ratio" in row)


def rollout_of(model, texts=("ab", "c", "abcab", "ba"), seed=0, config=None, num_samples=1):
    """Return (rollout, texts) of some prompts, sampled from seeded random numbers and scored by policy and reference."""
    torch.manual_seed(seed)
    tokenizer, config = Letters(model.config.vocab_size), config or options(response_length=6)
    rollout, responses = rlhf.sample_responses(model, [tokenizer.encode(text) for text in texts], tokenizer, config,
                                               num_samples)
    rlhf.score_tokens(Policy(model), rlhf.reference_of(model), rollout, config)
    return rollout, responses


def test_packed_rows_begin_their_responses_in_one_column():
    """Prompts are padded on the left and responses on the right, with a mask that shows both."""
    ids, mask, R = rlhf.pack([[1, 2, 3], [4]], [[5], [6, 7]], pad_id=0)
    assert R == 2 and ids.tolist() == [[1, 2, 3, 5, 0], [0, 0, 4, 6, 7]]
    assert mask.tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_what_is_scored_is_what_was_sampled():
    """At temperature 0.7 the log-probabilities of a response sum to those of drawing it alone, token by token."""
    model, asked = toy(sharp=30), ("ab", "c", "abcab", "ba")
    rollout, texts = rollout_of(model, asked, config=options(temperature=0.7, response_length=6))
    for row, prompt in enumerate(asked):
        ids, expected = torch.tensor([Letters(8).encode(prompt)]), 0.0
        response = rollout.ids[row, -rollout.response_mask.shape[1]:][rollout.response_mask[row].bool()]
        for token in response:
            expected += torch.log_softmax(model(ids)[0, -1] / 0.7, -1)[token].item()
            ids = torch.cat([ids, token.view(1, 1)], 1)
        assert rollout.logprobs[row].sum().item() == pytest.approx(expected, abs=1e-5)
        assert bool(rollout.stopped[row]) == (response[-1].item() == 7)
        assert texts[row] == Letters(8).decode([i for i in response.tolist() if i != 7])


def all_responses(V, R):
    """Return every response of at most R tokens over V ids, the last of which stops it."""
    return [r for n in range(1, R + 1) for r in itertools.product(range(V), repeat=n)
            if V - 1 not in r[:-1] and (r[-1] == V - 1 or n == R)]


def distribution(model, prompt, V, R):
    """Return (responses, their exact log-probabilities) after a prompt."""
    responses = [list(r) for r in all_responses(V, R)]
    with torch.no_grad():
        return responses, rlhf.sequence_logprobs(model, *rlhf.pack([prompt] * len(responses), responses, 0))


def test_the_probabilities_of_all_responses_sum_to_one():
    """40 responses over 4 tokens, cut at the stop token or at length 3."""
    responses, logprobs = distribution(toy(4, sharp=30), [0, 1], 4, 3)
    assert len(responses) == 40 and logprobs.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_padding_changes_no_score_and_no_gradient(tmp_path):
    """More padding on either side, garbage in it, and another order of rows leave losses and gradients as they were."""
    sample, stored = rlhf.sample_responses, toy(sharp=10).double().state_dict()

    def wider(*args, **named):
        rollout, texts = sample(*args, **named)
        ids = torch.where(rollout.mask > 0, rollout.ids, 3)
        ids = torch.cat([torch.full((len(ids), 3), 5), ids, torch.full((len(ids), 2), 2)], 1)
        order = torch.arange(len(texts)).flip(0)
        fields = [x if x.dim() == 1 else F.pad(x, (0, 2), value=9.0) for x in rollout]
        rollout = rlhf.Rollout(*fields)._replace(ids=ids, mask=F.pad(rollout.mask, (3, 2)),
                                                 response_mask=F.pad(rollout.response_mask, (0, 2)))
        return rlhf.Rollout(*(x[order] for x in rollout)), [texts[i] for i in order]

    results = []
    for patched in (sample, wider):
        model = toy(sharp=10).double()
        model.load_state_dict(stored)
        with mock.patch.object(rlhf, "sample_responses", patched):
            results.append(first_update(model, tmp_path))
    assert results[1][2]["loss"] == pytest.approx(results[0][2]["loss"], abs=1e-6)
    assert results[1][1].ids.shape[1] == results[0][1].ids.shape[1] + 5
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(results[0][0], results[1][0]))


def test_a_reward_model_takes_any_kind_of_mask():
    """Whole numbers, truth values and floats say the same."""
    model, ids = RewardModel(toy(), "likelihood"), torch.tensor([[0, 0, 3, 4, 5], [2, 3, 4, 5, 6]])
    with torch.no_grad():
        scores = [model(ids, (ids > 0).to(dtype), 2) for dtype in (torch.long, torch.bool, torch.float32)]
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2]) and scores[0][0] != scores[0][1]


@pytest.mark.parametrize("head", rlhf.HEADS)
def test_a_reward_models_score_ignores_padding_and_batch(head):
    """Padding left, right or none, alone or in a batch: the same score; the last real token decides."""
    torch.manual_seed(0)
    model = RewardModel(toy(), head)
    alone = model(torch.tensor([[1, 2, 3]]))
    ids = torch.tensor([[1, 2, 3, 0, 0], [0, 0, 1, 2, 3], [6, 5, 4, 3, 2]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    scores = model(ids, mask)
    answers, real, R = rlhf.pack([[4, 1], [1], [5, 6, 1]], [[2, 3]] * 3, 0)
    assert torch.allclose(model(answers, real, R)[1:2], model(torch.tensor([[1, 2, 3]]), None, 2), atol=1e-6)
    assert torch.allclose(scores[:2], alone.expand(2), atol=1e-6) and abs(scores[2] - alone) > 1e-3
    assert not torch.allclose(model(torch.tensor([[1, 2, 3, 0]])), alone, atol=1e-3)


def test_the_mlp_head_has_the_two_layers_of_the_notes():
    """C x C, a nonlinearity, and C x 1 on the last state."""
    model, ids = RewardModel(toy(), "mlp"), torch.tensor([[1, 2, 3]])
    state = model.gpt.hidden(ids)[:, -1]
    first, _, second = model.head
    assert [tuple(layer.weight.shape) for layer in (first, second)] == [(16, 16), (1, 16)]
    assert torch.allclose(model(ids), second(F.gelu(first(state)))[:, 0], atol=1e-6)


def test_the_likelihood_head_reads_the_responses_log_probability():
    """With all weights on that input the score is the sum over the response's tokens, and over those alone."""
    model = RewardModel(toy(sharp=10), "likelihood")
    ids, mask, R = rlhf.pack([[4, 1, 3], [1]], [[2, 3], [5, 6, 7]], 0)
    with torch.no_grad():
        model.head.weight.zero_()[0, -1] = 1
        found = [sum(torch.log_softmax(model.gpt(torch.tensor([p + r]))[0], -1)[len(p) + i - 1, r[i]] for i in range(len(r)))
                 for p, r in (([4, 1, 3], [2, 3]), ([1], [5, 6, 7]))]
        assert torch.allclose(model(ids, mask, R), torch.stack(found), atol=1e-5)


@pytest.mark.parametrize("head", rlhf.HEADS)
def test_pairs_as_padded_rows_are_as_each_answer_alone(head):
    """Scores, log-probabilities and gradients of B pairs as 2B rows equal those of one unpadded row at a time."""
    torch.manual_seed(0)
    draw = lambda n: torch.randint(7, (n,)).tolist()  # noqa: E731
    rows = [Pair(draw(3 + i), draw(2 + i % 3) + [7], draw(5 - i % 4) + [7], {}) for i in range(5)]
    model = RewardModel(toy(sharp=10), head).double()
    weights, results = torch.tensor([[1.0], [-2.0], [0.5], [-0.3]]).double(), []
    for alone in (False, True):
        model.zero_grad()
        if alone:
            each = [(torch.tensor([row.prompt + answer]), None, len(answer)) for side in (1, 2) for row in rows
                    for answer in (row[side],)]
            scores = torch.cat([model(*one) for one in each])
            logprobs = torch.stack([gpt.token_logprobs(model.gpt(ids), ids)[0, -R:].double().sum() for ids, _, R in each])
        else:
            (order, *packed), = rlhf.pair_batches(rows, 1, 0, "cpu")
            back = torch.tensor([order.index(i) for i in range(5)])
            back = torch.cat([back, back + 5])
            scores, logprobs = model(*packed)[back], rlhf.sequence_logprobs(model.gpt, *packed)[back]
        found = torch.cat([scores.view(2, 5), logprobs.view(2, 5)])
        (found * weights).sum().backward()
        results.append((found, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(results[0][1], results[1][1]))


def test_the_first_update_is_reinforce(tmp_path):
    """At the first pass every ratio is 1 to the bit, nothing is clipped, and the gradient is -sum(A grad logp) / n.

    A model left in training mode with dropout must pass too: training a policy switches it off."""
    model = toy(drop_rate=0.1).double().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients, rollout, row = first_update(model, tmp_path, accumulate=2, vf_coef=0.0, kl_coef=0.1)
    assert row["policy/approxkl"] == row["policy/clipfrac"] == 0 and row["val/ratio"] == 1
    model.load_state_dict(before)
    mask = rollout.response_mask
    rewards = rlhf.token_rewards(rollout.scores, rollout.logprobs, rollout.ref_logprobs, mask, 0.1)
    advantages = rlhf.whiten(rlhf.gae(rewards, rollout.values, mask)[0], mask)
    policy, R = Policy(model.eval()), mask.shape[1]
    policy.zero_grad()
    logits, _ = policy(rollout.ids, rollout.mask, R)
    new = torch.log_softmax(logits, -1).gather(2, rollout.ids[:, -R:, None]).squeeze(2)
    (-(advantages * new).sum() / mask.sum()).backward()
    for ours, parameter in zip(gradients, policy.gpt.parameters()):
        assert torch.allclose(ours, parameter.grad, atol=1e-9)


# --- toys small enough to know the optimum: pi* = pi_ref exp(r / beta) / Z


def optimum(model, prompt, V, R, reward, beta):
    """Return (log of the optimal policy over all responses, its own value beta log Z, the rewards)."""
    responses, ref = distribution(model, prompt, V, R)
    texts = [Letters(V).decode([i for i in r if i != V - 1]) for r in responses]
    rewards = torch.tensor(reward([""] * len(texts), texts))
    logits = ref + rewards / beta
    return torch.log_softmax(logits, 0), beta * torch.logsumexp(logits, 0).item(), rewards


def distance(model, prompt, V, R, best):
    """Return KL(policy || optimum) over all responses, in nats."""
    _, logprobs = distribution(model, prompt, V, R)
    return (logprobs.exp() * (logprobs - best)).sum().item()


def letter_values(prompts, responses):
    """Return a fixed reward for each text, between -1 and 1, that depends on its letters and their places."""
    return [math.sin(sum((ord(c) - 96) * (3 * i + 2) for i, c in enumerate(r)) + 0.5 * len(r)) for r in responses]


SMALL = dict(emb_dim=16, n_layers=1, context_length=8)
LEARNING = dict(batch_size=256, group=256, learning_rate=1e-2, weight_decay=0.0)  # all responses to one prompt


def test_ppo_finds_the_optimum_of_a_bandit(tmp_path):
    """One token of 8: PPO ends within 0.005 nats of pi_ref exp(r / beta)."""
    model, beta = toy(8, sharp=10, **SMALL), 0.25
    best, _, rewards = optimum(model, [0], 8, 1, letter_values, beta)
    assert distance(model, [0], 8, 1, best) > 0.7
    learn(model, ["a"], letter_values, tmp_path, max_steps=60, response_length=1, kl_coef=beta, ppo_epochs=2, **LEARNING)
    assert distance(model, [0], 8, 1, best) < 0.005
    reached = (distribution(model, [0], 8, 1)[1].exp() * rewards).sum().item()
    assert reached == pytest.approx((best.exp() * rewards).sum().item(), abs=0.02)


def sequence_toy(folder, steps):
    """Return (distance at the start, at the end, value reached - optimal value) of PPO on all responses of 3 letters."""
    model, beta = toy(4, sharp=10, **SMALL), 0.5
    best, value, rewards = optimum(model, [0, 1], 4, 3, letter_values, beta)
    _, ref = distribution(model, [0, 1], 4, 3)
    before = distance(model, [0, 1], 4, 3, best)
    learn(model, ["ab"], letter_values, folder, max_steps=steps, response_length=3, kl_coef=beta, ppo_epochs=4,
          **LEARNING)
    _, now = distribution(model, [0, 1], 4, 3)
    reached = (now.exp() * (rewards - beta * (now - ref))).sum().item()
    return before, distance(model, [0, 1], 4, 3, best), reached - value


def test_ppo_finds_the_optimum_over_sequences(tmp_path):
    """40 responses of unequal length: within 0.05 nats of the optimum, and its value within 0.02 of beta log Z."""
    before, after, missing = sequence_toy(tmp_path, 60)
    assert before > 0.5 and after < 0.05 and abs(missing) < 0.02


def flipped(scores, logprobs, ref_logprobs, mask, kl_coef):
    """token_rewards with the sign of the KL turned round."""
    return rlhf_token_rewards(scores, logprobs, ref_logprobs, mask, -kl_coef)


def with_k3(scores, logprobs, ref_logprobs, mask, kl_coef):
    """token_rewards with k3 = exp(ref - logp) - 1 - (ref - logp) in place of k1."""
    ratio = ref_logprobs - logprobs
    return rlhf_token_rewards(scores, (ratio.exp() - 1 - ratio), torch.zeros_like(ratio), mask, kl_coef)


rlhf_token_rewards = rlhf.token_rewards


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [flipped, with_k3])
def test_the_toy_tells_a_wrong_kl_from_the_right_one(wrong, monkeypatch, tmp_path):
    """The control of the test above: a flipped sign, or k3 as a reward, ends far from the optimum."""
    monkeypatch.setattr(rlhf, "token_rewards", wrong)
    assert sequence_toy(tmp_path, 30)[1] > 0.3


def even_share(prompts, responses):
    """Return 4 x the share of letters with an even number in each response, at most 16 letters."""
    return [4 * sum(ord(c) % 2 == 1 for c in r) / max(1, len(r)) for r in responses]


def longer_toy(folder, stage="ppo", reward=even_share, steps=32, **given):
    """Return (mean score of the first 3 and of the last 3 steps) on responses of 16 tokens from a vocabulary of 32."""
    model = toy(32, context_length=24, emb_dim=32, sharp=5)
    texts = ["".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=3 + i % 6)) for i in range(32)]
    rows = learn(model, texts, reward, folder, stage, max_steps=steps, **{
        "response_length": 16, "kl_coef": 0.02, "ppo_epochs": 4, "learning_rate": 2e-3, **given})
    scores = [row["objective/scores"] for row in rows if "objective/scores" in row]
    return sum(scores[:3]) / 3, sum(scores[-3:]) / 3


@pytest.mark.slow
def test_ppo_and_grpo_learn_a_property_of_whole_responses(tmp_path):
    """Even letters: both raise the score by more than 0.8 of 4; a shuffled reward, the control, does not."""
    before, after = longer_toy(tmp_path)
    assert after - before > 0.8
    rng = random.Random(0)
    shuffled = longer_toy(tmp_path, reward=lambda p, r: rng.sample(even_share(p, r), len(r)))
    assert shuffled[1] - before < 0.4
    before, after = longer_toy(tmp_path, "grpo", steps=40, batch_size=64, group=8, ppo_epochs=1)
    assert after - before > 0.8


def test_the_ptx_loss_is_that_of_the_preferred_answers_whatever_the_micro_batches():
    """ptx_coef times the mean over all their tokens, with its gradient, in one micro-batch or in three."""
    rows = [([1, 2, 3], [4, 7]), ([5], [6, 2, 1, 7]), ([2, 2], [7]), ([3, 1, 4, 1], [5, 6, 7])]
    asked, found = [Pair(ids, answer, [], {"chosen": "x"}) for ids, answer in rows], []
    for count in (0, 1, 3):
        model = toy(sharp=10).double()
        if count:
            total, config = 0.0, options(ptx_coef=0.7, accumulate=count)
            for loss in rlhf.ptx_losses(model, asked, config, rlhf.contextlib.nullcontext()):
                loss.backward()
                total += loss.item()
        else:
            scores = [torch.log_softmax(model(torch.tensor([ids + answer]))[0].double(), -1)[len(ids) + i - 1, token]
                      for ids, answer in rows for i, token in enumerate(answer)]
            loss = -0.7 * torch.stack(scores).mean()
            loss.backward()
            total = loss.item()
        found.append((total, torch.cat([p.grad.flatten() for p in model.parameters()])))
    for total, gradient in found[1:]:
        assert total == pytest.approx(found[0][0], rel=1e-6) and torch.allclose(gradient, found[0][1], atol=1e-6)
    nothing = [row._replace(text={"chosen": rlhf.NO_ANSWER}) for row in asked]
    assert list(rlhf.ptx_losses(model, nothing, options(ptx_coef=0.7), None)) == []
    assert list(rlhf.ptx_losses(model, asked, options(ptx_coef=0.0), None)) == []


def test_an_update_adds_the_gradient_of_the_ptx_loss(tmp_path):
    """The gradient with --ptx_coef minus that without it is the one of `ptx_losses` alone."""
    def gradient(coef):
        found, _, row = first_update(toy(sharp=10), tmp_path, ["ab"] * 4, chosen="de", ptx_coef=coef, accumulate=2)
        return torch.cat([one.flatten() for one in found]), row

    (with_it, row), (without, _) = gradient(0.5), gradient(0.0)
    policy, tokenizer = Policy(toy(sharp=10)), Letters(8)
    pair = rlhf.encode_pair({"prompt": "ab", "chosen": "de", "rejected": ""}, tokenizer, "plain")
    loss, = rlhf.ptx_losses(policy.gpt, [pair], options(ptx_coef=0.5, response_length=6), rlhf.contextlib.nullcontext())
    loss.backward()
    alone = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in policy.parameters()])
    assert alone.norm() > 0.01 and torch.allclose(with_it - without, alone, atol=1e-5)
    assert row["loss/ptx"] == pytest.approx(loss.item(), abs=1e-6)


# --- reward models, DPO, GRPO


def test_a_reward_model_recovers_a_hidden_score():
    """Pairs ranked by a hidden linear score of their tokens: held-out accuracy and correlation above 0.9."""
    torch.manual_seed(0)
    worth, model = torch.randn(12), RewardModel(toy(12, emb_dim=32))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def batch(n):
        ids = torch.randint(12, (n, 2, 6))
        true = worth[ids].sum(2)
        better = true.argmax(1, keepdim=True)
        return (ids.gather(1, at[:, :, None].expand(n, 1, 6))[:, 0] for at in (better, 1 - better))

    for step in range(80):
        model.zero_grad()
        rlhf.reward_loss(*(model(ids) for ids in batch(64))).backward()
        optimizer.step()
    with torch.no_grad():
        chosen, rejected = batch(400)
        assert (model(chosen) > model(rejected)).float().mean() > 0.9
        both = torch.stack([model(chosen), worth[chosen].sum(1)])
        assert torch.corrcoef(both)[0, 1] > 0.9


def test_normalized_scores_have_mean_0_and_deviation_1_and_the_old_ranking():
    """On the samples themselves exactly, on fresh ones of the same policy within chance; order and margins' signs stay."""
    policy, model = toy(8, sharp=10), RewardModel(toy(8, seed=3))
    first, fresh = (rollout_of(policy, ["ab"] * 300, seed, options(response_length=8))[0] for seed in (1, 2))
    with torch.no_grad():
        raw = model(first.ids, first.mask)
        model.normalize(raw)
        scaled, other = model(first.ids, first.mask), model(fresh.ids, fresh.mask)
    assert scaled.mean().item() == pytest.approx(0, abs=1e-4) and scaled.std().item() == pytest.approx(1, abs=1e-4)
    assert abs(other.mean().item()) < 3 / math.sqrt(300) * other.std().item() and other.std().item() == pytest.approx(1, abs=0.15)
    assert torch.equal(raw.argsort(stable=True), scaled.argsort(stable=True))
    with pytest.raises(ValueError, match="same score"):
        model.normalize(torch.ones(5))


def test_dpo_implies_the_true_reward_on_a_bandit():
    """Trained on all Bradley-Terry comparisons of 6 arms, beta log(pi / ref) is the reward up to a constant."""
    torch.manual_seed(0)
    reward, beta = torch.randn(6), 0.5
    ref = torch.log_softmax(torch.randn(6), 0)
    logits = ref.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for step in range(200):
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
        logp, loss = torch.log_softmax(logits, 0), 0.0
        for i, j in itertools.combinations(range(6), 2):
            wrong = torch.sigmoid(reward[j] - reward[i]).item()
            loss = loss + rlhf.dpo_loss(logp[i : i + 1], logp[j : j + 1], ref[i : i + 1], ref[j : j + 1], beta, wrong)
        loss.backward()
        optimizer.step()
    implied = beta * (torch.log_softmax(logits, 0) - ref).detach()
    assert (implied - implied.mean() - reward + reward.mean()).abs().max() < 0.04
    best = torch.log_softmax(ref + reward / beta, 0)
    assert F.kl_div(best, torch.log_softmax(logits.detach(), 0), log_target=True, reduction="sum").item() < 0.002


def mixed(prompts, responses):
    """Return equal scores for the responses to "ab", unequal ones for those to other prompts."""
    return [1.0 if prompt == "ab" else len(text) + 0.1 * ord((text or "a")[0]) for prompt, text in zip(prompts, responses)]


@pytest.mark.parametrize("advantage", ["group", "group-mean", "rloo"])
def test_groups_of_equal_rewards_are_left_out_and_counted(advantage, tmp_path):
    """The gradient is that of the other group alone, its KL too: by hand -A grad logp per token, plus the k2 term where
    the KL is part of the loss. (TRL keeps the KL of such groups, see its pull requests 5640 and 7068.)"""
    model = toy(sharp=10).double()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = toy(sharp=10, seed=5).double()  # another reference, so that there is a KL
    with mock.patch.object(rlhf, "reference_of", lambda model: lambda: rlhf.contextlib.nullcontext(other)):
        gradients, rollout, row = first_update(model, tmp_path, ["ab", "c"], mixed, stage="grpo", batch_size=8, group=4,
                                               kl_coef=0.3, advantage=advantage)
    assert row["val/equal_groups"] == 1 and row["val/ratio"] == pytest.approx(1)
    model.load_state_dict(start)
    model.zero_grad()
    asked = [i for i in range(8) if len(set(rollout.scores[i // 4 * 4 : i // 4 * 4 + 4].tolist())) > 1]
    scores, loss, tokens = rollout.scores[asked], 0.0, rollout.response_mask[asked].sum()
    if advantage == "rloo":
        scores = scores - 0.3 * (rollout.logprobs - rollout.ref_logprobs)[asked].sum(1)
    for number, i in enumerate(asked):
        others = [scores[j] for j in range(4) if j != number]
        weight = scores[number] - (sum(others) / 3 if advantage == "rloo" else scores.mean())
        weight = weight / (scores.std() + 1e-4) if advantage == "group" else weight
        P = rollout.ids.shape[1] - rollout.response_mask.shape[1]
        n, prompt = int(rollout.response_mask[i].sum()), rollout.ids[i, :P][rollout.mask[i, :P] > 0]
        ids = torch.cat([prompt, rollout.ids[i, P : P + n]])[None]
        new = torch.log_softmax(model(ids), -1)[0, :-1].gather(1, ids[0, 1:, None])[-n:, 0]
        loss = loss - (weight * new).sum()
        if advantage != "rloo":
            loss = loss + 0.3 * 0.5 * ((new - rollout.ref_logprobs[i, :n]) ** 2).sum()
    (loss / tokens).backward()
    for ours, parameter in zip(gradients, model.parameters()):
        assert torch.allclose(ours, parameter.grad, rtol=1e-4, atol=1e-5)


def test_micro_batches_give_the_gradient_of_the_whole(tmp_path):
    """Responses of unequal length in 1, 2 and 4 micro-batches: the same loss, gradients and metrics."""
    results = []
    for count in (1, 2, 4):
        gradients, _, row = first_update(toy(sharp=10).double(), tmp_path, accumulate=count, response_length=7)
        results.append((row["loss"], row["loss/value"], gradients))
    for loss, value_loss, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0]) and value_loss == pytest.approx(results[0][1])
        assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(gradients, results[0][2]))


def test_the_implied_reward_is_the_ratio_of_both_models():
    """Margins of beta log(policy / start), token by token from the logits; none where the policy is its start."""
    policy, start = toy(sharp=10, seed=1), toy(sharp=10)
    rows = [Pair([1, 2], [3, 7], [4, 5, 7], {}), Pair([6], [2, 2, 1, 7], [7], {})]

    def said(model, p, r):
        logprobs = torch.log_softmax(model(torch.tensor([p + r]))[0], -1)
        return sum(logprobs[len(p) + i - 1, token].item() for i, token in enumerate(r))

    def margin(model, row):
        _, *packed = next(rlhf.pair_batches([row], 1, 0, "cpu"))
        return rlhf.pair_loss(model, rlhf.reference_of(start), *packed, options(beta=1.0))[1]["rewards/margins"]

    ratio = lambda p, r: said(policy, p, r) - said(start, p, r)  # noqa: E731
    expected = [ratio(row.prompt, row.chosen) - ratio(row.prompt, row.rejected) for row in rows]
    assert [margin(policy, row) for row in rows] == pytest.approx(expected, abs=1e-4)
    assert max(map(abs, expected)) > 0.1 and max(abs(margin(start, row)) for row in rows) < 1e-5


# --- runs


WORDS = "cat dog sun map red box hen pig jam ant owl fox bee cup pen hat".split()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder of its own, the current one, with a small model and 80 pairs in which "please" is preferred."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "failing", "bad"):  # modules of an earlier test's folder
        sys.modules.pop(name, None)
    rows = [{"prompt": f"say {a} {b}", "response_1": f"{a} please", "response_2": f"no {b}", "preferred": 1}
            for a, b in itertools.islice(itertools.permutations(WORDS, 2), 80)]
    rows = [row if i % 2 else {**row, "response_1": row["response_2"], "response_2": row["response_1"], "preferred": 2}
            for i, row in enumerate(rows)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "mine.py").write_text("def length(prompts, responses):\n    return [float(len(r)) for r in responses]\n")
    tokenizer = CharTokenizer.train(["abcdefghijklmnopqrstuvwxyz \n>"], specials=True)
    torch.manual_seed(0)
    model = gpt.GPTModel(gpt.GPTConfig(tokenizer.vocab_size, 48, 16, 2, 2, drop_rate=0.0, tie_weights=True))
    gpt.save_checkpoint("start.safetensors", model, tokenizer, template="plain")
    return tmp_path


SMALL_RUN = {"data": "pairs.json", "init": "start.safetensors", "response_length": 8, "batch_size": 8, "eval_prompts": 4,
             "test_prompts": 6, "eval_every": 2, "log_every": 1, "warmup_steps": 1}


def argv(command, *flags):
    """Return a command line: small sizes, as far as the command reads them, and these flags."""
    read = rlhf.COMMANDS[command].flags.split()
    small = [word for name, value in SMALL_RUN.items() if name in read for word in (f"--{name}", str(value))]
    return [command, *small, *map(str, flags)]


def run(command, *flags, status=0):
    """Run rlhf.main with small sizes and return the summary of its folder, or None after a failure."""
    assert rlhf.main(argv(command, *flags)) == status
    path = Path(f"out/{command}/summary.json")
    return json.loads(path.read_text(encoding="utf-8")) if status == 0 and path.exists() else None


def logged(command):
    """Return the rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in open(f"out/{command}/metrics.jsonl", encoding="utf-8")]


def test_reward_model_and_ppo_run_from_files(folder, capsys):
    """The reward model learns "please", its file scores text, and PPO against it writes all figures that are promised."""
    summary = run("reward", "--max_steps", 60, "--learning_rate", 3e-3)
    assert summary["accuracy"] == 1.0 and summary["val_loss"] < 0.3 and summary["accuracy_noise_free"] is None
    for key in ("length_baseline_accuracy", "naive_bayes_accuracy", "margin"):
        assert isinstance(summary[key], float)
    assert summary["naive_bayes_accuracy"] == 1.0 and len(summary["accuracy_interval"]) == 2
    model, tokenizer, info = rlhf.load_reward_model("out/reward/model.safetensors")
    score = rlhf.model_reward(model, tokenizer, info["template"])
    polite, rude = score(["say cat dog"] * 2, ["cat please", "no dog"])
    assert polite > rude + 0.5
    with pytest.raises(ValueError, match="reward model"):
        gpt.load_checkpoint("out/reward/model.safetensors")
    summary = run("ppo", "--max_steps", 3)
    for key in ("reward_before", "reward_after", "kl", "episodes_per_second"):
        assert math.isfinite(summary[key])
    assert summary["gold_before"] is None and summary["kl"] >= 0 and summary["episodes"] == 24
    assert {"objective/kl", "objective/scores", "objective/entropy", "policy/clipfrac", "policy/approxkl", "eps",
            "val/explained_variance", "response_length", "val_reward"} <= set().union(*logged("ppo"))
    assert [path.name for path in Path("out/ppo").glob("*.svg")] == ["curves.svg"]
    assert "->" in Path("out/ppo/samples.txt").read_text(encoding="utf-8")
    capsys.readouterr()
    assert run("evaluate", "--checkpoint", "out/ppo/model.safetensors") is None
    table, notes = capsys.readouterr()
    table = table.splitlines()
    assert "split_seed" not in notes and "kl" in table[0] and table[1].startswith("start") and table[2].startswith("ppo")
    written = json.loads(Path("out/ppo/evaluation.json").read_text(encoding="utf-8"))
    assert written["prompts"] == 6 and set(written["rows"]["ppo"]) == {"reward", "kl", "length", "wins"}
    run("evaluate", "--checkpoint", "out/ppo/model.safetensors", "--split_seed", 5)
    assert "was trained with --split_seed 1234, perhaps on this data" in capsys.readouterr().err


def test_everything_in_a_row(folder, capsys):
    """`all` makes a reward model, a policy and the table; continued, it does nothing twice."""
    flags = ("--max_steps", 1)
    run("all", *flags)
    for file in ("reward/model.safetensors", "ppo/summary.json", "ppo/evaluation.json"):
        assert Path("out", file).exists()
    command = json.loads(Path("out/ppo/summary.json").read_text())
    assert command["steps"] == 1 and command["config"]["batch_size"] == 64 and "rlhf.py all" in command["command"]
    capsys.readouterr()
    run("all", *flags, "--resume")
    assert capsys.readouterr().err.count("nothing to do") == 2


@pytest.mark.parametrize("head", rlhf.HEADS)
@pytest.mark.parametrize("tied", [True, False])
def test_reward_models_come_back_from_their_file(folder, head, tied):
    """The same scores from the file; a head tied to the embeddings is stored once; a foreign kind of head is refused."""
    tokenizer = gpt.load_checkpoint("start.safetensors")[1]
    model = RewardModel(gpt.GPTModel(gpt.GPTConfig(tokenizer.vocab_size, 48, 16, 2, 2, tie_weights=tied)), head).eval()
    model.normalize(torch.tensor([1.0, 2.0, 4.0]))
    gpt.save_checkpoint("reward.safetensors", model, tokenizer, kind="reward", head=head, template="plain")
    again, _, info = rlhf.load_reward_model("reward.safetensors")
    ids = torch.randint(20, (3, 9))
    assert torch.equal(again(ids), model(ids)) and info["head"] == head
    assert ("gpt.out_head.weight" in gpt.read_safetensors("reward.safetensors")[0]) == (not tied)
    gpt.save_checkpoint("other.safetensors", model, tokenizer, kind="reward", head="mean", template="plain")
    with pytest.raises(ValueError, match="python rlhf.py reward"):
        rlhf.load_reward_model("other.safetensors")


def test_a_reward_model_of_the_first_edition_is_read(folder):
    """Its file says `made` for `info`; a tied head is not in it."""
    model, tokenizer, _ = gpt.load_checkpoint("start.safetensors")
    reward = RewardModel(model, "likelihood").eval()
    tensors = {name: tensor for name, tensor in reward.state_dict().items() if not name.startswith("gpt.out_head.")}
    made = {"kind": "reward", "head": "likelihood", "stage": "reward", "step": 1, "template": "plain", "blind": False}
    gpt.write_safetensors("old.safetensors", tensors, {
        "kind": "reward", "config": json.dumps(vars(model.config)), "made": json.dumps(made),
        "tokenizer": json.dumps(tokenizer.to_dict())})
    again, _, info = rlhf.load_reward_model("old.safetensors")
    ids = torch.randint(20, (3, 9))
    assert torch.equal(again(ids), reward(ids)) and info["template"] == "plain"


def test_preferences_by_coin_teach_nothing(folder):
    """The control: a file in which a coin decides. On held-out pairs the reward model is right half of the time."""
    rng = random.Random(0)
    pairs = [{"prompt": f"say {a} {b}", "response_1": f"{a} please", "response_2": f"no {b}", "preferred": rng.choice((1, 2))}
             for a, b in itertools.permutations(WORDS, 2)]
    Path("coins.json").write_text(json.dumps(pairs), encoding="utf-8")
    summary = run("reward", "--data", "coins.json", "--max_steps", 30, "--learning_rate", 3e-3)
    assert abs(summary["accuracy"] - 0.5) < 0.3 and summary["test_loss"] > 0.6


def weights(path):
    """Return the sha256 of all weights in a state.pt, and its KL coefficient."""
    state = train.read_state(path)
    digest = hashlib.sha256()
    for name in sorted(state["model"]):
        digest.update(name.encode() + gpt.tensor_bytes(state["model"][name].contiguous()))
    return digest.hexdigest(), state["progress"]["extra"]["kl_coef"]


def test_a_reward_that_fails_stops_the_run_and_resuming_ends_with_the_same_bits(folder, capsys):
    """Policy, value head, optimizer, KL coefficient, random numbers and data position: as if nothing had happened."""
    (folder / "failing.py").write_text(
        "import os\nfrom mine import length\ncalls = []\n\ndef reward(prompts, responses):\n    calls.append(1)\n"
        "    if os.path.exists('broken') and len(calls) == 5:\n        raise OSError('the server is away')\n"
        "    return length(prompts, responses)\n")
    flags = ("--reward", "failing:reward", "--max_steps", 4, "--save_every", 1, "--kl_target", 0.001, "--kl_horizon", 20,
             "--learning_rate", 1e-2)
    Path("broken").touch()
    run("ppo", *flags, "--out_dir", "stopped", status=1)  # calls: the evaluation at 0, steps 1 and 2, evaluation, step 3
    assert "OSError: the server is away" in capsys.readouterr().err
    assert train.read_state("stopped/state.pt")["progress"]["step"] == 2
    Path("broken").unlink()
    run("ppo", *flags, "--out_dir", "stopped", "--resume")
    run("ppo", *flags, "--out_dir", "whole")
    assert weights("stopped/state.pt") == weights("whole/state.pt") and weights("whole/state.pt")[1] != 0.2
    files = [gpt.read_safetensors(f"{name}/model.safetensors")[1]["data_sha256"] for name in ("stopped", "whole")]
    assert files[0] == files[1]
    assert rlhf.main(argv("ppo", *flags, "--out_dir", "whole", "--resume")) == 0
    assert "nothing to do" in capsys.readouterr().err


def test_another_reward_model_is_another_run(folder, capsys):
    """A run is not continued against a reward model that was trained anew since."""
    run("reward", "--max_steps", 2)
    flags = ("--max_steps", 2, "--save_every", 1)
    run("ppo", *flags)
    Path("out/ppo/summary.json").unlink()
    run("reward", "--max_steps", 3, "--fresh")
    run("ppo", *flags, "--resume", status=1)
    assert "other data" in capsys.readouterr().err


def test_a_file_is_divided_alike_whatever_the_seed(folder):
    """So no policy is tested on prompts that its reward model learned from; --split_seed divides otherwise."""
    divided = [[{pair["prompt"] for pair in part} for part in rlhf.load_pairs(Config(
        data="pairs.json", seed=seed, split_seed=split))] for seed, split in ((1, 1234), (2, 1234), (1, 1))]
    assert divided[0] == divided[1] != divided[2]
    assert all(not a & b for parts in divided for a, b in itertools.combinations(parts, 2))
    prompts = [{pair["prompt"] for pair in part} for part in rlhf.load_pairs(Config(data="pairs.json"), answers=False)]
    assert prompts == divided[0]


def test_with_lora_the_reference_is_the_model_with_its_adapters_off(folder):
    """One copy of the weights: the reference is the same object; switched off it is the start to the bit after training."""
    model, _, _ = gpt.load_checkpoint("start.safetensors")
    ids = torch.randint(20, (2, 10))
    with torch.no_grad():
        before = model(ids)
    apply_lora(model, 2)
    reference = rlhf.reference_of(model)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_()
    with torch.no_grad(), reference() as start:
        assert start is model and torch.equal(start(ids), before)
    assert not torch.allclose(model(ids), before)
    with rlhf.reference_of(model)() as frozen:  # adapters that were trained before are part of the start
        assert frozen is not model and torch.equal(frozen(ids), model(ids))


def test_a_lora_run_leaves_an_adapter_and_a_merged_model(folder):
    """Only adapters and value head train; model.safetensors computes what base and adapter/ compute together."""
    summary = run("ppo", "--reward", "mine:length", "--max_steps", 2, "--lora_rank", 2, "--learning_rate", 1e-2)
    base, _, _ = gpt.load_checkpoint("start.safetensors")
    full = sum(p.numel() for p in base.parameters())
    assert summary["trainable_parameters"] < full / 2
    merged, ids = gpt.load_checkpoint("out/ppo/model.safetensors")[0], torch.randint(20, (2, 10))
    adapted = load_lora(base, "out/ppo/adapter")
    assert torch.allclose(merged(ids), adapted(ids), atol=1e-5)


def test_ppo_and_grpo_take_prompts_without_answers(folder):
    """A file of prompts alone and a Python reward; the ptx loss has nothing to write then, and DPO refuses the file."""
    prompts = [{"prompt": f"say {a} {b}"} for a, b in itertools.islice(itertools.permutations(WORDS, 2), 60)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")
    for command, flags in (("grpo", ("--group", 4)), ("ppo", ())):
        run(command, "--data", "prompts.jsonl", "--reward", "mine:length", "--max_steps", 1, *flags)
        assert not any("loss/ptx" in row for row in logged(command))
    run("dpo", "--data", "prompts.jsonl", status=1)
    run("ppo", "--reward", "mine:length", "--max_steps", 1, "--fresh")
    assert any("loss/ptx" in row for row in logged("ppo"))  # the control: pairs have answers


FILLERS = ["".join(letters) for letters in itertools.product("klmnpqrs", "eiou", "tvwz")]


@pytest.fixture
def questions(folder):
    """Return 96 questions, all of which "a" answers, in a file, and leave a start that says "a" or "b" by a coin."""
    rows = [{"instruction": word, "output": "a"} for word in FILLERS[:96]]
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model, tokenizer, _ = gpt.load_checkpoint("start.safetensors")
    optimizer, rng = torch.optim.AdamW(model.parameters(), lr=1e-2), random.Random(0)
    for _ in range(30):
        some = [rlhf.encode_pair({**row, "chosen": rng.choice("ab"), "rejected": ""}, tokenizer, "plain")
                for row in rng.sample(rows, 16)]
        optimizer.zero_grad()
        packed = rlhf.pack([row.prompt for row in some], [row.chosen for row in some], 0)
        (-rlhf.sequence_logprobs(model, *packed).mean()).backward()
        optimizer.step()
    gpt.save_checkpoint("coin.safetensors", model, tokenizer, template="plain")
    return rows


EXACT = ("--data", "questions.jsonl", "--reward", "exact", "--temperature", 1.0, "--response_length", 4, "--test_prompts", 0)


def test_a_reward_for_right_answers_alone_teaches_them(questions, capsys):
    """Without `chosen` no answer is ever shown, so there is no ptx loss; greedy, sampled accuracy and pass@8 of both."""
    summary = run("grpo", *EXACT, "--init", "coin.safetensors", "--max_steps", 24, "--learning_rate", 1e-2, "--batch_size", 64,
                  "--group", 8, "--kl_coef", 0.01, "--eval_every", 12)
    assert 0.3 < summary["sampled_before"] < 0.7 and summary["pass_at_8_before"] > 0.9
    assert summary["sampled_after"] > 0.9 and summary["exact_match_after"] == summary["pass_at_8_after"] == 1
    assert not any("loss/ptx" in row for row in logged("grpo"))
    counts = [row["val/equal_groups"] for row in logged("grpo") if "val/equal_groups" in row]
    assert counts[0] < 4 and counts[-1] > 4  # of 8: what is always right teaches nothing more
    capsys.readouterr()
    run("evaluate", *EXACT, "--init", "coin.safetensors", "--checkpoint", "out/grpo/model.safetensors")
    assert "pass@8" in capsys.readouterr().out.splitlines()[0]
    rows = json.loads(Path("out/grpo/evaluation.json").read_text(encoding="utf-8"))["rows"]
    assert set(rows["start"]) == {"reward", "kl", "exact", "sampled", "pass@8", "length"}
    assert rows["grpo"]["sampled"][0] == pytest.approx(summary["sampled_after"])


def test_a_reward_for_right_answers_that_nobody_earns_is_refused(questions, capsys):
    """None right at the start, or all right, or no right answers known: one line, and nothing stays."""
    rows = [{"instruction": row["instruction"], "output": "cat"} for row in questions]
    Path("hard.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for flags, said in ((("--data", "hard.jsonl"), "all 4 rewards are 0 before the first step"),
                        (("--data", "pairs.json"), "`output` in each entry of --data pairs.json")):
        run("grpo", *EXACT, "--init", "coin.safetensors", *flags, "--group", 8, status=1)
        lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert len(lines) == 1 and said in lines[0], lines
    assert not Path("out/grpo").exists()


@pytest.mark.parametrize("advantage", ["group", "group-mean", "rloo"])
def test_one_prompt_whose_responses_all_earn_the_same_stays_as_it_is(advantage, tmp_path):
    """Public reports of NaN, or of drift by the KL alone, in TRL (3857, 5640): all groups are equal, and nothing moves."""
    model = toy(sharp=10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = learn(model, ["ab"], lambda prompts, responses: [1.0] * len(responses), tmp_path, "grpo", max_steps=3,
                 batch_size=4, group=4, response_length=4, advantage=advantage, eval_every=1)
    figures = [row for row in rows if "val/ratio" in row]
    assert all(math.isfinite(value) for row in figures for value in row.values())
    assert [row["val/equal_groups"] for row in figures] == [1, 1, 1] and "loss/value" not in figures[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_sparse_reward_may_begin_at_zero(folder, capsys):
    """0 for all responses of the start is a warning; another constant is an error, see the mistakes below."""
    (folder / "mine.py").write_text("def rare(prompts, responses):\n    return [float('zzzz' in r) for r in responses]\n")
    assert run("ppo", "--reward", "mine:rare", "--max_steps", 1)["reward_before"] == 0
    assert "warning: all 4 rewards are 0" in capsys.readouterr().err


# --- pairs that teach nothing, few prompts, few figures


def test_pairs_that_are_equal_after_truncation_are_dropped_and_counted(folder, capsys):
    """They differ in their first words and share a long end; where all do, there is nothing to train on."""
    rows = json.loads(Path("pairs.json").read_text(encoding="utf-8"))
    end = " and so on" * 6
    long = [{**row, "response_1": row["response_1"] + end, "response_2": row["response_2"] + end} for row in rows]
    Path("some.json").write_text(json.dumps(long[:20] + rows[20:]), encoding="utf-8")
    Path("all.json").write_text(json.dumps(long), encoding="utf-8")
    run("dpo", "--data", "some.json", "--max_steps", 1)
    dropped = [int(line.split()[0]) for line in capsys.readouterr().err.splitlines() if "equal answers" in line]
    assert 15 <= sum(dropped) <= 20  # those of the test part are prompts only
    run("dpo", "--data", "all.json", "--max_steps", 1, "--out_dir", "none", status=1)
    said = capsys.readouterr().err
    assert "equal answers within 48 tokens" in said and "--context_length" in said and not Path("none").exists()
    pair = {"prompt": "say", "chosen": "a", "rejected": "a"}
    with pytest.raises(ValueError, match="all 1 pairs"):
        rlhf.encode_pairs([pair], gpt.load_checkpoint("start.safetensors")[1], "plain", 48)


def test_a_reward_model_trains_with_one_validation_prompt(folder, monkeypatch, capsys):
    """20 prompts with 10 pairs each: one of them validates, so several responses to it set mean and deviation."""
    rows = [{"prompt": f"say {word}", "chosen": f"{word} please {i}".translate({48 + d: 97 + d for d in range(10)}),
             "rejected": f"no {word}"} for word in [*WORDS, "cow", "rat", "bat", "elk"] for i in range(10)]
    Path("few.json").write_text(json.dumps(rows), encoding="utf-8")
    assert len({pair["prompt"] for pair in rlhf.load_pairs(Config(data="few.json"))[1]}) == 1
    assert math.isfinite(run("reward", "--data", "few.json", "--max_steps", 2)["val_loss"])
    model, *_ = rlhf.load_reward_model("out/reward/model.safetensors")
    assert math.isfinite(model.gain.item())
    real = rlhf.sample_responses
    monkeypatch.setattr(rlhf, "sample_responses", lambda *args, **named: (real(*args, **named)[0], ["same"] * 64))
    capsys.readouterr()
    run("reward", "--data", "few.json", "--max_steps", 2, "--out_dir", "none", status=1)
    assert "only validation prompt" in capsys.readouterr().err and not Path("none").exists()


def test_the_table_is_written_before_the_judge_is_asked(folder, monkeypatch, capsys):
    """No server: an error, but everything that was sampled and scored is there. With one, its win rate is added."""
    run("ppo", "--reward", "mine:length", "--max_steps", 2, "--learning_rate", 1e-2, "--kl_coef", 0)
    flags = ("--reward", "mine:length", "--judge", "http://127.0.0.1:9/v1", "--judge_examples", 2)

    def away(*args, **named):
        raise OSError("no judge there")

    monkeypatch.setattr(finetune_sft, "ask_judge", away)
    capsys.readouterr()
    run("evaluate", *flags, status=1)
    out, err = capsys.readouterr()
    assert "ppo" in out and "no judge there" in err
    table = json.loads(Path("out/ppo/evaluation.json").read_text(encoding="utf-8"))
    assert set(table["rows"]["ppo"]) == {"reward", "kl", "length", "wins"} and len(table["samples"]) == 6
    asked = []

    def obey(ask, prompt, reference, first, second):
        asked.append((prompt, reference))
        return 1.0 if len(asked) == 1 else 0.5

    monkeypatch.setattr(finetune_sft, "judge_preference", obey)
    run("evaluate", *flags)
    table = json.loads(Path("out/ppo/evaluation.json").read_text(encoding="utf-8"))
    assert table["rows"]["ppo"]["judge"][0] == 0.75 and "judge" not in table["rows"]["start"]
    assert len(asked) == 2 and asked[0][0].startswith("say ") and asked[0][1].endswith("please")


# --- the table of methods


@pytest.mark.slow
def test_the_table_of_methods_at_toy_size(folder, monkeypatch, capsys):
    """Every cell is made once; the table stands between its markers, the rest of the file stays; the drawing is XML."""
    import methods

    monkeypatch.setattr(methods, "METHODS", dict(list(methods.METHODS.items())[:2]))
    Path("results.md").write_text("# Results\n\n<!-- methods -->\nold\n<!-- /methods -->\n\nThe end.\n", encoding="utf-8")
    argv = ("--init start.safetensors --data pairs.json --results results.md --figure m.svg --seeds 1 --steps 1 "
            "--test_prompts 6 --response_length 8").split()
    methods.main(argv)
    text, names = Path("results.md").read_text(encoding="utf-8"), ["start", "best of 4", *methods.METHODS]
    assert text.startswith("# Results\n\n<!-- methods -->\n| method | reward | KL, nats |") and text.endswith("-->\n\nThe end.\n")
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in text.split("\n") if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == names and "old" not in text
    found = {row[0]: dict(zip(rows[0], row)) for row in rows[1:]}
    assert float(found["start"]["KL, nats"]) == 0 and float(found["start"]["win rate"]) == 0.5
    assert float(found["best of 4"]["reward"]) > float(found["start"]["reward"])
    circles = [element for element in ElementTree.parse("m.svg").iter() if element.tag.endswith("circle")]
    assert len(circles) == 3 * len(names)  # of a seed, of the mean, in the legend
    trained = mock.Mock(side_effect=AssertionError("a cell was run twice"))
    monkeypatch.setattr(methods, "run", trained)
    methods.main(argv)
    assert Path("results.md").read_text(encoding="utf-8") == text


# --- rating


def type_in(monkeypatch, *lines):
    """Let these lines come from the terminal, and then nothing more."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))


def ratings(path="r/ratings.jsonl"):
    """Return the rows of a file of ratings."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def test_a_person_rates_stops_and_goes_on(folder, monkeypatch, capsys):
    """What is typed is on disk, a skipped prompt comes again, and --data reads the file."""
    type_in(monkeypatch, "1", "x", "2", "s", "", "q")
    assert run("rate", "--ratings", "r/ratings.jsonl") is None
    assert [row["preferred"] for row in ratings()] == [1, 2] and "2 ratings" in capsys.readouterr().out
    type_in(monkeypatch, *"2" * 5)  # and the end of the input
    run("rate", "--ratings", "r/ratings.jsonl")
    assert [row["preferred"] for row in ratings()] == [1, 2, 2, 2, 2, 2, 2]
    prompts = [row["prompt"] for row in ratings()]
    assert len(set(prompts)) == len(prompts) and len(data.read_preferences("r/ratings.jsonl")) == 7


def test_no_rating_is_ever_deleted(folder, monkeypatch, capsys):
    """A last line without an end stays and is a line of its own; odd line ends stand in a row; other files are refused."""
    row = {"prompt": "a line\u2028separator, next\u0085line", "response_1": "a", "response_2": "b", "preferred": 1}
    Path("r.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    type_in(monkeypatch, "1", "2", "q")
    run("rate", "--ratings", "r.jsonl")
    assert ratings("r.jsonl")[0] == row and [one["preferred"] for one in ratings("r.jsonl")] == [1, 1, 2]
    for name, text in {"list.json": json.dumps([row]), "list.jsonl": json.dumps([row]), "cut.jsonl": '{"prompt": "cu',
                       "pretty.jsonl": json.dumps([row], indent=1), "other.jsonl": '{"text": "a"}\n'}.items():
        Path(name).write_text(text, encoding="utf-8")
        capsys.readouterr()
        run("rate", "--ratings", name, status=2 if name == "list.json" else 1)
        assert name in capsys.readouterr().err and Path(name).read_text(encoding="utf-8") == text


def test_two_models_are_compared_blind(folder, monkeypatch):
    """The order is drawn anew for each prompt, and the file says who wrote what."""
    model, tokenizer, _ = gpt.load_checkpoint("start.safetensors")
    model.tok_emb.weight.data *= -50
    gpt.save_checkpoint("other.safetensors", model, tokenizer, template="plain")
    type_in(monkeypatch, *"1" * 12)
    run("rate", "--checkpoint", "other.safetensors", "--ratings", "r.jsonl")
    writers = [(row["from_1"], row["from_2"]) for row in ratings("r.jsonl")]
    assert len(writers) == 12 and all(set(two) == {"start.safetensors", "other.safetensors"} for two in writers)
    assert 0 < sum(two[0] == "other.safetensors" for two in writers) < 12


# --- what a user can get wrong


def test_mistakes_get_one_line(folder, capsys):
    """Files, rewards and flags that cannot work: status, one error line with the word that helps, and no model left."""
    good = json.loads(Path("pairs.json").read_text(encoding="utf-8"))
    (folder / "bad.py").write_text(
        "def wrong_count(p, r):\n    return [1.0]\n\ndef nan(p, r):\n    return [float('nan')] * len(r)\n\n"
        "def same(p, r):\n    return [2.0] * len(r)\n\ndef words(p, r):\n    return ['good'] * len(r)\n")
    for name, rows in {"three.json": [{**good[0], "preferred": 3}], "few.json": good[:2], "nothing.json": [{"text": "a"}],
                       "missing.json": [{"prompt": "a", "response_1": "b", "preferred": 1}]}.items():
        Path(name).write_text(json.dumps(rows), encoding="utf-8")
    gpt.save_checkpoint("other.safetensors", gpt.load_checkpoint("start.safetensors")[0],
                        CharTokenizer.train(["abcdefghijklmnopqrstuvwxyz \n?"], specials=True), template="plain")
    ppo = argv("ppo", "--max_steps", 2)
    cases = [(argv("reward", "--data", "three.json"), 1, "'preferred' must be 1 or 2"),
             (argv("reward", "--data", "missing.json"), 1, "response_2"),
             ([*ppo, "--data", "nothing.json"], 1, "'prompt' or 'instruction'"),
             (argv("grpo", "--reward", "mine:length", "--group", 3), 2, "a multiple of --group 3"),
             (argv("grpo", "--reward", "mine:length", "--group", 1), 2, "--group 1"),
             ([*ppo, "--reward", "mine.py:length"], 1, "mine:length for mine.py"),
             (argv("reward", "--data", "few.json"), 1, "too few"), (argv("reward", "--data", "no.json"), 1, "no.json"),
             (["reward", "--data", "pairs.json"], 1, "python finetune_sft.py"), (ppo, 1, "python rlhf.py reward"),
             ([*ppo, "--reward", "start.safetensors"], 1, "no reward model"),
             ([*ppo, "--reward", "nothing:here"], 1, "module:function"), ([*ppo, "--reward", "bad:here"], 1, "here"),
             ([*ppo, "--reward", "bad:wrong_count"], 1, "1 scores for 4 responses"), ([*ppo, "--reward", "bad:nan"], 1, "nan"),
             ([*ppo, "--reward", "bad:words"], 1, "ValueError"), ([*ppo, "--reward", "bad:same"], 1, "are 2"),
             ([*ppo, "--reward", "gold"], 1, "not a question"),
             ([*ppo, "--reward", "mine:length", "--response_length", "47"], 1, "--response_length"),
             ([*ppo, "--reward", "mine:length", "--init", "scratch"], 1, "python finetune_sft.py"),
             (argv("rate", "--checkpoint", "other.safetensors"), 1, "other.safetensors has another tokenizer"),
             ([*ppo, "--clip_range", "0"], 2, "clip_range"), ([*ppo, "--grpo", "2"], 2, "--group"), (["pppo"], 2, "unknown"),
             (argv("reward", "--group", 2), 2, "--group"), (argv("rate", "--batch_size", 2), 2, "--batch_size"),
             (argv("evaluate"), 1, "python rlhf.py ppo"),
             (argv("evaluate", "--checkpoint", "none.safetensors"), 1, "none.safetensors"),
             ([*ppo, "--reward", "mine:length", "--lora_rank", "999"], 2, "999")]
    for words, status, word in cases:
        capsys.readouterr()
        assert rlhf.main(words) == status, words
        lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert len(lines) == 1 and word in lines[0], (words, lines)
    assert not list(folder.glob("out/*/state.pt")) and not Path("out/reward").exists()


def test_every_command_lists_the_flags_that_it_reads_and_no_others(capsys):
    """--help shows real defaults, and the module has at most 40 flags of its own."""
    own = {name for command in rlhf.COMMANDS.values() for name in command.flags.split()}
    own -= {field.name for field in rlhf.dataclasses.fields(train.AdapterOptions)}
    assert len(own) <= 40
    for command, shown, absent in (("ppo", ("--clip_range ", "default 80", "default 0.0003"), ("--beta", "--ratings")),
                                   ("reward", ("--head", "default muon", "default 0.003"), ("--group", "--kl_coef")),
                                   ("rate", ("--ratings",), ("--batch_size", "--learning_rate"))):
        assert rlhf.main([command, "--help"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert all(word in text for word in shown) and not any(word in text for word in absent), command


@pytest.mark.parametrize("size, rank, rate, optimizer", [(0, 0, 3e-3, "muon"), (0, 8, 3e-2, "adamw"), (3e8, 0, 1e-5, "adamw"),
                                                         (3e8, 8, 1e-4, "adamw")])
def test_the_default_rate_depends_on_the_size_of_the_start_and_on_adapters(size, rank, rate, optimizer, tmp_path):
    """Muon for a small reward model, the rates of large models from 50 million parameters on, ten times with adapters."""
    path = tmp_path / "start.safetensors"
    with open(path, "wb") as file:
        file.truncate(int(size))
    found = rlhf.adjust("reward", Config(init=str(path), lora_rank=rank))
    assert found == {"learning_rate": pytest.approx(rate), "optimizer": optimizer, "beta": 0.1}
    assert rlhf.adjust("ppo", Config(init="gpt2"))["learning_rate"] == 3e-6
