"""Learning from preferences: closed forms, gradients, enumerable toys with a known optimum, runs, resuming, bad input."""

import contextlib
import hashlib
import io
import itertools
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import data
import finetune_sft
import gpt
import rlhf
import train
from lora import apply_lora, load_lora
from rlhf import Config, Policy, Prompt, RewardModel
from tokenizer import CharTokenizer


class Letters:
    """A tokenizer of single letters for toys: a is 0, b is 1 ..., and the last id ends a response."""

    def __init__(self, size):
        self.vocab_size, self.eot_id = size, size - 1

    def encode(self, text):
        return [ord(letter) - 97 for letter in text]

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)


def toy(vocab_size=8, seed=0, sharp=1.0, **sizes):
    """Return a small Policy with a head `sharp` times as large, whose value head is random instead of zero."""
    torch.manual_seed(seed)
    sizes = {"context_length": 16, "emb_dim": 16, "n_heads": 2, "n_layers": 2, "drop_rate": 0.0, **sizes}
    policy = Policy(gpt.GPTModel(gpt.GPTConfig(vocab_size, **sizes))).eval()
    with torch.no_grad():
        policy.gpt.out_head.weight *= sharp
        policy.value_head.weight.normal_(std=0.1)
    return policy


def options(**given):
    """Return a Config for toys: one piece, no penalty for responses that do not stop."""
    return Config(**{"batch_size": 32, "accumulate": 1, "temperature": 1.0, "no_stop_penalty": 0.0,
                     "max_approxkl": 0.0, **given})


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


def test_gae_at_its_ends_is_reward_to_go_and_one_step_td():
    """gamma = lam = 1: the returns are the rewards still to come, whatever the values; lam = 0: one step of TD."""
    rewards, values, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[5.0, -3.0, 0.5]]), torch.ones(1, 3)
    _, returns = rlhf.gae(rewards, values, mask, 1.0, 1.0)
    assert returns.tolist() == [[7.0, 6.0, 4.0]]
    advantages, _ = rlhf.gae(rewards, values, mask, 0.5, 0.0)
    assert advantages.tolist() == [[1 + 0.5 * -3 - 5, 2 + 0.5 * 0.5 + 3, 4 - 0.5]]


def test_whitening_counts_only_what_the_mask_shows():
    """Mean 0 and variance 1 over masked entries, 0 elsewhere; the mean can stay; hidden values change nothing."""
    torch.manual_seed(0)
    x, mask = torch.randn(5, 6) * 3 + 2, prefix_mask(6, 1, 3, 4, 2)
    white = rlhf.whiten(x, mask)
    kept = white[mask.bool()]
    assert kept.mean().item() == pytest.approx(0, abs=1e-6) and kept.var(unbiased=False).item() == pytest.approx(1, abs=1e-5)
    assert white[~mask.bool()].abs().max() == 0
    assert torch.equal(rlhf.whiten(x.masked_fill(mask == 0, 1e6), mask), white)
    raised = rlhf.whiten(x, mask, shift_mean=False)[mask.bool()]
    assert raised.mean().item() == pytest.approx(x[mask.bool()].mean().item(), abs=1e-5)
    assert raised.var(unbiased=False).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("advantage, ratio, loss, slope", [
    (2.0, 1.5, -2.4, 0.0),  # good and already 50% likelier: no more gain
    (2.0, 0.5, -1.0, -2.0),  # good and less likely: full gradient
    (-2.0, 1.5, 3.0, 2.0),  # bad and likelier: full gradient
    (-2.0, 0.5, 1.6, 0.0),  # bad and already half as likely: no more gain
])
def test_the_policy_loss_clips_where_it_should(advantage, ratio, loss, slope):
    """The four quadrants give the loss and the derivative by the ratio that the paper's figure 1 shows."""
    old = torch.tensor([[-1.0]])
    new = torch.tensor([[-1.0 + math.log(ratio)]], requires_grad=True)
    got, metrics = rlhf.ppo_policy_loss(new, old, torch.tensor([[advantage]]), torch.ones(1, 1), clip=0.2)
    got.backward()
    assert got.item() == pytest.approx(loss, abs=1e-6)
    assert new.grad.item() == pytest.approx(slope * ratio, abs=1e-5)  # d ratio / d new = ratio
    assert metrics["policy/clipfrac"] == 1 and metrics["policy/approxkl"] == pytest.approx(0.5 * math.log(ratio) ** 2)


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


def test_dpo_with_smoothing_is_the_mean_over_both_labels():
    """Smoothing by 0.25 mixes the losses of the labels as given and as swapped, 3 to 1."""
    a = [torch.tensor([v]) for v in (-2.0, -3.0, -2.5, -2.8)]
    swapped = [a[1], a[0], a[3], a[2]]
    expected = 0.75 * rlhf.dpo_loss(*a) + 0.25 * rlhf.dpo_loss(*swapped)
    assert rlhf.dpo_loss(*a, label_smoothing=0.25).item() == pytest.approx(expected.item())
    assert rlhf.dpo_loss(*a).item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.1 * (0.5 + 0.2)))))


def test_group_advantages_sum_to_zero_and_ignore_equal_groups():
    """Zero sum and unit deviation in each group, zeros where all scores are equal, and the order within does not matter."""
    scores = torch.tensor([1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 5.0, 5.0])
    got = rlhf.group_advantages(scores, 4)
    assert got[:4].sum().item() == pytest.approx(0, abs=1e-6) and got[:4].std().item() == pytest.approx(1, abs=1e-3)
    assert got[4:].tolist() == [0, 0, 0, 0]
    order = torch.tensor([2, 0, 3, 1, 4, 5, 6, 7])
    assert torch.allclose(rlhf.group_advantages(scores[order], 4), got[order])


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


def rollout(policy, config, texts=("ab", "c", "abcab", "ba"), reward=None, seed=0, num_samples=1):
    """Return the Episodes of some prompts, sampled from seeded random numbers, and the function that opens the start."""
    torch.manual_seed(seed)
    tokenizer = Letters(policy.gpt.config.vocab_size)
    prompts = [Prompt(text, tokenizer.encode(text)) for text in texts]
    reward = reward or (lambda prompts, responses: [len(r) + 0.1 * i for i, r in enumerate(responses)])
    start = rlhf.start_of(policy.gpt)
    return rlhf.play(policy, start, prompts, reward, tokenizer, config, num_samples), start


def test_packed_rows_begin_their_responses_in_one_column():
    """Prompts are padded on the left and responses on the right, with a mask that shows both."""
    ids, mask, R = rlhf.pack([[1, 2, 3], [4]], [[5], [6, 7]], pad_id=0)
    assert R == 2 and ids.tolist() == [[1, 2, 3, 5, 0], [0, 0, 4, 6, 7]]
    assert mask.tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_what_is_scored_is_what_was_sampled():
    """At temperature 0.7 the log-probabilities of a response sum to those of drawing it alone, token by token."""
    policy, config = toy(sharp=30), options(temperature=0.7, response_length=6)
    episodes, _ = rollout(policy, config)
    for row, prompt in enumerate(episodes.prompts):
        ids, expected = torch.tensor([Letters(8).encode(prompt)]), 0.0
        response = episodes.ids[row, -episodes.response_mask.shape[1]:][episodes.response_mask[row].bool()]
        for token in response:
            expected += torch.log_softmax(policy.gpt(ids)[0, -1] / 0.7, -1)[token].item()
            ids = torch.cat([ids, token.view(1, 1)], 1)
        assert episodes.logprobs[row].sum().item() == pytest.approx(expected, abs=1e-5)
        assert bool(episodes.stopped[row]) == (response[-1].item() == 7)
        assert episodes.texts[row] == Letters(8).decode([i for i in response.tolist() if i != 7])


def all_responses(V, R):
    """Return every response of at most R tokens over V ids, the last of which stops it."""
    return [r for n in range(1, R + 1) for r in itertools.product(range(V), repeat=n)
            if V - 1 not in r[:-1] and (r[-1] == V - 1 or n == R)]


def distribution(model, prompt, V, R):
    """Return (responses, their exact log-probabilities) after a prompt."""
    responses = [list(r) for r in all_responses(V, R)]
    ids, mask, R = rlhf.pack([prompt] * len(responses), responses, 0)
    with torch.no_grad():
        logits = model.out_head(rlhf.response_states(model, ids, mask, R))
    return responses, (rlhf.token_scores(logits, ids[:, -R:])[0] * mask[:, -R:]).sum(1)


def test_the_probabilities_of_all_responses_sum_to_one():
    """40 responses over 4 tokens, cut at the stop token or at length 3."""
    responses, logprobs = distribution(toy(4, sharp=30).gpt, [0, 1], 4, 3)
    assert len(responses) == 40 and logprobs.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_padding_changes_no_score_and_no_gradient():
    """More padding on either side, garbage in it, and another order of rows leave losses and gradients as they were."""
    policy, config = toy(sharp=10).double(), options(response_length=6)
    episodes, _ = rollout(policy, config)
    advantages, returns = rlhf.advantages_and_returns(episodes, 0.1, config, "ppo")

    def result(e, advantages, returns, order):
        policy.zero_grad()
        loss, _ = rlhf.policy_objective(policy, e, order, advantages, returns, 0.1, config)
        loss.backward()
        return loss.item(), [p.grad.clone() for p in policy.parameters()]

    loss, grads = result(episodes, advantages, returns, torch.arange(4))
    wider = episodes._replace(
        ids=torch.cat([torch.full((4, 3), 5), torch.where(episodes.mask > 0, episodes.ids, 3), torch.full((4, 2), 2)], 1),
        mask=F.pad(episodes.mask, (3, 2)), **{name: F.pad(getattr(episodes, name), (0, 2), value=9.0) for name in (
            "logprobs", "ref_logprobs", "values")}, response_mask=F.pad(episodes.response_mask, (0, 2)))
    again, other = result(wider, F.pad(advantages, (0, 2), value=4.0), F.pad(returns, (0, 2), value=4.0),
                          torch.tensor([2, 0, 3, 1]))
    assert again == pytest.approx(loss, abs=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads, other))


@pytest.mark.parametrize("head", rlhf.HEADS)
def test_a_reward_model_takes_any_kind_of_mask(head):
    """Whole numbers, truth values and floats say the same."""
    model, ids = RewardModel(toy().gpt, head), torch.tensor([[0, 0, 3, 4, 5], [2, 3, 4, 5, 6]])
    with torch.no_grad():
        scores = [model(ids, (ids > 0).to(dtype), 2) for dtype in (torch.long, torch.bool, torch.float32)]
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2]) and scores[0][0] != scores[0][1]


@pytest.mark.parametrize("head", rlhf.HEADS)
def test_a_reward_models_score_ignores_padding_and_batch(head):
    """Padding left, right or none, alone or in a batch: the same score; the last real token decides."""
    torch.manual_seed(0)
    model = RewardModel(toy().gpt, head)
    alone = model(torch.tensor([[1, 2, 3]]))
    ids = torch.tensor([[1, 2, 3, 0, 0], [0, 0, 1, 2, 3], [6, 5, 4, 3, 2]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    scores = model(ids, mask)
    answers, real, R = rlhf.pack([[4, 1], [1], [5, 6, 1]], [[2, 3]] * 3, 0)
    assert torch.allclose(model(answers, real, R)[1:2], model(torch.tensor([[1, 2, 3]]), None, 2), atol=1e-6)
    assert torch.allclose(scores[:2], alone.expand(2), atol=1e-6) and abs(scores[2] - alone) > 1e-3
    assert not torch.allclose(model(torch.tensor([[1, 2, 3, 0]])), alone, atol=1e-3)


def test_the_likelihood_head_reads_the_responses_log_probability():
    """With all weights on that input the score is the sum over the response's tokens, and over those alone."""
    model = RewardModel(toy(sharp=10).gpt, "likelihood")
    ids, mask, R = rlhf.pack([[4, 1, 3], [1]], [[2, 3], [5, 6, 7]], 0)
    with torch.no_grad():
        model.head.weight.zero_()[0, -1] = 1
        found = [sum(torch.log_softmax(model.gpt(torch.tensor([p + r]))[0], -1)[len(p) + i - 1, r[i]] for i in range(len(r)))
                 for p, r in (([4, 1, 3], [2, 3]), ([1], [5, 6, 7]))]
        assert torch.allclose(model(ids, mask, R), torch.stack(found), atol=1e-5)


def test_the_mean_head_reads_all_states_of_the_response():
    """Its score is linear in the mean of the states of the response's tokens, each row computed alone."""
    model = RewardModel(toy(sharp=10).gpt, "mean")
    rows = [([4, 1, 3], [2, 3]), ([1], [5, 6, 7])]
    ids, mask, R = rlhf.pack(*zip(*rows), 0)
    with torch.no_grad():
        states = [model.gpt.hidden(torch.tensor([p + r]))[0] for p, r in rows]
        found = [sum(model.head(state[i]) for i in range(len(p), len(p + r))) / len(r)
                 for state, (p, r) in zip(states, rows)]
        assert torch.allclose(model(ids, mask, R), torch.cat(found), atol=1e-5)


@pytest.mark.parametrize("head", ["linear", "likelihood", "mean"])
def test_both_answers_of_a_pair_in_one_row_are_as_in_rows_of_their_own(head):
    """Scores, log-probabilities and gradients of pairs that share their prompt equal those of separate rows."""
    torch.manual_seed(0)
    draw = lambda n: torch.randint(7, (n,)).tolist()  # noqa: E731
    rows = [rlhf.Pair(draw(3 + i), draw(2 + i % 3) + [7], draw(5 - i % 4) + [7]) for i in range(5)]
    model = RewardModel(toy(sharp=10).gpt, head).double()
    scores, gradients = [], []
    for separate in (False, True):
        model.zero_grad()
        if separate:
            packed = [rlhf.pack([row.prompt for row in rows], [row[side] for row in rows], 0) for side in (1, 2)]
            chosen, rejected = (model(*some) for some in packed)
            logprobs = [(rlhf.token_scores(model.gpt.out_head(rlhf.response_states(model.gpt, ids, mask, R)), ids[:, -R:])[0]
                         * mask[:, -R:]).sum(1) for ids, mask, R in packed]
        else:
            chosen, rejected = rlhf.pair_scores(model, rows, 0)
            logprobs = rlhf.pair_logprobs(model.gpt, rows, 0)
        scores.append(torch.stack([chosen, rejected, *logprobs]).double())
        (scores[-1] * torch.tensor([[1.0], [-2.0], [0.5], [-0.3]])).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert torch.allclose(*scores, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


@pytest.mark.parametrize("drop_rate", [0.0, 0.1])
def test_the_first_update_is_reinforce(drop_rate):
    """At the first pass every ratio is 1 to the bit, nothing is clipped, and the gradient is -sum(A grad logp) / n.

    A model left in training mode with dropout must pass too: training a policy switches it off."""
    policy, config = toy(drop_rate=drop_rate).double(), options(
        response_length=6, accumulate=2, vf_coef=0.0, ppo_epochs=1)
    policy.train()
    episodes, _ = rollout(policy, config)
    advantages, returns = rlhf.advantages_and_returns(episodes, 0.1, config, "ppo")
    seen = []

    def apply(loss):
        seen.append([p.grad.clone() for p in policy.gpt.parameters()])
        return 0.0, 0.0

    _, metrics, _, _ = rlhf.improve(policy, episodes, advantages, returns, 0.1, config, apply)
    assert metrics["policy/approxkl"] == metrics["policy/clipfrac"] == 0
    policy.zero_grad()
    R = episodes.response_mask.shape[1]
    logits, _ = policy(episodes.ids, episodes.mask, R)
    new = torch.log_softmax(logits, -1).gather(2, episodes.ids[:, -R:, None]).squeeze(2)
    (-(advantages * new).sum() / episodes.response_mask.sum()).backward()
    for ours, parameter in zip(seen[0], policy.gpt.parameters()):
        assert torch.allclose(ours, parameter.grad, atol=1e-9)


# --- toys small enough to know the optimum: pi* = pi_ref exp(r / beta) / Z


def learn(policy, texts, reward, config, steps, rate, stage="ppo", seed=0):
    """Train a policy in a plain loop, as a reader would write it, and return the mean score of every step."""
    torch.manual_seed(seed)
    tokenizer = Letters(policy.gpt.config.vocab_size)
    prompts = [Prompt(text, tokenizer.encode(text)) for text in texts]
    start, optimizer, scores = rlhf.start_of(policy.gpt), torch.optim.Adam(policy.parameters(), lr=rate), []

    def apply(loss):
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        return 0.0, 0.0

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        batch = [prompts[i % len(prompts)] for i in range(config.batch_size // (config.group if stage == "grpo" else 1))]
        episodes = rlhf.play(policy, start, batch, reward, tokenizer, config, config.group if stage == "grpo" else 1)
        advantages, returns = rlhf.advantages_and_returns(episodes, config.kl_coef, config, stage)
        rlhf.improve(policy, episodes, advantages, returns, config.kl_coef, config, apply)
        scores.append(episodes.scores.mean().item())
    return scores


def optimum(model, prompt, V, R, reward, beta):
    """Return (log of the optimal policy over all responses, its own value beta log Z, the rewards)."""
    responses, ref = distribution(model, prompt, V, R)
    texts = [Letters(V).decode([i for i in r if i != V - 1]) for r in responses]
    rewards = torch.tensor(reward([""] * len(texts), texts))
    logits = ref + rewards / beta
    return torch.log_softmax(logits, 0), beta * torch.logsumexp(logits, 0).item(), rewards


def distance(policy, prompt, V, R, best):
    """Return KL(policy || optimum) over all responses, in nats."""
    _, logprobs = distribution(policy.gpt, prompt, V, R)
    return (logprobs.exp() * (logprobs - best)).sum().item()


def letter_values(prompts, responses):
    """Return a fixed reward for each text, between -1 and 1, that depends on its letters and their places."""
    return [math.sin(sum((ord(c) - 96) * (3 * i + 2) for i, c in enumerate(r)) + 0.5 * len(r)) for r in responses]


SMALL = dict(emb_dim=16, n_layers=1, context_length=8)


@pytest.mark.parametrize("beta, whitened", [(0.5, False), (0.25, True)])
def test_ppo_finds_the_optimum_of_a_bandit(beta, whitened):
    """One token of 8: PPO ends within 0.005 nats of pi_ref exp(r / beta), with and without whitened rewards."""
    policy = toy(8, sharp=10, **SMALL)
    best, _, rewards = optimum(policy.gpt, [0], 8, 1, letter_values, beta)
    assert distance(policy, [0], 8, 1, best) > 0.7
    config = options(response_length=1, kl_coef=beta, batch_size=256, whiten_rewards=whitened, ppo_epochs=2)
    learn(policy, ["a"], letter_values, config, 60, 1e-2)
    assert distance(policy, [0], 8, 1, best) < 0.005
    reached = (distribution(policy.gpt, [0], 8, 1)[1].exp() * rewards).sum().item()
    assert reached == pytest.approx((best.exp() * rewards).sum().item(), abs=0.02)


def sequence_toy():
    """Return (distance at the start, at the end, value reached - optimal value) of PPO on all responses of 3 letters."""
    policy, beta = toy(4, sharp=10, **SMALL), 0.5
    best, value, rewards = optimum(policy.gpt, [0, 1], 4, 3, letter_values, beta)
    _, ref = distribution(policy.gpt, [0, 1], 4, 3)
    before = distance(policy, [0, 1], 4, 3, best)
    learn(policy, ["ab"], letter_values, options(response_length=3, kl_coef=beta, batch_size=256, ppo_epochs=4), 80, 1e-2)
    _, now = distribution(policy.gpt, [0, 1], 4, 3)
    reached = (now.exp() * (rewards - beta * (now - ref))).sum().item()
    return before, distance(policy, [0, 1], 4, 3, best), reached - value


def test_ppo_finds_the_optimum_over_sequences():
    """40 responses of unequal length: within 0.05 nats of the optimum, and its value within 0.02 of beta log Z."""
    before, after, missing = sequence_toy()
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
def test_the_toy_tells_a_wrong_kl_from_the_right_one(wrong, monkeypatch):
    """The control of the test above: a flipped sign, or k3 as a reward, ends far from the optimum."""
    monkeypatch.setattr(rlhf, "token_rewards", wrong)
    assert sequence_toy()[1] > 0.3


def even_share(prompts, responses):
    """Return 4 x the share of letters with an even number in each response, at most 16 letters."""
    return [4 * sum(ord(c) % 2 == 1 for c in r) / max(1, len(r)) for r in responses]


def longer_toy(stage="ppo", reward=even_share, steps=32, **given):
    """Return (mean score of the first 3 and of the last 3 steps) on responses of 16 tokens from a vocabulary of 32."""
    policy = toy(32, context_length=24, emb_dim=32, sharp=5)
    texts = ["".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=3 + i % 6)) for i in range(32)]
    config = options(response_length=16, **{"kl_coef": 0.02, "ppo_epochs": 4, **given})
    scores = learn(policy, texts, reward, config, steps, 2e-3, stage)
    return sum(scores[:3]) / 3, sum(scores[-3:]) / 3


@pytest.mark.slow
def test_ppo_and_grpo_learn_a_property_of_whole_responses():
    """Even letters: both raise the score by more than 0.8 of 4; a shuffled reward does not, nor a strong tie to the start."""
    before, after = longer_toy()
    assert after - before > 0.8
    rng = random.Random(0)
    shuffled = longer_toy(reward=lambda p, r: rng.sample(even_share(p, r), len(r)))
    assert shuffled[1] - before < 0.4
    tied = longer_toy(kl_coef=2.0)
    assert tied[1] - before < 0.4
    before, after = longer_toy("grpo", steps=40, batch_size=64, ppo_epochs=1)
    assert after - before > 0.8


def test_keeping_skills_is_the_loss_of_the_preferred_answers_whatever_the_pieces():
    """ptx_coef times the mean over all their tokens, with its gradient, in one piece or in three."""
    rows = [([1, 2, 3], [4, 7]), ([5], [6, 2, 1, 7]), ([2, 2], [7]), ([3, 1, 4, 1], [5, 6, 7])]
    prompts, found = [rlhf.Prompt("", ids, "", answer) for ids, answer in rows], []
    for pieces in (0, 1, 3):
        model = toy(sharp=10).gpt.double()
        if pieces:
            total = rlhf.keep_skills(model, prompts, options(ptx_coef=0.7, accumulate=pieces), contextlib.nullcontext())
        else:
            scores = [torch.log_softmax(model(torch.tensor([ids + answer]))[0].double(), -1)[len(ids) + i - 1, token]
                      for ids, answer in rows for i, token in enumerate(answer)]
            loss = -0.7 * torch.stack(scores).mean()
            loss.backward()
            total = loss.item()
        found.append((total, torch.cat([p.grad.flatten() for p in model.parameters()])))
    for total, gradient in found[1:]:
        assert total == pytest.approx(found[0][0], rel=1e-6) and torch.allclose(gradient, found[0][1], atol=1e-6)


def test_an_update_adds_the_gradient_of_keeping_skills():
    """The gradient with --ptx_coef minus that without it is the one of `keep_skills` alone."""
    def gradients(coef, only=False):
        policy, config = toy(sharp=10), options(ptx_coef=coef, ppo_epochs=1, accumulate=2, response_length=8)
        episodes, _ = rollout(policy, config, ["ab"] * 4)
        advantages, returns = rlhf.advantages_and_returns(episodes, 0.1, config, "ppo")
        prompts, kept = [rlhf.Prompt("", [1, 2], "", [3, 7])] * 4, []

        def apply(loss):
            kept.extend(p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in policy.gpt.parameters())
            return 0.0, 0.0

        policy.zero_grad()
        if only:
            rlhf.keep_skills(policy.gpt, prompts, config, contextlib.nullcontext())
            apply(0)
        else:
            rlhf.improve(policy, episodes, advantages, returns, 0.1, config, apply, prompts=prompts)
        return torch.cat([gradient.flatten() for gradient in kept])

    alone = gradients(0.5, only=True)
    assert alone.norm() > 0.01 and torch.allclose(gradients(0.5) - gradients(0.0), alone, atol=1e-5)


# --- reward models, DPO, GRPO


def test_a_reward_model_recovers_a_hidden_score():
    """Pairs ranked by a hidden linear score of their tokens: held-out accuracy and correlation above 0.9."""
    torch.manual_seed(0)
    worth, model = torch.randn(12), RewardModel(toy(12, emb_dim=32).gpt)
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


def test_normalised_scores_have_mean_0_and_deviation_1_and_the_old_ranking():
    """On the samples themselves exactly, on fresh ones of the same policy within chance; order and margins' signs stay."""
    torch.manual_seed(0)
    policy, config = toy(8, sharp=10), options(response_length=8)
    model = RewardModel(toy(8, seed=3).gpt)
    draw = lambda seed: rollout(policy, config, ["ab"] * 300, seed=seed)[0]  # noqa: E731
    first, fresh = draw(1), draw(2)
    with torch.no_grad():
        raw = model(first.ids, first.mask)
        model.normalise(raw)
        scaled, other = model(first.ids, first.mask), model(fresh.ids, fresh.mask)
    assert scaled.mean().item() == pytest.approx(0, abs=1e-4) and scaled.std().item() == pytest.approx(1, abs=1e-4)
    assert abs(other.mean().item()) < 3 / math.sqrt(300) * other.std().item() and other.std().item() == pytest.approx(1, abs=0.15)
    assert torch.equal(raw.argsort(stable=True), scaled.argsort(stable=True))
    model.undo_normalise()
    assert torch.equal(model(first.ids, first.mask), raw)
    with pytest.raises(ValueError, match="same score"):
        model.normalise(torch.ones(5))


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


def test_a_group_of_equal_rewards_teaches_nothing():
    """GRPO without a KL term: the gradient is 0 for groups whose scores are all equal."""
    policy, config = toy(sharp=10), options(response_length=5, group=4, ppo_epochs=1)
    episodes, _ = rollout(policy, config, reward=lambda p, r: [1.0] * len(r), num_samples=4)
    advantages, returns = rlhf.advantages_and_returns(episodes, 0.0, config, "grpo")
    assert returns is None and advantages.shape == episodes.response_mask.shape
    largest = []
    rlhf.improve(policy, episodes, advantages, returns, 0.0, config, lambda loss: (largest.append(
        max(p.grad.abs().max().item() for p in policy.gpt.parameters())), 0.0))
    assert largest == [0.0]


def test_pieces_of_a_batch_give_the_gradient_of_the_whole():
    """Responses of unequal length in 1, 2 and 4 pieces: the same loss, gradients and metrics, for policies and rewards."""
    policy = toy(sharp=10).double()
    episodes, _ = rollout(policy, options(response_length=7))
    results = []
    for count in (1, 2, 4):
        config, grads = options(response_length=7, accumulate=count, ppo_epochs=1), []
        advantages, returns = rlhf.advantages_and_returns(episodes, 0.1, config, "ppo")
        loss, metrics, _, _ = rlhf.improve(policy, episodes, advantages, returns, 0.1, config, lambda loss: (grads.extend(
            p.grad.clone() for p in policy.parameters()), 0.0))
        results.append((loss, metrics["loss/value"], grads))
    for loss, value_loss, grads in results[1:]:
        assert loss == pytest.approx(results[0][0]) and value_loss == pytest.approx(results[0][1])
        assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(grads, results[0][2]))


def test_the_objective_of_pairs_is_what_its_three_options_say():
    """Comparisons with other prompts one by one, next tokens by the model's own logits; no option, no change."""
    torch.manual_seed(0)
    draw = lambda n: torch.randint(7, (n,)).tolist()  # noqa: E731
    rows = [rlhf.Pair(draw(3 + i), draw(2 + i % 3) + [7], draw(5 - i % 4) + [7]) for i in range(5)]
    model = RewardModel(toy(sharp=10).gpt, "mean")
    with torch.no_grad():
        model.head.weight *= 10
        objective = lambda rows, **given: rlhf.pair_objective(model, rows, 7, options(**given)).item()  # noqa: E731
        score = lambda p, r: model(torch.tensor([p + r]), None, len(r)).item()  # noqa: E731
        pairs = [[math.log1p(math.exp(score(b.prompt, b.rejected) - score(a.prompt, a.chosen))) for b in rows]
                 for a in rows]
        own, all_of_them = sum(pairs[i][i] for i in range(5)) / 5, sum(map(sum, pairs)) / 25
        assert abs(own - all_of_them) > 0.01
        assert objective(rows) == pytest.approx(own, abs=1e-5)
        assert objective(rows, cross=0.25) == pytest.approx(0.75 * own + 0.25 * all_of_them, abs=1e-5)
        nats = [F.cross_entropy(model.gpt(torch.tensor([p + r]))[0, len(p) - 1 : -1], torch.tensor(r)).item()
                for p, *answers in rows for r in answers]
        assert objective(rows, lm_weight=0.5) == pytest.approx(own + 0.5 * sum(nats) / 10, abs=1e-5)
        pieces = sum(objective(some, lm_weight=0.5) * share for some, share in rlhf.in_pieces(rows, 3))
        assert pieces == pytest.approx(objective(rows, lm_weight=0.5), abs=1e-5)
        blank = [rlhf.Pair(*([7] * len(ids) for ids in row)) for row in rows]
        assert objective(rows, token_dropout=1.0) == pytest.approx(objective(blank), abs=1e-6) != objective(rows)


def test_as_many_tokens_are_hidden_as_asked_for():
    """A share of 0.3 within four standard errors, the others in their places, all of them with a share of 0."""
    torch.manual_seed(0)
    row = rlhf.Pair(*(torch.arange(n).tolist() for n in (1000, 2000, 3000)))
    (found,) = rlhf.hide([row], 0.3, -1)
    gone = sum(i == -1 for ids in found for i in ids)
    assert abs(gone - 1800) < 4 * math.sqrt(6000 * 0.3 * 0.7)
    assert all(i in (-1, place) for ids in found for place, i in enumerate(ids)) and rlhf.hide([row], 0.0, -1) == [row]


def test_the_implied_reward_is_the_ratio_of_both_models():
    """Margins of log(policy / start), token by token from the logits; none where the policy is its start."""
    policy, start = toy(sharp=10, seed=1).gpt, toy(sharp=10).gpt
    rows = [rlhf.Pair([1, 2], [3, 7], [4, 5, 7]), rlhf.Pair([6], [2, 2, 1, 7], [7])]
    opened = lambda: contextlib.nullcontext(start)  # noqa: E731

    def said(model, p, r):
        logprobs = torch.log_softmax(model(torch.tensor([p + r]))[0], -1)
        return sum(logprobs[len(p) + i - 1, token].item() for i, token in enumerate(r))

    ratio = lambda p, r: said(policy, p, r) - said(start, p, r)  # noqa: E731
    expected = [ratio(row.prompt, row.chosen) - ratio(row.prompt, row.rejected) for row in rows]
    assert rlhf.implied_margins(policy, opened, rows, 7).tolist() == pytest.approx(expected, abs=1e-4)
    assert max(map(abs, expected)) > 0.1 and rlhf.implied_margins(start, opened, rows, 7).abs().max() < 1e-5


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


SMALL_RUN = ("--data pairs.json --init start.safetensors --response_length 8 --batch_size 8 --eval_prompts 4 "
             "--test_prompts 6 --eval_every 2 --log_every 1 --warmup_steps 1").split()


def run(command, *flags, status=0):
    """Run rlhf.main with small sizes and return the summary of its folder, or None after a failure."""
    assert rlhf.main([command, *SMALL_RUN, *map(str, flags)]) == status
    path = Path(f"out/{command}/summary.json")
    return json.loads(path.read_text(encoding="utf-8")) if status == 0 and path.exists() else None


def test_reward_model_and_ppo_run_from_files(folder, capsys):
    """The reward model learns "please", its file scores text, and PPO against it writes all figures that are promised."""
    summary = run("reward", "--max_steps", 60, "--learning_rate", 3e-3)
    assert summary["accuracy"] == 1.0 and summary["val_loss"] < 0.3 and summary["accuracy_noise_free"] is None
    for key in ("length_baseline_accuracy", "naive_bayes_accuracy", "calibration_error", "margin"):
        assert isinstance(summary[key], float)
    model, tokenizer, made = rlhf.load_reward_model("out/reward/model.safetensors")
    score = rlhf.model_reward(model, tokenizer, made["template"])
    polite, rude = score(["say cat dog"] * 2, ["cat please", "no dog"])
    assert polite > rude + 0.5
    with pytest.raises(ValueError, match="reward model"):
        gpt.load_checkpoint("out/reward/model.safetensors")
    summary = run("ppo", "--max_steps", 3)
    for key in ("reward_before", "reward_after", "kl", "episodes_per_second"):
        assert math.isfinite(summary[key])
    assert summary["gold_before"] is None and summary["kl"] >= 0 and summary["episodes"] == 24
    rows = [json.loads(line) for line in open("out/ppo/metrics.jsonl", encoding="utf-8")]
    logged = set().union(*rows)
    assert {"objective/kl", "objective/scores", "objective/entropy", "policy/clipfrac", "policy/approxkl", "eps",
            "val/explained_variance", "response_length", "val_reward"} <= logged
    drawn = {path.name: path.read_text(encoding="utf-8") for path in Path("out/ppo").glob("*.svg")}
    assert sorted(drawn) == [f"{name}.svg" for name in ("critic", "curves", "length", "objective", "policy", "speed")]
    assert all(f"{name} " in drawn["objective.svg"] for name in ("objective/kl", "objective/scores", "objective/entropy"))
    assert "->" in Path("out/ppo/samples.txt").read_text(encoding="utf-8")
    capsys.readouterr()
    assert rlhf.main(["evaluate", *SMALL_RUN, "--checkpoint", "out/ppo/model.safetensors"]) == 0
    table = capsys.readouterr().out
    assert "best of 4" in table and "KL" in table and Path("out/ppo/evaluation.json").exists()


SCRATCH = "--init scratch --emb_dim 16 --n_layers 1 --n_heads 2 --vocab_size 280 --context_length 64".split()


def test_a_blind_reward_model_from_scratch_learns_the_manner_alone(folder):
    """It begins with fresh weights and its own byte pairs, tells "please" from "no", and no prompt changes a score."""
    run("reward", *SCRATCH, "--head", "mean", "--blind", "--cross", 0.5, "--lm_weight", 0.3, "--token_dropout", 0.1,
        "--max_steps", 40, "--learning_rate", 1e-2)
    model, tokenizer, made = rlhf.load_reward_model("out/reward/model.safetensors")
    assert json.loads(Path("out/reward/summary.json").read_text(encoding="utf-8"))["accuracy"] == 1.0
    assert tokenizer.vocab_size <= 280 and model.gpt.config.emb_dim == 16 and made["blind"]
    score = rlhf.load_reward("out/reward/model.safetensors", "cpu")
    polite, same, rude = score(["say cat dog", "hen? hen!", "say cat dog"], ["cat please", "cat please", "no dog"])
    assert polite == same > rude + 0.5


def test_a_policy_from_scratch_learns_to_write_and_dpo_goes_on_from_there(folder, capsys):
    """SFT makes the start that DPO then turns against the rejected answers; held-out pairs show that it did."""
    run("dpo", *SCRATCH, "--loss", "sft", "--max_steps", 30, "--learning_rate", 1e-2, "--out_dir", "out/start")
    start = ("--init", "out/start/model.safetensors")
    summary = run("dpo", *start, "--max_steps", 30, "--learning_rate", 1e-2)
    assert summary["pair_accuracy"] == 1.0 and "than the start did in 100.0%" in capsys.readouterr().out
    summary = run("dpo", *start, "--max_steps", 1, "--learning_rate", 0.0, "--fresh")  # learns nothing: margins of 0
    assert summary["pair_accuracy"] == 0.5 and "than the start did in 50.0%" in capsys.readouterr().out


def weights(path):
    """Return the sha256 of all weights in a state.pt, and its KL coefficient."""
    state = train.read_state(path)
    digest = hashlib.sha256()
    for name in sorted(state["model"]):
        digest.update(name.encode() + gpt.tensor_bytes(state["model"][name].contiguous()))
    return digest.hexdigest(), state["progress"]["kept"]["kl_coef"]


@pytest.mark.parametrize("flags", [(), ("--lora_rank", 2)])
def test_a_reward_that_fails_stops_the_run_and_resuming_ends_with_the_same_bits(folder, capsys, flags):
    """Policy, critic, optimizer, KL coefficient, random numbers and data position: as if nothing had happened."""
    (folder / "failing.py").write_text(
        "import os\nfrom mine import length\ncalls = []\n\ndef reward(prompts, responses):\n    calls.append(1)\n"
        "    if os.path.exists('broken') and len(calls) == 5:\n        raise OSError('the server is away')\n"
        "    return length(prompts, responses)\n")
    flags = ("--reward", "failing:reward", "--max_steps", 4, "--save_every", 1, "--kl_target", 0.001, "--kl_horizon", 20,
             "--learning_rate", 1e-2, *flags)
    Path("broken").touch()
    run("ppo", *flags, "--out_dir", "stopped", status=1)  # calls: the evaluation at 0, steps 1 and 2, evaluation, step 3
    assert "OSError: the server is away" in capsys.readouterr().err
    assert train.read_state("stopped/state.pt")["step"] == 2
    Path("broken").unlink()
    run("ppo", *flags, "--out_dir", "stopped", "--resume")
    run("ppo", *flags, "--out_dir", "whole")
    assert weights("stopped/state.pt") == weights("whole/state.pt") and weights("whole/state.pt")[1] != 0.05
    files = [gpt.read_safetensors(f"{name}/model.safetensors")[1]["data_sha256"] for name in ("stopped", "whole")]
    assert files[0] == files[1]
    assert rlhf.main(["ppo", *SMALL_RUN, *map(str, flags), "--out_dir", "whole", "--resume"]) == 0
    assert "nothing to do" in capsys.readouterr().err


def test_a_policy_with_dropout_begins_at_its_start(folder):
    """Evaluated before the first step it is 0 nats away: neither side drops anything."""
    run("ppo", "--reward", "mine:length", "--max_steps", 1, "--drop_rate", 0.5)
    with open("out/ppo/metrics.jsonl", encoding="utf-8") as log:
        first = json.loads(log.readline())
    assert first["step"] == 0 and first["val_kl"] == pytest.approx(0, abs=1e-6)


def test_a_run_that_was_killed_shows_each_sample_once(folder, monkeypatch):
    """Killed between an evaluation and the save behind it, then resumed: samples.txt is that of a run never stopped."""
    flags = ("--reward", "mine:length", "--max_steps", 4, "--save_every", 0)
    run("ppo", *flags, "--out_dir", "whole")

    def killed(run):
        if run.step == 2:
            raise OSError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "end_step", killed)
        run("ppo", *flags, "--out_dir", "killed", status=1)
    run("ppo", *flags, "--out_dir", "killed", "--resume")
    whole, killed = (Path(name, "samples.txt").read_text(encoding="utf-8") for name in ("whole", "killed"))
    assert killed == whole and whole.count("--- step ") == 3


def test_a_run_that_its_kl_ended_stays_ended(folder, monkeypatch):
    """Killed while the figures at the end were made, then resumed: no further step, as in a run never killed."""
    flags = ("--reward", "mine:length", "--max_steps", 12, "--learning_rate", 2e-2, "--max_kl", 0.02, "--kl_coef", 0)

    def killed(*args):
        raise OSError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(rlhf, "finish_policy", killed)
        run("ppo", *flags, status=1)
    ended = train.read_state("out/ppo/state.pt")["step"]
    assert ended < 12 and run("ppo", *flags, "--resume")["steps"] == ended
    assert run("ppo", *flags, "--fresh")["steps"] == ended


def test_a_file_is_divided_alike_whatever_the_seed(folder):
    """So no policy is tested on prompts that its reward model learned from; --split_seed -1 divides by --seed."""
    divided = [[{pair["prompt"] for pair in part} for part in rlhf.load_pairs(rlhf.Config(
        data="pairs.json", seed=seed, split_seed=split))] for split in (1234, -1) for seed in (1, 2)]
    assert divided[0] == divided[1] and divided[2] != divided[3]
    assert all(not a & b for parts in divided for a, b in itertools.combinations(parts, 2))


def test_with_lora_the_start_is_the_model_with_its_adapters_off(folder):
    """One copy of the weights: the reference is the same object; switched off it is the start to the bit after training."""
    model, _, _ = gpt.load_checkpoint("start.safetensors")
    ids = torch.randint(20, (2, 10))
    with torch.no_grad():
        before = model(ids)
    apply_lora(model, 2)
    start = rlhf.start_of(model)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_()
    with torch.no_grad(), start() as reference:
        assert reference is model and torch.equal(reference(ids), before)
    assert not torch.allclose(model(ids), before)
    with rlhf.start_of(model)() as frozen:  # adapters that were trained before are part of the start
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


def test_dpo_and_grpo_runs_begin_where_they_should(folder):
    """DPO's first loss is ln 2 and falls, margins grow; GRPO trains no value head; SFT on the chosen runs."""
    run("dpo", "--epochs", 3, "--learning_rate", 1e-2)
    rows = [json.loads(line) for line in open("out/dpo/metrics.jsonl", encoding="utf-8")]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < 0.3
    for key in ("rewards/margins", "val_rewards/margins"):
        assert [row[key] for row in rows if key in row][-1] > 1
    assert ">margin " in Path("out/dpo/margins.svg").read_text(encoding="utf-8")
    summary = run("grpo", "--reward", "mine:length", "--max_steps", 2, "--group", 4)
    assert summary["trainable_parameters"] == sum(p.numel() for p in gpt.load_checkpoint("start.safetensors")[0].parameters())
    assert run("dpo", "--loss", "sft", "--max_steps", 3, "--fresh")["kl"] > 0


def test_seeds_give_mean_and_spread(folder, capsys):
    """Two seeds: the second in a folder of its own, figures with _mean and _std in the first's summary."""
    summary = run("reward", "--max_steps", 3, "--seeds", 2)
    second = json.loads(Path("out/reward/seed1235/summary.json").read_text(encoding="utf-8"))
    assert summary["accuracy_mean"] == pytest.approx((summary["accuracy"] + second["accuracy"]) / 2)
    assert summary["accuracy_std"] >= 0 and "accuracy" in capsys.readouterr().out
    assert run("reward", "--max_steps", 3, "--seeds", 2, "--resume") == summary


@pytest.mark.parametrize("answer, wins", [("", 1.0), ("x" * 60, 0.0)])
def test_stored_responses_are_the_opponent(answer, wins, folder):
    """By length: all prompts answered, half of them, or none; each of the first 3 is compared with its own opponent."""
    rows = [{"instruction": row["prompt"], "input": "", "response": answer} for row in json.loads(Path("pairs.json").read_text())]
    rows = [{**row, "response": row["response"] or "a"} for row in rows]
    flags = ["--checkpoint", "start.safetensors", "--reward", "mine:length", "--against", "stored.json", "--test_prompts", 3,
             "--best_of", 1]
    for stored in (rows, rows[::2]):
        Path("stored.json").write_text(json.dumps(stored), encoding="utf-8")
        run("evaluate", *flags)
        table = json.loads(Path("evaluation.json").read_text(encoding="utf-8"))
        assert 0 < table["prompts"] <= 3 and table["rows"]["start"]["wins"][0] == pytest.approx(wins, abs=0.01)
    Path("stored.json").write_text(json.dumps([{**rows[0], "instruction": "other"}]), encoding="utf-8")
    run("evaluate", *flags, status=1)


# --- rating


def type_in(monkeypatch, *lines):
    """Let these lines come from the terminal, and then nothing more."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))


def test_a_person_rates_undoes_stops_and_goes_on(folder, monkeypatch, capsys):
    """Six keystrokes leave what they say on disk; a cut last line is dropped; the next session goes on with new prompts."""
    type_in(monkeypatch, "1", "x", "2", "u", "t", "s", "q")
    assert run("rate", "--ratings", "r/ratings.jsonl") is None
    kept, undecided = (Path(f"r/ratings{end}.jsonl").read_text(encoding="utf-8").splitlines() for end in ("", ".undecided"))
    assert [json.loads(row)["preferred"] for row in kept] == [1]
    assert [json.loads(row)["preferred"] for row in undecided] == ["tie", "skip"]
    assert "1 preferences, 1 ties, 1 skipped" in capsys.readouterr().out
    with open("r/ratings.jsonl", "a", encoding="utf-8") as file:
        file.write('{"prompt": "cut by a pow')
    type_in(monkeypatch, *"2" * 5)  # and the end of the input
    run("rate", "--ratings", "r/ratings.jsonl")
    rows = [json.loads(line) for line in open("r/ratings.jsonl", encoding="utf-8")]
    assert [row["preferred"] for row in rows] == [1, 2, 2, 2, 2, 2]
    prompts = [row["prompt"] for row in rows] + [json.loads(row)["prompt"] for row in undecided]
    assert len(set(prompts)) == len(prompts) and len(data.read_preferences("r/ratings.jsonl")) == 6


def test_ratings_behind_an_odd_line_end_are_not_lost(tmp_path):
    """U+2028 and U+0085 stand in a row as they are, and end no line."""
    prompts = ["plain", "a line\u2028separator", "next\u0085line", "after"]
    ratings = rlhf.Ratings(tmp_path / "ratings.jsonl")
    for prompt in prompts:
        ratings.add({"prompt": prompt, "preferred": 1})
    assert [row["prompt"] for row in rlhf.Ratings(tmp_path / "ratings.jsonl").rows] == prompts


def test_undo_goes_past_equal_answers(folder, monkeypatch):
    """Two equal answers are a tie that nobody is asked about; behind them undo asks for the pair before once more."""
    pairs = (("a", "b"), ("c", "c"), ("d", "e"))
    monkeypatch.setattr(rlhf, "offers", lambda models, prompts, *rest: (
        (prompt, [(text, "start") for text in pair]) for prompt, pair in zip(prompts, pairs)))
    type_in(monkeypatch, "1", "u", "2", "1", "q")
    monkeypatch.setattr(rlhf, "make_prompts", lambda *given, made=rlhf.make_prompts: made(*given)[:3])
    run("rate", "--ratings", "r/ratings.jsonl")
    rows = [json.loads(line) for end in ("", ".undecided") for line in open(f"r/ratings{end}.jsonl", encoding="utf-8")]
    assert [(row["response_1"], row["preferred"]) for row in rows] == [("a", 2), ("d", 1), ("c", "tie")]


def test_two_models_are_compared_blind_and_a_judge_can_do_it(folder, monkeypatch, capsys):
    """The order is drawn anew for each prompt, the file says who wrote what, and a judge that likes length is obeyed."""
    model, tokenizer, _ = gpt.load_checkpoint("start.safetensors")
    model.tok_emb.weight.data *= -50
    gpt.save_checkpoint("other.safetensors", model, tokenizer, template="plain")

    def judge(address, prompt, **named):
        first, second = (prompt.split(f"Answer {x}:\n")[1].split("\n====")[0] for x in "AB")
        assert named["context"] == 700
        return "A" if len(first) > len(second) else "B" if len(second) > len(first) else "tie"

    monkeypatch.setattr(finetune_sft, "ask_judge", judge)
    run("rate", "--checkpoint", "start.safetensors,other.safetensors", "--judge", "ollama", "--judge_context", 700,
        "--ratings", "r.jsonl")
    rows = [json.loads(line) for line in open("r.jsonl", encoding="utf-8")]
    assert all((row["preferred"] == 1) == (len(row["response_1"]) > len(row["response_2"])) for row in rows)
    assert {row["from_1"] for row in rows} == {"start.safetensors", "other.safetensors"}
    assert "other.safetensors wins" in capsys.readouterr().out


# --- what a user can get wrong


def test_mistakes_get_one_line(folder, capsys):
    """Files, rewards and flags that cannot work: status, one error line with the word that helps, and no model left."""
    good = json.loads(Path("pairs.json").read_text(encoding="utf-8"))
    (folder / "bad.py").write_text(
        "def wrong_count(p, r):\n    return [1.0]\n\ndef nan(p, r):\n    return [float('nan')] * len(r)\n\n"
        "def same(p, r):\n    return [2.0] * len(r)\n\ndef words(p, r):\n    return ['good'] * len(r)\n")
    for name, rows in {"equal.json": [{**row, "response_2": row["response_1"]} for row in good[:10]] + good,
                       "three.json": [{**good[0], "preferred": 3}], "missing.json": [{"prompt": "a", "response_1": "b"}],
                       "few.json": good[:2]}.items():
        Path(name).write_text(json.dumps(rows), encoding="utf-8")
    gpt.save_checkpoint("other.safetensors", gpt.load_checkpoint("start.safetensors")[0],
                        CharTokenizer.train(["abcdefghijklmnopqrstuvwxyz \n?"], specials=True), template="plain")
    base = SMALL_RUN[2:]
    ppo = ["ppo", *SMALL_RUN, "--max_steps", "2"]
    cases = [(["reward", "--data", "equal.json", *base], 1, "10 of 90 pairs"),
             (["reward", "--data", "three.json", *base], 1, "'preferred' must be 1 or 2"),
             (["reward", "--data", "missing.json", *base], 1, "response_2"),
             (["grpo", *SMALL_RUN, "--reward", "mine:length", "--group", "3"], 2, "a multiple of --group 3"),
             ([*ppo, "--reward", "mine.py:length"], 1, "so mine:length for a file mine.py"),
             (["reward", "--data", "few.json", *base], 1, "too few"), (["reward", "--data", "no.json", *base], 1, "no.json"),
             (["reward", *SMALL_RUN[:2]], 1, "python finetune_sft.py"), (ppo, 1, "python rlhf.py reward"),
             ([*ppo, "--reward", "start.safetensors"], 1, "no reward model"),
             ([*ppo, "--reward", "nothing:here"], 1, "module:function"), ([*ppo, "--reward", "bad:here"], 1, "here"),
             ([*ppo, "--reward", "bad:wrong_count"], 1, "1 scores for 4 responses"), ([*ppo, "--reward", "bad:nan"], 1, "nan"),
             ([*ppo, "--reward", "bad:words"], 1, "ValueError"), ([*ppo, "--reward", "bad:same"], 1, "are 2"),
             ([*ppo, "--reward", "gold"], 1, "not a question"), ([*ppo, "--reward", "mine:length", "--response_length", "47"], 1,
                                                                 "--response_length"),
             ([*ppo, "--reward", "mine:length", "--init", "scratch"], 2, "--loss sft"),
             (["reward", *SMALL_RUN, "--emb_dim", "64"], 2, "--init scratch"),
             (["all", *SMALL_RUN, "--init", "scratch"], 2, "all goes on to ppo"),
             (["all", *SMALL_RUN, "--seeds", "2"], 2, "leave it out with all"),
             (["rate", *SMALL_RUN, "--checkpoint", "start.safetensors,other.safetensors"], 1,
              "other.safetensors has another tokenizer than start.safetensors"),
             (["reward", *SMALL_RUN, "--init", "scratch", "--lora_rank", "2"], 2, "leave one of the two out"),
             ([*ppo, "--clip_ratio", "0"], 2, "clip_ratio"), ([*ppo, "--grpo", "2"], 2, "--group"), (["pppo"], 2, "unknown"),
             (["evaluate", *SMALL_RUN], 1, "python rlhf.py ppo"), (["rate", *SMALL_RUN, "--checkpoint", "a,b,c"], 2, "one or two"),
             (["evaluate", *SMALL_RUN, "--checkpoint", "none.safetensors"], 1, "none.safetensors"),
             ([*ppo, "--reward", "mine:length", "--lora_rank", "999"], 2, "999")]
    for argv, status, word in cases:
        capsys.readouterr()
        assert rlhf.main(argv) == status, argv
        lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert len(lines) == 1 and word in lines[0], (argv, lines)
    assert not list(folder.glob("out/*/state.pt")) and not Path("out/reward").exists()
