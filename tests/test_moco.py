"Parity with slow references, wrap-around, and the callback under fastai's other callbacks"
import math
import pytest, torch, torch.nn.functional as F, torchvision
from fastai.callback.all import CSVLogger, GradientAccumulation, GradientClip, SaveModelCallback, SchedCos
from fastai.callback.core import Callback
from hypothesis import given, strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from helpers import arrays, loaders, quiet
from helpers_method import quick
from ifnd_nb.encoders import create_encoder
from ifnd_nb.loaders import two_view_dls
from ifnd_nb.contrast import enqueue, info_nce, moco_logits, momentum_update, not_negatives
from ifnd_nb.moco import moco_learner, MocoCallback
from ifnd_nb.moco import sub_batched
from ifnd_nb.sources import image_source

pytestmark = pytest.mark.usefixtures('in_a_folder')

def unit(g, *sz): return F.normalize(torch.randn(*sz, generator=g, dtype=torch.float64), dim=-1)

def literal_loss(q, k, queue, tau, idx, queue_idx, positives):
    "The equation, entry by entry, in Python floats"
    total = 0.
    for i in range(len(q)):
        sims = [float(q[i] @ k[i]) / tau] + [float(q[i] @ s) / tau for s in queue]
        used = [True] + [int(j) >= 0 and int(j) != int(idx[i]) for j in queue_idx]
        denom = sum(math.exp(s) for s, u in zip(sims, used) if u)
        pos = [j for j in range(len(sims)) if positives[i, j]]
        total += -sum(math.log(math.exp(sims[j]) / denom) for j in pos) / len(pos)
    return total / len(q)

@quick(60)
@given(bs=st.integers(1, 6), K=st.integers(1, 9), dim=st.integers(1, 5), tau=st.floats(.05, 2),
       seed=st.integers(0, 10**6))
def test_loss_equals_the_equation(bs, K, dim, tau, seed):
    g = torch.Generator().manual_seed(seed)
    q, k, queue = unit(g, bs, dim), unit(g, bs, dim), unit(g, K, dim)
    idx, queue_idx = torch.randint(0, 5, (bs,), generator=g), torch.randint(-1, 5, (K,), generator=g)
    drop = not_negatives(idx, queue_idx)
    positives = torch.cat([torch.ones(bs, 1, dtype=torch.bool), (torch.rand(bs, K, generator=g) < .3) & ~drop], 1)
    loss = info_nce(moco_logits(q, k, queue, tau, drop), positives)
    assert loss.item() == pytest.approx(literal_loss(q, k, queue, tau, idx, queue_idx, positives), rel=1e-9)

def test_gradients_in_float64():
    g = torch.Generator().manual_seed(0)
    q, k, queue = unit(g, 3, 4).requires_grad_(), unit(g, 3, 4), unit(g, 6, 4)
    drop = not_negatives(torch.tensor([0, 1, 2]), torch.tensor([0, 5, -1, 2, 2, 7]))
    positives = torch.cat([torch.ones(3, 1, dtype=torch.bool), ~drop & (queue[:, 0] > 0)], 1)
    assert torch.autograd.gradcheck(lambda q: info_nce(moco_logits(q, k, queue, .2, drop), positives), q)
    assert torch.autograd.gradcheck(lambda q: info_nce(moco_logits(q, k, queue, .2, drop)), q)

def test_half_precision_embeddings_give_float_logits():
    g = torch.Generator().manual_seed(0)
    q, k, queue = unit(g, 3, 4).bfloat16(), unit(g, 3, 4).bfloat16(), unit(g, 6, 4).float()
    assert moco_logits(q, k, queue, .2).dtype == torch.float32

@quick(60)
@given(K=st.integers(1, 12), sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_queue_holds_the_last_keys_for_any_sizes(K, sizes):
    queue, queue_idx, ptr = torch.zeros(K, 2), torch.full((K,), -1), torch.zeros(1, dtype=torch.int64)
    seen = torch.arange(sum(sizes))
    for batch in seen.split(sizes): enqueue(queue, queue_idx, ptr, batch[:, None].float().expand(-1, 2), batch)
    filled = queue_idx[queue_idx >= 0]
    assert sorted(filled.tolist()) == seen[-K:].tolist()
    assert (queue[queue_idx >= 0, 0] == filled).all()
    assert ptr.item() == len(seen) % K

def test_queue_takes_no_key_that_is_not_finite():
    queue, queue_idx, ptr = torch.zeros(3, 2), torch.full((3,), -1), torch.zeros(1, dtype=torch.int64)
    enqueue(queue, queue_idx, ptr, torch.tensor([[1., 0], [float('nan'), 0], [float('inf'), 0]]), torch.arange(3))
    assert queue_idx.tolist() == [0, -1, -1] and queue.isfinite().all()

def test_momentum_update_is_the_average():
    a, b = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    want = {n: .9*p.detach() + .1*dict(b.named_parameters())[n] for n, p in a.named_parameters()}
    momentum_update(a, b, .9)
    for n, p in a.named_parameters(): torch.testing.assert_close(p.detach(), want[n])

def test_shuffled_sub_batches_keep_the_order_and_mix_the_batch():
    f = nn.Identity()
    x = torch.arange(12.)[:, None]
    assert (sub_batched(f, x, 3, shuffle=True) == x).all()
    seen = []
    class Spy(nn.Module):
        def forward(self, x): seen.append(x[:, 0].tolist()); return x
    torch.manual_seed(0); sub_batched(Spy(), x, 3, shuffle=True)
    assert [len(s) for s in seen] == [4, 4, 4] and seen != [list(range(4)), list(range(4, 8)), list(range(8, 12))]

# ---- the learner

@pytest.fixture(scope='module')
def dls(): return two_view_dls('digits', size=8, bs=128, seed=0)

def learner(dls, **kw): return moco_learner(dls, dim=16, queue_size=300, **kw)
def state(learn): return {n: p.clone() for n, p in learn.model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def test_same_seed_same_numbers():
    runs = []
    for _ in range(2):
        learn = learner(two_view_dls('digits', size=8, bs=128, seed=0), seed=3)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2)
        runs.append(state(learn))
    assert same(*runs)

def test_training_excludes_own_images_and_validation_does_not(dls):
    learn = learner(dls)
    learn.model.queue_idx[:] = torch.arange(300); learn.model.queue[:] = F.normalize(torch.randn(300, 16), dim=1)
    cb = learn.moco; seen = {}
    for training in (True, False):
        x_q, x_k, idx = dls.train.one_batch()[:3]
        learn.model.train(training); learn.training = training
        learn.yb, learn.pred = (idx.clamp(max=299),), learn.model(x_q, x_k)
        cb.after_pred(); seen[training] = learn.pred[0].isinf().sum().item()
    assert seen == {True: len(idx), False: 0}

def test_validation_stores_nothing(dls):
    learn = learner(dls)
    before = state(learn)
    with learn.no_bar(): learn.validate()
    assert same(before, state(learn))

def test_lr_find_and_summary_leave_the_state_as_it_was(dls, tmp_path):
    learn = learner(dls, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        before = state(learn)
        learn.lr_find(num_it=20, show_plot=False, suggest_funcs=()); assert same(before, state(learn))
        learn.summary()
        learn.fit(1); learn.fit(1)
    assert (learn.model.queue_idx >= 0).all()

def test_save_and_load_carry_key_encoder_queue_and_pointer(dls, tmp_path):
    learn = learner(dls, path=tmp_path, cbs=[SaveModelCallback(monitor='train_loss', fname='m'), CSVLogger()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.save('all'); other = learner(dls, path=tmp_path, seed=9)
    assert not same(state(learn), state(other))
    other.load('all'); assert same(state(learn), state(other))

def test_gradient_accumulation_fills_the_queue_and_follows_once_per_step(dls):
    learn = learner(dls, cbs=[GradientAccumulation(256), GradientClip(1.)])
    steps = []
    step = learn.model.step
    learn.model.step = lambda m: (steps.append(m), step(m))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert len(steps) == len(dls.train)//2
    assert learn.model.queue_ptr.item() == len(dls.train)*128 % 300

@pytest.mark.parametrize('strategy', ['none', 'eliminate', 'attract', 'both'])
def test_a_skipped_step_moves_nothing_and_poisons_nothing(dls, strategy):
    "What MixedPrecision does when float16 overflows: numbers that are none in a batch, and no step"
    from fastai.callback.core import Callback, CancelStepException
    from ifnd_nb.ifnd import IFNDCallback
    class Overflow(Callback):
        order = 5
        def before_batch(self):
            self.bad = self.training and self.train_iter % 4 == 1
            if self.bad: self.learn.xb = tuple(x.clone().index_fill_(0, torch.tensor([0]), torch.inf) for x in self.xb)
            self.before = [p.clone() for p in self.model.parameters()]
        def before_step(self):
            if self.bad: self.skipped += 1; raise CancelStepException()
        def before_fit(self): self.skipped = 0
        def after_batch(self):
            if not self.bad: return
            assert [n for p, (n, q) in zip(self.before, self.model.named_parameters()) if not torch.equal(p, q)]==[]
    cbs = [Overflow()]
    if strategy!='none': cbs.append(IFNDCallback([5, 10], acceptance=1., strategy=strategy))
    learn = learner(dls, cbs=cbs)
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    m = learn.model
    assert learn.overflow.skipped and all(p.isfinite().all() for p in m.parameters()) and m.queue.isfinite().all()
    assert m.bank is None or m.bank.mean.isfinite().all()

def test_momentum_schedule(dls):
    learn = learner(dls, momentum=SchedCos(.9, 1.))
    seen = []
    step = learn.model.step
    learn.model.step = lambda m: (seen.append(m), step(m))
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert seen[0] == pytest.approx(.9) and seen == sorted(seen) and .99 < seen[-1] < 1

@pytest.mark.parametrize('make,words', [
    (lambda d: moco_learner(d, tau=0), 'tau=0'), (lambda d: moco_learner(d, queue_size=0), 'queue_size=0'),
    (lambda d: moco_learner(d, momentum=1.5), 'momentum=1.5')])
def test_bad_arguments_are_named(dls, make, words):
    with pytest.raises(ValueError, match=words): make(dls)

def test_a_model_of_another_kind_is_refused(dls):
    from fastai.learner import Learner
    learn = Learner(dls, nn.Linear(2, 2), loss_func=F.mse_loss, cbs=MocoCallback())
    with pytest.raises(TypeError, match='needs a MoCo model'), learn.no_bar(): learn.fit(1)

# ---- ordinary use

@pytest.mark.parametrize('n,bs,queue_size', [(40, 16, 64), (40, 16, 24), (40, 8, 8), (33, 16, 100)])
def test_the_held_out_loss_is_that_of_k_held_out_negatives(n, bs, queue_size, tmp_path):
    "Against a slow reference in float64: the last keys of held-out images, the own one left out, averaged up to K"
    x, y = arrays(n)
    dls = two_view_dls(arrays(64)[0], valid=image_source(x, labels=y), size=16, bs=bs, device='cpu')
    learn = moco_learner(dls, queue_size=queue_size, path=tmp_path)
    quiet(learn, lambda l: l.fit(2))
    model, before = learn.model, [o.clone() for o in (learn.model.queue, learn.model.queue_idx, learn.model.queue_ptr)]
    loss = quiet(learn, lambda l: l.validate())[0]
    for a, b in zip(before, (model.queue, model.queue_idx, model.queue_ptr)):
        assert torch.equal(a, b) # that of training is untouched
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
    learn = moco_learner(two_view_dls(image_source('digits').subset(range(600)), size=16, device='cpu'),
                         queue_size=4096, path=tmp_path)
    fresh = quiet(learn, lambda l: l.validate())[0]
    quiet(learn, lambda l: l.fit_one_cycle(5))
    valid = [fresh, *(float(v[1]) for v in learn.recorder.values)]
    # it falls from that of chance
    assert fresh==pytest.approx(math.log(4097), abs=.3) and valid==sorted(valid, reverse=True)

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
    with pytest.raises(ValueError, match='3-channel images, but the encoder takes 1; make them with channels=1'):
        quiet(learn, lambda l: l.fit(1))
    with pytest.raises(TypeError, match='strategy='): moco_learner(loaders(), loss_func=info_nce)
    with pytest.raises(TypeError, match='arch=None'): moco_learner(loaders(), None)
    assert moco_learner(two_view_dls(torch.rand(40, 3, 32, 32), bs=8, device='cpu'),
                        torchvision.models.resnet18).model.body.n_features==512

def test_a_network_that_makes_its_own_channels(tmp_path):
    class Three(torch.nn.Module):
        def forward(self, x): return x.expand(-1, 3, -1, -1)
    net = torch.nn.Sequential(Three(), create_encoder('small_resnet', 3, 16))
    quiet(moco_learner(loaders(), net, queue_size=16, path=tmp_path), lambda l: l.fit(1))

# ---- launches

LOOKS = ('view', '_unsafe_view', 'expand', 'transpose', 't', 'permute', 'slice', 'select', 'unsqueeze', 'squeeze', 'split',
         'split_with_sizes', 'as_strided', 'detach', 'alias', 'unbind', 'unfold', '_reshape_alias', 'lift_fresh', 'empty',
         'empty_like', 'empty_strided', 'new_empty', 'diagonal', '_record_function_enter_new', '_record_function_exit')

class Launches(TorchDispatchMode):
    "Operations that a GPU would be asked for: what only looks at memory in another way is left out"
    def __init__(self): super().__init__(); self.n = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.n += f.overloadpacket.__name__ not in LOOKS
        return f(*args, **(kwargs or {}))

@pytest.mark.parametrize('channels', [1, 3])
def test_a_step_of_the_small_network_takes_few_launches(channels):
    dls = two_view_dls(torch.randint(0, 256, (80, channels, 16, 16), dtype=torch.uint8), bs=16, valid=.2, device='cpu')
    learn, counts = moco_learner(dls, queue_size=64, precision='fp32'), []
    class Between(Callback):
        order = 1000
        def before_train(self): self.mode = Launches(); self.mode.__enter__()
        def after_batch(self): counts.append(self.mode.n)
        def after_train(self): self.mode.__exit__(None, None, None)
    learn.add_cb(Between())
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    steps = [b - a for a, b in zip(counts, counts[1:])][:len(dls.train) - 1]
    assert len(steps) > 2 and max(steps) <= 300
