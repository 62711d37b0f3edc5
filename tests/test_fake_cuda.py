"With a GPU that is none: no tensor on the CPU meets one on the GPU in data, step, detection and scoring"
import math, pickle
import matplotlib.pyplot as plt, pytest, torch
from fake_cuda import CUDA, FakeCuda, MixedDevices
from helpers_method import EVER, groups, points
from ifnd_nb import loaders as loaders_room, start, weights
from ifnd_nb.detect import accept, chance_of_a_pair, pair_quality
from ifnd_nb.clustering import cluster
from ifnd_nb.pairs import drift, near_far_quality, quality_by_rate
from ifnd_nb.evaluate import cluster_scores
from ifnd_nb.embedding import embed
from ifnd_nb.detectors import ClusterDetector
from ifnd_nb.ifnd import ifnd_learner
from ifnd_nb.levels import stable_clusters
from ifnd_nb.loaders import plain_dl, two_view_dls
from ifnd_nb.moco import moco_learner
from ifnd_nb.pictures import plot_embedding
from ifnd_nb.scoring import evaluation_table, score_features, ScoreCallback
from ifnd_nb.start import start_run
from ifnd_nb.training import do_run
from ifnd_nb.views import TwoViews

@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr('fastai.torch_core.defaults.use_cuda', None)
    for room in (loaders_room, start, weights): monkeypatch.setattr(room, 'pick_device', lambda device=None: CUDA)
    monkeypatch.setattr(loaders_room, 'has_room', lambda device, images: device.type=='cuda')
    monkeypatch.setattr(loaders_room, 'pinned', lambda x: x)
    monkeypatch.setattr(ClusterDetector, 'trust', EVER)
    with FakeCuda() as gpu: yield gpu

def test_the_fake_refuses_what_a_gpu_refuses(gpu):
    x, y = torch.rand(3, 4), torch.rand(3, 4, device='cuda')
    assert x.device.type=='cpu' and y.device==(y + 1).device==y[0].device==x.to(y).device==CUDA
    assert y.cpu().device.type=='cpu'
    for mix in (lambda: x + y, lambda: x[y.argmax(1)], lambda: torch.cat([x, y]), lambda: y.numpy(),
                lambda: torch.where(y > 0, y, x),
                lambda: y[torch.tensor([0, 1])]):
        with pytest.raises(MixedDevices): mix()
    assert (y * torch.tensor(2.)).device==CUDA # as on a GPU
    few = torch.sparse_coo_tensor(torch.eye(3, 2, device='cuda').nonzero().T, y.flatten()[:2], (3, 3))
    for form in (few, few.coalesce(), few.coalesce().to_sparse_csr()):
        assert form.device==(form @ y).device==CUDA
        with pytest.raises(MixedDevices): form @ x
    z = y.clone().requires_grad_()
    (z * z).sum().backward()
    assert z.grad.device==CUDA

def loaders(channels=1, n=120):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 4
    x = (torch.rand(n, channels, 16, 16, generator=g) * 80 + 40 * y[:, None, None, None]).byte()
    return two_view_dls(x, labels=y, bs=16, valid=.25, seed=1, size=16)

@pytest.mark.parametrize('channels', [1, 3])
def test_data(gpu, channels):
    dls = loaders(channels)
    for dl in (dls.train, dls.valid, plain_dl(dls)):
        for b in dl: assert all(o.device==CUDA for o in b)
    dls.show_batch()

def test_data_from_odd_places(gpu):
    x, y = torch.arange(60 * 64, device='cuda').view(60, 1, 8, 8).to(torch.uint8), torch.arange(60, device='cuda') % 3
    dls = two_view_dls(x, labels=y, bs=8, size=8)
    assert all(o.device==CUDA for o in dls.one_batch())
    assert dls.train_ds.batch(torch.arange(4, device='cuda'))[0].device.type=='cpu' # where they are stored
    assert TwoViews(8)((x,))[0].device==CUDA

def test_images_are_copied_once_and_anew_when_they_or_their_labels_change(gpu):
    images = loaders().train_ds
    there = images.on(CUDA)
    assert images.on(CUDA) is there and there.on(CUDA) is there and images.images.device.type=='cpu'
    assert there.images.device==there.labels.device==CUDA
    assert images.subset([1, 2]).copied is pickle.loads(pickle.dumps(images)).copied is None
    images.labels = images.labels + 1
    assert torch.equal(images.on(CUDA).labels.cpu(), images.labels)

runs = {'baseline': None, 'stable': dict(n_clusters='stable'),
        'stable, eliminate': dict(n_clusters='stable', strategy='eliminate'),
        'the paper': dict(n_clusters=None, recipe='paper'),
        'levels': {}, 'levels, attract': dict(strategy='attract'), 'pass': dict(features='pass'),
        'topk': dict(detector='topk'), 'quantile': dict(detector='quantile'),
        'oracle': dict(detector='oracle', strategy='attract')}

@pytest.mark.parametrize('name', runs)
def test_steps_detection_and_looks(gpu, name):
    dls, kw = loaders(), dict(queue_size=40, sub_batches=2, cbs=[ScoreCallback(('knn', 'one_label'))])
    if runs[name] is None: learn = moco_learner(dls, **kw)
    else: learn = ifnd_learner(dls, **{'n_clusters': [4, 8], 'acceptance': .8, **kw, **runs[name]})
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3)
    model = learn.model
    assert all(o.device==CUDA for o in (*model.parameters(), *model.buffers())) and model.queue_idx.min() >= 0
    assert all(math.isfinite(v) for v in learn.recorder.values[-1][:2])
    assert all(0 <= v <= 1 for v in learn.score.now().values())
    if name not in ('baseline', 'topk', 'quantile'):
        assert learn.recorder.values[-1][learn.recorder.metric_names.index('removed') - 1] > 0
        learn.ifnd.plot_epochs(), learn.ifnd.show_false_negatives(), learn.ifnd.show_clusters()
        plt.close('all')
    with learn.no_bar(): learn.validate(), learn.get_preds()

@pytest.mark.parametrize('name, there', [*((name, True) for name in runs), ('levels', False)])
def test_an_epoch_moves_its_batches_and_asks_for_nothing(gpu, name, there, monkeypatch):
    "A call that asks a GPU for a number makes the host wait, and so may each copy from there or to it"
    from fastai.callback.core import Callback
    moved, counted, real = [], [], gpu.move
    def move(t, goal, *args):
        if goal is not None and gpu.holds(t)!=(goal.type=='cuda'): moved.append(f'to {goal.type}')
        return real(t, goal, *args)
    monkeypatch.setattr(gpu, 'move', move)
    monkeypatch.setattr('ifnd_nb.habits.monotonic', lambda: 0.) # half a second never passes
    waits = '_local_scalar_dense', 'nonzero', 'masked_select', 'equal', '_unique2'
    monkeypatch.setattr(loaders_room, 'has_room', lambda device, images: there)
    pinned = []
    monkeypatch.setattr(loaders_room, 'pinned', lambda x: pinned.append(x) or x)
    def seen(): return [len(moved) - len(pinned), len(pinned), *(gpu.there.get(o, 0) for o in waits)]
    class Begin(Callback):
        order = 1000
        def before_train(self): counted.append(seen())
    class End(Callback):
        order = -1000
        def after_train(self): counted[-1] = [b - a for a, b in zip(counted[-1], seen())]
    dls, cbs = loaders(), [Begin(), End()]
    if runs[name] is None: learn = moco_learner(dls, queue_size=40, cbs=cbs)
    else:
        learn = ifnd_learner(dls,
                             **{'n_clusters': [4, 8], 'acceptance': .8, 'queue_size': 40, 'cbs': cbs, **runs[name]})
    with learn.no_bar(), learn.no_logging(): learn.fit(3)
    if there: assert counted[-1]==[1, *[0] * 6] # the order of the images; the first epochs move more, once
    else: assert counted[-1]==[0, 3 * len(dls.train), *[0] * 5] # images, indices and labels, from pinned memory

@pytest.mark.parametrize('kind', ['levels', 'stable'])
def test_detection_sends_and_waits_alike_for_more_images(gpu, kind, monkeypatch):
    "Some numbers for each cluster and round, and at most 4,096 images that stand for all; none for each image"
    moved, real = [], gpu.move
    def move(t, goal, *args):
        if goal is not None and gpu.holds(t)!=(goal.type=='cuda'): moved.append(t.numel())
        return real(t, goal, *args)
    monkeypatch.setattr(gpu, 'move', move)
    def cost(n):
        x = groups(n, 10).to('cuda')
        moved.clear(); gpu.there.clear()
        clusters = cluster(x, [4, 8]) if kind=='levels' else stable_clusters(x)[0]
        accept(*clusters[:2], .5)
        waits = sum(gpu.there.get(o, 0) for o in ('_local_scalar_dense', 'nonzero', 'masked_select', 'equal', '_unique2'))
        return waits, sum(moved), max(moved)
    (waits, total, _), (more, larger, largest) = cost(1600), cost(6400)
    assert more < 3 * waits and larger < 2 * total and largest <= 4096

def test_clusters_and_their_quality(gpu):
    x, truth = points(300, 8, 0).to('cuda'), torch.arange(300) % 5
    apart = groups(400, 10).to('cuda')
    some, far = stable_clusters(apart, seed=0)
    assert (some.labels >= 0).all() and (stable_clusters(x)[0].labels < 0).all() and type(far) is float and far > .1
    some = some._replace(labels=some.labels[:300], confidence=some.confidence[:300])
    for c in (cluster(x, [5, 20]), some):
        assert c.labels.device==c.confidence.device==CUDA
        pseudo = accept(c.labels, c.confidence, .7)
        for y in (truth, truth.to('cuda')):
            pair_quality(pseudo, y), near_far_quality(x, pseudo, y, anchors=20)
            cluster_scores(y, c.labels[:, 0]), chance_of_a_pair(y)
        drift(c.labels, c.labels), quality_by_rate(c, truth, [.5])

def test_scores(gpu):
    dls = loaders()
    learn = moco_learner(dls, queue_size=40)
    learn.model.to('cuda')
    table = evaluation_table(dls, learn.model.body, baseline=learn.model.body, no_bar=True)
    assert table.notna().all(axis=None)
    x, y = (o.to('cuda') for o in embed(learn.model.body, plain_dl(dls), no_bar=True))
    assert all(0 <= v <= 1 for v in score_features(x, y, x, y).values())
    plot_embedding(x, y)

@pytest.mark.parametrize('strategy', ['none', 'attract'])
def test_the_whole_job_and_going_on(gpu, strategy, tmp_path, capsys):
    kw = dict(data='digits', size=16, epochs=2, strategy=strategy, queue_size=256, device='cuda')
    if strategy!='none': kw.update(beside_baseline=True, n_clusters='10,20')
    learn, cfg, out = start_run(out=tmp_path/'out', **kw)
    files = learn.run_files
    def stop(): type(files).after_epoch(files); raise KeyboardInterrupt
    files.after_epoch = stop
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.no_logging(): do_run(learn, cfg, out)
    rest, cfg, _ = start_run(resume=out)
    assert all(v.device==CUDA for s in rest.opt.state.values() for v in s.values() if torch.is_tensor(v))
    with rest.no_bar(), rest.no_logging(): metrics = do_run(rest, cfg, out)
    assert cfg.device=='cuda:0' and metrics['table']['trained encoder']['one_label'] > .2
    assert (out/'report.png').exists()
    assert capsys.readouterr().err=='' # what fails costs only itself, and a line
