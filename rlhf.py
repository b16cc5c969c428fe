"""Learning from preferences by hand: a reward model from pairs of answers, then PPO, DPO or GRPO, and what it brought.

    python rlhf.py                                  reward model, PPO, evaluation on the built-in pairs: 5 minutes
    python rlhf.py reward --data pairs.json         a reward model of your own pairs
    python rlhf.py ppo --reward my_rewards:brevity  PPO against any Python function (prompts, responses) -> floats
    python rlhf.py ppo --lora_rank 8                PPO with adapters: policy and reference share one set of weights
    python rlhf.py dpo                              the same pairs without a reward model; --loss sft is the baseline
    python rlhf.py grpo                             groups of responses to each prompt instead of a critic
    python rlhf.py evaluate --checkpoint out/ppo/model.safetensors,out/dpo/model.safetensors    all in one table
    python rlhf.py rate                             be the rater: two responses, blind; 1, 2, tie, skip, undo, quit

The reward model is a GPT with one number for a head, trained so that the better answer of a pair scores higher; it
reads the answer's last state and how likely the answer is. PPO then lets the policy answer prompts and makes the tokens
of answers that score well more likely, while each token pays for leaving the starting policy (the KL penalty), and the
loss of writing preferred answers keeps skills (--ptx_coef; 0 where only the reward is to count). The mathematics stands
first, as functions of tensors with paper and equation; then models and responses; then the loops, with the eight
numbered steps of every training script here.

Reads --data: the built-in `tinyworld`, a name that `data.py list` shows, or a file in any form of
data.read_preferences; files are divided by prompt into 85% training, 5% validation and 10% test. Reads --init, the
model that instruction tuning made; `reward` and `dpo --loss sft` may begin from `scratch`, with fresh weights and a
tokenizer of the training pairs. Writes into --out_dir: model.safetensors (a reward model's scores have mean 0 and
standard deviation 1 on the start's own responses, with scratch or --blind on the validation answers), adapter/ with
--lora_rank, state.pt, metrics.jsonl, curves.svg and further .svg of the steps, samples.txt, summary.json; `evaluate`
writes evaluation.json beside the first model; `rate` appends to --ratings, which `reward` and `dpo` take as --data or
--extra.

Logged at each step of PPO and GRPO: objective/scores (mean reward of the batch), objective/kl (k1, nats a response, of
the sampled tokens), objective/kl_exact (over whole distributions, never negative), objective/entropy (nats a response),
objective/rlhf_reward (score - kl_coef x kl), policy/clipfrac (share of tokens whose ratio was clipped), policy/approxkl
(k2, nats a token, to the policy that sampled), val/ratio (mean; 1 at the first update), val/explained_variance (of the
returns, by the critic), val/stopped (share of responses that ended), loss/ptx, eps (responses a second).

Differs from OpenAI's code (Ziegler et al. 2019) and TRL's: tokens behind the stop token are masked out everywhere; the
score stands at the stop token; a response that never stops loses a point instead of getting a fixed score; log-probs
are recomputed by the forward pass that trains, so the first ratios are 1 to the bit; all padding is masked, no id is
reserved for it; GRPO ties to the start by k2, and each token of a batch weighs the same (in its paper each response
does). Sources: Ziegler et al. 2019; Stiennon et al. 2020; Ouyang et al. 2022;
Schulman et al. 2016 and 2017; Rafailov et al. 2023; Shao et al. 2024; Huang et al. 2024, "The N+ implementation details
of RLHF with PPO". What each function takes from them stands in its docstring.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib
import json
import math
import os
import random
import re
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import gpt  # first, because it quiets torch's warning about numpy
import torch
import torch.nn as nn
import torch.nn.functional as F
from data import (TEMPLATES, answer, epoch_order, exact_match, format_prompt, format_response, gold_score, json_sha256,
                  preference, prompt_of, read_preferences, rubric_parts, seeded, split, tinyworld)
from finetune_sft import Judge, add_adapters, finished_lines, judged_share, stored_responses
from gpt import generate, pick_device
from train import (Z, Options, Run, autocast, check_sizes, compile_blocks, draw_curves, full_precision, load_writer,
                   make_optimizers, new_model, option, run_script, total_steps, train_each_seed, wilson, write_json)

HEADS = ("linear", "mlp", "likelihood", "mean")
DEFAULTS = {  # each command's own defaults; `rates`: of small models, and of those with more than 50 million parameters
    "reward": dict(epochs=1, max_steps=0, batch_size=32, rates=(3e-3, 1e-5), eval_every=125),
    "ppo": dict(epochs=0, max_steps=160, batch_size=64, rates=(3e-4, 3e-6), eval_every=40),
    "dpo": dict(epochs=1, max_steps=0, batch_size=32, rates=(1e-4, 1e-6), eval_every=100),
    "grpo": dict(epochs=0, max_steps=100, batch_size=64, rates=(3e-4, 1e-6), eval_every=20),
}


def own(name, help):
    """Return the option of a number whose default depends on the command; it is -1 until the command is known."""
    shown = ", ".join(f"{stage} {defaults[name]}" for stage, defaults in DEFAULTS.items())
    return option(-1, f"{help}; -1 = {shown}", low=-1)


@dataclass
class Config(Options):
    """The options of learning from preferences."""

    data: str = option("tinyworld", "pairs: tinyworld, preferences, hh_rlhf, or a .json, .jsonl or .gz file")
    examples: int = option(0, "use the first so many training pairs, 0 = all", low=0)
    split_seed: int = option(1234, "of the division of a file into train, validation and test, the same for all "
                             "stages; -1 = --seed, which gives each of several --seeds a division of its own", low=-1)
    extra: str = option("", "a file of further pairs to train on, those that `rate` wrote for instance")
    init: str = option("out/sft/model.safetensors", "the policy to start from: a checkpoint file, gpt2 ... gpt2-xl, or "
                       "scratch (reward; dpo --loss sft)")
    out_dir: str = option("", "the run's folder, default out/ and the command's name")
    epochs: int = own("epochs", "times through the pairs or prompts, 0 = no limit; this or max_steps, whichever "
                      "ends first")
    max_steps: int = own("max_steps", "steps of one batch each, 0 = no limit")
    batch_size: int = own("batch_size", "pairs, or sampled responses, a step")
    accumulate: int = option(4, "pieces of similar length that a batch is computed in; saves memory and padding, "
                             "changes nothing but --cross and what is drawn at random", low=1)
    learning_rate: float = option(-1.0, "peak, after warm-up; -1 = by command and size of the model", low=-1)
    weight_decay: float = option(0.0, "of matrices; vectors are not decayed", low=0)
    warmup_steps: int = option(10, "steps from 0 up to the peak rate", low=0)
    schedule: str = option("linear", "after warm-up", choices=("cosine", "linear", "constant"))
    optimizer: str = option("auto", "muon takes AdamW for all but the blocks' matrices; auto = muon for a small reward "
                            "model, else adamw", choices=("auto", "adamw", "muon"))
    eval_every: int = own("eval_every", "steps between evaluations, 0 = only at the end")
    save_every: int = option(50, "steps between saves of state.pt, 0 = only at the end and when stopped", low=0)
    log_every: int = option(10, "steps between log lines", low=1)
    template: str = option("auto", "words around a prompt; auto = those that --init was tuned with",
                           choices=("auto", *TEMPLATES))
    lora_rank: int = option(0, "train adapters of this rank instead of the weights, 0 = off", low=0)
    lora_alpha: float = option(32.0, "an adapter's update is multiplied by alpha / rank", low=1e-6)
    lora_dropout: float = option(0.0, "of an adapter's input", low=0, high=0.99)
    lora_targets: str = option("all-linear", "layers with adapters: all-linear, or ends of names as qkv,fc1")
    seeds: int = option(1, "runs, with the seeds from --seed on; the summary has their mean and spread", low=1)
    shuffle_labels: bool = option(False, "prefer by coin instead: a control that must gain nothing")
    model: str = option("tiny", "with --init scratch: architecture", choices=tuple(gpt.GPT_CONFIGS))
    emb_dim: int = option(0, "with --init scratch: channels, 0 = the architecture's", low=0)
    n_layers: int = option(0, "with --init scratch: blocks, 0 = the architecture's", low=0)
    n_heads: int = option(0, "with --init scratch: heads, 0 = the architecture's", low=0)
    vocab_size: int = option(2000, "with --init scratch: of the bpe tokenizer of the training pairs", low=258)
    head: str = option("likelihood", "reward: its head; mlp = two layers, likelihood = linear, and it also reads the "
                       "response's log-probability, mean = linear on the mean of the response's states",
                       choices=HEADS)
    blind: bool = option(False, "reward: reads answers without their prompts, where the manner alone counts")
    cross: float = option(0.0, "reward: share of the loss that compares each answer with those to the other prompts of "
                               "its piece of the batch, for manners that do not depend on the prompt", low=0, high=1)
    lm_weight: float = option(0.0, "reward: weight of the loss of writing both answers, in nats a token", low=0)
    token_dropout: float = option(0.0, "reward: share of the tokens hidden from the model in training", low=0, high=0.9)
    beta: float = option(0.1, "dpo: strength of the tie to the start", low=0)
    label_smoothing: float = option(0.0, "dpo: share of preferences believed to be wrong", low=0, high=0.5)
    loss: str = option("dpo", "dpo: sft only learns to write the chosen answers", choices=("dpo", "sft"))
    reward: str = option("out/reward/model.safetensors", "what ppo, grpo and evaluate score with: a reward model's "
                         "file, gold (tinyworld's own rubric), or module:function in Python")
    response_length: int = option(40, "tokens of a sampled response at most", low=1)
    temperature: float = option(0.7, "of sampling, and so of all log-probabilities; Ziegler et al.'s", low=1e-3)
    kl_coef: float = option(0.2, "reward that a nat of KL to the start costs", low=0)
    kl_target: float = option(0.0, "nats a response that kl_coef is adapted towards, 0 = it stays", low=0)
    kl_horizon: int = option(2000, "episodes in which kl_coef may change by 20%", low=1)
    max_kl: float = option(0.0, "end the run once a batch is so many nats a response away from the start, "
                           "0 = never", low=0)
    max_approxkl: float = option(0.1, "go on to new responses once the policy is so many nats a token away from the "
                                 "one that sampled, 0 = never", low=0)
    no_stop_penalty: float = option(1.0, "subtracted from the score of a response that does not end by itself", low=0)
    ptx_coef: float = option(0.3, "ppo, grpo: weight of the loss of writing the preferred answers, in nats a token, "
                             "which keeps skills", low=0)
    ppo_epochs: int = option(2, "times through each batch of responses", low=1)
    minibatches: int = option(1, "updates in each of them", low=1)
    clip_ratio: float = option(0.2, "the probability ratio counts between 1 - this and 1 + this", low=0.001)
    clip_value: float = option(0.2, "a value counts up to this far from the one at sampling", low=0.001)
    vf_coef: float = option(0.1, "weight of the value loss", low=0)
    gamma: float = option(1.0, "discount a token", low=0, high=1)
    lam: float = option(0.95, "lambda of GAE", low=0, high=1)
    whiten_rewards: bool = option(False, "divide the tokens' rewards by their spread")
    group: int = option(8, "grpo: responses to each prompt", low=2)
    eval_prompts: int = option(200, "validation prompts of an evaluation while training", low=1)
    test_prompts: int = option(500, "held-out prompts of the figures at the end, 0 = all", low=0)
    checkpoint: str = option("", "evaluate: model files, commas between, default what is in out/; rate: one, whose "
                             "responses are compared with each other, or two; default --init")
    best_of: int = option(4, "evaluate: a row for the best of so many responses of the start by --reward", low=1)
    against: str = option("", "evaluate: a responses.json whose answers are the opponent instead of the start's")
    judge: str = option("", "evaluate, rate, all: ollama, openai or a URL, as in finetune_sft.py; empty = no judge")
    judge_model: str = option("llama3", "the judge's name there")
    judge_context: int = option(8192, "tokens that the judge is asked to read at once", low=512)
    judge_examples: int = option(100, "evaluate: ask about the first so many prompts", low=1)
    ratings: str = option("out/ratings/ratings.jsonl", "rate: the file of comparisons that is appended to")
    rounds: int = option(1, "all: repetitions, each with new pairs of the last policy's responses", low=1)
    round_pairs: int = option(2000, "all: so many of them", low=1)


# ---------------------------------------------------------------------------------------------------------------------
# The mathematics: pure functions of tensors
#
# B responses, R tokens of the longest one, V vocabulary. `mask` (B, R) is 1 from a response's first token to its stop
# token and 0 behind it; what stands behind it changes nothing. Log-probabilities, KL and losses are in nats.


def masked_mean(x, mask):
    """Return the mean of x over the entries whose mask is 1, x and mask of one shape -> ()."""
    return (x * mask).sum() / mask.sum()


def whiten(x, mask, shift_mean=True):
    """Return x with mean 0 and variance 1 over the entries whose mask is 1, and 0 elsewhere: (B, R) -> (B, R).

    With `shift_mean=False` the mean stays, only the spread is divided out. The variance is the biased one.
    Source: Ziegler et al. 2019, "Fine-tuning language models from human preferences", their code's `whiten`."""
    x = x * mask
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def reward_loss(chosen, rejected):
    """Return the mean Bradley-Terry loss -log sigmoid(chosen - rejected) of scores (B,), (B,) -> ().

    exp(-loss) is the probability that the better response wins. Equal scores cost ln 2 = 0.6931.
    Source: Ouyang et al. 2022 (InstructGPT), equation 1."""
    return -F.logsigmoid(chosen - rejected).mean()


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.0):
    """Return the mean DPO loss of summed response log-probabilities, each (B,), -> ().

    beta log(policy / reference) is the reward that the policy implies, and the loss is `reward_loss` of it; before the
    first update it is ln 2. `label_smoothing` is the share of preferences believed to be the wrong way round.
    Source: Rafailov et al. 2023, "Direct preference optimization", equation 7; smoothing: Mitchell 2023 (cDPO)."""
    margin = beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))
    right, wrong = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return ((1 - label_smoothing) * right + label_smoothing * wrong).mean()


def token_scores(logits, ids, temperature=1.0):
    """Return (log-probability, entropy, all log-probabilities) of tokens: logits (B, R, V), ids (B, R) -> (B, R),
    (B, R), (B, R, V). Entry t of `logits` is the one that predicts ids[:, t].

    Everything that samples, scores or trains divides by the same temperature: else the ratio of new to old
    probabilities would not start at 1."""
    everything = torch.log_softmax(full_precision(logits) / temperature, dim=-1)
    entropy = -(everything.exp() * everything).sum(-1)
    return everything.gather(2, ids[:, :, None]).squeeze(2), entropy, everything


def exact_kl(logprobs, ref_logprobs):
    """Return KL(policy || reference) of each position's whole distribution: (B, R, V), (B, R, V) -> (B, R), never < 0.

    Summed over a response and averaged over samples it estimates the same number as k1 = log policy - log reference of
    the sampled tokens, with less noise."""
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1).clamp(min=0)


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """Return each token's reward (B, R): -kl_coef * k1, and the response's score (B,) added at its last token.

    k1 = log policy - log reference, unsquared and signed: as a reward its expected gradient is that of the KL. The
    k3 estimate, though never negative, has none to first order when used here.
    Source: Ziegler et al. 2019, "Fine-tuning language models from human preferences", equation 2."""
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    last = mask.long().sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Return (advantages, returns), both (B, R), of per-token rewards and value estimates (B, R).

    A_t = sum_k (gamma lam)^k delta_{t+k} with delta_t = r_t + gamma V_{t+1} - V_t; behind the last token V is 0, and
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


def ppo_policy_loss(new, old, advantages, mask, clip=0.2):
    """Return (loss, metrics) of log-probabilities under the new and the sampling policy and advantages, each (B, R).

    loss = mean over tokens of max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)), ratio = exp(new - old): no gain from
    moving a probability further than the clip. Source: Schulman et al. 2017 (PPO), equation 7."""
    ratio = torch.exp((new - old) * mask)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    loss = masked_mean(torch.max(-advantages * ratio, -advantages * clipped), mask)
    with torch.no_grad():
        metrics = {"policy/clipfrac": masked_mean((ratio != clipped).float(), mask).item(),
                   "policy/approxkl": masked_mean(0.5 * (new - old) ** 2, mask).item(),  # k2
                   "val/ratio": masked_mean(ratio, mask).item()}
    return loss, metrics


def ppo_value_loss(values, old_values, returns, mask, clip=0.2):
    """Return half the mean squared error of values against returns, all (B, R), -> ().

    A value that moved further than `clip` from the one at sampling gains nothing by it: the larger of both errors
    counts. Source: the code of Schulman et al. 2017."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask)


def kl_controller(kl_coef, kl, target, episodes, horizon):
    """Return the next KL coefficient: larger where the KL of a batch of so many episodes is above the target.

    The error is cut at +-20%, so a batch changes the coefficient by at most 20% x episodes / horizon.
    Source: Ziegler et al. 2019, section 2.2."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


def group_advantages(scores, group):
    """Return (score - mean) / (standard deviation + 1e-4) within each group of `group` neighbours: (B,) -> (B,).

    A group of equal scores gets zeros. Source: Shao et al. 2024 (DeepSeekMath), section 4.1.2 (GRPO)."""
    groups = scores.view(-1, group)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten()


# ---------------------------------------------------------------------------------------------------------------------
# Models and responses


class RewardModel(nn.Module):
    """A GPT whose last layer's state at the last real token becomes one number: ids, mask (B, T) -> scores (B,).

    `head` is "linear", "mlp" for two layers, "mean" for a linear one on the mean of the states of the response (the
    last R tokens of ids, all but the first where R is not given), or "likelihood": linear, and beside the state it
    reads the response's summed log-probability. A small model needs its last layers to work out the right answer and
    has none left to compare it with the given one; the log-probability is that comparison, and its gradient teaches
    the trunk as DPO's does. The mean suits few pairs in which single words tell. A score is
    gain * head + bias; `normalise` sets the two, so that the starting policy's responses have mean 0 and standard
    deviation 1. The head starts as N(0, 1/sqrt(C + 1)), which gives scores a spread of about 1. Source: Stiennon et al.
    2020, appendix B.1 (with the square root it omits)."""

    def __init__(self, gpt, head="linear"):
        super().__init__()
        C = gpt.config.emb_dim
        self.gpt, self.head_kind = gpt, head
        last = nn.Linear(C + (head == "likelihood"), 1)
        nn.init.normal_(last.weight, std=1 / math.sqrt(C + 1))
        nn.init.zeros_(last.bias)
        if head == "likelihood":
            nn.init.constant_(last.weight[:, C:], 0.2)
        self.head = last if head != "mlp" else nn.Sequential(nn.Linear(C, C), nn.GELU(), last)
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))

    @property
    def trf_blocks(self):
        """The backbone's blocks, under the name by which `make_optimizers` looks for them."""
        return self.gpt.trf_blocks

    @property
    def reads_head(self):
        """Whether a head of tokens of its own, not tied to the embeddings, is needed for the scores."""
        return self.head_kind == "likelihood" and not self.gpt.config.tie_weights

    def forward(self, ids, mask=None, R=None):
        width = ids.shape[1]
        ids, left, lengths = without_left_padding(ids, torch.ones_like(ids) if mask is None else mask)
        states, columns = self.gpt.hidden(ids), torch.arange(ids.shape[1], device=ids.device)
        last = states[torch.arange(len(ids), device=ids.device), lengths - 1]
        if self.head_kind in ("linear", "mlp"):
            return self.score(last)
        first = torch.ones_like(left) if R is None else width - R - left
        answer = (columns >= first[:, None]) & (columns < lengths[:, None])
        if self.head_kind == "mean":
            return self.score(mean_states(states, answer[:, None])[:, 0])
        return self.score(last, summed_logprobs(self.gpt, states[:, :-1], ids[:, 1:], answer[:, 1:]))

    def score(self, states, logprobs=None):
        """Return the scores (...) of the states (..., C) of last tokens and the log-probabilities (...) of responses.

        In float32 whatever the rest runs in: bfloat16 would round a log-probability of 50 nats to a quarter."""
        with torch.autocast(states.device.type, enabled=False):
            states = full_precision(states)
            if logprobs is not None:
                states = torch.cat([states, logprobs[..., None].to(states.dtype)], dim=-1)
            return self.gain * self.head(states).squeeze(-1) + self.bias

    @torch.no_grad()
    def normalise(self, scores):
        """Set gain and bias so that scores (N,), made with gain 1 and bias 0, would have had mean 0 and deviation 1.

        Raises ValueError where all are equal."""
        std, mean = torch.std_mean(scores)
        if not std > 1e-6:
            raise ValueError("the reward model gives every response of the starting policy the same score; it has "
                             "learnt nothing, look at the pairs")
        self.gain.copy_(1 / std)
        self.bias.copy_(-mean / std)

    @torch.no_grad()
    def undo_normalise(self):
        """Set gain 1 and bias 0, as in training: a loss of differences is about them as they are."""
        self.gain.fill_(1)
        self.bias.zero_()


class Policy(nn.Module):
    """A GPT and, on the same trunk, a value head that starts at 0: ids, mask (B, P + R) -> logits, values of R tokens.

    Entry t of both belongs to the state before response token t: logits (B, R, V) predict it, values (B, R) estimate
    the reward from it onwards."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt
        self.value_head = nn.utils.skip_init(nn.Linear, gpt.config.emb_dim, 1)  # which draws no random numbers
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    trf_blocks = RewardModel.trf_blocks

    def forward(self, ids, mask, R):
        hidden = response_states(self.gpt, ids, mask, R)
        return self.gpt.out_head(hidden), self.value_head(hidden).squeeze(2)


def without_left_padding(ids, mask):
    """Return (ids (B, longest), left (B,), lengths (B,)): rows moved to the left by the `left` pads in front of them.

    A causal model needs no mask then: no real token sees the padding, which stands behind all of them; and a row's
    first token has position 0. That is faster than attention with a mask, and columns are saved."""
    mask = mask.long()  # bool masks are welcome too
    left, lengths = mask.argmax(dim=1), mask.sum(dim=1)
    columns = torch.arange(int(lengths.max()), device=ids.device) + left[:, None]
    return ids.gather(1, columns.clamp(max=ids.shape[1] - 1)), left, lengths


def mean_states(states, inside):
    """Return the means (B, n, C) of the states (B, T, C) of n stretches of each row: inside (B, n, T) is boolean."""
    with torch.autocast(states.device.type, enabled=False):
        states = full_precision(states)
        return inside.to(states.dtype) @ states / inside.sum(2, keepdim=True).clamp(min=1)


def summed_logprobs(model, states, ids, mask):
    """Return the summed log-probabilities (B,) of the ids (B, T) with mask 1, which the states (B, T, C) predict."""
    rows, columns = mask.nonzero(as_tuple=True)
    logits = full_precision(model.out_head(states[rows, columns]))
    scores = -F.cross_entropy(logits, ids[rows, columns], reduction="none")
    return scores.new_zeros(len(ids)).index_add(0, rows, scores)


def response_states(model, ids, mask, R):
    """Return the states (B, R, C) from which the last R tokens of ids (B, P + R) are predicted."""
    shifted, left, _ = without_left_padding(ids, mask)
    hidden = model.hidden(shifted)
    before = ids.shape[1] - R - 1 - left  # the column of a row's last prompt token
    columns = (before[:, None] + torch.arange(R, device=ids.device)).clamp(max=hidden.shape[1] - 1)
    return hidden.gather(1, columns[:, :, None].expand(-1, -1, hidden.shape[2]))


def pack(prompts, responses, pad_id, device="cpu"):
    """Return (ids, mask, R): token lists side by side, (B, P + R) each, prompts padded on the left, responses right.

    So all responses begin in one column. Example: pack([[5]], [[6, 7]], 0) has the ids [[5, 6, 7]] and R = 2."""
    P, R = max(map(len, prompts)), max(map(len, responses))
    rows = [[pad_id] * (P - len(p)) + p + r + [pad_id] * (R - len(r)) for p, r in zip(prompts, responses)]
    real = [[0] * (P - len(p)) + [1] * (len(p) + len(r)) + [0] * (R - len(r)) for p, r in zip(prompts, responses)]
    return torch.tensor(rows, device=device), torch.tensor(real, device=device), R


class Prompt(NamedTuple):
    """A question as a person wrote it, and the token ids in which the model is asked."""

    text: str
    ids: list
    reference: str = ""  # an answer that somebody preferred
    preferred: list = []  # its ids, as many as a response may have


class Episodes(NamedTuple):
    """B sampled responses of at most R tokens to prompts of P, and what sampler, reference and reward say of them."""

    prompts: list  # of text, one for each response
    texts: list  # of the responses
    ids: torch.Tensor  # (B, P + R)
    mask: torch.Tensor  # (B, P + R)
    response_mask: torch.Tensor  # (B, R)
    stopped: torch.Tensor  # (B,) whether the response ended by itself
    logprobs: torch.Tensor  # (B, R) under the policy that sampled
    ref_logprobs: torch.Tensor  # (B, R)
    kl: torch.Tensor  # (B,) nats a response, over whole distributions
    entropy: torch.Tensor  # (B, R)
    values: torch.Tensor  # (B, R)
    scores: torch.Tensor  # (B,) from the reward, without any penalty


@torch.no_grad()
def sample_responses(model, prompts, tokenizer, max_new_tokens, temperature=1.0, num_samples=1, generator=None):
    """Return (ids (B, P + R), mask, response_mask (B, R), texts) of responses to lists of ids, `num_samples` to each.

    Drawn from the model's whole distribution: top-k or top-p would sample from another policy than the one trained."""
    ids, mask, _ = pack(prompts, [[]] * len(prompts), tokenizer.eot_id, model.device)
    P, stop = ids.shape[1], tokenizer.eot_id
    ids = generate(model, ids, max_new_tokens, temperature, eos_id=stop, mask=mask, num_samples=num_samples,
                   generator=generator)
    stops = (ids[:, P:] == stop).long()
    real = (stops.cumsum(1) - stops == 0).long()  # up to and with the first stop token
    texts = [tokenizer.decode([i for i, r in zip(row, kept) if r and i != stop]).strip()
             for row, kept in zip(ids[:, P:].tolist(), real.tolist())]
    mask = torch.cat([mask.repeat_interleave(num_samples, dim=0), real], dim=1)
    return ids, mask, full_precision(real.to(model.tok_emb.weight.dtype)), texts


def call_reward(reward, prompts, responses):
    """Return the reward function's scores (B,) after checking that there is one finite number for each response.

    Raises ValueError that says what the function did; nothing was changed by then."""
    try:
        scores = [float(score) for score in reward(prompts, responses)]
    except Exception as error:  # foreign code: whatever it raises, the run ends in one line
        raise ValueError(f"the reward function failed: {type(error).__name__}: {error}; the policy was not updated, "
                         "--resume goes on once it works") from error
    if len(scores) != len(responses):
        raise ValueError(f"the reward function returned {len(scores)} scores for {len(responses)} responses")
    bad = [index for index, score in enumerate(scores) if not math.isfinite(score)]
    if bad:
        raise ValueError(f"the reward of response {bad[0]} is {scores[bad[0]]}: {responses[bad[0]][:80]!r}; the policy "
                         "was not updated")
    return torch.tensor(scores)


def start_of(model):
    """Return a function that opens a context with the model as it is now, whatever training makes of it later.

    New adapters change nothing yet, so the model with them switched off is the start, and no second copy is needed;
    otherwise (all weights train, or the adapters have been trained before) it is a frozen copy."""
    adapters = [parameter for name, parameter in model.named_parameters() if name.endswith("lora_B")]
    if adapters and not any(bool(parameter.any()) for parameter in adapters):
        from lora import lora_disabled

        return lambda: lora_disabled(model)
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    return lambda: contextlib.nullcontext(frozen)


def pieces(lengths, count):
    """Return `count` index tensors (fewer for a small batch) that share out a batch by length, the shortest first."""
    return lengths.argsort(stable=True).chunk(count)


def cut(ids, mask, response_mask, rows):
    """Return (ids, mask, R) of some rows without the last columns where those are padding in all of them."""
    R = int(response_mask[rows].sum(1).max())
    end = ids.shape[1] - response_mask.shape[1] + R
    return ids[rows, :end], mask[rows, :end], R


@torch.no_grad()
def compare_with_start(policy, start, ids, mask, response_mask, config):
    """Return (logprobs, ref_logprobs, exact KL, entropy, values), each (B, R), of sampled responses.

    Computed anew by one full forward, as in training: the sampler's own numbers differ from it by rounding."""
    results = [torch.zeros_like(response_mask) for _ in range(5)]
    for rows in pieces(mask.sum(1).cpu(), config.accumulate):
        some_ids, some_mask, R = cut(ids, mask, response_mask, rows)
        logits, values = policy(some_ids, some_mask, R)
        logprobs, entropy, everything = token_scores(logits, some_ids[:, -R:], config.temperature)
        with start() as reference:
            logits = reference.out_head(response_states(reference, some_ids, some_mask, R))
        ref_logprobs, _, ref_everything = token_scores(logits, some_ids[:, -R:], config.temperature)
        kl = exact_kl(everything, ref_everything)
        for result, found in zip(results, (logprobs, ref_logprobs, kl, entropy, values)):
            result[rows, :R] = full_precision(found)
    return [result * response_mask for result in results]


def play(policy, start, prompts, reward, tokenizer, config, num_samples=1):
    """Return the Episodes of a batch of prompts: responses sampled, scored by `reward`, and by policy and reference."""
    policy.eval()  # dropout off, here and in `improve`: else old and new probabilities would differ by chance
    ids, mask, response_mask, texts = sample_responses(policy.gpt, [prompt.ids for prompt in prompts], tokenizer,
                                                       config.response_length, config.temperature, num_samples)
    asked = [prompt.text for prompt in prompts for _ in range(num_samples)]
    scores = call_reward(reward, asked, texts).to(ids.device)
    logprobs, ref_logprobs, kl, entropy, values = compare_with_start(policy, start, ids, mask, response_mask, config)
    stopped = (ids[:, -response_mask.shape[1] :] == tokenizer.eot_id).any(1)
    return Episodes(asked, texts, ids, mask, response_mask, stopped, logprobs, ref_logprobs, kl.sum(1), entropy, values,
                    scores)


# ---------------------------------------------------------------------------------------------------------------------
# Pairs and rewards


def load_pairs(config):
    """Return the pairs of --data as three lists, train, validation and test, no prompt in two of them.

    A pair is a dict with prompt, chosen, rejected; see data.preference."""
    names = ("train", "val", "test")
    if config.data == "tinyworld":
        parts = [[preference(entry) for entry in tinyworld(
            "preferences", part, config.examples or None if part == "train" else None)] for part in names]
    else:
        pairs = different_pairs(config.data)
        seed = config.seed if config.split_seed < 0 else config.split_seed
        parts = list(split(pairs, seed=seed, group=lambda pair: pair["prompt"]))
        if not all(parts):
            prompts = len({pair["prompt"] for pair in pairs})
            raise ValueError(f"{config.data}: {len(pairs)} pairs to {prompts} different prompts are too few to split "
                             "into train, validation and test")
    parts[0] = parts[0][: config.examples or None]
    if config.extra:
        held_out = {pair["prompt"] for part in parts[1:] for pair in part}
        parts[0].extend(pair for pair in different_pairs(config.extra) if pair["prompt"] not in held_out)
    return [shuffled(part, name, config.seed) if config.shuffle_labels and name != "test" else part
            for part, name in zip(parts, names)]


def different_pairs(source):
    """Return the pairs of a file without those of two equal answers, which teach nothing and are counted.

    Raises ValueError where they are more than 5%."""
    pairs = read_preferences(source)
    different = [pair for pair in pairs if pair["chosen"].strip() != pair["rejected"].strip()]
    equal = f"{source}: {len(pairs) - len(different)} of {len(pairs)} pairs have two equal answers"
    if len(different) < 0.95 * len(pairs):
        raise ValueError(f"{equal}; above 5% something is wrong with the file")
    if len(different) < len(pairs):
        print(f"{equal} and are left out", file=sys.stderr)
    return different


def shuffled(pairs, *seed):
    """Return the pairs, each turned round by the fall of a coin."""
    coins = torch.rand(len(pairs), generator=seeded("coins", *seed)) < 0.5
    return [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} if coin else pair
            for pair, coin in zip(pairs, coins.tolist())]


def correct(margins):
    """Return 1 for each positive margin, 0.5 for each that is 0, (N,) -> (N,)."""
    return (margins > 0).float() + 0.5 * (margins == 0).float()


def pair_margins(pairs, score):
    """Return score(chosen) - score(rejected) of the texts of each pair, (N,)."""
    return torch.tensor([float(score(pair["chosen"]) - score(pair["rejected"])) for pair in pairs])


def report_pairs(parts):
    """Print counts, lengths, duplicates and how often the longer answer wins."""
    pairs = [pair for part in parts for pair in part]
    lengths = [len(pair[side]) for pair in pairs for side in ("chosen", "rejected")]
    different = {(pair["prompt"], *sorted((pair["chosen"], pair["rejected"]))) for pair in pairs}
    print(f"pairs: {len(parts[0]):,} train, {len(parts[1]):,} validation, {len(parts[2]):,} test, of "
          f"{len({pair['prompt'] for pair in pairs}):,} prompts; {len(pairs) - len(different):,} occur twice; answers "
          f"have {statistics.mean(lengths):.0f} characters, the longest {max(lengths):,}; the longer one is preferred "
          f"in {correct(pair_margins(pairs, len)).mean():.1%}", file=sys.stderr)


def naive_bayes(pairs):
    """Return a function of a text: the log-odds, by its words, that it is a preferred answer. A baseline.

    Multinomial naive Bayes with add-one smoothing over lower-cased words and punctuation marks."""
    words = lambda text: re.findall(r"\w+|[^\w\s]", text.lower())  # noqa: E731
    good, bad = (Counter(word for pair in pairs for word in words(pair[side])) for side in ("chosen", "rejected"))
    both = good | bad
    lead = math.log((sum(bad.values()) + len(both)) / (sum(good.values()) + len(both)))
    odds = {word: math.log((good[word] + 1) / (bad[word] + 1)) + lead for word in both}
    return lambda text: sum(odds.get(word, 0.0) for word in words(text))


def rubric(score, prompts, responses):
    """Return score(prompt, response) of each (N,), or None where the prompts are not tinyworld's."""
    try:
        return torch.tensor([float(score(prompt, response)) for prompt, response in zip(prompts, responses)])
    except ValueError:
        return None


def truth_decides(pairs):
    """Return which of tinyworld's pairs are of two whole answers of which one is right, (N,) of true or false."""
    found = [[rubric_parts(pair["prompt"], pair[side]) for side in ("chosen", "rejected")] for pair in pairs]
    return torch.tensor([a["right"] != b["right"] and a["ends"] and b["ends"] for a, b in found])


def is_right(prompt, response):
    """Return whether a response gives the right answer, whatever its manner."""
    return exact_match(response, answer(prompt))


class Pair(NamedTuple):
    """A comparison as token ids; the answers end with the stop token."""

    prompt: list
    chosen: list
    rejected: list

    @property
    def lengths(self):
        """The tokens of its three parts."""
        return [len(part) for part in self]

    @property
    def length(self):
        """All of its tokens, the prompt counted once."""
        return sum(self.lengths)


def encode_response(text, tokenizer, template):
    """Return the token ids of a response as it follows a template's prompt, its stop token included."""
    return tokenizer.encode(format_response(text, template)) + [tokenizer.eot_id]


def encode_pairs(pairs, tokenizer, template, room):
    """Return a Pair for each pair of text; of one that has more than `room` tokens the beginning is cut off."""
    rows, cut_off = [], 0
    for pair in pairs:
        prompt = tokenizer.encode(format_prompt(pair, template))
        answers = [encode_response(pair[side], tokenizer, template) for side in ("chosen", "rejected")]
        longest = max(map(len, answers))
        cut_off += len(prompt) + longest > room
        rows.append(Pair(prompt[-max(1, room - longest) :], *(ids[-(room - 1) :] for ids in answers)))
    if cut_off:
        print(f"{cut_off} of {len(pairs)} pairs are longer than the context of {room} tokens and lose their beginning",
              file=sys.stderr)
    return rows


def make_prompts(pairs, tokenizer, template, config, model):
    """Return a Prompt for each different prompt of the pairs that leaves room for a response; others are counted."""
    room = model.config.context_length - config.response_length
    first = {pair["prompt"]: pair for pair in reversed(pairs)}
    prompts = [Prompt(text, tokenizer.encode(format_prompt(first[text], template)), first[text]["chosen"],
                      encode_response(first[text]["chosen"], tokenizer, template)[: config.response_length])
               for text in dict.fromkeys(pair["prompt"] for pair in pairs)]
    short = [prompt for prompt in prompts if 0 < len(prompt.ids) <= room]
    long = f"{len(prompts) - len(short)} of {len(prompts)} prompts have more than {room} tokens, which leaves no room"
    if not short:
        raise ValueError(f"{long} for a response; lower --response_length")
    if len(short) < len(prompts):
        print(f"{long} for a response, and are left out", file=sys.stderr)
    return short


def stored_tensors(model):
    """Return {name: tensor} of what a reward model's file holds: no head of tokens that is tied or not needed."""
    return {name: tensor for name, tensor in model.state_dict().items()
            if model.reads_head or not name.startswith("gpt.out_head.")}


def save_reward_model(path, model, tokenizer, **made):
    """Return the sha256 of the data after writing a reward model, its config and tokenizer to one file."""
    config = dataclasses.replace(model.gpt.config, tie_weights=not model.reads_head)
    metadata = {"kind": "reward", "config": json.dumps(dataclasses.asdict(config)),
                "made": json.dumps({"kind": "reward", "head": model.head_kind, **made}),
                "tokenizer": json.dumps(tokenizer.to_dict())}
    return gpt.write_safetensors(path, stored_tensors(model), metadata)


def load_reward_model(path, device="cpu"):
    """Return (model in eval mode, tokenizer, made) from a file of `save_reward_model`.

    Raises FileNotFoundError that says how to make one, ValueError for a file that is damaged or something else."""
    from tokenizer import from_dict

    if not Path(path).is_file():
        raise FileNotFoundError(f"no reward model {path}; make it with: python rlhf.py reward")
    tensors, metadata = gpt.read_safetensors(path)
    if metadata.get("kind") != "reward":
        raise ValueError(f"{path} is no reward model; make one with: python rlhf.py reward")
    gpt.verify_data(path, metadata)
    config, made = gpt.GPTConfig(**json.loads(metadata["config"])), json.loads(metadata["made"])
    model = RewardModel(gpt.empty_model(config), made["head"])
    wanted = stored_tensors(model)
    for name in sorted(set(wanted) | set(tensors)):
        if name not in wanted or name not in tensors or wanted[name].shape != tensors[name].shape:
            raise ValueError(f"{path}: tensor {name!r} does not fit its config")
        wanted[name].copy_(tensors[name])
    return model.to(device).eval(), from_dict(json.loads(metadata["tokenizer"])), made


def model_reward(model, tokenizer, template, blind=False):
    """Return the reward function (prompts, responses) -> list of floats of a reward model; `blind` to the prompts."""
    @torch.no_grad()
    def reward(prompts, responses):
        seen = ["" if blind else prompt for prompt in prompts]
        asked = [tokenizer.encode(format_prompt({"prompt": prompt}, template)) for prompt in seen]
        given = [encode_response(response, tokenizer, template) for response in responses]
        room, scores = model.gpt.config.context_length, torch.zeros(len(asked))
        for some in pieces(torch.tensor([len(p) + len(r) for p, r in zip(asked, given)]), math.ceil(len(asked) / 32)):
            answers = [given[i][-(room - 1) :] for i in some.tolist()]
            texts = [asked[i][-(room - len(answer)) :] for i, answer in zip(some.tolist(), answers)]
            ids, mask, R = pack(texts, answers, tokenizer.eot_id, model.gpt.device)
            scores[some] = model(ids, mask, R).float().cpu()
        return scores.tolist()

    return reward


def gold_reward(prompts, responses):
    """Return the hidden rubric's scores, a list of floats, of responses to tinyworld's prompts."""
    return [gold_score(prompt, response) for prompt, response in zip(prompts, responses)]


def load_reward(name, device):
    """Return the reward function that --reward names: gold, module:function, or a reward model's file."""
    if name == "gold":
        return gold_reward
    module, _, function = name.rpartition(":")
    if not module or name.endswith(".safetensors"):
        model, tokenizer, made = load_reward_model(name, device)
        return model_reward(model, tokenizer, made["template"], made.get("blind", False))
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, SyntaxError) as error:
        module = module.removesuffix(".py")
        raise ValueError(f"--reward {name}: {error}; it takes module:function, so {module}:{function} for a file "
                         f"{module}.py here") from None
    finally:
        sys.path.remove(os.getcwd())


# ---------------------------------------------------------------------------------------------------------------------
# The loops: reward model; PPO and GRPO; DPO


def open_setting(config, stage):
    """Return what every loop starts from: (config, context, model, tokenizer, template, parts).

    The command's own defaults are filled in, with --lora_rank the model has adapters, and `parts` are the pairs of
    text for training, validation and test."""
    given = getattr(config, "command_line", "")
    unset = {name: value for name, value in DEFAULTS[stage].items() if getattr(config, name, None) == -1}
    config = dataclasses.replace(config, out_dir=config.out_dir or f"out/{stage}", **unset)
    config.command_line = given
    device = pick_device(config.device)
    context = autocast(config, device)
    if config.init == "scratch":
        check_scratch(config, stage)
        parts = load_pairs(config)
        model, tokenizer, made = new_start(config, parts[0])
    else:
        check_sizes(config, "vocab_size")
        parts, (model, tokenizer, made) = None, load_writer(config, "python finetune_sft.py")
    if tokenizer.eot_id is None:
        raise ValueError(f"{config.init}: its tokenizer has no end-of-text token, without which no response ends")
    large = sum(p.numel() for p in model.parameters()) > 50e6
    if config.learning_rate == -1:
        config.learning_rate = DEFAULTS[stage]["rates"][large] * (10 if config.lora_rank else 1)
    if config.optimizer == "auto":
        config.optimizer = "muon" if stage == "reward" and not large and not config.lora_rank else "adamw"
    template = made.get("template", "plain") if config.template == "auto" else config.template
    torch.manual_seed(config.seed)
    if config.lora_rank:
        add_adapters(model, config)
    return config, context, model.to(device), tokenizer, template, parts or load_pairs(config)


def check_scratch(config, stage):
    """Raise ArgumentError where a stage cannot begin with fresh weights."""
    if stage in ("all", "ppo", "grpo") or stage == "dpo" and config.loss == "dpo":
        improves = "all goes on to ppo, which improves" if stage == "all" else f"{stage} improves"
        raise argparse.ArgumentError(None, f"--init scratch: {improves} a policy that writes already; make one with: "
                                           "python rlhf.py dpo --loss sft --init scratch")
    if config.lora_rank:
        raise argparse.ArgumentError(None, "--init scratch has learnt nothing that --lora_rank could adapt; leave one "
                                           "of the two out")


def new_start(config, pairs):
    """Return (model, tokenizer, made) for --init scratch: fresh weights, and byte pairs of the training pairs."""
    from tokenizer import BPETokenizer

    texts = [pair[key] for pair in pairs for key in Pair._fields]
    tokenizer = BPETokenizer.train(texts, config.vocab_size, split_digits=True)
    torch.manual_seed(config.seed)
    return new_model(config, tokenizer), tokenizer, {"kind": "gpt"}


def fingerprint(*parts):
    """Return one sha256 over data and the content of files that a run depends on; a resumed run must find the same."""
    return json_sha256([hashlib.sha256(Path(part).read_bytes()).hexdigest()
                        if isinstance(part, str) and Path(part).is_file() else part for part in parts])


@contextlib.contextmanager
def merged(run, model):
    """Within the block adapters, where the model has any, are merged into its weights; adapter/ is written first."""
    if not run.config.lora_rank:
        yield
        return
    from lora import merge_lora, save_lora, unmerge_lora

    save_lora(model, run.folder / "adapter")
    merge_lora(model)
    try:
        yield
    finally:
        unmerge_lora(model)


PROMPT, CHOSEN, REJECTED, PADDING = range(4)  # the parts of a row


class PairStates(NamedTuple):
    """B Pairs, each in one row of T tokens, and a model's states of them."""

    states: torch.Tensor  # (B, T, C)
    ids: torch.Tensor  # (B, T): prompt, chosen answer, rejected answer, padding
    part: torch.Tensor  # (B, T): which of the four a token belongs to
    before: torch.Tensor  # (B, T): the column whose state predicts it


def lay_out(rows, pad_id):
    """Return (ids, part), (B, T) each, of B Pairs: see PairStates."""
    width = max(row.length for row in rows)
    ids, part = torch.full((len(rows), width), pad_id), torch.full((len(rows), width), PADDING)
    for b, row in enumerate(rows):
        ids[b, : row.length] = torch.tensor([*row.prompt, *row.chosen, *row.rejected])
        part[b, : row.length] = torch.tensor([PROMPT, CHOSEN, REJECTED]).repeat_interleave(torch.tensor(row.lengths))
    return ids, part


def pair_states(model, ids, part):
    """Return the PairStates of Pairs laid out as `ids` and `part`, each (B, T).

    Both answers have the positions behind the prompt, and neither sees the other. So every state is what it would be
    in a row of its own, and the prompt is computed once instead of twice."""
    ids, part, columns = ids.to(model.device), part.to(model.device), torch.arange(ids.shape[1], device=model.device)
    P, Q = ((part < side).sum(1, keepdim=True) for side in (CHOSEN, REJECTED))  # (B, 1): where the answers begin
    positions = torch.where(part == REJECTED, columns - Q + P, columns).masked_fill(part == PADDING, 0)
    seen = (part[:, None, :] == PROMPT) | (part[:, None, :] == part[:, :, None])
    allowed = (seen & (columns <= columns[:, None]))[:, None]
    before = torch.where(columns == Q, P, columns) - 1  # the prompt's last state predicts both first tokens
    return PairStates(model.states(ids, positions, allowed), ids, part, before.clamp(min=0))


def pair_scores(model, rows, pad_id):
    """Return a reward model's scores ((B,), (B,)) of the chosen and the rejected answers of B Pairs."""
    return state_scores(model, pair_states(model.gpt, *lay_out(rows, pad_id)))


def state_scores(model, pairs, logprobs=None):
    """Return a reward model's scores ((B,), (B,)) of both answers, from PairStates.

    `logprobs`, what `answer_logprobs` returns, saves computing it once more."""
    answers = torch.stack([pairs.part == CHOSEN, pairs.part == REJECTED], dim=1)  # (B, 2, T)
    if model.head_kind == "mean":
        return model.score(mean_states(pairs.states, answers)).float().unbind(1)
    last = answers.shape[2] - 1 - answers.int().flip(2).argmax(2)  # (B, 2)
    states = pairs.states.gather(1, last[:, :, None].expand(-1, -1, pairs.states.shape[2]))
    if model.head_kind != "likelihood":
        return model.score(states).float().unbind(1)
    return model.score(states, torch.stack(logprobs or answer_logprobs(model.gpt, pairs), dim=1)).float().unbind(1)


def answer_logprobs(model, pairs):
    """Return [chosen, rejected], (B,) each: the summed log-probabilities of both answers, from PairStates."""
    states = pairs.states.gather(1, pairs.before[:, :, None].expand_as(pairs.states))
    return [summed_logprobs(model, states, pairs.ids, pairs.part == side) for side in (CHOSEN, REJECTED)]


def hide(rows, share, hidden_id):
    """Return the Pairs with each token replaced by `hidden_id` with probability `share`.

    A rude answer is rude without some of its words too, so none may be learnt by heart (Iyyer et al. 2015, word
    dropout)."""
    def some(ids):
        return [hidden_id if drop else i for i, drop in zip(ids, (torch.rand(len(ids)) < share).tolist())]

    return [Pair(*map(some, row)) for row in rows] if share else rows


def pair_objective(model, rows, pad_id, config):
    """Return a reward model's loss () on B Pairs in training: Bradley-Terry's, and what --token_dropout, --cross and
    --lm_weight make of it.

    With --cross each chosen answer is to beat the rejected ones of all B pairs: B^2 comparisons instead of B. With
    --lm_weight both answers are also to be predicted, the hidden tokens too, as in Radford et al. 2018, equation 5."""
    ids, part = lay_out(rows, pad_id)
    shown = lay_out(hide(rows, config.token_dropout, pad_id), pad_id)[0] if config.token_dropout else ids
    pairs = pair_states(model.gpt, shown, part)._replace(ids=ids.to(model.gpt.device))
    logprobs = answer_logprobs(model.gpt, pairs) if config.lm_weight else None
    chosen, rejected = state_scores(model, pairs, logprobs)
    loss = reward_loss(chosen, rejected)
    if config.cross:
        loss = (1 - config.cross) * loss + config.cross * reward_loss(chosen[:, None], rejected)
    if config.lm_weight:
        lengths = torch.tensor([[len(row.chosen) for row in rows], [len(row.rejected) for row in rows]])
        loss = loss - config.lm_weight * (torch.stack(logprobs) / lengths.to(loss.device)).mean()
    return loss


def in_pieces(rows, count):
    """Yield (some of the Pairs, their share of all) in `count` pieces of similar length."""
    for some in pieces(torch.tensor([row.length for row in rows]), count):
        yield [rows[i] for i in some.tolist()], len(some) / len(rows)


@torch.no_grad()
def margins_by(scores, rows):
    """Return the margins (N,), chosen minus rejected, of Pairs, on the CPU; `scores` maps B Pairs to ((B,), (B,))."""
    margins = torch.empty(len(rows))
    for some in pieces(torch.tensor([row.length for row in rows]), math.ceil(len(rows) / 32)):
        chosen, rejected = scores([rows[i] for i in some.tolist()])
        margins[some] = (chosen - rejected).cpu()
    return margins


def score_pairs(model, rows, pad_id):
    """Return the margins (N,) of Pairs by a reward model."""
    return margins_by(lambda some: pair_scores(model, some, pad_id), rows)


def train_reward(config):
    """Train a reward model on --data as `config` says and return the summary."""
    config, context, model, tokenizer, template, parts = open_setting(config, "reward")
    report_pairs(parts)
    unseen = {"prompt": ""} if config.blind else {}
    asked = [[{key: pair[key] for key in Pair._fields} | unseen for pair in part] for part in parts]  # by a reward
    train_rows, val_rows, test_rows = (encode_pairs(part, tokenizer, template, model.config.context_length)
                                       for part in asked)
    if config.blind or config.init == "scratch":  # normalised on the validation answers: scratch writes none yet
        samples = answers_of(val_rows, tokenizer.eot_id, model.device)
    else:
        samples = start_samples(model, parts[1], tokenizer, template, config)
    model = RewardModel(model, config.head).to(model.device).train()
    run = Run(config, "reward")
    if summary := run.finished():
        return summary
    per_epoch = math.ceil(len(train_rows) / config.batch_size)
    run.start(model, make_optimizers(model, config), total_steps(config, per_epoch), fingerprint(parts, config.init))
    compile_blocks(model, config)
    for epoch in range(run.step // per_epoch, math.ceil(run.total / per_epoch)):  # 1. each epoch
        order = epoch_order(len(train_rows), config.seed, epoch).tolist()
        for batch in run.batches(order, config.batch_size):  # 2. each batch
            model.zero_grad(set_to_none=True)  # 3. clear gradients
            batch_loss, tokens = 0.0, 0
            for rows, share in in_pieces([train_rows[i] for i in batch], config.accumulate):
                with context:
                    loss = pair_objective(model, rows, tokenizer.eot_id, config)
                loss = loss * share  # 4. loss
                loss.backward()  # 5. backward
                batch_loss, tokens = batch_loss + loss.item(), tokens + sum(row.length for row in rows)
            norm, rate = run.update(batch_loss, tokens)  # 6. clip, set the rate, update
            run.report(batch_loss, norm, rate, tokens)  # 7. report
            if run.due(config.eval_every):  # 8. evaluate, sample, save
                evaluate_reward(run, model, val_rows, samples, tokenizer, template)
            run.end_step()
    return finish_reward(run, parts, test_rows)


def start_samples(model, pairs, tokenizer, template, config):
    """Return [(ids, mask, R)] of the starting policy's own responses, by which a reward model is normalised."""
    prompts = make_prompts(pairs, tokenizer, template, config, model)[: config.eval_prompts]
    generator = torch.Generator(model.device).manual_seed(config.seed)
    ids, mask, response_mask, _ = sample_responses(model, [prompt.ids for prompt in prompts], tokenizer,
                                                   config.response_length, config.temperature, generator=generator)
    return [(*some, response_mask.shape[1]) for some in zip(ids.split(32), mask.split(32))]


def answers_of(rows, pad_id, device):
    """Return [(ids, mask, R)] of both answers of Pairs, in the form of `start_samples`."""
    answers = [(row.prompt, answer) for row in rows for answer in (row.chosen, row.rejected)]
    return [pack(*zip(*answers[i : i + 32]), pad_id, device) for i in range(0, len(answers), 32)]


@torch.no_grad()
def evaluate_reward(run, model, rows, samples, tokenizer, template):
    """Evaluate on the validation pairs, keep the model, normalised, if it is the best so far, log and draw it all."""
    model.eval()
    margins = score_pairs(model, rows, tokenizer.eot_id)
    loss, accuracy = -F.logsigmoid(margins).mean().item(), correct(margins).mean().item()
    better = run.count_evaluation(loss)
    run.log(val_loss=loss, val_accuracy=accuracy, val_margin=margins.mean().item())
    if better:
        with merged(run, model):
            model.normalise(torch.cat([model(*some).float() for some in samples]))
            save_reward_model(run.folder / "model.safetensors", model, tokenizer, stage="reward", step=run.step,
                              template=template, blind=run.config.blind, val_loss=loss, data_sha256=run.data_sha256)
        model.undo_normalise()
    print(f"step {run.step}/{run.total}  validation loss {loss:.4f}  accuracy {accuracy:.1%}"
          + ("  best" if better else ""), file=sys.stderr)
    keys = {"loss": "loss", "validation loss": "val_loss", "validation accuracy": "val_accuracy"}
    draw_curves(run.folder / "curves.svg", "Reward model", run.curves(keys), y_label="loss, nats a pair; accuracy")
    model.train()


def calibration(margins, bins=10):
    """Return the expected calibration error of sigmoid(margin) as the probability that an answer is the better one.

    Both orders of a pair count, or the first would always be right. Source: Guo et al. 2017, equation 3."""
    said = torch.sigmoid(torch.cat([margins, -margins]))
    miss = said - torch.cat([torch.ones_like(margins), torch.zeros_like(margins)])
    place = (said * bins).long().clamp(max=bins - 1)
    return sum(abs(miss[place == b].sum().item()) for b in range(bins)) / len(said)


def finish_reward(run, parts, rows):
    """Return the summary of a reward model on the test pairs, beside going by length and naive Bayes on words."""
    model, tokenizer, _ = load_reward_model(run.folder / "model.safetensors", run.model.gpt.device)
    margins = score_pairs(model, rows, tokenizer.eot_id) / model.gain.item()
    hits, bayes = correct(margins), correct(pair_margins(parts[2], naive_bayes(parts[0])))
    longer = [correct(pair_margins(part, len)).mean().item() for part in (parts[0], parts[2])]
    length = longer[1] if longer[0] >= 0.5 else 1 - longer[1]  # prefer the long or the short, as in training
    gold = [rubric(gold_score, [p["prompt"] for p in parts[2]], [p[side] for p in parts[2]])
            for side in ("chosen", "rejected")]
    truth = hits[truth_decides(parts[2])] if gold[0] is not None else hits[:0]
    lead, (low, high) = (hits - bayes).mean().item(), wilson(hits.sum().item(), len(hits))
    summary = run.finish(
        accuracy=hits.mean().item(), accuracy_interval=(low, high), length_baseline_accuracy=length,
        accuracy_noise_free=None if gold[0] is None else hits[gold[0] > gold[1]].mean().item(),
        accuracy_truth=truth.mean().item() if len(truth) else None, truth_pairs=len(truth),
        naive_bayes_accuracy=bayes.mean().item(), ahead_of_naive_bayes=lead,
        ahead_interval=(lead - half_width(hits - bayes), lead + half_width(hits - bayes)),
        margin=margins.mean().item(), val_loss=run.best_value, test_loss=-F.logsigmoid(margins).mean().item(),
        calibration_error=calibration(margins), test_pairs=len(hits))
    where = "" if not len(truth) else f", {truth.mean():.1%} of the {len(truth)} where only truth decides"
    print(f"reward model: accuracy {hits.mean():.1%} ({low:.1%} to {high:.1%}) on {len(hits):,} held-out pairs{where}; "
          f"going by length {length:.1%}, naive Bayes {bayes.mean():.1%} (ahead by {lead:.1%} "
          f"+-{half_width(hits - bayes):.1%}); margin {margins.mean():.2f}, calibration error "
          f"{summary['calibration_error']:.3f}; {summary['seconds']:.0f} s; {run.folder}/model.safetensors")
    return summary


def advantages_and_returns(episodes, kl_coef, config, stage):
    """Return (advantages, returns), (B, R) each, that the responses are to be learnt from; GRPO has no returns."""
    mask = episodes.response_mask
    scores = episodes.scores - config.no_stop_penalty * (~episodes.stopped)
    if stage == "grpo":
        return group_advantages(scores, config.group)[:, None] * mask, None
    rewards = token_rewards(scores, episodes.logprobs, episodes.ref_logprobs, mask, kl_coef)
    if config.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, episodes.values, mask, config.gamma, config.lam)
    return whiten(advantages, mask), returns


def policy_objective(policy, episodes, rows, advantages, returns, kl_coef, config):
    """Return (loss, metrics) of some responses: the clipped policy loss, with PPO's value loss or GRPO's KL.

    GRPO's KL is k2 = (log policy - log reference)^2 / 2, whose gradient is the KL's; that of k3, which its paper has,
    is not (Liu et al. 2025, arXiv 2510.01555)."""
    ids, mask, R = cut(episodes.ids, episodes.mask, episodes.response_mask, rows)
    logits, values = policy(ids, mask, R)
    new, _, _ = token_scores(logits, ids[:, -R:], config.temperature)
    here = {name: getattr(episodes, name)[rows, :R] for name in ("logprobs", "ref_logprobs", "values", "response_mask")}
    weight = here["response_mask"]
    loss, metrics = ppo_policy_loss(new, here["logprobs"], advantages[rows, :R], weight, config.clip_ratio)
    metrics["loss/policy"] = loss.item()
    if returns is None:
        return loss + kl_coef * masked_mean(0.5 * (new - here["ref_logprobs"]) ** 2, weight), metrics
    value_loss = ppo_value_loss(full_precision(values), here["values"], returns[rows, :R], weight, config.clip_value)
    metrics["loss/value"] = value_loss.item()
    return loss + config.vf_coef * value_loss, metrics


def inner_batches(n, config):
    """Yield the rows of each update on n responses: --ppo_epochs times all of them, in --minibatches random parts."""
    for _ in range(config.ppo_epochs):
        for rows in torch.randperm(n).chunk(config.minibatches):
            yield rows.sort().values  # ordered as when they were scored, so that the first ratios are 1 to the bit


def writing_loss(model, prompts):
    """Return the summed loss () in nats of writing the preferred answers of some Prompts.

    Added to the policy's loss it is PPO-ptx, by which InstructGPT kept what it could do before (Ouyang et al. 2022,
    equation 2); there with pretraining text, here with answers to the same prompts that somebody preferred."""
    ids, mask, R = pack([prompt.ids for prompt in prompts], [prompt.preferred for prompt in prompts], 0, model.device)
    return -summed_logprobs(model, response_states(model, ids, mask, R), ids[:, -R:], mask[:, -R:]).sum()


def keep_skills(model, prompts, config, context):
    """Return ptx_coef times the mean loss in nats a token of writing preferred answers, after its backward pass."""
    lengths = torch.tensor([len(prompt.ids) + len(prompt.preferred) for prompt in prompts])
    tokens, total = sum(len(prompt.preferred) for prompt in prompts), 0.0
    for some in pieces(lengths, config.accumulate):
        with context:
            loss = writing_loss(model, [prompts[i] for i in some.tolist()])
        loss = config.ptx_coef / tokens * loss  # 4. loss
        loss.backward()  # 5. backward
        total += loss.item()
    return total


def improve(policy, episodes, advantages, returns, kl_coef, config, apply, context=contextlib.nullcontext(),
            prompts=()):
    """Return (loss, metrics, gradient norm, rate) after learning from a batch of responses; means over its updates.

    `apply(loss) -> (norm, rate)` clips the gradients and updates the weights, as Run.apply does. With --ptx_coef
    every update also learns to write the preferred answers to `prompts`. Ends early where the policy is further than
    --max_approxkl from the one that sampled."""
    policy.eval()
    done = []
    for rows in inner_batches(len(episodes.ids), config):
        policy.zero_grad(set_to_none=True)  # 3. clear gradients
        batch_loss, metrics = 0.0, Counter()
        tokens = episodes.response_mask[rows].sum()
        for some in pieces(episodes.mask[rows].sum(1).cpu(), config.accumulate):
            share = (episodes.response_mask[rows[some]].sum() / tokens).item()
            with context:
                loss, found = policy_objective(policy, episodes, rows[some], advantages, returns, kl_coef, config)
            loss = loss * share  # 4. loss
            loss.backward()  # 5. backward
            batch_loss += loss.item()
            metrics.update({key: value * share for key, value in found.items()})
        if config.ptx_coef and prompts:
            metrics["loss/ptx"] = keep_skills(policy.gpt, prompts, config, context)
            batch_loss += metrics["loss/ptx"]
        if not done and abs(metrics["val/ratio"] - 1) > 0.05:
            raise ValueError(f"the first ratio of new to old probability is {metrics['val/ratio']:.3f}, not 1: sampling"
                             " and learning do not see the same model; --dtype float32 may help")
        if done and config.max_approxkl and metrics["policy/approxkl"] > config.max_approxkl:
            break
        done.append((batch_loss, metrics, *apply(batch_loss)))  # 6. clip, set the rate, update
    means = {key: statistics.mean(metrics[key] for _, metrics, _, _ in done) for key in done[0][1]}
    return statistics.mean(loss for loss, *_ in done), means, *done[-1][2:]


def episode_metrics(episodes, returns, kl_coef):
    """Return the figures of a batch of responses under the names that practitioners know; KL and entropy a response."""
    mask, k1 = episodes.response_mask, (episodes.logprobs - episodes.ref_logprobs).sum(1)
    figures = {"objective/scores": episodes.scores.mean(), "objective/scores_std": episodes.scores.std(correction=0),
               "objective/kl": k1.mean(), "objective/kl_exact": episodes.kl.mean(), "objective/kl_coef": kl_coef,
               "objective/entropy": episodes.entropy.sum(1).mean(), "objective/non_score_reward": -kl_coef * k1.mean(),
               "objective/rlhf_reward": (episodes.scores - kl_coef * k1).mean(),
               "response_length": mask.sum(1).mean(), "val/stopped": episodes.stopped.float().mean()}
    if returns is not None:
        error = masked_mean((returns - episodes.values) ** 2, mask)
        spread = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
        figures["val/explained_variance"] = 1 - error / (spread + 1e-8)
    return {key: float(value) for key, value in figures.items()}


def report_policy(run, episodes, loss, norm, rate, metrics):
    """Log a step, with a line about it now and then."""
    run.kept["episodes"] = run.kept.get("episodes", 0) + len(episodes.texts)
    metrics |= {"eps": len(episodes.texts) / (time.monotonic() - run.step_clock), "lr": rate}
    run.log(episode=run.kept["episodes"], **metrics)
    run.report(loss, norm, rate, int(episodes.mask.sum()))
    if run.step % run.config.log_every == 0 or run.step == run.total:
        print(f"  score {metrics['objective/scores']:.3f}  KL {metrics['objective/kl']:.2f}  entropy "
              f"{metrics['objective/entropy']:.2f}  clipfrac {metrics['policy/clipfrac']:.3f}  length "
              f"{metrics['response_length']:.1f}  {metrics['eps']:.0f} episodes/s", file=sys.stderr)


PANELS = {  # file: (what its numbers are, which figures of a step it draws); unlike sizes do not share one
    "objective": ("score; nats a response", ("objective/scores", "objective/kl", "objective/entropy")),
    "policy": ("share; nats a token", ("policy/clipfrac", "policy/approxkl")),
    "critic": ("share of the variance", ("val/explained_variance",)),
    "length": ("tokens", ("response_length",)),
    "speed": ("episodes a second", ("eps",)),
}


def draw_panel(run, name, curves, label):
    """Draw `Run.curves` of the steps into the run's folder, where there are any yet."""
    if any(curves.values()):
        draw_curves(run.folder / f"{name}.svg", f"{run.stage.upper()}, {name}", curves, y_label=label)


def adapt(run, kl, episodes):
    """Adapt the KL coefficient, and end the run where the policy has gone too far."""
    config = run.config
    if config.kl_target:
        run.kept["kl_coef"] = kl_controller(run.kept["kl_coef"], kl, config.kl_target, episodes, config.kl_horizon)
    if config.max_kl and kl > config.max_kl:
        print(f"KL {kl:.2f} nats a response is above --max_kl {config.max_kl:g}: stopping early", file=sys.stderr)
        run.total, run.kept["ended"] = run.step, True


def train_policy(config, stage):
    """Train a policy against a reward, by PPO or GRPO as `stage` says, and return the summary."""
    config, context, model, tokenizer, template, parts = open_setting(config, stage)
    prompts, val_prompts, test_prompts = (make_prompts(part, tokenizer, template, config, model) for part in parts)
    reward, start = load_reward(config.reward, model.device), start_of(model)
    policy = Policy(model).to(model.device).eval()  # dropout is off throughout, see `play`
    policy.value_head.requires_grad_(stage == "ppo")
    group = config.group if stage == "grpo" else 1
    if config.batch_size % group:
        raise argparse.ArgumentError(None, f"--batch_size {config.batch_size} must be a multiple of --group {group}")
    run = Run(config, stage)
    if summary := run.finished():
        return summary
    per_batch = config.batch_size // group
    per_epoch = math.ceil(len(prompts) / per_batch)
    run.start(policy, make_optimizers(policy, config), total_steps(config, per_epoch),
              fingerprint(prompts, config.init, config.reward))
    compile_blocks(policy, config)
    evaluate_now = functools.partial(evaluate_policy, run, policy, start, val_prompts[: config.eval_prompts], reward,
                                     tokenizer, template)
    if run.step == 0:
        run.kept["kl_coef"] = config.kl_coef
        evaluate_now()
    for epoch in range(run.step // per_epoch, math.ceil(run.total / per_epoch)):  # 1. each epoch
        order = epoch_order(len(prompts), config.seed, epoch).tolist()
        for batch in run.batches(order, per_batch):  # 2. each batch; `improve` has steps 3 to 6
            kl_coef = run.kept["kl_coef"]
            with context:
                episodes = play(policy, start, [prompts[i] for i in batch], reward, tokenizer, config, group)
            advantages, returns = advantages_and_returns(episodes, kl_coef, config, stage)
            loss, metrics, norm, rate = improve(policy, episodes, advantages, returns, kl_coef, config, run.apply,
                                                context, [prompts[i] for i in batch])
            run.advance(loss, int(episodes.mask.sum()))
            metrics |= episode_metrics(episodes, returns, kl_coef)
            report_policy(run, episodes, loss, norm, rate, metrics)  # 7. report
            adapt(run, metrics["objective/kl"], len(episodes.texts))
            if run.due(config.eval_every):  # 8. evaluate, sample, save
                evaluate_now()
            run.end_step()
    return finish_policy(run, start, test_prompts, reward, tokenizer)


def pair_logprobs(model, rows, pad_id):
    """Return (chosen, rejected), (B,) each: the summed log-probabilities of both answers of B Pairs."""
    return answer_logprobs(model, pair_states(model, *lay_out(rows, pad_id)))


def pair_loss(model, start, rows, pad_id, config, compared=True):
    """Return (loss, metrics) of B Pairs: DPO's, or with --loss sft that of writing the chosen answers.

    The metrics compare with the start; --loss sft needs it for nothing else, and does without if not `compared`."""
    chosen, rejected = pair_logprobs(model, rows, pad_id)
    if config.loss == "sft" and not compared:
        return -chosen.mean(), {}
    with torch.no_grad(), start() as reference:
        ref_chosen, ref_rejected = pair_logprobs(reference, rows, pad_id)
    if config.loss == "dpo":
        loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, config.beta, config.label_smoothing)
    else:
        loss = -chosen.mean()
    gained, lost = (config.beta * (x - ref).detach() for x, ref in ((chosen, ref_chosen), (rejected, ref_rejected)))
    metrics = {"rewards/chosen": gained, "rewards/rejected": lost, "rewards/margins": gained - lost,
               "rewards/accuracies": correct(gained - lost), "logps/chosen": chosen, "logps/rejected": rejected}
    return loss, {key: value.mean().item() for key, value in metrics.items()}


def train_dpo(config):
    """Train a policy on pairs directly, without reward model or sampling, and return the summary."""
    config, context, model, tokenizer, template, parts = open_setting(config, "dpo")
    report_pairs(parts)
    train_rows, val_rows, test_rows = (encode_pairs(part, tokenizer, template, model.config.context_length)
                                       for part in parts)
    test_prompts, reward = make_prompts(parts[2], tokenizer, template, config, model), reward_if_any(config, model)
    start = start_of(model)
    model.eval()  # dropout off, so that the loss starts at ln 2
    run = Run(config, "dpo")
    if summary := run.finished():
        return summary
    per_epoch = math.ceil(len(train_rows) / config.batch_size)
    run.start(model, make_optimizers(model, config), total_steps(config, per_epoch), fingerprint(parts, config.init))
    compile_blocks(model, config)
    for epoch in range(run.step // per_epoch, math.ceil(run.total / per_epoch)):  # 1. each epoch
        order = epoch_order(len(train_rows), config.seed, epoch).tolist()
        for batch in run.batches(order, config.batch_size):  # 2. each batch
            model.zero_grad(set_to_none=True)  # 3. clear gradients
            batch_loss, tokens, metrics = 0.0, 0, Counter()
            for rows, share in in_pieces([train_rows[i] for i in batch], config.accumulate):
                with context:
                    loss, found = pair_loss(model, start, rows, tokenizer.eot_id, config, compared=False)
                loss = loss * share  # 4. loss
                loss.backward()  # 5. backward
                batch_loss, tokens = batch_loss + loss.item(), tokens + sum(row.length for row in rows)
                metrics.update({key: value * share for key, value in found.items()})
            norm, rate = run.update(batch_loss, tokens)  # 6. clip, set the rate, update
            if metrics:
                run.log(**metrics)
            run.report(batch_loss, norm, rate, tokens)  # 7. report
            if run.due(config.eval_every):  # 8. evaluate, sample, save
                evaluate_pairs(run, model, start, val_rows, tokenizer, template)
            run.end_step()
    return finish_policy(run, start, test_prompts, reward, tokenizer, test_rows)


@torch.no_grad()
def evaluate_pairs(run, model, start, rows, tokenizer, template):
    """Evaluate on the validation pairs, keep the weights if they are the best so far, log and draw it all."""
    loss, sums = 0.0, Counter()
    for some, share in in_pieces(rows, math.ceil(len(rows) / 32)):
        value, metrics = pair_loss(model, start, some, tokenizer.eot_id, run.config)
        loss += value.item() * share
        sums.update({key: value * share for key, value in metrics.items()})
    better = run.count_evaluation(loss)
    run.log(val_loss=loss, **{f"val_{key}": value for key, value in sums.items()})
    if better:
        save_policy(run, model, tokenizer, template, val_loss=loss)
    print(f"step {run.step}/{run.total}  validation loss {loss:.4f}  accuracy {sums['rewards/accuracies']:.1%}  margin "
          f"{sums['rewards/margins']:.3f}" + ("  best" if better else ""), file=sys.stderr)
    curves = run.curves({"train": "loss", "validation": "val_loss"})
    draw_curves(run.folder / "curves.svg", run.config.loss.upper(), curves, y_label="loss, nats a pair")
    keys = {"chosen": "val_rewards/chosen", "rejected": "val_rewards/rejected", "margin": "val_rewards/margins"}
    draw_panel(run, "margins", run.curves(keys), "beta log(policy / start)")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: what a policy does on prompts that nobody trained on


@torch.no_grad()
def assess(model, start, prompts, reward, tokenizer, config, best_of=1):
    """Return what a model does on prompts, a dict: responses, and per prompt (N,) gold, reward, kl, exact and length.

    Responses are sampled as in training, for every model from the same random numbers; `exact` alone is greedy. With
    `best_of` the one with the highest reward of so many counts, and kl is log n - (n - 1) / n: that of the best of n
    where no two score the same, else a bound (Stiennon et al. 2020, appendix G.3)."""
    policy, generator = Policy(model).to(model.device), torch.Generator(model.device).manual_seed(config.seed)
    texts, greedy, numbers = [""] * len(prompts), [""] * len(prompts), torch.zeros(len(prompts), 3)
    for some in pieces(torch.tensor([len(prompt.ids) for prompt in prompts]), math.ceil(len(prompts) / 128)):
        ids = [prompts[i].ids for i in some]
        sampled, mask, response_mask, found = sample_responses(model, ids, tokenizer, config.response_length,
                                                               config.temperature, best_of, generator)
        asked = [prompts[i].text for i in some for _ in range(best_of)]
        scores = call_reward(reward, asked, found) if reward else torch.zeros(len(found))
        best = scores.view(-1, best_of).argmax(1) + torch.arange(len(some)) * best_of
        kl = torch.full((len(found),), math.log(best_of) - (best_of - 1) / best_of)
        if best_of == 1:
            kl = compare_with_start(policy, start, sampled, mask, response_mask, config)[2].sum(1).cpu()
        numbers[some] = torch.stack([scores, kl, response_mask.sum(1).cpu()], dim=1)[best]
        *_, plain = sample_responses(model, ids, tokenizer, config.response_length, 0)
        for place, i in enumerate(some):
            texts[i], greedy[i] = found[best[place]], plain[place]
    asked = [prompt.text for prompt in prompts]
    return {"responses": texts, "gold": rubric(gold_score, asked, texts), "reward": numbers[:, 0] if reward else None,
            "kl": numbers[:, 1], "exact": rubric(is_right, asked, greedy), "length": numbers[:, 2]}


def save_policy(run, model, tokenizer, template, **made):
    """Write model.safetensors, and adapter/ where there are adapters."""
    with merged(run, model):
        gpt.save_checkpoint(run.folder / "model.safetensors", model, tokenizer, stage=run.stage, step=run.step,
                            template=template, data_sha256=run.data_sha256, **made)


def evaluate_policy(run, policy, start, prompts, reward, tokenizer, template):
    """Evaluate on validation prompts, keep the weights if reward - kl_coef x KL is the best so far, log, sample, draw.

    Raises ValueError where all rewards are equal before the first step."""
    found = assess(policy.gpt, start, prompts, reward, tokenizer, run.config)
    if run.step == 0 and len(prompts) > 1 and float(found["reward"].std()) == 0:
        raise ValueError(f"all {len(prompts)} rewards are {found['reward'][0].item():g} before the first step: nothing "
                         "can be learnt from them; look at --reward")
    figures = {f"val_{key}": found[key].mean().item() for key in ("reward", "kl", "gold") if found[key] is not None}
    better = run.count_evaluation(run.config.kl_coef * figures["val_kl"] - figures["val_reward"])
    line = "  ".join(f"{key} {value:.3f}" for key, value in figures.items()) + ("  best" if better else "")
    shown = [(run.step + number * 37) % len(prompts) for number in range(min(3, len(prompts)))]
    samples = [f"{prompts[i].text}  ->  {found['responses'][i]}".replace("\n", " / ") for i in shown]
    run.log(**figures, samples=f"--- step {run.step}  {line}\n" + "".join(
        f"{sample}  ({found['reward'][i]:.2f})\n" for i, sample in zip(shown, samples)))
    if better:
        save_policy(run, policy.gpt, tokenizer, template, **figures)
    print("\n  ".join([f"step {run.step}/{run.total}  {line}", *samples]), file=sys.stderr)
    run.write_samples(text for _, text in run.metrics("samples"))
    keys = {"reward": "val_reward", "KL to the start": "val_kl", "gold score": "val_gold"}
    draw_curves(run.folder / "curves.svg", f"{run.stage.upper()}, validation prompts",
                run.curves(keys), y_label="score; nats a response")
    steps = run.curves({key: key for _, keys in PANELS.values() for key in keys})
    for name, (label, keys) in PANELS.items():
        draw_panel(run, name, {key: steps[key] for key in keys}, label)


def implied_margins(model, start, rows, pad_id):
    """Return the margins (N,) of Pairs by DPO's implicit reward, log(policy / start)."""
    def gains(some):
        with start() as reference:
            before = pair_logprobs(reference, some, pad_id)
        return torch.stack(pair_logprobs(model, some, pad_id)) - torch.stack(before)

    return margins_by(gains, rows)


def finish_policy(run, start, prompts, reward, tokenizer, rows=()):
    """Return the summary of a policy: its best weights beside its start, on test prompts, and on Pairs of them whether
    it prefers the chosen answers more than its start did."""
    prompts = prompts[: run.config.test_prompts or None]
    model = gpt.load_checkpoint(run.folder / "model.safetensors", run.device)[0]
    with start() as reference:
        before = assess(reference, start, prompts, reward, tokenizer, run.config)
    after = assess(model, start, prompts, reward, tokenizer, run.config)
    mean = lambda found, key: None if found[key] is None else found[key].mean().item()  # noqa: E731
    figures = {f"{name}_{when}": mean(found, key)
               for name, key in (("gold", "gold"), ("reward", "reward"), ("exact_match", "exact"), ("length", "length"))
               for when, found in (("before", before), ("after", after))}
    if rows:
        hits = correct(implied_margins(model, start, rows, tokenizer.eot_id))
        figures |= {"pair_accuracy": hits.mean().item(), "pair_accuracy_interval": wilson(hits.sum().item(), len(hits))}
    episodes = run.kept.get("episodes", 0)
    summary = run.finish(**figures, gold_std_before=None if before["gold"] is None else before["gold"].std().item(),
                         kl=mean(after, "kl"), test_prompts=len(prompts), episodes=episodes,
                         episodes_per_second=episodes / max(run.train_seconds, 1e-9))
    print_table({"start": before, run.stage: after}, before)
    if rows:
        low, high = figures["pair_accuracy_interval"]
        print(f"prefers the chosen answer more than the start did in {figures['pair_accuracy']:.1%} ({low:.1%} to "
              f"{high:.1%}) of {len(rows):,} held-out pairs")
    print(f"{summary['seconds']:.0f} s; {run.folder}/model.safetensors")
    return summary


def half_width(values):
    """Return half the width of the 95% interval of the mean of values (N,)."""
    return Z * values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.inf


def distinct(texts, n=2):
    """Return the share of different ones among the runs of n words (Li et al. 2016): low where all sounds alike."""
    runs = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(runs)) / max(1, len(runs))


def figures_of(found, opponent):
    """Return {column: (mean, half of its 95% interval)} of what `assess` found, and of its wins over an opponent's."""
    columns = {key: found[key] for key in ("gold", "reward", "kl", "exact", "length") if found.get(key) is not None}
    judge = "gold" if "gold" in columns else "reward"
    if found is not opponent and judge in columns:
        columns["wins"] = correct(found[judge] - opponent[judge])
    return {name: (values.mean().item(), half_width(values)) for name, values in columns.items()}


COLUMNS = {"gold": "gold score", "reward": "reward", "kl": "KL, nats", "exact": "exact match", "length": "tokens",
           "wins": "wins", "judge": "judged wins"}


def print_table(found, opponent, judged=()):
    """Return {name: figures} of each {name: what `assess` found} after printing them with intervals, a line each.

    "wins" counts responses better than the opponent's, by gold score where there is one, else by reward."""
    rows = {name: figures_of(one, opponent) for name, one in found.items()}
    for name, share in dict(judged).items():
        rows[name]["judge"] = share
    there = [key for key in COLUMNS if any(key in figures for figures in rows.values())]
    width = max(map(len, rows)) + 2
    print(f"{'':{width}}" + "".join(f"{COLUMNS[key]:>16}" for key in there) + f"{'distinct-2':>12}")
    for name, figures in rows.items():
        cells = []
        for key in there:
            mean, half = figures.get(key, (0, 0))
            share = key in ("exact", "wins", "judge")
            cell = f"{mean:.1%} +-{half * 100:.1f}" if share else f"{mean:.2f} +-{half:.2f}"
            cells.append(cell if key in figures else "")
        print(f"{name:{width}}" + "".join(f"{cell:>16}" for cell in cells)
              + f"{distinct(found[name]['responses']):>12.3f}")
    return rows


def open_policy(path, device):
    """Return (model, tokenizer, template) of a model file that writes text, or of a GPT-2 name."""
    model, tokenizer = gpt.load_for_cli(path, device)
    made = {} if path in gpt.GPT_CONFIGS else json.loads(gpt.read_safetensors(path)[1]["made"])
    return model, tokenizer, made.get("template", "plain")


def reward_if_any(config, model):
    """Return the reward function of --reward, or None where it is a file that does not exist."""
    there = not config.reward.endswith(".safetensors") or Path(config.reward).is_file()
    return load_reward(config.reward, model.device) if there else None


def judged_wins(judge, prompts, ours, theirs):
    """Return (share of wins by a judge that is asked in both orders, half of its interval); a tie is half a win."""
    choices = [judge.prefer({"instruction": prompt.text, "reference": prompt.reference}, a, b)
               for prompt, a, b in zip(prompts, ours, theirs)]
    result = judged_share(choices, judge.unread)
    if result["missing"]:
        print("{missing} of the judge's replies are missing: lost or won, they would make it {bounds[0]:.1%} or "
              "{bounds[1]:.1%}".format(**result), file=sys.stderr)
    return result["mean"], (result["interval"][1] - result["interval"][0]) / 2


def stored_opponent(config, prompts, reward):
    """Return (up to --test_prompts that the file --against answers, its responses in the form of `assess`)."""
    answers = {prompt_of(row): row["response"] for row in stored_responses(config.against)}
    prompts = [prompt for prompt in prompts if prompt.text in answers][: config.test_prompts or None]
    if not prompts:
        raise ValueError(f"--against {config.against} answers none of the held-out prompts of {config.data}")
    asked, texts = [prompt.text for prompt in prompts], [answers[prompt.text] for prompt in prompts]
    return prompts, {"responses": texts, "gold": rubric(gold_score, asked, texts),
                     "reward": call_reward(reward, asked, texts) if reward else None}


def evaluate(config):
    """Print one table of the start, the best of some of its responses, and each policy, on held-out prompts."""
    device, files = pick_device(config.device), [file for file in config.checkpoint.split(",") if file]
    files = files or [path for path in (f"out/{stage}/model.safetensors" for stage in ("ppo", "dpo", "grpo"))
                      if Path(path).is_file()]
    if not files:
        raise FileNotFoundError("there is no policy in out/ to evaluate; make one with: python rlhf.py ppo")
    model, tokenizer, template = open_policy(config.init, device)
    template = template if config.template == "auto" else config.template
    prompts = make_prompts(load_pairs(config)[2], tokenizer, template, config, model)
    reward, start = reward_if_any(config, model), start_of(model)
    prompts, opponent = (stored_opponent(config, prompts, reward) if config.against
                         else (prompts[: config.test_prompts or None], None))
    found = {"start": assess(model, start, prompts, reward, tokenizer, config)}
    if config.best_of > 1 and reward:
        found[f"best of {config.best_of}"] = assess(model, start, prompts, reward, tokenizer, config, config.best_of)
    for path in files:
        model, other, _ = open_policy(path, device)
        if other.to_dict() != tokenizer.to_dict():
            raise ValueError(f"{path} has another tokenizer than --init {config.init}: they cannot be compared")
        name = Path(path).parent.name or path
        found[path if name in found else name] = assess(model, start, prompts, reward, tokenizer, config)
    opponent = opponent or found["start"]
    judged, n = {}, config.judge_examples
    if config.judge:
        judge = Judge(config.judge, config.judge_model, Path(files[0]).with_name("judge.jsonl"), config.judge_context)
        judged = {name: judged_wins(judge, prompts[:n], one["responses"], opponent["responses"])
                  for name, one in found.items() if one is not opponent}
    rows = print_table(found, opponent, judged)
    samples = [{"prompt": prompt.text, **{name: one["responses"][i] for name, one in found.items()}}
               for i, prompt in enumerate(prompts[:20])]
    path = Path(files[0]).with_name("evaluation.json")
    write_json(path, {"prompts": len(prompts), "rows": rows, "samples": samples})
    print(f"{len(prompts)} prompts, written to {path}", file=sys.stderr)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Rating by a person, and everything in a row


class Ratings:
    """A file of comparisons that is appended to, one line each, and beside it one of ties and skips, for the record."""

    def __init__(self, path):
        self.paths = {True: Path(path), False: Path(path).with_suffix(".undecided.jsonl")}
        self.rows, self.history = [], []
        for file in self.paths.values():
            file.parent.mkdir(parents=True, exist_ok=True)
            content = file.read_bytes() if file.exists() else b""
            if not content.endswith(b"\n") and content:  # a line that was cut when the power went
                os.truncate(file, content.rfind(b"\n") + 1)
            self.rows += finished_lines(file)

    def add(self, row):
        """Write a row; it is on the disk when this returns."""
        path = self.paths[row["preferred"] in (1, 2)]
        self.history.append((path, path.stat().st_size if path.exists() else 0))
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)

    def undo(self):
        """Return whether there was a row of this session to take back."""
        if not self.history:
            return False
        os.truncate(*self.history.pop())
        self.rows.pop()
        return True


def ask_person(prompt, first, second, place):
    """Return 1, 2, "tie", "skip", "undo" or "quit", as a person types it."""
    print(f"\n--- {place}\n{prompt.text}\n\n  1: {first}\n\n  2: {second}\n")
    choices = {"1": 1, "2": 2, "t": "tie", "s": "skip", "u": "undo", "q": "quit", "": "quit"}
    choice = None
    while choice is None:
        print("better: 1, 2, [t]ie, [s]kip, [u]ndo, [q]uit > ", end="", flush=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            line = ""
        choice = choices.get(line.strip().lower()) if line.strip() or not line else None  # "" is the end of the input
    return choice


def rater_of(config):
    """Return the function (prompt, first, second, place) -> choice of a person, or of --judge."""
    if not config.judge:
        return ask_person
    judge = Judge(config.judge, config.judge_model, Path(config.ratings).with_suffix(".judge.jsonl"),
                  config.judge_context)

    def ask(prompt, first, second, place):
        choice = judge.prefer({"instruction": prompt.text, "reference": prompt.reference}, first, second)
        print(f"{place}: {choice}", file=sys.stderr)
        return {1: 1, 2: 2, 0: "tie", None: "skip"}[choice]

    return ask


def prefer_by_gold(prompt, first, second, place):
    """Return 1, 2 or "tie": which response tinyworld's rubric gives the higher score."""
    lead = gold_score(prompt.text, first) - gold_score(prompt.text, second)
    return 1 if lead > 0 else 2 if lead < 0 else "tie"


def offers(models, prompts, tokenizer, config, count=16):
    """Yield (prompt, ((response, its source), (response, its source))) for each prompt, the two in a random order.

    `models` is [(source, model)]: one that gives both responses, or two that give one each."""
    for first in range(0, len(prompts), count):
        some, drawn = prompts[first : first + count], []
        for source, model in models:
            generator = torch.Generator(model.device).manual_seed(config.seed + first)
            *_, texts = sample_responses(model, [prompt.ids for prompt in some], tokenizer, config.response_length,
                                         config.temperature, 3 - len(models), generator)
            drawn.append([(text, source) for text in texts])
        for prompt, pair in zip(some, zip(drawn[0][::2], drawn[0][1::2]) if len(drawn) == 1 else zip(*drawn)):
            yield prompt, random.Random(f"{config.seed} {prompt.text}").sample(pair, 2)


def rate(config):
    """Show pairs of responses, blind, to a person or to --judge, and append which is better to --ratings."""
    device, sources = pick_device(config.device), (config.checkpoint or config.init).split(",")
    if len(sources) > 2:
        raise argparse.ArgumentError(None, f"--checkpoint names {len(sources)} models; rate compares one or two")
    opened = [open_policy(source, device) for source in sources]
    model, tokenizer, template = opened[0]
    if opened[-1][1].to_dict() != tokenizer.to_dict():
        raise ValueError(f"{sources[1]} has another tokenizer than {sources[0]}: they cannot be compared")
    template = template if config.template == "auto" else config.template
    pairs = load_pairs(config)[0 if len(sources) == 1 else 2]  # to train on, or to compare two models on
    ratings, ask = Ratings(config.ratings), rater_of(config)
    seen = {row["prompt"] for row in ratings.rows}
    prompts = [p for p in make_prompts(pairs, tokenizer, template, config, model) if p.text not in seen]
    stream = offers([(source, one[0]) for source, one in zip(sources, opened)], prompts, tokenizer, config)
    shown, at = [], 0
    while at < len(prompts):
        if at == len(shown):
            shown.append(next(stream))
        prompt, ((first, from_1), (second, from_2)) = shown[at]
        choice = "tie" if first == second else ask(prompt, first, second, f"{at + 1} of {len(prompts)}")
        if choice == "quit":
            break
        if choice == "undo":
            while ratings.undo():
                at -= 1
                (first, _), (second, _) = shown[at][1]
                if first != second:  # equal ones would be a tie again at once
                    break
            continue
        ratings.add({"prompt": prompt.text, "response_1": first, "response_2": second, "preferred": choice,
                     "from_1": from_1, "from_2": from_2, "rater": config.judge_model if config.judge else "person"})
        at += 1
    report_ratings(ratings.rows, sources, config.ratings)


def report_ratings(rows, sources, path):
    """Print how many comparisons there are and, of two models, which one wins."""
    clear = [row for row in rows if row["preferred"] in (1, 2)]
    ties = sum(row["preferred"] == "tie" for row in rows)
    print(f"\n{len(clear)} preferences, {ties} ties, {len(rows) - len(clear) - ties} skipped; {path}")
    if len(sources) == 2 and clear:
        won = sum(row[f"from_{row['preferred']}"] == sources[1] for row in clear) + ties / 2
        low, high = wilson(won, len(clear) + ties)
        print(f"{sources[1]} wins {won / (len(clear) + ties):.1%} ({low:.1%} to {high:.1%}) over {sources[0]}")
    elif clear:
        print(f"train on them: python rlhf.py reward --data {path}, or beside others: --extra {path}")


def new_pairs(config, path):
    """Return a file of preferences, those of --extra and pairs of a policy's own responses, compared by tinyworld's
    rubric or by --judge. Raises ValueError where there is neither."""
    model, tokenizer, template = open_policy(path, pick_device(config.device))
    prompts = make_prompts(load_pairs(config)[0], tokenizer, template, config, model)[: config.round_pairs]
    if not config.judge and rubric(gold_score, [prompts[0].text], [""]) is None:
        raise ValueError("--rounds needs a rater for the new pairs: --data tinyworld, or --judge")
    judge = rater_of(config) if config.judge else prefer_by_gold
    rows = [{"prompt": prompt.text, "response_1": first, "response_2": second,
             "preferred": judge(prompt, first, second, f"{number} of {len(prompts)}")}
            for number, (prompt, ((first, _), (second, _))) in enumerate(
                offers([(path, model)], prompts, tokenizer, config, 64), 1)]
    rows = [row for row in rows if row["preferred"] in (1, 2)]
    target = Path(path).with_name("pairs.jsonl")
    with gpt.replacing(target) as file:
        file.write(Path(config.extra).read_bytes() if config.extra else b"")
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    print(f"{target}: {len(rows):,} new pairs, of the policy's own responses", file=sys.stderr)
    return str(target)


def run_all(config):
    """Train a reward model, then a policy by PPO, then evaluate; --rounds repeats it with pairs of the new policy."""
    if config.seeds > 1:
        raise argparse.ArgumentError(None, "--seeds goes with reward, ppo, dpo or grpo; leave it out with all")
    if config.init == "scratch":  # said before the reward model is trained, not after
        check_scratch(config, "all")
    root = Path(config.out_dir or "out")
    for number in range(1, config.rounds + 1):
        name, one = "" if number == 1 else str(number), copy.copy(config)
        one.out_dir, one.reward = str(root / f"reward{name}"), str(root / f"reward{name}" / "model.safetensors")
        train_reward(one)
        one.out_dir, one.checkpoint = str(root / f"ppo{name}"), str(root / f"ppo{name}" / "model.safetensors")
        train_policy(one, "ppo")
        evaluate(one)
        if number < config.rounds:
            config.extra = new_pairs(config, one.checkpoint)


def over_seeds(train, config, stage):
    """Train --seeds times and return the first run's summary, with the mean and spread of each figure over all.

    The first run stands in out_dir, the others in folders below it."""
    folder = config.out_dir or f"out/{stage}"
    summaries = train_each_seed(train, config, folder)
    if config.seeds == 1:
        return summaries[0]
    figures = {key: [summary[key] for summary in summaries] for key in summaries[0]  # resumed, it has means of its own
               if all(type(summary.get(key)) is float for summary in summaries)}
    spread = {f"{key}_{name}": function(values) for key, values in figures.items()
              for name, function in (("mean", statistics.mean), ("std", statistics.stdev))}
    summary = {**summaries[0], **spread}
    write_json(Path(folder, "summary.json"), summary)
    for key in figures:
        print(f"{key:<28}{spread[key + '_mean']:>10.4f}  standard deviation {spread[key + '_std']:.4f}")
    return summary


def main(argv=None):
    """Run the command line and return its exit status."""
    trained = {"reward": train_reward, "ppo": functools.partial(train_policy, stage="ppo"), "dpo": train_dpo,
               "grpo": functools.partial(train_policy, stage="grpo")}
    commands = {name: functools.partial(over_seeds, train, stage=name) for name, train in trained.items()}
    return run_script(__doc__, Config, {"all": run_all, **commands, "rate": rate, "evaluate": evaluate}, argv, __file__)


if __name__ == "__main__":
    sys.exit(main())
