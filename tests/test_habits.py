"What keeps fastai's loop from waiting for the device"
import pytest, torch
from ifnd_nb.loaders import two_view_dls
from ifnd_nb.moco import moco_learner

@pytest.mark.parametrize('kw', [
    dict(strategy='eliminate'), dict(n_clusters='stable'),
    dict(strategy='attract', features='pass'), dict(detector='topk'), dict(detector='quantile'), dict(detector='oracle')], ids=str)
def test_no_training_step_asks_the_device_for_a_number(kw, monkeypatch):
    "On a GPU each of these calls makes the host wait; here they are counted"
    from fastai.callback.core import Callback
    from torch.utils._python_dispatch import TorchDispatchMode
    from ifnd_nb.ifnd import ifnd_learner
    asked, steps = [], []
    class Ops(TorchDispatchMode):
        "Operations whose result, or whose size, the host has to know"
        single = '_local_scalar_dense', 'nonzero', 'masked_select', 'equal', 'unique', '_unique2'
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            name = f.overloadpacket.__name__
            by_mask = name in ('index', 'index_put_') and any(i is not None and i.dtype==torch.bool for i in args[1])
            if name in self.single or by_mask: asked.append(name)
            return f(*args, **(kwargs or {}))
    ops, real = Ops(), torch.Tensor.cpu
    def cpu(self, *args):
        if steps and steps[-1] is not None: asked.append('cpu')
        return real(self, *args)
    monkeypatch.setattr(torch.Tensor, 'cpu', cpu)
    monkeypatch.setattr('ifnd_nb.habits.monotonic', lambda: 0.) # half a second never passes
    class Begin(Callback):
        order = -100
        def before_batch(self):
            if self.training and self.epoch: steps.append(self.iter); ops.__enter__()
    class End(Callback):
        order = 100
        def after_batch(self):
            if self.training and self.epoch: ops.__exit__(None, None, None); steps.append(None)
    dls = two_view_dls(torch.rand(84, 1, 16, 16), labels=torch.arange(84) % 4, size=16, bs=8, device='cpu')
    learn = ifnd_learner(dls, **{'n_clusters': [3, 6], **kw}, acceptance=.8, queue_size=32, cbs=[Begin(), End()])
    with learn.no_bar(), learn.no_logging(): learn.fit(3)
    n = len(dls.train)
    assert len(steps)==2 * 2 * n and asked==[]
    assert len(learn.recorder.losses)==3 * n and all(isinstance(float(l), float) for l in learn.recorder.losses)

def test_each_loss_is_fetched_once(monkeypatch):
    "Those of earlier epochs are on the host already, and would not go together with those on a GPU"
    dls = two_view_dls(torch.rand(60, 1, 16, 16), size=16, bs=8, device='cpu')
    learn, fetched, real = moco_learner(dls, queue_size=16), [], torch.stack
    def stack(x, *args, **kw):
        if isinstance(x, list) and all(o.dim()==0 for o in x): fetched.append(len(x))
        return real(x, *args, **kw)
    monkeypatch.setattr(torch, 'stack', stack)
    for epochs in (3, 1):
        fetched.clear()
        with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
        assert fetched==[len(dls.train)] * epochs and len(learn.recorder.losses)==epochs * len(dls.train)
