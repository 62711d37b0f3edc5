"Recorded networks and views train as plain ones; here a recording runs its function anew, as a GPU's graph would its kernels"
import pytest, torch
from fastai.callback.all import GradientAccumulation
from torch.utils._pytree import tree_leaves
from helpers_method import bright_loaders, columns, fit, learner, same
from ifnd_nb import replays
from ifnd_nb.replays import Replayed, ReplayCallback

def runs_anew(f, pool=None):
    out = f()
    def replay():
        for old, new in zip(tree_leaves(out), tree_leaves(f())):
            if old is not None: old.data.copy_(new.detach())
    return replay, out, None

@pytest.fixture
def recorder(monkeypatch):
    "Counts recordings"
    made = []
    monkeypatch.setattr(replays, 'warm_up', lambda f, device: [f() for _ in range(3)])
    monkeypatch.setattr(replays, 'recorded', lambda f, pool=None: made.append(f) or runs_anew(f, pool))
    monkeypatch.setattr(ReplayCallback, 'wanted', lambda self: True)
    return made

def trained(**kw): return fit(learner(bright_loaders(), precision='fp32', **kw), 2)

@pytest.mark.parametrize('kw', [dict(strategy='eliminate'), dict(strategy='attract'), dict(cbs=[GradientAccumulation(40)])],
                         ids=['eliminate', 'attract', 'accumulated'])
def test_training_is_the_same_recorded_or_not(kw, recorder, monkeypatch):
    a = trained(**kw)
    assert len(recorder)==4 # views, two forward passes, one backward
    assert a.model.replays is None and 'views' not in vars(a.dls.train.after_batch[0]) # let go
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
    def fail(f, pool=None): raise RuntimeError('operation not permitted\nmore')
    monkeypatch.setattr(replays, 'recorded', fail)
    a = trained()
    said = capsys.readouterr().out
    assert said=='networks are not recorded as CUDA graphs, which makes small ones slower: RuntimeError: operation not permitted\n'
    monkeypatch.setattr(ReplayCallback, 'wanted', lambda self: False)
    same(a, trained())

def test_a_recording_that_differs_is_not_used(recorder, monkeypatch, capsys):
    def wrong(f, pool=None):
        replay, out, _ = runs_anew(f, pool)
        return (lambda: tree_leaves(out)[0].data.zero_()), out, None
    monkeypatch.setattr(replays, 'recorded', wrong)
    assert trained().model.replays is None and 'AssertionError' in capsys.readouterr().out

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
