"What a GPU adds: the same numbers as on the CPU where they must be, and all of training and scoring to its end"
import json, math, os, subprocess, sys
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from fastai.callback.all import GradientAccumulation, GradientClip, SaveModelCallback
from helpers import pictures
from helpers_method import EVER, groups, points
from ifnd_nb.compiled import Compiled, in_one, info_nce_terms, Pairs
from ifnd_nb.clustering import cluster
from ifnd_nb.detect import false_negatives, pair_quality
from ifnd_nb.pairs import near_far_quality, votes
from ifnd_nb.embedding import embed
from ifnd_nb.detectors import ClusterDetector
from ifnd_nb.ifnd import ifnd_learner
from ifnd_nb.kmeans import spherical_kmeans
from ifnd_nb.levels import main_directions, neighbours, silhouette, smoothed, stable_clusters
from ifnd_nb.loaders import pick_device, two_view_dls
from ifnd_nb.contrast import info_nce, moco_logits, not_negatives
from ifnd_nb.moco import moco_learner
from ifnd_nb.registry import strategies
from ifnd_nb.removal import attract, both, eliminate
from ifnd_nb.replays import ReplayCallback
from ifnd_nb.runs import load_checkpoint, load_config
from ifnd_nb.scoring import evaluation_table, score_features, ScoreCallback
from ifnd_nb.start import start_run
from ifnd_nb.training import do_run
from ifnd_nb.draws import hashed_uniforms
from ifnd_nb.views import TwoViews
from ifnd_nb.weights import load_encoder, save_encoder

pytestmark = pytest.mark.gpu

def loaders(device=None, n=160, channels=1, **kw):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 4
    x = (torch.rand(n, channels, 16, 16, generator=g) * 80 + 40 * y[:, None, None, None]).byte()
    return two_view_dls(x, labels=y, bs=16, valid=.25, seed=1, size=16, device=device, **kw)

def fit(learn, n=3, **kw):
    torch.manual_seed(0); learn.dls.set_epoch(0)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n, **kw)
    return learn

def kept(model): return [*model.parameters(), *model.buffers()]

def columns(learn): return dict(zip(learn.recorder.metric_names[1:-1], learn.recorder.values[-1]))

# ---- devices

def test_a_gpu_is_chosen_where_there_is_one_and_the_cpu_where_asked():
    assert pick_device().type==loaders().device.type=='cuda' and loaders('cpu').device.type=='cpu'
    assert pick_device('cuda')==pick_device('cuda:0')==pick_device(torch.device('cuda'))
    with pytest.raises(ValueError, match="device='cuda:99' is not there; use device='cpu', or one of cuda:0"):
        pick_device('cuda:99')

@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_all_of_a_learner_is_on_one_device(device):
    learn = fit(ifnd_learner(loaders(device), n_clusters=[4, 8], acceptance=1., queue_size=64), 2)
    assert {o.device.type for o in kept(learn.model)}=={device}
    assert {o.device.type for o in learn.dls.one_batch()}=={device}

def test_fastais_wish_for_the_cpu_is_kept():
    from fastai.torch_core import default_device
    default_device(False)
    try:
        assert pick_device().type=='cpu'
        with pytest.raises(ValueError, match='default_device'): pick_device('cuda')
    finally: default_device(None)

# ---- the same numbers

def test_views_are_those_of_the_cpu():
    x, idx = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8), torch.arange(12)
    t = TwoViews(24, blur=.5)
    assert torch.equal(hashed_uniforms(idx, 28), hashed_uniforms(idx.cuda(), 28).cpu())
    assert torch.allclose(t((x.cuda(), idx.cuda()))[0].cpu(), t((x, idx))[0], atol=2e-2)

@pytest.mark.parametrize('loss', [info_nce, eliminate, attract, both])
def test_losses_and_gradients_are_those_of_the_cpu(loss):
    g = torch.Generator().manual_seed(0)
    logits, masks = 10 * torch.randn(64, 1 + 500, generator=g), torch.rand(3, 64, 500, generator=g) < .1
    def value_and_grad(x, masks):
        x = x.requires_grad_()
        y = loss(x) if loss is info_nce else loss(x, masks)
        y.backward()
        return y.detach().cpu(), x.grad.cpu()
    for a, b in zip(value_and_grad(logits.clone(), masks), value_and_grad(logits.cuda(), masks.cuda())):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('name', strategies)
@pytest.mark.parametrize('enough', [None, (3, 6)])
def test_compiled_losses_are_those_of_the_lesson_and_take_no_more_memory(name, enough):
    g, N, K = torch.Generator().manual_seed(0), 60_000, 2**16
    pseudo = torch.randint(-1, 100, (N, 6 if enough else 3), generator=g).int().cuda()
    idx, queue_idx = (torch.randint(N, (n,), generator=g).cuda() for n in (256, K))
    pairs = Pairs(pseudo, idx, queue_idx, enough)
    q, k, queue = (points(n, 128, seed).cuda() for seed, n in enumerate((256, 256, K)))
    def step(loss):
        x = q.clone().requires_grad_()
        torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = loss(moco_logits(x, k, queue, .1, not_negatives(idx, queue_idx)))
        found.backward()
        return found.detach(), x.grad, torch.cuda.max_memory_allocated() - before
    strategy = strategies[name]
    baseline, ours = in_one(info_nce_terms), in_one(strategy.terms)
    for loss in (baseline, lambda x: ours(x, *pairs.parts())): step(loss) # compiled here
    (*got, memory), (*want, _) = step(lambda x: ours(x, *pairs.parts())), step(lambda x: strategy(x, pairs.masks()))
    assert not Compiled.failed and memory < 1.1 * step(baseline)[2]
    for a, b in zip(got, want): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)

def test_clusters_are_those_of_the_cpu():
    x = points(2000, 16, 0)
    cpu, gpu = cluster(x, [10, 40], niter=5), cluster(x.cuda(), [10, 40], niter=5)
    for a, b in zip(cpu.centroids, gpu.centroids): torch.testing.assert_close(a, b.cpu(), atol=1e-3, rtol=0)
    assert (cpu.labels==gpu.labels.cpu()).float().mean() > .999
    torch.testing.assert_close(cpu.confidence, gpu.confidence.cpu(), atol=1e-2, rtol=0)

def test_neighbours_walk_and_silhouette_are_those_of_the_cpu():
    x = groups(400, 10)
    links, on_gpu = neighbours(x), neighbours(x.cuda())
    assert on_gpu.is_cuda and (links.sort(1).values==on_gpu.cpu().sort(1).values).float().mean() > .99
    assert torch.equal(neighbours(x.cuda(), rows=slice(100, 120)), on_gpu[100:120])
    z, there = smoothed(x, links), smoothed(x.cuda(), links.cuda())
    torch.testing.assert_close(there.cpu(), z, rtol=0, atol=1e-3)
    a, b = main_directions(x, 9), main_directions(x.cuda(), 9).cpu() # ten groups differ in nine
    torch.testing.assert_close(a @ a.T, b @ b.T, rtol=0, atol=1e-3)
    c = spherical_kmeans(z, 10)
    assert silhouette(there, c.cuda())==pytest.approx(silhouette(z, c), abs=1e-3)

def test_stable_clusters_are_those_of_the_cpu():
    "But for the odd start of k-means that ends elsewhere"
    x, idx = groups(400, 10), torch.arange(400)
    (cpu, far), (gpu, far_too) = stable_clusters(x, seed=0), stable_clusters(x.cuda(), seed=0)
    assert far > .1 and far_too==pytest.approx(far, abs=.1) and gpu.labels.is_cuda and (gpu.labels >= 0).all()
    counted = [votes(c.labels, i, i).cpu() for c, i in ((cpu, idx), (gpu, idx.cuda()))]
    for least in (3, 6): assert ((counted[0] >= least)==(counted[1] >= least)).float().mean() > .95
    clusters, apart = stable_clusters(points(400, 12, 0).cuda())
    assert apart < .1 and (clusters.labels==-1).all()

def test_kmeans_finds_what_is_there_as_on_the_cpu():
    spread = .1 * torch.randn(2000, 32, generator=torch.Generator().manual_seed(2))
    x = F.normalize(points(20, 32, 1).repeat(100, 1) + spread, dim=1)
    a, b = spherical_kmeans(x, 20), spherical_kmeans(x.cuda(), 20).cpu()
    assert ((x @ a.T).amax(1).mean() - (x @ b.T).amax(1).mean()).abs() < 1e-3

def test_masks_and_quality_are_those_of_the_cpu():
    x, truth = points(400, 8, 0), torch.arange(400) % 5
    pseudo = truth[:, None].int().masked_fill(torch.arange(400)[:, None] % 3 == 0, -1)
    idx, queue_idx = torch.arange(30), torch.arange(-5, 300)
    on_gpu = false_negatives(pseudo.cuda(), idx.cuda(), queue_idx.cuda())
    assert torch.equal(false_negatives(pseudo, idx, queue_idx), on_gpu.cpu())
    on_gpu = votes(pseudo.cuda(), idx.cuda(), queue_idx.cuda())
    assert on_gpu.is_cuda and torch.equal(votes(pseudo, idx, queue_idx), on_gpu.cpu())
    for y in (truth, truth.cuda()):
        assert pair_quality(pseudo.cuda(), y).equals(pair_quality(pseudo, truth))
        assert near_far_quality(x.cuda(), pseudo.cuda(), y).round(3).equals(near_far_quality(x, pseudo, truth).round(3))

def test_scores_are_those_of_the_cpu():
    x, v = points(300, 16, 0), points(80, 16, 1)
    y, w = torch.arange(300) % 4, torch.arange(80) % 4
    cpu, gpu = score_features(x, y, v, w), score_features(x.cuda(), y.cuda(), v.cuda(), w.cuda())
    assert cpu==pytest.approx(gpu, abs=.03)
    dls = loaders()
    learn = fit(moco_learner(dls, queue_size=64), 2)
    on_gpu = evaluation_table(dls, learn.model.body, baseline=learn.model.body, no_bar=True)
    on_cpu = evaluation_table(loaders('cpu'), learn.model.body.cpu(), baseline=learn.model.body, no_bar=True)
    assert on_gpu.notna().all(axis=None)
    assert (on_gpu - on_cpu).abs().loc['trained encoder', ['knn', 'linear']].max() < .1

def test_the_first_loss_is_that_of_the_cpu():
    losses = []
    for device in ('cpu', 'cuda'):
        learn = fit(ifnd_learner(loaders(device), queue_size=64, seed=3), 1)
        losses.append(torch.stack([torch.as_tensor(float(o)) for o in learn.recorder.losses[:3]]))
    torch.testing.assert_close(*losses, rtol=2e-2, atol=2e-2)

# ---- training

@pytest.fixture
def ever(monkeypatch): monkeypatch.setattr(ClusterDetector, 'trust', EVER)

runs = {'baseline': None, 'stable': dict(n_clusters='stable'), 'the paper': dict(n_clusters=None, recipe='paper'),
        'levels': {}, 'eliminate': dict(strategy='eliminate'), 'attract': dict(strategy='attract'),
        'pass': dict(features='pass'),
        'topk': dict(detector='topk'), 'quantile': dict(detector='quantile'),
        'oracle': dict(detector='oracle', strategy='attract'), 'sub-batches': dict(sub_batches=2)}

def learner(kw=None, cbs=(), **more):
    if kw is None: return moco_learner(loaders(), queue_size=64, cbs=list(cbs), **more)
    return ifnd_learner(loaders(), cbs=list(cbs),
                        **{'n_clusters': [4, 8], 'acceptance': .8, 'queue_size': 64, **kw, **more})

@pytest.mark.parametrize('name', runs)
def test_training_to_its_end(name, ever):
    learn = fit(learner(runs[name], [ScoreCallback(('knn', 'one_label'))]))
    assert all(o.is_cuda for o in kept(learn.model))
    assert all(p.isfinite().all() for p in learn.model.parameters())
    assert (learn.model.queue_idx >= 0).all() and columns(learn)['knn'] > .5
    if runs[name] is not None and name not in ('quantile', 'topk'):
        assert columns(learn)['removed'] > 0
        learn.ifnd.plot_epochs(), learn.ifnd.show_false_negatives(), learn.ifnd.show_clusters()
    fit(learn, 1) # a second one goes on

@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize('name', runs)
def test_recorded_networks_train_as_plain_ones(name, precision, ever, monkeypatch, capsys):
    recorded = fit(learner(runs[name], precision=precision))
    assert 'CUDA graphs' not in capsys.readouterr().out
    monkeypatch.setattr(ReplayCallback, 'wanted', lambda self: False)
    plain = fit(learner(runs[name], precision=precision))
    a, b = (torch.tensor(o.recorder.values)[:, :2] for o in (recorded, plain))
    torch.testing.assert_close(a, b, rtol=0, atol=.02 if precision=='fp32' else .2)

@pytest.mark.parametrize('precision', ['to_fp16', 'to_bf16'])
@pytest.mark.parametrize('name', ['baseline', 'levels', 'eliminate', 'attract', 'stable'])
def test_mixed_precision(name, precision, ever):
    learn = fit(getattr(learner(runs[name]), precision)())
    assert all(p.isfinite().all() and p.dtype==torch.float32 for p in learn.model.parameters())
    assert learn.model.queue.dtype==torch.float32 and learn.model.queue.isfinite().all()
    if name!='baseline': assert columns(learn)['removed'] > 0

def test_with_other_callbacks(tmp_path):
    learn = fit(learner({}, [GradientClip(), GradientAccumulation(32), SaveModelCallback(monitor='train_loss')],
                        path=tmp_path))
    assert all(p.isfinite().all() for p in learn.model.parameters())
    learn.save('all')
    again = learner({}, path=tmp_path)
    again.load('all')
    both = zip(learn.model.state_dict().values(), again.model.state_dict().values())
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in both)
    learner({}).summary()

def test_files_that_readers_decode(tmp_path):
    dls = two_view_dls(pictures(tmp_path/'pics', 40), size=16, bs=8, workers=2, max_cache_gb=0)
    assert fit(moco_learner(dls, queue_size=16), 1).dls.one_batch()[0].is_cuda

# ---- runs

def command(*args, cwd):
    installed = Path(sys.executable).with_name('ifnd_train')
    start = [installed] if installed.exists() else [sys.executable, '-c', 'from ifnd_nb.cli import main; main()']
    return subprocess.run([*start, *map(str, args)], capture_output=True, text=True, cwd=cwd,
                          env={**os.environ, 'MPLBACKEND': 'Agg'})

def test_the_first_command(tmp_path):
    done = command('--epochs', 12, cwd=tmp_path)
    assert done.returncode==0, done.stderr
    metrics = json.loads((tmp_path/'ifnd_out'/'metrics.json').read_text())
    assert metrics['config']['device']=='cuda:0' and 'on cuda:0' in done.stdout
    assert set(metrics['table'])=={'raw pixels', 'untrained encoder', 'baseline', 'trained encoder'}
    assert all(math.isfinite(v) for row in metrics['table'].values() for v in row.values())
    assert (tmp_path/'ifnd_out'/'report.png').exists()

@pytest.mark.parametrize('there', ['cuda', 'cpu'])
def test_a_run_goes_on_here_or_elsewhere(there, tmp_path):
    kw = dict(data='digits', epochs=2, queue_size=256, strategy='attract', n_clusters='10,20')
    learn, cfg, out = start_run(out=tmp_path/'a', **kw)
    files = learn.run_files
    def stop(): type(files).after_epoch(files); raise KeyboardInterrupt
    files.after_epoch = stop
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, cfg.lr)
    rest, cfg, _ = start_run(resume=out, device=there)
    assert all(v.device.type==there for s in rest.opt.state.values() for v in s.values() if torch.is_tensor(v))
    with rest.no_bar(), rest.no_logging(): metrics = do_run(rest, cfg, out)
    assert len(load_checkpoint(out)['rows'])==2 and metrics['knn'] > .8
    assert load_config(out)['device'].startswith(there) and cfg.device.startswith(there)
    body, _ = load_encoder(out/'encoder.safetensors', 'cuda')
    assert next(body.parameters()).is_cuda

# ---- ordinary use

@pytest.mark.parametrize('make', [moco_learner, ifnd_learner])
def test_lr_find_suggests_a_rate(make, tmp_path):
    learn = make(loaders(n=800), queue_size=512, path=tmp_path)
    with learn.no_bar(): found = learn.lr_find(show_plot=False)
    assert 1e-5 < found.valley < .3 and (learn.model.queue_idx < 0).all()

def test_habits(tmp_path):
    import matplotlib.pyplot as plt
    from fastai.learner import load_learner
    kw = dict(n_clusters=[4], acceptance=1., queue_size=64, path=tmp_path, cbs=[SaveModelCallback()])
    learn = fit(ifnd_learner(loaders(), **kw), 3)
    losses = learn.get_preds(with_loss=True)[2]
    assert losses.shape==(40,) and losses.mean().item()==pytest.approx(learn.validate()[0], rel=1e-3)
    learn.show_results(max_n=2); plt.close('all')
    learn.export('l.pkl')
    other = load_learner(tmp_path/'l.pkl', cpu=False)
    x = torch.rand(9, 1, 16, 16)
    a, b = (embed(l.model.body, l.dls.test_dl(x), no_bar=True)[0] for l in (learn, other))
    assert torch.allclose(a, b, atol=1e-3)
    learn.dls = loaders(n=320)
    fit(learn, 2)
    assert learn.model.bank.mean.shape[0]==240 and learn.model.queue_idx.max() < 240

def test_loggers_read_the_loss_of_the_last_batch(tmp_path):
    from fastai.callback.core import Callback
    from fastai.learner import Recorder
    class Log(Callback):
        order, seen = Recorder.order + 1, []
        def after_batch(self):
            if self.training: self.seen.append((float(self.smooth_loss), float(self.loss)))
    log, average = Log(), 0.
    fit(moco_learner(loaders(), queue_size=32, path=tmp_path, cbs=log), 1)
    for n, (smooth, loss) in enumerate(log.seen, 1):
        average = .98 * average + .02 * loss
        assert smooth==pytest.approx(average / (1 - .98**n), rel=1e-4)

@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
def test_the_command_in_each_precision(precision, tmp_path):
    args = '--data', 'digits', '--epochs', 4, '--queue-size', 512, '--n-clusters', '10', '--precision', precision
    done = command(*args, cwd=tmp_path)
    assert done.returncode==0 and done.stderr=='', done.stderr
    metrics = json.loads((tmp_path/'ifnd_out'/'metrics.json').read_text())
    assert metrics['knn'] > .9 and not {'\r', '\x1b'} & set(done.stdout)
    state = load_checkpoint(tmp_path/'ifnd_out')
    assert (state['scaler'] is not None)==(precision=='fp16') and state['model']['queue'].dtype==torch.float32
    more = command('--resume', 'ifnd_out', '--epochs', 5, cwd=tmp_path)
    assert more.returncode==0 and 'going on after 4 of 5' in more.stdout, more.stderr

def test_memory_that_runs_out_is_one_line(tmp_path):
    done = command('--data', 'digits', '--size', 1024, '--bs', 1024, cwd=tmp_path)
    assert done.returncode in (1, 2) and done.stderr.count('\n')==1, done.stderr
    assert 'memory ran out; use a smaller --bs, --size, --queue-size or --dim' in done.stderr

def test_features_are_those_of_the_cpu(tmp_path, monkeypatch):
    import numpy as np
    from ifnd_nb.cli import embed_main
    monkeypatch.chdir(tmp_path)
    learn = fit(moco_learner(loaders(), queue_size=64), 2)
    save_encoder(learn, 'encoder.safetensors')
    for device in ('cpu', 'cuda'): embed_main(['.', '--data', 'digits', '--to', f'{device}.npz', '--device', device])
    a, b = (np.load(f'{d}.npz')['features'] for d in ('cpu', 'cuda'))
    assert np.abs(a - b).max() < 2e-2 * np.abs(a).max()
