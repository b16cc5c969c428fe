"""On a GPU: the same numbers as on the CPU. All of these skip where there is none; `make test-gpu` runs them."""

import pytest
import torch

import gpt
import train
from lora import apply_lora

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CONFIG = gpt.GPTConfig(vocab_size=512, context_length=128, emb_dim=128, n_heads=4, n_layers=4, drop_rate=0.0)


def both():
    """Return the same model twice, on the CPU and on the GPU, and (ids, targets) for it."""
    torch.manual_seed(0)
    model, ids = gpt.GPTModel(CONFIG), torch.randint(512, (8, 129))
    other = gpt.GPTModel(CONFIG)
    other.load_state_dict(model.state_dict())
    return model, other.cuda(), ids[:, :-1], ids[:, 1:]


def loss_of(model, ids, targets, context=None):
    """Return the mean loss (), with gradients left in the model."""
    ids, targets = ids.to(model.device), targets.to(model.device)
    with context or torch.autocast("cpu", enabled=False):
        logits = model(ids)
    loss = train.next_token_loss(logits, targets) / targets.numel()
    model.zero_grad(set_to_none=True)
    loss.backward()
    return loss.item()


def gradients(model):
    """Return all gradients in one vector on the CPU."""
    return torch.cat([p.grad.flatten().cpu() for p in model.parameters()])


@pytest.mark.parametrize("dtype, tolerance, angle", [("float32", 1e-4, 0.9999), ("bfloat16", 2e-2, 0.99)])
def test_loss_and_gradient_are_the_cpus(dtype, tolerance, angle):
    """In float32 to rounding, in bfloat16 within its 8 bits; gradients point the same way."""
    cpu, gpu, ids, targets = both()
    context = train.autocast(train.Config(dtype=dtype), gpu.device)
    assert loss_of(gpu, ids, targets, context) == pytest.approx(loss_of(cpu, ids, targets), rel=tolerance)
    assert torch.cosine_similarity(gradients(cpu), gradients(gpu), dim=0) > angle


def test_a_compiled_model_equals_the_eager_one():
    """Loss and gradient, for two lengths, with a generation in between, which calls the plain model."""
    _, gpu, ids, targets = both()
    expected = [(loss_of(gpu, ids[:, :T], targets[:, :T]), gradients(gpu)) for T in (128, 61)]
    compiled = torch.compile(gpu)
    for T, (loss, gradient) in zip((128, 61), expected):
        found = train.next_token_loss(compiled(ids[:, :T].cuda()), targets[:, :T].cuda()) / targets[:, :T].numel()
        gpu.zero_grad(set_to_none=True)
        found.backward()
        assert found.item() == pytest.approx(loss, rel=1e-4)
        torch.testing.assert_close(gradients(gpu), gradient, rtol=1e-3, atol=1e-5)
        gpt.generate(gpu, ids[:, :9].cuda(), 5, temperature=0)


def test_greedy_tokens_are_the_cpus():
    """With a cache, padded prompts of unequal length included; random weights, spread so that no two logits tie."""
    cpu, gpu, ids, _ = both()
    with torch.no_grad():
        for model in (cpu, gpu):
            model.out_head.weight.mul_(20)
    mask = (torch.arange(24) >= torch.arange(8)[:, None]).long()
    expected = gpt.generate(cpu, ids[:, :24] * mask, 40, temperature=0, mask=mask)
    found = gpt.generate(gpu, (ids[:, :24] * mask).cuda(), 40, temperature=0, mask=mask.cuda()).cpu()
    assert (expected == found).float().mean() > 0.97


def test_frozen_weights_have_the_cpus_hash():
    """What a run with adapters stores of its base is the same wherever the base is."""
    cpu, gpu, _, _ = both()
    assert train.fingerprint(apply_lora(cpu, 2))["frozen"] == train.fingerprint(apply_lora(gpu, 2))["frozen"]
