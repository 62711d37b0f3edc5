"The two removal strategies against their equations"
import math
import pytest, torch
from hypothesis import given, strategies as st
from helpers_method import logits_and_masks, quick
from ifnd_nb.moco import info_nce
from ifnd_nb.removal import attract, eliminate

sizes = dict(seed=st.integers(0, 10**6), bs=st.integers(1, 6), K=st.integers(1, 9), H=st.integers(1, 7),
             share=st.sampled_from([0., .2, .7, 1.]))

def literal(logits, masks, how):
    "The equations, entry by entry, in Python floats"
    total = 0.
    for level in masks:
        for row, marked in zip(logits.tolist(), level.tolist()):
            e = [math.exp(v) for v in row]
            positives = [0] + [j + 1 for j, m in enumerate(marked) if m and how=='attract']
            denom = e[0] + sum(v for v, m in zip(e[1:], marked) if not (m and how=='eliminate'))
            total -= sum(math.log(e[p] / denom) for p in positives) / len(positives)
    return total / (len(masks) * len(logits))

@quick(80)
@given(**sizes)
def test_both_equal_their_equations(seed, bs, K, H, share):
    logits, masks = logits_and_masks(seed, bs, K, H, share)
    assert eliminate(logits, masks).item() == pytest.approx(literal(logits, masks, 'eliminate'), rel=1e-9, abs=1e-12)
    assert attract(logits, masks).item() == pytest.approx(literal(logits, masks, 'attract'), rel=1e-9, abs=1e-12)

@quick(80)
@given(**{**sizes, 'share': st.just(0.)}, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_nothing_marked_is_info_nce_to_the_bit(seed, bs, K, H, share, dtype):
    logits, masks = logits_and_masks(seed, bs, K, H, share, dtype=dtype)
    assert torch.equal(eliminate(logits, masks), info_nce(logits))
    assert torch.equal(attract(logits, masks), info_nce(logits))

@pytest.mark.parametrize('loss', [eliminate, attract])
def test_gradients_in_float64(loss):
    for seed in range(5):
        logits, masks = logits_and_masks(seed, 3, 7, 3, .4)
        keep = logits.isfinite()
        fill = lambda v: torch.full_like(logits, -torch.inf).masked_scatter(keep, v)
        assert torch.autograd.gradcheck(lambda v: loss(fill(v), masks), logits[keep].requires_grad_())

@pytest.mark.parametrize('loss', [eliminate, attract])
def test_rows_in_blocks_equal_rows_together(loss, monkeypatch):
    logits, masks = logits_and_masks(0, 9, 40, 3, .3)
    def both():
        x = logits.clone().requires_grad_(); y = loss(x, masks); y.backward()
        return y.detach(), x.grad
    whole = both()
    asked = []
    def two_at_a_time(x): asked.append(len(x)); return [slice(i, i+2) for i in range(0, len(x), 2)]
    monkeypatch.setattr('ifnd_nb.removal.row_blocks', two_at_a_time)
    for a, b in zip(whole, both()): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    assert asked == [9, 9] # forward and backward

def test_a_row_without_any_negative_left_is_finite_even_when_all_it_lost_was_near():
    logits = torch.tensor([[-10., *[100.] * 5], [3., *[-torch.inf] * 5]], requires_grad=True) # tau of about .03
    masks = torch.ones(3, 2, 5, dtype=torch.bool); masks[:, 1] = False
    loss = eliminate(logits, masks); loss.backward()
    assert loss.item() == 0 and logits.grad.abs().max() < 1e-6

@quick(80)
@given(**{**sizes, 'share': st.sampled_from([.2, .7])})
def test_eliminated_keys_get_no_gradient_and_attracted_ones_their_share(seed, bs, K, H, share):
    logits, masks = logits_and_masks(seed, bs, K, H, share)
    x = logits.clone().requires_grad_(); eliminate(x, masks).backward()
    assert (x.grad[:, 1:][masks.all(0)] == 0).all()
    x = logits.clone().requires_grad_(); attract(x, masks).backward()
    want = (logits.softmax(1)[:, 1:] - (masks.double() / (1 + masks.sum(2, keepdim=True))).mean(0)) / bs
    torch.testing.assert_close(x.grad[:, 1:], want, rtol=1e-9, atol=1e-12)
