"Recorded networks and views train as plain ones; here a recording runs its function anew, as a GPU's graph would its kernels"
import copy, pickle
import pytest, torch
from fastai.callback.all import Callback, GradientAccumulation
from fastai.optimizer import Adam, SGD
from torch import nn
from torch.utils._pytree import tree_leaves
from helpers_method import bright_loaders, columns, fit, learner, same
from ifnd_nb import replays
from ifnd_nb.optimiser import fused_adam
from ifnd_nb.replays import Replayed, ReplayCallback, ReplayedNet

def runs_anew(f, device=None):
    out = f()
    kept = [None if o is None else o.data for o in tree_leaves(out)] # writing is no step of the graph's
    def replay():
        for old, new in zip(kept, tree_leaves(f())):
            if old is not None: old.copy_(new.detach())
    return replay, out

@pytest.fixture
def recorder(monkeypatch):
    "Counts recordings"
    made = []
    monkeypatch.setattr(replays, 'warm_up', lambda f, device: [f() for _ in range(3)])
    monkeypatch.setattr(replays, 'recorded', lambda f, device: made.append(f) or runs_anew(f))
    monkeypatch.setattr(ReplayCallback, 'wanted', lambda self: True)
    return made

def trained(**kw): return fit(learner(bright_loaders(), precision='fp32', **kw), 2)

@pytest.mark.parametrize('kw', [dict(strategy='eliminate'), dict(strategy='attract'), dict(cbs=[GradientAccumulation(40)])],
                         ids=['eliminate', 'attract', 'accumulated'])
def test_training_is_the_same_recorded_or_not(kw, recorder, monkeypatch):
    a = trained(**kw)
    assert len(recorder)==4 # views, two forward passes, one backward
    assert a.model.replays is a.dls.train.after_batch[0].replayed is None # let go
    monkeypatch.setattr(ReplayCallback, 'wanted', lambda self: False)
    b = trained(**kw)
    same(a, b)
    assert columns(a)==pytest.approx(columns(b), nan_ok=True)

def test_a_second_fit_is_recorded_anew_with_what_is_frozen(recorder):
    learn = trained()
    for p in learn.model.encoder_q.body.parameters(): p.requires_grad_(False)
    before = [p.clone() for p in learn.model.encoder_q.parameters()]
    fit(learn, 1)
    changed = [not torch.equal(p, q) for p, q in zip(learn.model.encoder_q.parameters(), before)]
    assert len(recorder)==8 and any(changed) and not any(changed[:-4])

def test_a_network_that_cannot_be_recorded_trains_as_it_is(recorder, monkeypatch, capsys):
    def fail(f, device): raise RuntimeError('operation not permitted\nmore')
    monkeypatch.setattr(replays, 'recorded', fail)
    a = trained()
    said = capsys.readouterr().out
    assert said=='networks are not recorded as CUDA graphs, which makes small ones slower: RuntimeError: operation not permitted\n'
    monkeypatch.setattr(ReplayCallback, 'wanted', lambda self: False)
    same(a, trained())

@pytest.mark.parametrize('replay', ['nothing', 'zeros'])
def test_a_recording_that_differs_is_not_used(replay, recorder, monkeypatch, capsys):
    def wrong(f, device):
        _, out = runs_anew(f)
        return (lambda: None) if replay=='nothing' else (lambda: tree_leaves(out)[0].data.zero_()), out
    monkeypatch.setattr(replays, 'recorded', wrong)
    a = trained()
    assert a.model.replays is None and "from the network's own" in capsys.readouterr().out
    monkeypatch.setattr(ReplayCallback, 'wanted', lambda self: False)
    same(a, trained())

@pytest.mark.parametrize('opt_func', [Adam, SGD, fused_adam])
def test_any_optimiser_sees_its_own_gradients(opt_func, recorder, monkeypatch):
    a = trained(opt_func=opt_func)
    assert len(recorder)==4
    monkeypatch.setattr(ReplayCallback, 'wanted', lambda self: False)
    same(a, trained(opt_func=opt_func))

def test_a_network_that_draws_is_recorded(recorder):
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 24), nn.Dropout(.5))
    net.n_features = 24
    trained(arch=net)
    assert len(recorder)==4

def test_an_interrupted_fit_leaves_nothing_that_the_next_one_uses(recorder):
    learn = learner(bright_loaders(), precision='fp32')
    class Stop(Callback):
        def after_step(self): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, cbs=Stop())
    left = learn.dls.train.after_batch[0].replayed
    assert left is not None and learn.model.replays is not None
    assert copy.deepcopy(learn.model).replays is pickle.loads(pickle.dumps(learn.model)).replays is None
    fit(learn, 1)
    assert len(recorder)==4 + 4 - 1 and learn.model.replays is None # the first saw one batch, and so no other views

def test_a_gradient_of_an_earlier_batch_is_refused(recorder):
    x, y = torch.rand(2, 4, 1, 3, 3)
    net = ReplayedNet(nn.Sequential(nn.Flatten(), nn.Linear(9, 2)), x)
    first, second = net(x).sum(), net(y).sum()
    second.backward()
    with pytest.raises(RuntimeError, match='went forward again'): first.backward()

def test_views_that_cannot_be_recorded_are_made_as_they_are(recorder, monkeypatch, capsys):
    def fail(f, device): raise RuntimeError('no')
    monkeypatch.setattr(replays, 'recorded', fail)
    f = Replayed(lambda x: (x + 1,))
    for n in (3, 3, 5): assert torch.equal(f(torch.ones(n))[0], torch.full((n,), 2.))
    assert capsys.readouterr().out.count('\n')==1

def test_what_is_recorded_gives_each_shape_its_own(recorder):
    f = Replayed(lambda x, y: (x + y, x * y))
    for n in (3, 5, 3):
        x, y = torch.rand(n), torch.rand(n)
        first, second = f(x, y)
        kept = first.clone()
        f(x + 1, y)
        assert torch.equal(first, kept) and torch.equal(first, x + y) and torch.equal(second, x * y)
    assert len(recorder)==2

def test_on_a_processor_nothing_is_recorded(monkeypatch):
    monkeypatch.setattr(replays, 'recorded', None)
    assert trained().model.replays is None
