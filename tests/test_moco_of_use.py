"Of moco_of_use"
import math
import pytest, torch, torchvision
from fastai.callback.core import Callback
from ifnd_nb.encoders import create_encoder
from ifnd_nb.loaders import two_view_dls
from ifnd_nb.moco import info_nce, moco_learner
from ifnd_nb.sources import image_source
from helpers import arrays, loaders, quiet

pytestmark = pytest.mark.usefixtures('in_a_folder')

@pytest.mark.parametrize('n,bs,queue_size', [(40, 16, 64), (40, 16, 24), (40, 8, 8), (33, 16, 100)])
def test_the_held_out_loss_is_that_of_k_held_out_negatives(n, bs, queue_size, tmp_path):
    "Against a slow reference in float64: the last keys of held-out images, the own one left out, averaged up to K"
    x, y = arrays(n)
    dls = two_view_dls(arrays(64)[0], valid=image_source(x, labels=y), size=16, bs=bs, device='cpu')
    learn = moco_learner(dls, queue_size=queue_size, path=tmp_path)
    quiet(learn, lambda l: l.fit(2))
    model, before = learn.model, [o.clone() for o in (learn.model.queue, learn.model.queue_idx, learn.model.queue_ptr)]
    loss = quiet(learn, lambda l: l.validate())[0]
    for a, b in zip(before, (model.queue, model.queue_idx, model.queue_ptr)): assert torch.equal(a, b) # that of training is untouched
    model.eval()
    keys, ids, losses = [], [], []
    with torch.no_grad():
        for x_q, x_k, idx, *_ in dls.valid:
            q, k = (o.double() for o in model(x_q, x_k))
            keys, ids = [*keys, *k][-queue_size:], [*ids, *idx.tolist()][-queue_size:]
            for i, own, key in zip(idx.tolist(), q, k):
                e = [math.exp(float(own @ o) / .1) for o, j in zip(keys, ids) if j!=i]
                pos = float(own @ key) / .1
                losses.append(math.log(math.exp(pos) + queue_size * sum(e) / len(e)) - pos)
    assert loss==pytest.approx(sum(losses) / len(losses), rel=1e-4)

def test_held_out_loss_compares_between_epochs(tmp_path):
    learn = moco_learner(two_view_dls(image_source('digits').subset(range(600)), size=16, device='cpu'), queue_size=4096, path=tmp_path)
    fresh = quiet(learn, lambda l: l.validate())[0]
    quiet(learn, lambda l: l.fit_one_cycle(5))
    valid = [fresh, *(float(v[1]) for v in learn.recorder.values)]
    assert fresh==pytest.approx(math.log(4097), abs=.3) and valid==sorted(valid, reverse=True) # it falls from that of chance

def test_one_held_out_image_has_no_negative(tmp_path):
    x, y = arrays(65)
    learn = moco_learner(two_view_dls(x[:64], valid=x[64:], size=16, bs=16, device='cpu'), queue_size=32, path=tmp_path)
    assert all(math.isnan(v) for v in quiet(learn, lambda l: l.validate()))

def test_an_interrupted_validation_costs_no_queue(tmp_path):
    class Stop(Callback):
        def after_batch(self):
            if not self.training and self.stop: raise KeyboardInterrupt
    learn = moco_learner(loaders(), queue_size=32, path=tmp_path, cbs=(stop := Stop()))
    stop.stop = False
    quiet(learn, lambda l: l.fit(1))
    queue, stop.stop = learn.model.queue_idx.clone(), True
    with pytest.raises(KeyboardInterrupt): quiet(learn, lambda l: l.validate())
    stop.stop = False
    for _ in range(2): quiet(learn, lambda l: l.validate())
    assert torch.equal(learn.model.queue_idx, queue)

def test_other_channels_and_other_loaders_are_refused(tmp_path):
    learn = moco_learner(loaders(), queue_size=32, path=tmp_path)
    learn.dls = two_view_dls(torch.rand(40, 3, 16, 16), bs=8, device='cpu')
    with pytest.raises(ValueError, match='3-channel images, but the encoder takes 1; make them with channels=1'): quiet(learn, lambda l: l.fit(1))
    with pytest.raises(TypeError, match='strategy='): moco_learner(loaders(), loss_func=info_nce)
    with pytest.raises(TypeError, match='arch=None'): moco_learner(loaders(), None)
    assert moco_learner(two_view_dls(torch.rand(40, 3, 32, 32), bs=8, device='cpu'), torchvision.models.resnet18).model.body.n_features==512

def test_a_network_that_makes_its_own_channels(tmp_path):
    class Three(torch.nn.Module):
        def forward(self, x): return x.expand(-1, 3, -1, -1)
    net = torch.nn.Sequential(Three(), create_encoder('small_resnet', 3, 16))
    quiet(moco_learner(loaders(), net, queue_size=16, path=tmp_path), lambda l: l.fit(1))
