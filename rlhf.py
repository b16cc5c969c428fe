"""Learning from preferences: a reward model from pairs of answers, then PPO, GRPO or DPO, and an evaluation.

    python rlhf.py                                  reward model, PPO, evaluation on the built-in pairs: 4 minutes
    python rlhf.py reward --data pairs.json         a reward model of your own pairs
    python rlhf.py ppo --reward my_rewards:brevity  against any Python function (prompts, responses) -> floats
    python rlhf.py grpo --reward exact              groups of responses, no value head; here 1 for right answers, else 0
    python rlhf.py dpo --loss ipo                   from the pairs alone; also dpo, simpo, orpo, and sft as a baseline
    python rlhf.py evaluate --checkpoint out/ppo/model.safetensors,out/dpo/model.safetensors
    python rlhf.py rate                             compare answers yourself, blind: 1, 2 or skip

Pairs come in any form of data.preference (for ppo and grpo also prompts alone), divided by prompt into 85% training,
5% validation, 10% test. Logged at each step of PPO and GRPO: objective/scores (mean reward), objective/kl (k1, nats
per response), objective/kl_exact (whole distributions), objective/entropy, objective/rlhf_reward (score - kl_coef x
kl), policy/clipfrac, policy/approxkl (k2 per token, to the policy that sampled), val/ratio (1 at the first update),
val/explained_variance, val/stopped (share that ended), val/equal_groups (prompts whose responses all score the same:
the update leaves them out), loss/*, eps (responses per second).

Differs from Ziegler et al. 2019 and TRL: tokens after the stop token are masked, the score stands at the stop token, a
response that does not stop loses a point, log-probabilities are recomputed by the forward pass that trains, so that the
first ratios are 1 to the bit. GRPO's KL penalty is the k2 estimator, and each token of a batch weighs the same: no
response is divided by its length. IPO takes sums of log-probabilities, as in its paper; TRL takes means.
"""

import argparse
import contextlib
import copy
import dataclasses
import importlib
import itertools
import json
import math
import os
import sys
import time
from collections import Counter, namedtuple
from pathlib import Path

import gpt  # first, because it filters torch's warning about numpy
import torch
import torch.nn as nn
import torch.nn.functional as F
from data import (answer, exact_match, format_prompt, format_response, gold_score, locate, pad_left, preference,
                  read_preferences, records, seeded, split, tinyworld)
from gpt import generate, pick_device, write_json
from torch.nn.utils import clip_grad_norm_
from train import (TRAINING, AdapterOptions, Command, Progress, Z, add_adapters, autocast, batches, check_finite,
                   draw_curves, due, fingerprint, finished, full_precision, is_best, is_large, load_start, log,
                   make_optimizers, naive_bayes, open_run, option, read_log, report_step, run_script, save_best,
                   save_state, set_learning_rate, stop_now, total_steps, wilson, write_summary)

HEADS, LOSSES = ("linear", "mlp", "likelihood"), ("dpo", "ipo", "simpo", "orpo", "sft")
ADVANTAGES, NO_ANSWER = ("gae", "group", "group-mean", "rloo"), "(no answer)"


@dataclasses.dataclass
class Config(AdapterOptions):
    """The options of learning from preferences."""
    data: str = option("tinyworld", "pairs: tinyworld, preferences, hh_rlhf, or a .json, .jsonl or .gz file")
    init: str = option("out/sft/model.safetensors", "the policy to start from: a checkpoint file, or gpt2 ... gpt2-xl")
    batch_size: int = option(64, "pairs, or sampled responses, per step", low=1)
    accumulate: int = option(4, "micro-batches of similar length per update: less memory, less padding", low=1)
    weight_decay: float = option(0.0, "of matrices; vectors are not decayed", low=0)
    warmup_steps: int = option(10, "steps from 0 up to the peak rate", low=0)
    schedule: str = option("linear", "after warm-up", choices=("cosine", "linear", "constant"))
    save_every: int = option(50, "steps between saves of state.pt, 0 = only at the end and when stopped", low=0)
    split_seed: int = option(1234, "of the division of a file, the same for all stages", low=0, high=2**62)
    head: str = option("likelihood", "mlp: two layers; likelihood: linear, with the log-probability", choices=HEADS)
    loss: str = option("dpo", "of pairs; sft only learns to write the chosen answers", choices=LOSSES)
    beta: float = option(0.1, "tie to the start; simpo: scale of its reward; orpo: weight of the odds ratio", low=1e-6)
    label_smoothing: float = option(0.0, "share of preferences believed to be wrong", low=0, high=0.5)
    reward: str = option("out/reward/model.safetensors", "a reward model, exact (1 if right), gold, module:function")
    response_length: int = option(40, "tokens of a sampled response at most", low=1)
    temperature: float = option(0.7, "of sampling, and so of all log-probabilities", low=1e-3)
    no_stop_penalty: float = option(1.0, "subtracted from the score of a response that does not end by itself", low=0)
    kl_coef: float = option(0.2, "KL penalty: reward subtracted per nat of KL to the reference", low=0)
    kl_target: float = option(0.0, "nats per response that kl_coef is adapted towards, 0 = it stays", low=0)
    kl_horizon: int = option(2000, "episodes in which kl_coef may change by 20%", low=1)
    max_approxkl: float = option(0.1, "end a step's updates above this approximate KL per token, 0 = never", low=0)
    ptx_coef: float = option(0.5, "weight of the ptx loss (writing the preferred answers), which keeps skills", low=0)
    ppo_epochs: int = option(2, "passes over each batch of responses", low=1)
    minibatches: int = option(1, "updates in each pass", low=1)
    clip_range: float = option(0.2, "the probability ratio is clipped to 1 +- this, a value to its old one", low=0.001)
    clip_high: float = option(0.0, "clip the ratio at 1 + this where it rises, 0 = --clip_range; DAPO: 0.28", low=0)
    advantage: str = option("gae", "group: GRPO; group-mean: Dr. GRPO; gae: of a value head, PPO", choices=ADVANTAGES)
    vf_coef: float = option(0.1, "weight of the value loss", low=0)
    lam: float = option(0.95, "lambda of GAE", low=0, high=1)
    group: int = option(1, "responses to each prompt", low=1)
    eval_prompts: int = option(200, "validation prompts of an evaluation while training", low=1)
    test_prompts: int = option(500, "held-out prompts of the figures at the end, 0 = all", low=0)
    checkpoint: str = option("", "policies, commas between; rate: one whose answers stand beside those of --init")
    judge: str = option("", "ollama, openai or a URL, as in finetune_sft.py; empty = no judge")
    judge_model: str = option("llama3", "the judge's name there")
    judge_examples: int = option(100, "ask the judge about the first so many prompts", low=1)
    ratings: str = option("out/ratings/ratings.jsonl", "the file that is appended to; train on it by --data")


# The mathematics: pure functions of tensors ---------------------------------------------------------------------------
# B responses, R tokens of the longest one, V vocabulary. `mask` (B, R) is 1 from a response's first token to its stop
# token and 0 after it; what stands there changes nothing. Log-probabilities, KL and losses are in nats.


def masked_mean(x, mask):
    """Return the mean of x over the entries whose mask is 1, x and mask of one shape -> ()."""
    return (x * mask).sum() / mask.sum()


def whiten(x, mask):
    """Return x with mean 0 and variance 1 over the entries whose mask is 1, and 0 elsewhere: (B, R) -> (B, R).

    The variance is the biased one. Entries are first taken relative to one of them, so that equal ones become 0.
    Source: the code of Ziegler et al. 2019."""
    x = (x - x.flatten()[mask.argmax()]) * mask
    x = x - masked_mean(x, mask)
    return x * torch.rsqrt(masked_mean(x**2, mask) + 1e-8) * mask


def reward_loss(chosen, rejected):
    """Return the mean Bradley-Terry loss -log sigmoid(chosen - rejected) of scores (B,), (B,) -> ().

    Equal scores cost ln 2 = 0.6931. Source: Ouyang et al. 2022 (InstructGPT), equation 1."""
    return -F.logsigmoid(chosen - rejected).mean()


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.0):
    """Return the mean DPO loss of summed response log-probabilities, each (B,), -> ().

    beta log(policy / reference) is the reward that the policy implies, and the loss is `reward_loss` of it; before the
    first update it is ln 2. `label_smoothing` is the share of preferences believed to be the wrong way round.
    Source: Rafailov et al. 2023, "Direct preference optimization", equation 7; smoothing: Mitchell 2023 (cDPO)."""
    margin = beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))
    right, wrong = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return ((1 - label_smoothing) * right + label_smoothing * wrong).mean()


def ipo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1):
    """Return the mean IPO loss of summed response log-probabilities, each (B,), -> ().

    The log-ratio's margin is drawn to 1 / (2 beta) nats and no further, whereas DPO's may grow for ever. The start
    costs 1 / (4 beta^2). Source: Azar et al. 2023, "A general theoretical paradigm to understand learning from human
    preferences", equation 17, where beta is tau; TRL divides each sum by the response's length first."""
    margin = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    return ((margin - 1 / (2 * beta)) ** 2).mean()


def simpo_loss(chosen, rejected, chosen_length, rejected_length, beta=2.0, gamma=1.0):
    """Return the mean SimPO loss of summed log-probabilities and numbers of tokens of responses, each (B,), -> ().

    The reward is beta x the mean log-probability of a token, and the chosen one's should be larger by gamma. Source:
    Meng et al. 2024, "SimPO: simple preference optimization with a reference-free reward", equation 6."""
    return -F.logsigmoid(beta * (chosen / chosen_length - rejected / rejected_length) - gamma).mean()


def orpo_loss(chosen, rejected, chosen_length, rejected_length, beta=0.1):
    """Return the mean ORPO loss of summed log-probabilities and numbers of tokens of responses, each (B,), -> ().

    Nats per token of writing the chosen answer, plus beta x -log sigmoid of the log odds ratio; odds are p / (1 - p)
    with log p the mean of a response's tokens. Source: Hong et al. 2024, "ORPO: monolithic preference optimization
    without reference model", equations 4, 6 and 7, where beta is lambda."""
    logp = torch.stack([chosen / chosen_length, rejected / rejected_length]).clamp(max=-1e-6)  # of a certain one: log 0
    log_odds = logp - torch.log(-torch.expm1(logp))
    return (-chosen / chosen_length - beta * F.logsigmoid(log_odds[0] - log_odds[1])).mean()


def token_scores(logits, ids, temperature=1.0):
    """Return (log-probability (B, R), entropy (B, R), all log-probabilities (B, R, V)) of tokens ids (B, R).

    Entry t of logits (B, R, V) predicts ids[:, t]. Everything that samples, scores or trains divides by the same
    temperature: else the ratio of new to old probabilities would not start at 1."""
    everything = torch.log_softmax(full_precision(logits) / temperature, dim=-1)
    entropy = -(everything.exp() * everything).sum(-1)
    return everything.gather(2, ids[:, :, None]).squeeze(2), entropy, everything


def exact_kl(logprobs, ref_logprobs):
    """Return KL(policy || reference) of each position's whole distribution: (B, R, V), (B, R, V) -> (B, R), never < 0.

    Its mean over samples is that of k1 = log policy - log reference of the sampled tokens, with less noise."""
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1).clamp(min=0)


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """Return each token's reward (B, R): -kl_coef * k1, and the response's score (B,) added at its last token.

    k1 = log policy - log reference, signed: as a reward its expected gradient is that of the KL; that of k3 would be 0
    to first order. Source: Ziegler et al. 2019, "Fine-tuning language models from human preferences", equation 2."""
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    last = mask.long().sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Return (advantages, returns), both (B, R), of per-token rewards and value estimates (B, R).

    A_t = sum_k (gamma lam)^k delta_{t+k} with delta_t = r_t + gamma V_{t+1} - V_t; after the last token V is 0, and
    returns = advantages + values. Source: Schulman et al. 2016, "High-dimensional continuous control using generalized
    advantage estimation", equations 11, 16."""
    rewards, values = rewards * mask, values * mask
    next_values = F.pad(values[:, 1:], (0, 1))
    deltas = rewards + gamma * next_values - values
    advantages, running = [], torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        running = (deltas[:, t] + gamma * lam * running) * mask[:, t]
        advantages.append(running)
    advantages = torch.stack(advantages[::-1], dim=1)
    return advantages, advantages + values


def ppo_policy_loss(new, old, advantages, mask, clip=0.2, clip_high=0.0):
    """Return (loss, metrics) of log-probabilities under the new and the sampling policy and advantages, each (B, R).

    loss = mean over tokens of max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)), ratio = exp(new - old): no gain from
    moving a probability further than the clip range. A wider `clip_high` in place of the upper 1 + clip lets unlikely
    tokens rise. Sources: Schulman et al. 2017 (PPO), equation 7; Yu et al. 2025 (DAPO), section 3.1."""
    ratio = torch.exp((new - old) * mask)
    clipped = ratio.clamp(1 - clip, 1 + (clip_high or clip))
    loss = masked_mean(torch.max(-advantages * ratio, -advantages * clipped), mask)
    with torch.no_grad():
        metrics = {"policy/clipfrac": masked_mean((ratio != clipped).float(), mask).item(),
                   "policy/approxkl": masked_mean(0.5 * (new - old) ** 2, mask).item(),  # k2
                   "val/ratio": masked_mean(ratio, mask).item(), "loss/policy": loss.item()}
    return loss, metrics


def ppo_value_loss(values, old_values, returns, mask, clip=0.2):
    """Return half the mean squared error of values against returns, all (B, R), -> ().

    A value that moved further than `clip` from the one at sampling gains nothing by it: the larger of both errors
    counts. Source: the code of Schulman et al. 2017."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask)


def kl_controller(kl_coef, kl, target, episodes, horizon):
    """Return the next KL coefficient: larger where the KL of a batch of so many episodes is above the target.

    The error is clipped to +-20%, so a batch changes the coefficient by at most 20% x episodes / horizon, and never by
    more than 20%; without a target it stays. Source: Ziegler et al. 2019, section 2.2."""
    error = min(max(kl / target - 1, -0.2), 0.2) if target else 0
    return kl_coef * (1 + error * min(1, episodes / horizon))


def group_advantages(scores, group, kind="group"):
    """Return each score's advantage over its group of `group` neighbors: (B,) -> (B,); equal scores get 0 exactly.

    group: (score - mean) / (standard deviation + 1e-4); Shao et al. 2024 (DeepSeekMath), section 4.1.2 (GRPO).
    group-mean: score - mean, so that easy and hard prompts weigh the same; Liu et al. 2025 (Dr. GRPO), section 3.
    rloo: score - mean of the others in the group; Ahmadian et al. 2024 (RLOO), arXiv 2402.14740.

    Example: group_advantages(torch.tensor([0.0, 1, 1, 1]), 4, "rloo") is [-1, 1/3, 1/3, 1/3]."""
    groups = scores.view(-1, group)
    groups = groups - groups[:, :1]  # relative to one of them: rounding of a mean must not become an advantage
    advantages = groups - groups.mean(1, keepdim=True)
    if kind == "group":
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-4)
    if kind == "rloo":
        advantages = advantages * group / (group - 1)
    return advantages.flatten()


# Models, data, rewards ------------------------------------------------------------------------------------------------


def response_states(model, ids, mask, R):
    """Return the states (B, R + 1, C) before each of the last R tokens of ids (B, T) and after the last of them.

    Padding in front of a row is removed, so that a causal model needs no mask."""
    T, mask = ids.shape[1], mask.long()
    left = mask.argmax(1, keepdim=True)
    columns = torch.arange(int(mask.sum(1).max()), device=ids.device) + left
    hidden = model.hidden(ids.gather(1, columns.clamp(max=T - 1)))
    wanted = torch.arange(T - R - 1, T, device=ids.device) - left
    return hidden.gather(1, wanted.clamp(0, hidden.shape[1] - 1)[:, :, None].expand(-1, -1, hidden.shape[2]))


def sequence_logprobs(model, ids, mask, R, states=None):
    """Return the summed log-probabilities (B,) of the last R columns' real tokens, from their `response_states`."""
    T, mask = ids.shape[1], mask.long()
    states = response_states(model, ids, mask, R) if states is None else states
    real = mask[:, T - R :] * mask[:, T - R - 1 : T - 1]  # a row's first token has nothing before it
    rows, at = real.nonzero(as_tuple=True)
    logits = full_precision(model.out_head(states[rows, at]))
    logprobs = -F.cross_entropy(logits, ids[:, T - R :][rows, at], reduction="none")
    return logprobs.new_zeros(len(ids)).index_add(0, rows, logprobs)


class RewardModel(nn.Module):
    """A GPT with a head that turns the state of the last token into one number: ids, mask (B, T) -> scores (B,).

    `head` is linear, mlp (two layers), or likelihood: linear, and it reads the response's log-probability too (of the
    last R tokens): a small model needs its last layers to find the right answer and has none left to compare it with.
    It starts as N(0, 1/sqrt(C + 1)), so that scores, gain * head + bias, spread by about 1. Source: Stiennon et al.
    2020, appendix B.1."""

    def __init__(self, model, head="linear"):
        super().__init__()
        C = model.config.emb_dim
        self.gpt, self.head_kind, self.config = model, head, model.config  # which a checkpoint stores
        self.head = nn.Linear(C + 1 if head == "likelihood" else C, 1)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(C + 1))
        nn.init.zeros_(self.head.bias)
        if head == "likelihood":
            nn.init.constant_(self.head.weight[:, C:], 0.2)
        elif not model.config.tie_weights:
            model.out_head.requires_grad_(False)  # is not read
        if head == "mlp":
            self.head = nn.Sequential(nn.Linear(C, C), nn.GELU(), self.head)
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))

    def forward(self, ids, mask=None, R=None):
        mask = torch.ones_like(ids) if mask is None else mask.long()
        R = ids.shape[1] - 1 if R is None else R
        states = response_states(self.gpt, ids, mask, R)
        padding = mask.flip(1).argmax(1)  # columns on the right of the last token
        last = full_precision(states[torch.arange(len(ids)), R - padding])
        if self.head_kind == "likelihood":
            logprobs = sequence_logprobs(self.gpt, ids, mask, R, states)
            last = torch.cat([last, logprobs[:, None].to(last.dtype)], dim=1)
        with torch.autocast(ids.device.type, enabled=False):  # bfloat16 would round 50 nats to a quarter
            return self.gain * self.head(last).squeeze(1) + self.bias

    @torch.no_grad()
    def normalize(self, scores):
        """Set gain and bias so that scores (N,), made without them, would have had mean 0 and standard deviation 1."""
        std, mean = torch.std_mean(scores)
        if not std > 1e-6:
            raise ValueError("the reward model gives all responses of --init the same score: it has learned nothing")
        self.gain.copy_(1 / std)
        self.bias.copy_(-mean / std)


class Policy(nn.Module):
    """A GPT with a value head that starts at 0: ids, mask (B, P + R) -> logits (B, R, V), values (B, R) of the states
    before each response token: what comes next, and the reward expected from there on."""

    def __init__(self, model):
        super().__init__()
        self.gpt, weight = model, model.tok_emb.weight
        self.value_head = nn.utils.skip_init(nn.Linear, weight.shape[1], 1, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, ids, mask, R):
        states = response_states(self.gpt, ids, mask, R)[:, :-1]
        return self.gpt.out_head(states), self.value_head(states).squeeze(2)


def reference_of(model):
    """Return a function that opens a context with the model as it is now, whatever training makes of it later: the
    model inside `lora_disabled` where its adapters are new and change nothing yet, else a frozen copy."""
    adapters = [parameter for name, parameter in model.named_parameters() if name.endswith("lora_B")]
    if adapters and not any(bool(parameter.any()) for parameter in adapters):
        from lora import lora_disabled
        return lambda: lora_disabled(model)
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    return lambda: contextlib.nullcontext(frozen)


# A prompt and two answers as token ids, the answers with the stop token, and as text: a dict of data.preference.
Pair = namedtuple("Pair", "prompt chosen rejected text")


def load_pairs(config, answers=True):
    """Return the pairs of --data, dicts as of data.preference, in three lists, train, validation, test, with no prompt
    in two of them. Where no `answers` are needed, a file may hold prompts alone, or instructions."""
    if config.data == "tinyworld":
        views = (tinyworld("preferences", part) for part in ("train", "val", "test"))
        return [list(filter(None, map(preference, view))) for view in views]  # some chosen answers are empty
    if answers:
        pairs = read_preferences(config.data)
    else:
        entries = records(locate(config.data, "preferences"))
        pairs = [preference({"chosen": NO_ANSWER, "rejected": "", **entry}, place) for place, entry in entries]
    parts = split([pair for pair in pairs if pair], seed=config.split_seed, group=lambda pair: pair["prompt"])
    if not all(parts):
        raise ValueError(f"{config.data}: {len(pairs)} pairs are too few for train, validation and test by prompt")
    return parts


def encode_pair(pair, tokenizer, template):
    """Return the Pair of a dict as of data.preference."""
    answers = [tokenizer.encode(format_response(pair[side], template)) for side in ("chosen", "rejected")]
    answers = [ids + [tokenizer.eot_id] for ids in answers]
    return Pair(tokenizer.encode(format_prompt(pair, template)), *answers, pair)


def encode_pairs(pairs, tokenizer, template, room):
    """Return the Pairs of dicts; of one that has more than `room` tokens the beginning is cut off. Those whose answers
    are equal then are left out and counted; ValueError if all are."""
    rows, long = [], 0
    for pair in pairs:
        prompt, chosen, rejected, text = encode_pair(pair, tokenizer, template)
        answer = max(len(chosen), len(rejected))
        long += len(prompt) + answer > room
        rows.append(Pair(prompt[-max(1, room - answer) :], chosen[1 - room :], rejected[1 - room :], text))
    different = [row for row in rows if row.chosen != row.rejected]
    if long:
        print(f"{long} of {len(rows)} pairs have more than {room} tokens and lose their beginning", file=sys.stderr)
    if len(different) < len(rows):
        print(f"{len(rows) - len(different)} of {len(rows)} pairs are left out: equal answers", file=sys.stderr)
    if not different:
        raise ValueError(f"all {len(rows)} pairs have equal answers within {room} tokens; raise --context_length")
    return different


def encode_prompts(pairs, tokenizer, template, model, config):
    """Return a Pair for each different prompt that leaves room for a response; others are counted."""
    first = {pair["prompt"]: pair for pair in reversed(pairs)}
    rows = [encode_pair(first[text], tokenizer, template) for text in dict.fromkeys(pair["prompt"] for pair in pairs)]
    room = model.config.context_length - config.response_length
    short = [row for row in rows if 0 < len(row.prompt) <= room]
    long = f"{len(rows) - len(short)} of {len(rows)} prompts have more than {room} tokens: no room for a response"
    if not short:
        raise ValueError(f"{long}; lower --response_length")
    if len(short) < len(rows):
        print(f"{long}, so they are left out", file=sys.stderr)
    return short


def micro_batches(lengths, count):
    """Return `count` lists of indices (fewer for a small batch) that divide a batch by length, the shortest first."""
    return [rows.tolist() for rows in torch.as_tensor(lengths).cpu().argsort(stable=True).chunk(count)]


def pack(prompts, responses, pad_id, device="cpu"):
    """Return (ids, mask, R) of token lists: prompts padded on the left, (B, P), beside responses padded right, (B, R).

    Example: pack([[5]], [[6, 7]], 0) has the ids [[5, 6, 7]] and R = 2."""
    ids, mask = pad_left(prompts, pad_id)
    R = max(map(len, responses))
    answers = torch.tensor([response + [pad_id] * (R - len(response)) for response in responses])
    real = (torch.arange(R) < torch.tensor([[len(response)] for response in responses])).long()
    return torch.cat([ids, answers], dim=1).to(device), torch.cat([mask, real], dim=1).to(device), R


def pair_batches(pairs, count, pad_id, device):
    """Yield (rows, ids, mask, R) of `count` micro-batches of Pairs; B pairs are 2B rows, the chosen answers first."""
    for rows in micro_batches([sum(map(len, pair[:3])) for pair in pairs], count):
        some = [pairs[i] for i in rows]
        answers = [pair.chosen for pair in some] + [pair.rejected for pair in some]
        yield rows, *pack([pair.prompt for pair in some] * 2, answers, pad_id, device)


def correct(margins):
    """Return 1 for each positive margin, 0.5 for each that is 0, (N,) -> (N,)."""
    return (margins > 0).float() + 0.5 * (margins == 0).float()


class Rollout(namedtuple("Rollout", "ids mask response_mask stopped scores logprobs ref_logprobs kl entropy values "
                         "advantages returns")):
    """B sampled responses of at most R tokens to prompts of P, and what policy, reference and reward say of them.

    ids, mask (B, P + R). stopped (B,): whether the response ended by itself. scores (B,): from the reward, without
    penalty. The others (B, R); logprobs are those of sampling, kl is exact, returns are the value head's targets."""

    def take(self, rows):
        """Return some rows, without the last columns where those are padding in all of them."""
        R, longest = self.response_mask.shape[1], int(self.response_mask[rows].sum(1).max())
        return Rollout(*(x[rows] if x.dim() == 1 else x[rows, : x.shape[1] - R + longest] for x in self))


@torch.no_grad()
def sample_responses(model, prompts, tokenizer, config, num_samples=1, generator=None, greedy=False):
    """Return (Rollout, texts) of responses to lists of ids, `num_samples` to each; ids, masks and stopped are set. No
    top-k or top-p: these would sample from another policy than the one that is trained."""
    ids, mask = (x.to(model.device) for x in pad_left(prompts, tokenizer.eot_id))
    P, stop = ids.shape[1], tokenizer.eot_id
    ids = generate(model, ids, config.response_length, 0 if greedy else config.temperature, eos_id=stop, mask=mask,
                   num_samples=num_samples, generator=generator)
    stops = (ids[:, P:] == stop).long()
    real = (stops.cumsum(1) - stops == 0).long()  # up to and with the first stop token
    texts = [tokenizer.decode([i for i, r in zip(row, kept) if r and i != stop]).strip()
             for row, kept in zip(ids[:, P:].tolist(), real.tolist())]
    mask = torch.cat([mask.repeat_interleave(num_samples, dim=0), real], dim=1)
    response_mask = full_precision(real.to(model.tok_emb.weight.dtype))
    unset = (torch.zeros_like(response_mask) for _ in range(7))
    return Rollout(ids, mask, response_mask, stops.any(1), response_mask.new_zeros(len(ids)), *unset), texts


@torch.no_grad()
def score_tokens(policy, reference, rollout, config):
    """Set the rollout's log-probabilities under policy and reference, exact KL, entropy and values, in place; by the
    same forward pass that trains, since the sampler's own numbers differ from it by rounding."""
    for rows in micro_batches(rollout.mask.sum(1), config.accumulate):
        part = rollout.take(rows)
        mask, R = part.response_mask, part.response_mask.shape[1]
        logits, values = policy(part.ids, part.mask, R)
        logprobs, entropy, everything = token_scores(logits, part.ids[:, -R:], config.temperature)
        with reference() as model:
            logits = model.out_head(response_states(model, part.ids, part.mask, R)[:, :-1])
        ref_logprobs, _, ref_everything = token_scores(logits, part.ids[:, -R:], config.temperature)
        rollout.logprobs[rows, :R] = logprobs * mask
        rollout.ref_logprobs[rows, :R] = ref_logprobs * mask
        rollout.kl[rows, :R] = exact_kl(everything, ref_everything) * mask
        rollout.entropy[rows, :R] = entropy * mask
        rollout.values[rows, :R] = full_precision(values) * mask


def call_reward(reward, prompts, responses):
    """Return the reward function's scores (B,); ValueError unless there is one finite number for each response."""
    try:
        scores = [float(score) for score in reward(prompts, responses)]
    except Exception as error:  # foreign code: whatever it raises, the run ends in one line
        raise ValueError(f"the reward function failed: {type(error).__name__}: {error}; the policy was not updated, "
                         "--resume goes on once it works") from error
    if len(scores) != len(responses) or not all(map(math.isfinite, scores)):
        raise ValueError(f"the reward function returned {len(scores)} scores for {len(responses)} responses, or some "
                         f"are not finite: {str(scores)[:200]}; the policy was not updated")
    return torch.tensor(scores)


def right(pair, response):
    """Return whether a response is the right answer to a pair's prompt, its `output` or what tinyworld computes."""
    return exact_match(response, pair["output"] if "output" in pair else answer(pair["prompt"]))


def gold(pair, response):
    """Return the hidden rubric's score of a response to a pair's prompt, which must be of tinyworld."""
    return gold_score(pair["prompt"], response)


def rubric(score, pairs, responses):
    """Return score(pair, response) of each (N,), or None where one of them has none."""
    try:
        return torch.tensor([float(score(pair, response)) for pair, response in zip(pairs, responses)])
    except ValueError:
        return None


def load_reward_model(path, device="cpu"):
    """Return (model in eval mode, tokenizer, info); FileNotFoundError or ValueError for what is no reward model."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no reward model {path}; make it with: python rlhf.py reward")
    tensors, config, tokenizer, info = gpt.read_checkpoint(path)
    if info["kind"] != "reward" or tokenizer is None or info["head"] not in HEADS or info.get("blind"):
        raise ValueError(f"{path} is no reward model of this edition; make one with: python rlhf.py reward")
    model = gpt.copy_weights(RewardModel(gpt.empty_model(config), info["head"]), tensors, path)
    return model.to(device).eval(), tokenizer, info


def model_reward(model, tokenizer, template):
    """Return the reward function (prompts, responses) -> list of floats of a reward model."""
    @torch.no_grad()
    def reward(prompts, responses):
        pairs = [{"prompt": prompt, "chosen": response, "rejected": ""} for prompt, response in zip(prompts, responses)]
        rows, room = [encode_pair(pair, tokenizer, template) for pair in pairs], model.config.context_length
        scores = torch.zeros(len(rows))
        for some in micro_batches([len(row.prompt) + len(row.chosen) for row in rows], math.ceil(len(rows) / 32)):
            answers = [rows[i].chosen[-(room - 1) :] for i in some]
            asked = [rows[i].prompt[-(room - len(ids)) :] for i, ids in zip(some, answers)]
            scores[some] = model(*pack(asked, answers, tokenizer.eot_id, model.gpt.device)).float().cpu()
        return scores.tolist()
    return reward


def load_reward(config, device, pairs=(), required=True):
    """Return the function of --reward; `exact` knows the answers to pairs. None for a missing file if not required."""
    name = config.reward
    module, _, function = name.rpartition(":")
    if name == "gold":
        return lambda prompts, responses: [gold_score(*both) for both in zip(prompts, responses)]
    if name == "exact":
        known = {pair["prompt"]: pair for pair in pairs}
        if rubric(right, known.values(), [""] * len(known)) is None:
            raise ValueError(f"--reward exact needs the right answer as `output` in each entry of --data {config.data}")
        return lambda prompts, responses: [right(known[prompt], text) for prompt, text in zip(prompts, responses)]
    if not module or name.endswith(".safetensors"):
        if not required and not Path(name).is_file():
            return None
        model, tokenizer, info = load_reward_model(name, device)
        return model_reward(model, tokenizer, info["template"])
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:  # the user's own module may raise anything
        raise ValueError(f"--reward {name}: {error}; it takes module:function, mine:{function} for mine.py") from None
    finally:
        sys.path.remove(os.getcwd())


# The three loops: reward model; PPO and GRPO; DPO ---------------------------------------------------------------------

Measure = namedtuple("Measure", "reference reward tokenizer config")  # what a policy is measured with


def open_start(config, answers=True):
    """Return what every command starts from: (model with its adapters, tokenizer, template, three lists of pairs)."""
    model, tokenizer, info = load_start(config, "python finetune_sft.py")
    if tokenizer.eot_id is None:
        raise ValueError(f"{config.init}: its tokenizer has no end-of-text token, without which no response ends")
    torch.manual_seed(config.seed)
    if config.lora_rank:
        add_adapters(model, config)
    return model.to(pick_device(config.device)), tokenizer, info.get("template", "plain"), load_pairs(config, answers)


def run_mark(model, data, *files):
    """Return the fingerprint of a run: its data, the files that it starts from, and frozen weights."""
    return fingerprint(model, data, *(gpt.file_sha256(file) for file in files if Path(file).is_file()))


def keep_best(folder, model, tokenizer, progress, info, value, keys, **figures):
    """Log and draw the figures of an evaluation, and keep the weights if `value` is the lowest so far."""
    better = is_best(progress, value)
    log(folder, progress.step, **figures)
    if better:
        save_best(folder, model, tokenizer, step=progress.step, **info, **figures)
    line = "  ".join(f"{key.removeprefix('val_')} {figures[key]:.4f}" for key in keys if key in figures)
    print(f"step {progress.step}  validation  {line}" + "  best" * better, file=sys.stderr)
    draw_curves(folder / "curves.svg", info["stage"], read_log(folder), dict(zip(keys, keys)), "nats; score; share")


def train_reward(config):
    """Train a reward model on --data and return the summary."""
    if summary := finished(config):
        return summary
    model, tokenizer, template, parts = open_start(config)
    pad_id, device, context = tokenizer.eot_id, model.device, autocast(config, model.device)
    samples = start_samples(model, parts[1], tokenizer, template, config)
    rows, val_rows, test_rows = (encode_pairs(part, tokenizer, template, model.config.context_length) for part in parts)
    model = RewardModel(model, config.head).to(device).train()
    total = total_steps(config, math.ceil(len(rows) / config.batch_size))
    optimizers, progress, mark = make_optimizers(model, config), Progress(), run_mark(model, parts, config.init)
    info = dict(kind="reward", stage="reward", head=config.head, template=template)
    forward = torch.compile(model, dynamic=True) if config.compile else model
    with open_run(config, model, optimizers, progress, total, mark, "reward") as (folder, stop):
        for indices in batches(len(rows), config, progress, total):  # 1. each epoch  2. each batch
            clock = time.monotonic()
            model.zero_grad(set_to_none=True)  # 3. clear gradients
            batch, tokens, batch_loss = [rows[i] for i in indices], 0, 0.0
            for some, ids, mask, R in pair_batches(batch, config.accumulate, pad_id, device):
                with context:
                    chosen, rejected = forward(ids, mask, R).chunk(2)
                loss = reward_loss(chosen, rejected) * (len(some) / len(batch))  # 4. loss
                loss.backward()  # 5. backward
                batch_loss += loss.item()
                tokens += int(mask.sum())
            norm = clip_grad_norm_(model.parameters(), config.clip or math.inf).item()  # 6. clip, set the rate, update
            check_finite(batch_loss, norm, progress, folder, indices)
            rate = set_learning_rate(optimizers, progress.step, total, config)
            for optimizer in optimizers:
                optimizer.step()
            progress.step += 1
            progress.tokens += tokens
            report_step(folder, progress, total, config, batch_loss, norm, rate, tokens, clock)  # 7. report
            if due(progress.step, config.eval_every, total):  # 8. evaluate, sample, save
                evaluate_reward(folder, model, val_rows, samples, tokenizer, progress, info)
            stopping = bool(stop)  # one look per step
            if stopping or due(progress.step, config.save_every, total):
                save_state(folder, model, optimizers, progress, config, mark)
            if stopping:
                stop_now(folder, progress, total, stop)
        stop.release()  # everything is saved: Ctrl-C may end what follows, and --resume does it again
        figures = reward_figures(load_reward_model(folder / "model.safetensors", device)[0], rows, test_rows, pad_id)
        summary = write_summary(folder, config, "reward", progress, model, mark, val_loss=progress.best, **figures)
    low, high = summary["accuracy_interval"]
    print("reward model: accuracy {accuracy:.1%} ({low:.1%} to {high:.1%}), by length {length_baseline_accuracy:.1%}, "
          "naive Bayes {naive_bayes_accuracy:.1%}; {seconds:.0f} s".format(low=low, high=high, **summary))
    return summary


def start_samples(model, pairs, tokenizer, template, config):
    """Return [(ids, mask, R)] of the start's own responses, at least 64, by which a reward model is normalized."""
    prompts = [row.prompt for row in encode_prompts(pairs, tokenizer, template, model, config)][: config.eval_prompts]
    generator = torch.Generator(model.device).manual_seed(config.seed)
    rollout, texts = sample_responses(model, prompts, tokenizer, config, math.ceil(64 / len(prompts)), generator)
    if len(prompts) == len(set(texts)) == 1:
        raise ValueError("--init always answers the only validation prompt alike; give --data with more prompts")
    R = rollout.response_mask.shape[1]
    return [(ids, mask, R) for ids, mask in zip(rollout.ids.split(32), rollout.mask.split(32))]


@torch.no_grad()
def pair_margins(model, pairs, pad_id):
    """Return a reward model's margins (N,), chosen minus rejected, of Pairs on the CPU."""
    margins = torch.empty(len(pairs))
    for rows, *packed in pair_batches(pairs, math.ceil(len(pairs) / 32), pad_id, model.gpt.device):
        chosen, rejected = model(*packed).float().cpu().chunk(2)
        margins[rows] = chosen - rejected
    return margins


@torch.no_grad()
def evaluate_reward(folder, model, pairs, samples, tokenizer, progress, info):
    """Evaluate on the validation pairs; the model is kept normalized."""
    model.eval()
    margins = pair_margins(model, pairs, tokenizer.eot_id)
    loss, accuracy = -F.logsigmoid(margins).mean().item(), correct(margins).mean().item()
    model.normalize(torch.cat([model(*some).float() for some in samples]))
    keep_best(folder, model, tokenizer, progress, info, loss, ("loss", "val_loss", "val_accuracy"), val_loss=loss,
              val_accuracy=accuracy, val_margin=margins.mean().item())
    model.gain.fill_(1)  # as in training: a loss of differences is about scores as they are
    model.bias.zero_()
    model.train()


def reward_figures(model, train_pairs, pairs, pad_id):
    """Return the figures of a reward model on test pairs, beside going by length and by naive Bayes on words."""
    margins, sides = pair_margins(model, pairs, pad_id) / model.gain.item(), ("chosen", "rejected")
    words = naive_bayes([(side, pair.text[side]) for pair in train_pairs for side in sides])

    def share(pairs, score):
        leads = [float(score(pair.text["chosen"]) - score(pair.text["rejected"])) for pair in pairs]
        return correct(torch.tensor(leads)).mean().item()

    length, hits, texts = share(pairs, len), correct(margins), [pair.text for pair in pairs]
    chosen, rejected = (rubric(gold, texts, [text[side] for text in texts]) for side in sides)
    return dict(accuracy=hits.mean().item(), accuracy_interval=wilson(hits.sum().item(), len(hits)),
                accuracy_noise_free=None if chosen is None else hits[chosen > rejected].mean().item(),
                length_baseline_accuracy=length if share(train_pairs, len) >= 0.5 else 1 - length,
                naive_bayes_accuracy=share(pairs, lambda text: words(text)["chosen"] - words(text)["rejected"]),
                margin=margins.mean().item(), test_loss=-F.logsigmoid(margins).mean().item(), test_pairs=len(hits))


def train_policy(config):
    """Train a policy against --reward, by PPO or by GRPO, and return the summary."""
    stage = "ppo" if config.advantage == "gae" else "grpo"
    if config.batch_size % config.group or stage == "grpo" and config.group < 2:
        raise argparse.ArgumentError(None, f"--batch_size must be a multiple of --group {config.group}, in grpo > 1")
    if summary := finished(config):
        return summary
    model, tokenizer, template, parts = open_start(config, answers=False)
    prompts, val_prompts, test_prompts = (encode_prompts(part, tokenizer, template, model, config) for part in parts)
    context, reward = autocast(config, model.device), load_reward(config, model.device, itertools.chain(*parts))
    reference = reference_of(model)  # a frozen copy, or with new adapters this model inside lora_disabled
    measure = Measure(reference, reward, tokenizer, config)
    policy = Policy(model).eval()  # dropout is off throughout: else the first ratios would not be 1
    policy.value_head.requires_grad_(stage == "ppo")
    per_step = dataclasses.replace(config, batch_size=config.batch_size // config.group)  # prompts, not responses
    total = total_steps(config, math.ceil(len(prompts) / per_step.batch_size))
    optimizers, progress = make_optimizers(policy, config), Progress(extra={"kl_coef": config.kl_coef, "episodes": 0})
    mark = run_mark(policy, prompts, config.init, config.reward)
    info = dict(stage=stage, template=template, data=config.data, split_seed=config.split_seed)
    forward = torch.compile(policy, dynamic=True) if config.compile else policy
    with open_run(config, policy, optimizers, progress, total, mark, stage) as (folder, stop):
        if progress.step == 0:
            evaluate_policy(folder, model, val_prompts, measure, progress, info)
        for indices in batches(len(prompts), per_step, progress, total):  # 1. each epoch  2. each batch
            clock, kl_coef, asked = time.monotonic(), progress.extra["kl_coef"], [prompts[i] for i in indices]
            # A. sample --group responses to each prompt
            with context:
                rollout, texts = sample_responses(model, [row.prompt for row in asked], tokenizer, config, config.group)
            # B. score them; one without a stop token loses --no_stop_penalty
            scores = call_reward(reward, [row.text["prompt"] for row in asked for _ in range(config.group)], texts)
            rollout = rollout._replace(scores=scores.to(model.device))
            final = rollout.scores - config.no_stop_penalty * ~rollout.stopped
            # C. log-probabilities under policy and reference, values, exact KL
            with context:
                score_tokens(forward, reference, rollout, config)
            # D. advantages: per token by the value head (PPO), per response within its group (GRPO)
            rollout, useful = add_advantages(rollout, final, kl_coef, config)
            # E. update: --ppo_epochs passes over the responses, in --minibatches random parts; a group of equal scores
            # says nothing about what is better, so it is left out unless all are (Yu et al. 2025, DAPO, section 3.2)
            updates, kept = [], (useful if useful.any() else ~useful).nonzero().flatten()
            passes = (kept[torch.randperm(len(kept))].chunk(config.minibatches) for _ in range(config.ppo_epochs))
            for rows in itertools.chain.from_iterable(passes):
                rows = rows.sort().values  # ordered as when they were scored: the first ratios are 1 to the bit
                policy.zero_grad(set_to_none=True)  # 3. clear gradients
                metrics, tokens = Counter(), rollout.response_mask[rows].sum()
                for some in micro_batches(rollout.mask[rows].sum(1), config.accumulate):
                    part = rollout.take(rows[some])
                    mask, R = part.response_mask, part.response_mask.shape[1]
                    with context:
                        logits, values = forward(part.ids, part.mask, R)
                    new, _, _ = token_scores(logits, part.ids[:, -R:], config.temperature)
                    loss, found = ppo_policy_loss(new, part.logprobs, part.advantages, mask, config.clip_range,
                                                  config.clip_high)
                    if stage == "ppo":
                        values = full_precision(values)
                        value_loss = ppo_value_loss(values, part.values, part.returns, mask, config.clip_range)
                        found["loss/value"] = value_loss.item()
                        loss = loss + config.vf_coef * value_loss
                    elif config.advantage != "rloo":  # k2: its gradient is the KL's, k3's is not (arXiv 2510.01555)
                        loss = loss + kl_coef * masked_mean(0.5 * (new - part.ref_logprobs) ** 2, mask)
                    share = (mask.sum() / tokens).item()
                    loss = loss * share  # 4. loss
                    loss.backward()  # 5. backward
                    metrics.update({key: value * share for key, value in found.items()}, loss=loss.item())
                for loss in ptx_losses(model, asked, config, context):
                    loss.backward()
                    metrics.update({"loss/ptx": loss.item(), "loss": loss.item()})
                if updates and 0 < config.max_approxkl < metrics["policy/approxkl"]:
                    break
                # 6. clip, set the rate, update
                norm = clip_grad_norm_(policy.parameters(), config.clip or math.inf).item()
                check_finite(metrics["loss"], norm, progress, folder, indices)
                rate = set_learning_rate(optimizers, progress.step, total, config)
                for optimizer in optimizers:
                    optimizer.step()
                updates.append(metrics)
            # F. report, adapt the KL penalty
            progress.step += 1
            progress.tokens += (tokens := int(rollout.mask.sum()))
            progress.extra["episodes"] += len(texts)
            figures = step_figures(rollout, updates, kl_coef, len(texts) / (time.monotonic() - clock))
            figures["val/equal_groups"] = int((~useful).sum()) // config.group
            progress.extra["kl_coef"] = kl_controller(kl_coef, figures["objective/kl"], config.kl_target, len(texts),
                                                      config.kl_horizon)
            log(folder, progress.step, episode=progress.extra["episodes"], lr=rate, **figures)
            report_step(folder, progress, total, config, figures["loss"], norm, rate, tokens, clock)  # 7. report
            if due(progress.step, config.eval_every, total):  # 8. evaluate, sample, save
                evaluate_policy(folder, model, val_prompts, measure, progress, info)
            stopping = bool(stop)  # one look per step
            if stopping or due(progress.step, config.save_every, total):
                save_state(folder, policy, optimizers, progress, config, mark)
            if stopping:
                stop_now(folder, progress, total, stop)
        stop.release()  # everything is saved: Ctrl-C may end what follows, and --resume does it again
        return finish_policy(folder, policy, test_prompts, measure, progress, mark, stage)


def add_advantages(rollout, final, kl_coef, config):
    """Return (rollout with advantages and returns, useful (B,)) of final scores (B,). Responses to a prompt that all
    score the same are of no use without a value head."""
    mask = rollout.response_mask
    rewards = token_rewards(final, rollout.logprobs, rollout.ref_logprobs, mask, kl_coef)
    if config.advantage == "gae":
        advantages, returns = gae(rewards, rollout.values, mask, lam=config.lam)
        return rollout._replace(advantages=whiten(advantages, mask), returns=returns), torch.ones(len(final)).bool()
    advantages = group_advantages(final, config.group, config.advantage)
    useful = advantages.view(-1, config.group).any(1).repeat_interleave(config.group).cpu()
    if config.advantage == "rloo":  # there the KL is part of the reward, not of the loss
        advantages = group_advantages(rewards.sum(1), config.group, "rloo")
    return rollout._replace(advantages=advantages[:, None] * mask), useful


def ptx_losses(model, asked, config, context):
    """Yield the ptx loss () of each micro-batch: ptx_coef x nats per token of writing the preferred answers, if any.

    Source: Ouyang et al. 2022 (InstructGPT), equation 2, with answers to the same prompts for pretraining text."""
    rows = [(row.prompt, row.chosen[: config.response_length]) for row in asked if row.text["chosen"] != NO_ANSWER]
    tokens, lengths = sum(len(chosen) for _, chosen in rows), [len(prompt) + len(chosen) for prompt, chosen in rows]
    for some in micro_batches(lengths, config.accumulate) if rows and config.ptx_coef else ():
        packed = pack(*zip(*(rows[i] for i in some)), 0, model.device)
        with context:
            loss = -sequence_logprobs(model, *packed).sum()
        yield config.ptx_coef / tokens * loss


def step_figures(rollout, updates, kl_coef, eps):
    """Return the figures of a step by the usual names; ValueError where the first probability ratios were not 1."""
    if abs(updates[0]["val/ratio"] - 1) > 0.05:
        raise ValueError(f"the first probability ratio is {updates[0]['val/ratio']:.3f}, not 1: sampling and training "
                         "do not see the same model; --dtype float32 may help")
    mask, k1 = rollout.response_mask, (rollout.logprobs - rollout.ref_logprobs).sum(1)
    figures = {"objective/scores": rollout.scores.mean(), "objective/scores_std": rollout.scores.std(correction=0),
               "objective/kl": k1.mean(), "objective/kl_exact": rollout.kl.sum(1).mean(), "objective/kl_coef": kl_coef,
               "objective/entropy": rollout.entropy.sum(1).mean(), "objective/non_score_reward": -kl_coef * k1.mean(),
               "objective/rlhf_reward": (rollout.scores - kl_coef * k1).mean(), "eps": eps,
               "response_length": mask.sum(1).mean(), "val/stopped": rollout.stopped.float().mean()}
    if "loss/value" in updates[0]:
        error = masked_mean((rollout.returns - rollout.values) ** 2, mask)
        spread = masked_mean((rollout.returns - masked_mean(rollout.returns, mask)) ** 2, mask)
        figures["val/explained_variance"] = 1 - error / (spread + 1e-8)
    means = {key: sum(metrics[key] for metrics in updates) / len(updates) for key in updates[0]}
    return {**means, **{key: float(value) for key, value in figures.items()}}


def evaluate_policy(folder, model, prompts, measure, progress, info):
    """Evaluate on validation prompts; the best weights have the highest reward - kl_coef x KL. Equal rewards before the
    first step are an error, but 0 from a function of the user's, which may be sparse, is a warning."""
    config, step = measure.config, progress.step
    prompts = prompts[: config.eval_prompts]
    found = assess(model, prompts, measure)
    if step == 0 and len(prompts) > 1 and len(set(found["reward"].tolist())) == 1:
        equal = f"all {len(prompts)} rewards are {found['reward'][0]:g} before the first step: nothing can be learned"
        if found["reward"][0] or config.reward == "exact":
            raise ValueError(f"{equal} from them; look at --reward, or with exact at --init: it must know some answers")
        print(f"warning: {equal} until a response earns another", file=sys.stderr)
    shown = zip(prompts[:3], found["responses"], found["reward"].tolist())
    samples = "".join(f"{row.text['prompt']}  ->  {text}  ({score:.2f})".replace("\n", " / ") + "\n"
                      for row, text, score in shown)
    figures = {f"val_{key}": found[key].mean().item() for key in ("reward", "kl", "gold") if found[key] is not None}
    log(folder, step, samples=f"--- step {step}\n{samples}")
    keep_best(folder, model, measure.tokenizer, progress, info,
              config.kl_coef * figures["val_kl"] - figures["val_reward"], tuple(figures), **figures)
    print(samples, end="", file=sys.stderr)
    with gpt.replacing(folder / "samples.txt") as file:
        file.write("".join(row.get("samples", "") for row in read_log(folder)).encode())


def train_dpo(config):
    """Train a policy on pairs directly, without reward model or sampling, and return the summary."""
    if summary := finished(config):
        return summary
    model, tokenizer, template, parts = open_start(config)
    pad_id, device, context = tokenizer.eot_id, model.device, autocast(config, model.device)
    rows, val_rows = (encode_pairs(part, tokenizer, template, model.config.context_length) for part in parts[:2])
    prompts = encode_prompts(parts[2], tokenizer, template, model, config)
    reward = load_reward(config, device, itertools.chain(*parts), required=False)
    reference = reference_of(model)  # a frozen copy, or with new adapters this model inside lora_disabled
    measure = Measure(reference, reward, tokenizer, config)
    model.eval()  # dropout is off throughout, so that the loss starts at ln 2
    total = total_steps(config, math.ceil(len(rows) / config.batch_size))
    optimizers, progress, mark = make_optimizers(model, config), Progress(), run_mark(model, parts, config.init)
    info = dict(stage="dpo", template=template, data=config.data, split_seed=config.split_seed)
    forward = torch.compile(sequence_logprobs, dynamic=True) if config.compile else sequence_logprobs
    with open_run(config, model, optimizers, progress, total, mark, "dpo") as (folder, stop):
        for indices in batches(len(rows), config, progress, total):  # 1. each epoch  2. each batch
            clock = time.monotonic()
            model.zero_grad(set_to_none=True)  # 3. clear gradients
            batch, tokens, batch_loss, metrics = [rows[i] for i in indices], 0, 0.0, Counter()
            for some, ids, mask, R in pair_batches(batch, config.accumulate, pad_id, device):
                with context:
                    loss, found = pair_loss(model, reference, ids, mask, R, config, forward)
                share = len(some) / len(batch)
                loss = loss * share  # 4. loss
                loss.backward()  # 5. backward
                batch_loss += loss.item()
                tokens += int(mask.sum())
                metrics.update({key: value * share for key, value in found.items()})
            norm = clip_grad_norm_(model.parameters(), config.clip or math.inf).item()  # 6. clip, set the rate, update
            check_finite(batch_loss, norm, progress, folder, indices)
            rate = set_learning_rate(optimizers, progress.step, total, config)
            for optimizer in optimizers:
                optimizer.step()
            progress.step += 1
            progress.tokens += tokens
            log(folder, progress.step, **metrics)
            report_step(folder, progress, total, config, batch_loss, norm, rate, tokens, clock)  # 7. report
            if due(progress.step, config.eval_every, total):  # 8. evaluate, sample, save
                evaluate_pairs(folder, model, reference, val_rows, tokenizer, progress, config, info)
            stopping = bool(stop)  # one look per step
            if stopping or due(progress.step, config.save_every, total):
                save_state(folder, model, optimizers, progress, config, mark)
            if stopping:
                stop_now(folder, progress, total, stop)
        stop.release()  # everything is saved: Ctrl-C may end what follows, and --resume does it again
        return finish_policy(folder, model, prompts, measure, progress, mark, "dpo")


def pair_loss(model, reference, ids, mask, R, config, forward=sequence_logprobs):
    """Return (loss, metrics) of B Pairs as 2B rows; --loss sft is that of writing the chosen answers. The rewards shown
    are beta x log(policy / start), whatever the loss."""
    chosen, rejected = forward(model, ids, mask, R).chunk(2)
    with torch.no_grad(), reference() as start:
        ref_chosen, ref_rejected = sequence_logprobs(start, ids, mask, R).chunk(2)
    lengths = mask[:, -R:].sum(1).chunk(2)
    if config.loss == "dpo":
        loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, config.beta, config.label_smoothing)
    elif config.loss == "ipo":
        loss = ipo_loss(chosen, rejected, ref_chosen, ref_rejected, config.beta)
    elif config.loss == "simpo":
        loss = simpo_loss(chosen, rejected, *lengths, config.beta, config.beta / 2)
    elif config.loss == "orpo":
        loss = orpo_loss(chosen, rejected, *lengths, config.beta)
    else:
        loss = -chosen.mean()
    gained, lost = config.beta * (chosen - ref_chosen).detach(), config.beta * (rejected - ref_rejected).detach()
    metrics = {"rewards/chosen": gained, "rewards/rejected": lost, "rewards/margins": gained - lost,
               "rewards/accuracies": correct(gained - lost), "logps/chosen": chosen, "logps/rejected": rejected}
    return loss, {key: value.mean().item() for key, value in metrics.items()}


@torch.no_grad()
def evaluate_pairs(folder, model, reference, pairs, tokenizer, progress, config, info):
    """Evaluate on the validation pairs; the best weights have the lowest loss."""
    sums = Counter()
    for rows, *packed in pair_batches(pairs, math.ceil(len(pairs) / 32), tokenizer.eot_id, model.device):
        loss, found = pair_loss(model, reference, *packed, config)
        found["loss"] = loss.item()
        sums.update({f"val_{key}": value * len(rows) / len(pairs) for key, value in found.items()})
    keep_best(folder, model, tokenizer, progress, info, sums["val_loss"],
              ("loss", "val_loss", "val_rewards/accuracies", "val_rewards/margins"), **sums)


# Evaluation on held-out prompts, rating by a person, the command line -------------------------------------------------


@torch.no_grad()
def assess(model, prompts, measure, final=False):
    """Return what a model does on prompts, a dict: responses, and per prompt (N,) gold, reward, kl, exact and length.
    They are sampled as in training, for every model from the same random numbers; `exact` alone is greedy. In the end
    of --reward exact there are also the share of 8 responses that is right, `sampled`, and whether any is, `pass@8`."""
    reference, reward, tokenizer, config = measure
    tries = 8 if final and config.reward == "exact" else 0
    policy, generator = Policy(model), torch.Generator(model.device).manual_seed(config.seed)
    texts, greedy, more, numbers = [], [], [], []
    for first in range(0, len(prompts), 128):
        ids = [row.prompt for row in prompts[first : first + 128]]
        rollout, sampled = sample_responses(model, ids, tokenizer, config, 1, generator)
        score_tokens(policy, reference, rollout, config)
        numbers.append(torch.stack([rollout.kl.sum(1), rollout.response_mask.sum(1)]).cpu())
        texts += sampled
        greedy += sample_responses(model, ids, tokenizer, config, greedy=True)[1]
        more += sample_responses(model, ids, tokenizer, config, tries, generator)[1] if tries else []
    pairs = [row.text for row in prompts]
    kl, length = torch.cat(numbers, dim=1)
    found = {"responses": texts, "gold": rubric(gold, pairs, texts), "kl": kl, "length": length,
             "exact": rubric(right, pairs, greedy),
             "reward": call_reward(reward, [pair["prompt"] for pair in pairs], texts) if reward else None}
    if tries:
        hits = rubric(right, [pair for pair in pairs for _ in range(tries)], more).view(-1, tries)
        found.update({"sampled": hits.mean(1), "pass@8": hits.amax(1)})
    return found


def finish_policy(folder, trained, prompts, measure, progress, mark, stage):
    """Return the summary of a policy: its best weights beside its start, on test prompts."""
    config, figures = measure.config, {}
    prompts = prompts[: config.test_prompts or None]
    with measure.reference() as start:
        before = assess(start, prompts, measure, final=True)
    best, _, _ = gpt.load_checkpoint(folder / "model.safetensors", pick_device(config.device))
    after = assess(best, prompts, measure, final=True)
    rows = print_table({"start": before, stage: after})
    for when, row in (("before", rows["start"]), ("after", rows[stage])):
        for key in ("gold", "reward", "exact", "length", *(("sampled", "pass@8") if "sampled" in after else ())):
            name = {"exact": "exact_match", "pass@8": "pass_at_8"}.get(key, key)
            figures[f"{name}_{when}"] = row.get(key, [None])[0]
    seconds = [row[2] for row in progress.extra["recent"]]
    summary = write_summary(
        folder, config, stage, progress, trained, mark, **figures, kl=after["kl"].mean().item(),
        gold_std_before=None if before["gold"] is None else before["gold"].std(correction=0).item(),
        test_prompts=len(prompts), episodes=progress.extra.get("episodes", 0),
        episodes_per_second=config.batch_size * len(seconds) / sum(seconds))
    print(f"{summary['seconds']:.0f} s; {folder}/model.safetensors")
    return summary


def print_table(found):
    """Return {name: {column: (mean, half of its 95% interval)}} of {name: what `assess` found} after printing it. A
    response wins over the one in the first line by gold score where there is one, else by reward."""
    start = next(iter(found.values()))
    by, width = "reward" if start["gold"] is None else "gold", max(map(len, found))
    columns = [key for key in ("gold", "reward", "kl", "exact", "sampled", "pass@8", "length", "wins")
               if key == "wins" or start.get(key) is not None]
    print(" " * width + "".join(f"{key:>17}" for key in columns))
    rows = {name: {} for name in found}
    for name, one in found.items():
        if one is not start and start[by] is not None:
            one = {**one, "wins": correct(one[by] - start[by])}
        for key in (key for key in columns if key in one):  # of a single value there is no interval: null in the file
            mean, n = one[key].mean().item(), len(one[key])
            rows[name][key] = mean, Z * one[key].std().item() / math.sqrt(n) if n > 1 else math.nan
        cells = ("{:.3f} +-{:.3f}".format(*rows[name][key]) if key in one else "" for key in columns)
        print(f"{name:{width}}" + "".join(f"{cell:>17}" for cell in cells))
    return rows


def evaluate(config):
    """Print, write and return one table of the start and each policy on held-out prompts in the template of --init."""
    if config.judge:
        from finetune_sft import judge_preference, judged_mean, open_judge
        ask = open_judge(config.judge, config.judge_model)
    model, tokenizer, template, parts = open_start(config, answers=False)
    policies = {path: load_policy(path, tokenizer, model.device, config) for path in config.checkpoint.split(",")}
    prompts = encode_prompts(parts[2], tokenizer, template, model, config)[: config.test_prompts or None]
    reward = load_reward(config, model.device, parts[2], required=False)
    measure = Measure(reference_of(model), reward, tokenizer, config)
    found = {"start": assess(model, prompts, measure, final=True)}
    for path, policy in policies.items():
        name = Path(path).parent.name or path
        found[path if name in found else name] = assess(policy, prompts, measure, final=True)
    target = Path(next(iter(policies))).with_name("evaluation.json")
    samples = [{"prompt": row.text["prompt"], **{name: one["responses"][i] for name, one in found.items()}}
               for i, row in enumerate(prompts[:20])]
    table = {"command": config.command, "prompts": len(prompts), "rows": print_table(found), "samples": samples}
    if target.exists():  # perhaps of other policies
        aside = next(name for n in itertools.count(1) if not (name := target.with_suffix(f".{n}.json")).exists())
        print(f"the earlier {target} is kept as {target.rename(aside)}", file=sys.stderr)
    write_json(target, table)
    for name in list(found)[1:] if config.judge else ():
        compared = zip(prompts[: config.judge_examples], found[name]["responses"], found["start"]["responses"])
        share = judged_mean([judge_preference(ask, row.text["prompt"], row.text["chosen"].replace(NO_ANSWER, ""), ours,
                                              theirs) for row, ours, theirs in compared], 1)
        table["rows"][name]["judge"] = share["mean"], (share["interval"][1] - share["interval"][0]) / 2
        print("{} wins {mean:.1%} by the judge, {interval[0]:.1%} to {interval[1]:.1%}; {missing} replies are missing, "
              "as losses or wins {bounds[0]:.1%} or {bounds[1]:.1%}".format(name, **share))
        write_json(target, table)
    print(f"{len(prompts)} prompts, written to {target}", file=sys.stderr)
    return table["rows"]


def load_policy(path, tokenizer, device, config):
    """Return the language model of a file; ValueError where its tokenizer is another than --init's."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no policy {path!r}; make one with: python rlhf.py ppo")
    model, other, info = gpt.load_language_model(path, device)
    if other.to_dict() != tokenizer.to_dict():
        raise ValueError(f"{path} has another tokenizer than --init: they cannot be compared")
    if config.data != "tinyworld" and info.get("split_seed", config.split_seed) != config.split_seed:
        print(f"note: {path} was trained with --split_seed {info['split_seed']}, perhaps on this data", file=sys.stderr)
    return model


def rate(config):
    """Show two answers to a prompt in random order and append to --ratings which is better; skipped ones come again."""
    path, count = Path(config.ratings), 0
    if path.suffix != ".jsonl":
        raise argparse.ArgumentError(None, f"--ratings {path} must end in .jsonl, the form that --data reads")
    if sys.stdin is None:
        raise ValueError("stdin is closed, but rate reads 1, 2, s (skip) or q (quit) from it")
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        rated = {json.loads(line)["prompt"] for line in text.split("\n") if line}  # not splitlines: U+2028 is text
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} does not hold ratings, one JSON object per line; give another --ratings") from None
    model, tokenizer, template, parts = open_start(config, answers=False)
    writers = [(config.init, model)] * 2
    if config.checkpoint:
        writers[1] = (config.checkpoint, load_policy(config.checkpoint, tokenizer, model.device, config))
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = encode_prompts(parts[0], tokenizer, template, model, config)
    for row in (row for row in rows if row.text["prompt"] not in rated):
        prompt, choice, answers = row.text["prompt"], "", []
        generator = torch.Generator(model.device).manual_seed(seeded(config.seed, prompt).initial_seed())
        for name, writer in writers:
            _, (response,) = sample_responses(writer, [row.prompt], tokenizer, config, 1, generator)
            answers.append((response, name))
        order = torch.randperm(2, generator=generator, device=model.device).tolist()
        (first, from_1), (second, from_2) = (answers[i] for i in order)
        if first == second:
            continue
        print(f"\n---\n{prompt}\n\n  1: {first}\n\n  2: {second}\n")
        while choice not in ("1", "2", "s", "q"):
            print("better: 1, 2, [s]kip, [q]uit > ", end="", flush=True)
            choice = (sys.stdin.readline() or "q").strip().lower()
        if choice == "q":
            break
        if choice != "s":
            rating = {"prompt": prompt, "response_1": first, "response_2": second, "preferred": int(choice),
                      "from_1": from_1, "from_2": from_2}
            with open(path, "a", encoding="utf-8") as file:
                file.write("\n" * (text[-1:] not in ("", "\n")) + json.dumps(rating, ensure_ascii=False) + "\n")
            text, count = "", count + 1
    print(f"\n{count} ratings added to {path}; train on them with: python rlhf.py reward --data {path}")


def run_all(config):
    """Train a reward model, then a policy by PPO, then evaluate it, in the folders reward and ppo below --out_dir."""
    root, given = Path(config.out_dir), COMMANDS["all"].flags.split()
    files = {"reward": str(root / "reward/model.safetensors"), "checkpoint": str(root / "ppo/model.safetensors")}
    for word in ("reward", "ppo", "evaluate"):
        stage = COMMANDS[word]
        names = stage.flags.split()
        values = {name: getattr(config, name) for name in names if name in given}
        values |= {**stage.defaults, **adjust(word, config), "out_dir": str(root / word), "command": config.command}
        values |= {name: file for name, file in files.items() if name in names}
        ends = [steps for steps in (config.max_steps, stage.defaults.get("max_steps")) if steps]
        stage.function(Config(**{**values, "max_steps": min(ends, default=0)}))


RATES = {"reward": (3e-3, 1e-5), "ppo": (3e-4, 3e-6), "dpo": (1e-4, 1e-6), "grpo": (3e-4, 1e-6)}  # small, large model


def adjust(word, config):
    """Return the defaults that depend on other flags: rate, optimizer, beta (SimPO's reward is a mean)."""
    large = is_large(config.init)
    muon = word == "reward" and not large and not config.lora_rank
    rate = RATES.get(word, (0.0, 0.0))[large] * (10 if config.lora_rank else 1)
    return dict(learning_rate=rate, optimizer="muon" if muon else "adamw", beta=2.0 if config.loss == "simpo" else 0.1)


TRAINED = f"{TRAINING} lora_rank lora_alpha lora_dropout lora_targets split_seed response_length temperature"
POLICY = (f"{TRAINED} reward no_stop_penalty kl_coef kl_target kl_horizon max_approxkl ptx_coef ppo_epochs minibatches "
          "clip_range clip_high group eval_prompts test_prompts")
SEEN = "data init split_seed response_length temperature seed device debug checkpoint"
JUDGE = "test_prompts judge judge_model judge_examples"
COMMANDS = {
    "all": Command(run_all, "data init out_dir max_steps save_every log_every seed device dtype compile resume fresh "
                   "debug lora_rank lora_alpha lora_dropout lora_targets split_seed response_length temperature head "
                   f"kl_coef ptx_coef eval_prompts {JUDGE}", defaults=dict(out_dir="out")),
    "reward": Command(train_reward, f"{TRAINED} head eval_prompts", defaults=dict(
        out_dir="out/reward", epochs=1, batch_size=32, eval_every=125)),
    "ppo": Command(train_policy, f"{POLICY} vf_coef lam", defaults=dict(
        out_dir="out/ppo", max_steps=80, eval_every=40)),
    "dpo": Command(train_dpo, f"{TRAINED} loss beta label_smoothing reward test_prompts", defaults=dict(
        out_dir="out/dpo", epochs=1, batch_size=32, eval_every=100)),
    "grpo": Command(train_policy, f"{POLICY} advantage", defaults=dict(
        out_dir="out/grpo", max_steps=100, eval_every=20, group=8, advantage="group")),
    "rate": Command(rate, f"{SEEN} ratings"),
    "evaluate": Command(evaluate, f"{SEEN} reward {JUDGE}", defaults=dict(checkpoint="out/ppo/model.safetensors")),
}


def main(argv=None):
    """Run the command line and return its exit status."""
    return run_script(__doc__, Config, COMMANDS, argv, __file__, adjust)


if __name__ == "__main__":
    sys.exit(main())
