"Other ways to handle false negatives: an equation, marks by hand, and training"
import math
import pytest, torch
from hypothesis import given, strategies as st
from helpers_method import bright_loaders, fit, logits_and_masks, quick
from ifnd_nb.experiments import found_by, trusts_after
from ifnd_nb.moco import moco_learner
from ifnd_nb.ifnd import ifnd_learner
from ifnd_nb.rivals import concentration, debiased, DebiasedCallback, hierarchy, LotsDetector
from ifnd_nb.rivals import QuantileDetector, TopKDetector

@quick(80)
@given(seed=st.integers(0, 10**6), bs=st.integers(1, 5), K=st.integers(1, 8), prior=st.floats(0., .5))
def test_debiased_equals_its_equation(seed, bs, K, prior):
    logits, _ = logits_and_masks(seed, bs, K, 1, 0.)
    total = 0.
    for row in logits.tolist():
        e = [math.exp(v) for v in row[1:] if v > -math.inf]
        negative = max(((sum(e) / len(e) if e else 0.) - prior * math.exp(row[0])) / (1 - prior), math.exp(-1/.2))
        total -= math.log(math.exp(row[0]) / (math.exp(row[0]) + len(e) * negative))
    assert debiased(logits, prior, .2).item() == pytest.approx(total / bs, rel=1e-9, abs=1e-12)

def test_top_k_and_quantile_mark_the_nearest():
    logits, tau = torch.tensor([[9., 8., 2., 7.5, -torch.inf], [9., -9., -8., 1., 0.]]), .1
    assert TopKDetector(tau, k=2, threshold=.7)(logits, None,
                                                torch.arange(4)).tolist() == [[[True, False, True, False], [False] * 4]]
    d = QuantileDetector(5, tau, share=.5, lr=1.)
    idx = torch.tensor([3, 1])
    d(logits, idx, torch.arange(4)) # the first look sets the threshold
    torch.testing.assert_close(d.threshold, torch.tensor([2., -1., 2., -.25, 2.])) # Adam's first step is as long as lr
    assert (d(logits, idx, torch.arange(4))[0].sum(1) == torch.tensor([3, 4])).all()

@pytest.mark.parametrize('share', [.01, .1])
def test_the_quantile_threshold_is_adams_and_lets_its_share_pass(share):
    g, tau, K = torch.Generator().manual_seed(0), .125, 1000 # a power of 2: no rounding
    d, idx = QuantileDetector(3, tau, share=share), torch.tensor([2, 0])
    t = [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in idx]
    opt = torch.optim.Adam(t, .05, betas=(.9, .98))
    for step in range(40):
        sims = torch.rand(2, K, generator=g) * 2 - 1
        if step==0:
            for p, row in zip(t, sims): p.data.fill_(row.double().topk(round(share * K)).values[-1])
        marked = d(torch.cat([torch.ones(2, 1), sims], 1) / tau, idx, torch.arange(K))[0]
        for p, row, m in zip(t, sims, marked):
            above = row.double() > p.data
            assert (above != m).sum() <= 2 # rounding
            p.grad = share - above.double().mean()[None]
        opt.step()
    torch.testing.assert_close(d.threshold[idx].double(), torch.cat([p.data for p in t]), atol=1e-2, rtol=0)
    assert d.threshold[1]==2 and (marked.float().mean(1) - share).abs().max() < .05

def test_the_quantile_detector_waits_for_its_acceptance():
    d = QuantileDetector(2, .1)
    d.refresh(None, 0., 0)
    args = torch.ones(1, 5), torch.tensor([0]), torch.arange(4)
    assert not d(*args).any() and (d.threshold==2).all() and (d.steps==0).all()
    d.refresh(None, 1., 1)
    d(*args)
    assert d.threshold[0] < 2

@pytest.fixture(scope='module')
def dls(): return bright_loaders()

def test_debiased_trains_and_validates_by_info_nce(dls):
    learn = fit(moco_learner(dls, queue_size=64, seed=3, cbs=DebiasedCallback()))
    plain = fit(moco_learner(dls, queue_size=64, seed=3))
    assert all(p.isfinite().all() for p in learn.model.parameters())
    assert not torch.equal(next(learn.model.parameters()), next(plain.model.parameters()))
    loss = learn.validate()[0]
    learn.remove_cb(learn.debiased)
    assert learn.validate()[0] == loss
    with pytest.raises(ValueError, match='prior=1.0'): DebiasedCallback(1.)

def test_lots_leave_out_the_anchors_cluster_and_hold_while_it_trains(dls):
    x = torch.nn.functional.one_hot(torch.arange(40) % 2, 8).float() # two points: belonging is as sure as can be
    lots = LotsDetector(40, tau=.01)
    assert hierarchy(40)==[17, 11, 6]
    x[0] = 0 # no embedding yet
    lots.refresh(x, 1., 0)
    idx, keys = torch.tensor([2, 3]), torch.tensor([4, 5, 2, -1, 0])
    masks = lots(None, idx, keys)
    assert masks.shape==(3, 2, 5)
    assert not masks[:, 0, 1].any() and not masks[:, 1, 0].any() # of the other point
    assert not masks[:, :, 3].any() and not masks[:, 0, 2].any() # an empty slot, the anchor's own image
    assert not masks[:, :, 4].any() and not lots(None, torch.tensor([0]), keys).any() # no embedding, as key and as anchor
    learn = fit(ifnd_learner(dls, queue_size=64, seed=3, detector='hcsc', strategy='eliminate'), 2)
    assert all(p.isfinite().all() for p in learn.model.parameters())
    assert learn.recorder.values[-1][learn.recorder.metric_names[1:].index('removed')] > 0

def test_concentration_is_least_where_images_lie_close():
    g = torch.Generator().manual_seed(0)
    c = torch.eye(8)[:3]
    near, far = (torch.nn.functional.normalize(c[h] + s * torch.randn(20, 8, generator=g), dim=1)
                 for h, s in ((0, .05), (1, .5)))
    x, y = torch.cat([near, far, c[2:]]), torch.tensor([0] * 20 + [1] * 20 + [2])
    phi = concentration(x, y, c, tau=.2)
    assert phi[0] < phi[1] and phi[2]==phi[1] # one image alone says nothing of its spread
    assert phi.mean().item() == pytest.approx(.2)

@pytest.mark.parametrize('detector', ['topk', 'quantile'])
def test_a_rival_may_be_told_how_frequent_classes_are(dls, detector):
    cbs = found_by(detector, 'eliminate', told=True)(dls.train_ds.labels, 3)
    learn = fit(moco_learner(dls, queue_size=64, seed=3, cbs=cbs), 2)
    d = learn.model.detector
    assert d.share==1 / 4 if detector=='quantile' else d.k==64 / 4

def resumed(dls, epochs, **kwargs):
    "A run that stops after an odd number of epochs, and goes on with one that has no detection of its own"
    def learner(): return ifnd_learner(dls, queue_size=64, every=2, strategy='eliminate', **kwargs)
    first, rest = fit(learner(), epochs), learner()
    rest.model.load_state_dict(first.model.state_dict())
    return fit(rest, epochs + 1, start_epoch=epochs)

def test_a_quantile_rival_that_waits_goes_on_waiting_after_a_resume(dls):
    d = resumed(dls, 1, detector='quantile', acceptance=trusts_after(.6)).model.detector
    assert (d.threshold==2).all() and (d.steps==0).all()

def test_a_rival_without_its_clusters_removes_nothing_after_a_resume(dls):
    rest = resumed(dls, 3, detector='hcsc', acceptance=1.)
    assert dict(zip(rest.recorder.metric_names[1:], rest.recorder.values[-1]))['removed']==0
