"Rows, losses, networks and small learners that the tests of several rooms use"
import random
import numpy as np, torch, torch.nn.functional as F
from hypothesis import settings
from torch import nn
from ifnd_nb.ifnd import ifnd_learner
from ifnd_nb.loaders import two_view_dls
from ifnd_nb.contrast import moco_logits, not_negatives

def quick(n): return settings(max_examples=n, deadline=None, derandomize=True)
def points(n, dim, seed): return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)

def groups(n, k, dim=32, spread=.1):
    "n unit-norm rows around k random directions; k=0: no groups"
    g = torch.Generator().manual_seed(0)
    x = spread * torch.randn(n, dim, generator=g)
    return F.normalize(x + F.normalize(torch.randn(k, dim, generator=g), dim=1)[torch.arange(n) % k] if k else x, dim=1)

def cone(x, spread):
    "Rows around one direction, the nearer the smaller `spread` is"
    return F.normalize(points(1, x.shape[1], 99) + spread * x, dim=1)

# ---- clusters, in Python floats

def literal_walk(x, links, steps):
    "Means over the links of each row in either direction, less the mean of all"
    ends = [list(found) for found in links.tolist()]
    for i, found in enumerate(links.tolist()):
        for j in found: ends[j].append(i)
    x = x.double()
    for _ in range(steps): x = torch.stack([x[to].mean(0) for to in ends])
    return x - x.mean(0)

def literal_silhouette(x, centroids):
    total = 0.
    for v in x.double(): # half the squared distance: what 1 - cosine is for unit norms, and exact for close ones
        near, second = sorted(float((v - c).square().sum()) / 2 for c in centroids.double())[:2]
        total += (second - near) / max(second, 1e-12)
    return total / len(x)

def recall(x, links):
    "Share of the links that are as near as the nearest of all"
    nearest = (x @ x.T).fill_diagonal_(-2)
    return float((nearest.gather(1, links) >= nearest.topk(links.shape[1], 1).values[:, -1:] - 1e-6).float().mean())

EVER = dict(likely=(.5, -1.), sure=(1., -1.)) # `ClusterDetector.trust` with which any clusters stand apart far enough

# ---- losses

def logits_and_masks(seed, bs, K, H, share, tau=.2, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    q, k, queue = (F.normalize(torch.randn(n, 4, generator=g, dtype=dtype), dim=1) for n in (bs, bs, K))
    invalid = not_negatives(torch.randint(0, 6, (bs,), generator=g), torch.randint(-1, 6, (K,), generator=g))
    masks = (torch.rand(H, bs, K, generator=g) < share) & ~invalid
    return moco_logits(q, k, queue, tau, invalid), masks

# ---- learners

def bright_loaders():
    "Images of four classes that differ in brightness"
    g = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 4
    x = (torch.rand(120, 1, 16, 16, generator=g) * 80 + 40 * y[:, None, None, None]).byte()
    return two_view_dls(x, labels=y, bs=16, valid=.2, seed=1)

def learner(dls, cbs=(), **kw):
    return ifnd_learner(dls, cbs=list(cbs), **{**dict(n_clusters=[4, 8], queue_size=64, seed=3), **kw})

def fit(learn, n=3, method='fit_one_cycle', **kw):
    torch.manual_seed(0); learn.dls.set_epoch(0)
    with learn.no_bar(), learn.no_logging(): getattr(learn, method)(n, **kw)
    return learn

def same(a, b):
    for (n, p), q in zip(a.model.state_dict().items(), b.model.state_dict().values()): assert torch.equal(p, q), n

def columns(learn, epoch=-1): return dict(zip(learn.recorder.metric_names[1:-1], learn.recorder.values[epoch]))

# ---- networks and loaders without this package

class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(.5)
    def forward(self, x): return self.drop(self.norm(self.conv(x)).relu()).mean((2, 3))

def images(n=30, seed=0): return torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed))

def loader(n=30, bs=7, labels=True, seed=0):
    x, y = images(n, seed), torch.arange(n) % 3
    return [(x[i], i, y[i])[:2+labels] for i in torch.arange(n).split(bs)]

def states(): return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
def modes(m): return [o.training for o in m.modules()]
