"The removal strategies against their equations"
import math
import pytest, torch
from hypothesis import given, strategies as st
from helpers_method import logits_and_masks, quick
from ifnd_nb.contrast import info_nce
from ifnd_nb.registry import strategies
from ifnd_nb.removal import attract, both, eliminate

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
def test_the_two_equal_their_equations(seed, bs, K, H, share):
    logits, masks = logits_and_masks(seed, bs, K, H, share)
    assert eliminate(logits, masks).item() == pytest.approx(literal(logits, masks, 'eliminate'), rel=1e-9, abs=1e-12)
    assert attract(logits, masks).item() == pytest.approx(literal(logits, masks, 'attract'), rel=1e-9, abs=1e-12)

@quick(80)
@given(**{**sizes, 'share': st.just(0.)}, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_nothing_marked_is_info_nce_to_the_bit(seed, bs, K, H, share, dtype):
    logits, masks = logits_and_masks(seed, bs, K, H, share, dtype=dtype)
    assert torch.equal(eliminate(logits, masks), info_nce(logits))
    assert torch.equal(attract(logits, masks), info_nce(logits))
    assert torch.equal(both(logits, masks), info_nce(logits))

@pytest.mark.parametrize('loss', [eliminate, attract, both])
def test_gradients_in_float64(loss):
    for seed in range(5):
        logits, masks = logits_and_masks(seed, 3, 7, 3, .4)
        keep = logits.isfinite()
        fill = lambda v: torch.full_like(logits, -torch.inf).masked_scatter(keep, v)
        assert torch.autograd.gradcheck(lambda v: loss(fill(v), masks), logits[keep].requires_grad_())

@pytest.mark.parametrize('loss', [eliminate, attract, both])
def test_rows_in_blocks_equal_rows_together(loss, monkeypatch):
    logits, masks = logits_and_masks(0, 9, 40, 3, .3)
    def run():
        x = logits.clone().requires_grad_(); y = loss(x, masks); y.backward()
        return y.detach(), x.grad
    whole = run()
    asked = []
    def two_at_a_time(x): asked.append(len(x)); return [slice(i, i+2) for i in range(0, len(x), 2)]
    monkeypatch.setattr('ifnd_nb.one_pass.row_blocks', two_at_a_time)
    for a, b in zip(whole, run()): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
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

# ---- both at once

def literal_both(logits, masks):
    "The equation, entry by entry, in Python floats: the first level is E, the last A"
    total = 0.
    for row, likely, sure in zip(logits.tolist(), masks[0].tolist(), masks[-1].tolist()):
        e = [math.exp(v) for v in row]
        denom = e[0] + sum(v for v, out, pulled in zip(e[1:], likely, sure) if pulled or not out)
        positives = [0] + [j + 1 for j, pulled in enumerate(sure) if pulled]
        total -= sum(math.log(e[p] / denom) for p in positives) / len(positives)
    return total / len(logits)

several = {**sizes, 'H': st.integers(2, 4)}

@quick(80)
@given(**several, nested=st.booleans())
def test_both_is_its_equation(seed, bs, K, H, share, nested):
    logits, masks = logits_and_masks(seed, bs, K, H, share)
    if nested: masks[-1] &= masks[0] # as a detector has it; else some of the sure are not likely
    assert both(logits, masks).item() == pytest.approx(literal_both(logits, masks), rel=1e-9, abs=1e-12)

@quick(60)
@given(**several)
def test_both_is_elimination_or_attraction_where_there_is_but_one_of_them(seed, bs, K, H, share):
    logits, masks = logits_and_masks(seed, bs, K, H, share)
    assert torch.equal(both(logits, masks[:1]), eliminate(logits, masks[:1])) # one level alone
    assert torch.equal(both(logits, masks[[0, 0]]), attract(logits, masks[:1])) # all that is likely is sure
    none = torch.zeros_like(masks[:1])
    torch.testing.assert_close(both(logits, torch.cat([masks, none])), eliminate(logits, masks[:1]))

@quick(80)
@given(**{**several, 'share': st.sampled_from([.2, .7, 1.])})
def test_likely_keys_get_no_gradient_and_sure_ones_their_share(seed, bs, K, H, share):
    logits, masks = logits_and_masks(seed, bs, K, H, share)
    masks[-1] &= torch.rand(bs, K, generator=torch.Generator().manual_seed(seed)) < .5
    x = logits.clone().requires_grad_(); both(x, masks).backward()
    out, sure = masks[0] & ~masks[-1], masks[-1]
    assert (x.grad[:, 1:][out] == 0).all()
    left = logits.exp(); left[:, 1:][out] = 0
    want = left / left.sum(1, keepdim=True)
    want[:, 1:] -= sure.double() / (1 + sure.sum(1, keepdim=True))
    want[:, 0] -= 1 / (1. + sure.sum(1).double())
    torch.testing.assert_close(x.grad, want / bs, rtol=1e-9, atol=1e-12)

@quick(60)
@given(**several, tau=st.sampled_from([.05, .2, 1.]))
def test_both_in_float32_is_near_float64_and_autocast_changes_nothing(seed, bs, K, H, share, tau):
    logits, masks = logits_and_masks(seed, bs, K, H, share, tau)
    x, y = logits.clone().requires_grad_(), logits.float().requires_grad_()
    exact, loss = both(x, masks), both(y, masks)
    exact.backward(); loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and y.grad.isfinite().all()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.grad.double(), x.grad, rtol=1e-4, atol=1e-5)
    assert (y.grad[logits.isneginf()] == 0).all()
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(both(y, masks), loss)

def test_both_stays_finite_where_nothing_but_the_positive_is_left():
    logits = torch.tensor([[-10., *[100.] * 5], [3., *[-torch.inf] * 5]], requires_grad=True) # tau of about .03
    masks = torch.zeros(2, 2, 5, dtype=torch.bool); masks[0, 0] = True
    loss = both(logits, masks); loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()

def test_strategies_say_which_pairs_they_want():
    wants = {name: strategies[name].wants for name in ('eliminate', 'attract', 'both')}
    assert wants == dict(eliminate=('likely',), attract=('sure',), both=('likely', 'sure'))
    assert [strategies[name] for name in wants] == [eliminate, attract, both]
