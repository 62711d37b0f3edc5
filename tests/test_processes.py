"Two processes train as one does: same weights, same queue, same pseudo labels; files and figures once"
import json, os, subprocess, sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock
import pytest, torch
from PIL import Image
from torch import nn
pytest.importorskip('accelerate')
import fastai.distributed # noqa: F401 gives every Learner distrib_ctx
from ifnd_nb.loaders import plain_dl, two_view_dls
from ifnd_nb.folders import run_files
from helpers_method import EVER, groups
from ifnd_nb.detectors import ClusterDetector
from ifnd_nb.ifnd import ifnd_learner, IFNDCallback
from ifnd_nb.levels import stable_clusters, stable_clusters_of_all
from ifnd_nb import reading
from ifnd_nb.embedding import embed
from ifnd_nb.moco import moco_learner
from ifnd_nb.processes import gather, gather_shards, in_shares, process, reading_together, shard
from ifnd_nb.scoring import embed_together
from ifnd_nb.sources import image_source

class Plain(nn.Module):
    "A body without BatchNorm"
    n_features = 24
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(256, 24), nn.ReLU())
    def forward(self, x): return self.layers(x)

runs = { # 101 images, of which 81 train: neither divides by two
    'eliminate': dict(strategy='eliminate'), 'both': dict(),
    'attract, a pass': dict(strategy='attract', features='pass'),
    'stable': dict(n_clusters='stable'), 'stable, trusted': dict(n_clusters='stable', acceptance=1.),
    'quantile': dict(detector='quantile'),
    'batchnorm': dict(arch='small_resnet', strategy='attract'),
}

def trusted(stack):
    "Trust the clusters of given embeddings: those of noise hang on the order in which two processes add up"
    stack.enter_context(mock.patch.object(ClusterDetector, 'trust', EVER))
    stack.enter_context(mock.patch.object(IFNDCallback, 'embedding', lambda self: groups(81, 5)))

def trained(name, world):
    x, y = torch.rand(101, 1, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(101) % 5
    kw = runs[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        arch = kw.get('arch') or Plain()
    kw = {'n_clusters': [4, 12], 'acceptance': .7, 'queue_size': 40, 'precision': 'fp32', **kw, 'arch': arch}
    dls = two_view_dls(x, labels=y, bs=16, seed=1, device='cpu')
    learn = ifnd_learner(dls, **kw, sub_batches=2 if 'arch' in runs[name] and world==1 else 1)
    torch.manual_seed(3)
    with learn.no_bar(), learn.no_logging(), ExitStack() as stack:
        if name=='stable, trusted': trusted(stack)
        if world > 1: stack.enter_context(learn.distrib_ctx(sync_bn=False, cpu=True))
        learn.fit_one_cycle(3)
    figures = [[float(v) for v in row] for row in learn.recorder.values]
    return dict(state=learn.model.state_dict(), figures=figures, part=list(learn.dls.train.part),
                kind=type(learn.dls.train).__name__)

def _worker(rank, world, port, out):
    torch.set_num_threads(1)
    os.environ.update(WORLD_SIZE=str(world), RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1',
                      MASTER_PORT=str(port))
    done = {name: trained(name, world) for name in runs}
    n = 7
    assert process()==(rank, world) and gather(torch.tensor([rank, rank])).tolist()==[0, 0, 1, 1]
    assert torch.equal(gather_shards(torch.arange(n)[shard(n)], n), torch.arange(n))
    assert gather_shards(torch.arange(1)[shard(1)], 1).tolist()==[0]
    g = torch.Generator().manual_seed(0)
    def around(n):
        means = torch.randn(n, 32, generator=g).repeat(401 // n + 1, 1)[:401]
        return nn.functional.normalize(means + .3 * torch.randn(401, 32, generator=g), dim=1)
    x, noise = around(10), nn.functional.normalize(torch.randn(401, 12, generator=g), dim=1)
    some = x * (torch.arange(401) % 3 > 0)[:, None] # others have no embedding
    for v, least, k in ((x, .1, 401), (around(20), .1, 401), (some, .1, 267), (noise, .1, 0), (noise, -1., 401),
                        (x[:8], -1., 0)):
        (whole, apart), (mine, far) = stable_clusters(v, least=least), stable_clusters_of_all(v, least=least)
        assert far==apart and torch.equal(mine.labels, whole.labels), (least, k)
        assert torch.equal(mine.confidence, whole.confidence)
        assert (whole.labels >= 0).sum(0).tolist()==[k] * 6, (least, k)
    odd = two_view_dls(torch.zeros(30, 1, 16, 16), bs=9, seed=1, device='cpu')
    try:
        learn = ifnd_learner(odd)
        with learn.no_bar(), learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(1)
    except ValueError as e: done['refused'] = str(e)
    learn = ifnd_learner(two_view_dls(torch.zeros(30, 1, 16, 16), bs=8, seed=1, device='cpu'))
    try:
        with learn.no_bar(): learn.fit(1)
    except RuntimeError as e: done['alone'] = str(e)
    try:
        with learn.no_bar(), learn.distrib_ctx(sync_bn=False, cpu=True): learn.lr_find(show_plot=False)
    except RuntimeError as e: done['finding'] = str(e)
    done['read'] = read_together(out, rank)
    learn = moco_learner(two_view_dls(torch.rand(101, 1, 16, 16), labels=torch.arange(101) % 5, bs=16, seed=1, device='cpu'))
    for images in (learn.dls.train_ds, learn.dls.valid_ds): # 81 and 20
        x, y = embed_together(learn.model.body, learn.dls, images)
        alone = embed(learn.model.body, plain_dl(learn.dls, images), no_bar=True)
        torch.testing.assert_close(x, alone[0], rtol=1e-5, atol=1e-6)
        assert torch.equal(y, alone[1])
    torch.save(done, f'{out}/{rank}')
    torch.distributed.destroy_process_group()

def read_together(out, rank):
    "Each process decodes or checks its half of 21 files; all hold what one would, or the same error"
    read, counts = reading.read_image, []
    def counted(f, *args):
        counts.append(f)
        return read(f, *args)
    found = {}
    with mock.patch.object(reading, 'read_image', counted):
        for folder, kw in (('whole', {}), ('whole', dict(max_cache_gb=0)), ('damaged', dict(skip_bad=True)), ('damaged', {})):
            counts.clear()
            try:
                with reading_together(): images = image_source(f'{out}/{folder}', size=16, **kw)
            except ValueError as e: found[f'{folder} {kw}'] = dict(error=str(e))
            else:
                n = len(counts)
                x = images.batch(torch.arange(len(images)))[0]
                found[f'{folder} {kw}'] = dict(x=x, n=n, left_out=[str(o.path) for o in images.left_out], paths=images.paths)
    assert not in_shares()
    return found

def some_files(folder, damaged=None):
    folder.mkdir()
    for i, x in enumerate(torch.randint(0, 256, (21, 16, 16), generator=torch.Generator().manual_seed(0)).byte()):
        f = folder/f'{i:02}.png'
        Image.fromarray(x.numpy()).save(f)
        if i==damaged: f.write_bytes(f.read_bytes()[:60])

def free_port():
    import socket
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp('two')
    some_files(out/'whole'), some_files(out/'damaged', 3)
    torch.multiprocessing.spawn(_worker, (2, free_port(), out), nprocs=2)
    return [torch.load(out/str(r), weights_only=True) for r in range(2)]

def _learned(state): return {k: v for k, v in state.items() if not ('running_' in k or 'num_batches' in k)}

def test_each_process_reads_its_share_of_the_files(two):
    first, second = (o['read'] for o in two)
    assert first.keys()==second.keys() and len(first)==4
    for name in first:
        a, b = first[name], second[name]
        if 'error' in a:
            assert a==b and '03.png' in a['error']
            continue
        assert torch.equal(a['x'], b['x']) and a['paths']==b['paths'] and a['left_out']==b['left_out']
        assert (a['n'], b['n'])==(10, 11) # a damaged one is looked at, too
        assert len(a['x'])==21 - len(a['left_out']) and len(a['left_out'])==('damaged' in name)
    whole = first['whole {}']
    alone = image_source(str(Path(whole['paths'][0]).parent), size=16)
    assert torch.equal(alone.images, whole['x']) and [*map(str, alone.paths)]==whole['paths']

@pytest.mark.parametrize('name', runs)
def test_both_processes_hold_the_same(two, name):
    a, b = (t[name] for t in two)
    assert a['state'].keys()==b['state'].keys() and all(torch.equal(v, b['state'][k]) for k, v in a['state'].items())
    torch.testing.assert_close(a['figures'], b['figures'], rtol=0, atol=0, equal_nan=True)
    assert a['part']==b['part']==[0, 1] and a['kind']=='ImagesDL' # the loaders are as they were

@pytest.mark.parametrize('name', runs)
def test_two_processes_train_as_one(two, name):
    one, state = trained(name, 1), two[0][name]['state']
    assert one['state']['queue_idx'].tolist()==state['queue_idx'].tolist()
    assert int(one['state']['queue_ptr'])==int(state['queue_ptr'])
    for k, v in _learned(one['state']).items():
        if v.is_floating_point(): torch.testing.assert_close(v, state[k], rtol=0, atol=2e-4, msg=k)
        else: assert torch.equal(v, state[k]), k
    if name!='batchnorm': # running statistics, which held-out images meet, are means over the processes
        torch.testing.assert_close(torch.tensor(one['figures'])[:, :2], torch.tensor(two[0][name]['figures'])[:, :2],
                                   rtol=0, atol=1e-3)
    else:
        torch.testing.assert_close(torch.tensor(one['figures'])[:, 0], torch.tensor(two[0][name]['figures'])[:, 0],
                                   rtol=0, atol=1e-3)
    assert all(v.isfinite().all() for v in _learned(state).values())
    assert (name in ('quantile', 'stable') or (state['detector.pseudo'] >= 0).any())
    assert name!='stable, trusted' or min(row[-3] for row in two[0][name]['figures']) > 0 # removed

def test_a_batch_that_cannot_be_shared_is_refused(two):
    assert all('bs=9' in t['refused'] and '2 processes' in t['refused'] for t in two)

def test_what_would_go_wrong_in_silence_is_refused(two):
    assert all('distrib_ctx' in t['alone'] and 'one process' in t['finding'] for t in two)

# ---- the command

def launch(*args, cwd, script=None):
    "`ifnd_train`, or a script, in two processes"
    if script is None: script = '--no-python', os.path.join(os.path.dirname(sys.executable), 'ifnd_train')
    words = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', 2, '--master_port', free_port(),
             *script, *args]
    return subprocess.run([*map(str, words)], cwd=cwd, text=True, capture_output=True, timeout=300,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg'})

KILLED = """
import os, signal, sys
from ifnd_nb.runs import RunFiles
after_epoch = RunFiles.after_epoch
def killed(self):
    after_epoch(self)
    if os.environ['RANK']=='0': os.kill(os.getpid(), signal.SIGKILL)
RunFiles.after_epoch = killed
from ifnd_nb.cli import main
main(sys.argv[1:])
"""

def test_a_command_of_two_processes_writes_once_and_goes_on_after_a_kill(tmp_path):
    args = '--data', 'digits', '--epochs', 2, '--queue_size', 256, '--strategy', 'attract', '--out'
    whole = launch(*args, 'whole', cwd=tmp_path)
    out = whole.stdout
    assert whole.returncode == 0, whole.stderr
    assert {p.name for p in (tmp_path/'whole').iterdir()} =={*run_files} - {'left_out.txt'}
    assert out.count('k-NN accuracy:') == out.count('held out: 359') == 1
    assert len((tmp_path/'whole'/'metrics.csv').read_text().splitlines()) == 3

    (tmp_path/'killed.py').write_text(KILLED)
    half = launch(*args, 'half', cwd=tmp_path, script=['killed.py'])
    assert half.returncode != 0 and 'Signal 9' in half.stderr, half.stderr
    assert len(torch.load(tmp_path/'half'/'checkpoint', weights_only=True)['rows']) == 1
    assert not (tmp_path/'half'/'metrics.json').exists()
    rest = launch('--resume', 'half', cwd=tmp_path)
    assert rest.returncode == 0 and 'going on after 1 of 2 epochs' in rest.stdout, rest.stderr
    a, b = (torch.load(tmp_path/o/'checkpoint', weights_only=True) for o in ('whole', 'half'))
    assert all(torch.equal(v, b['model'][k]) for k, v in a['model'].items()) and a['model'].keys()==b['model'].keys()
    x, y = (json.loads((tmp_path/o/'metrics.json').read_text()) for o in ('whole', 'half'))
    assert {k: v for k, v in x.items() if 'second' not in k} == {k: v for k, v in y.items() if 'second' not in k}

def test_a_command_of_two_processes_refuses_in_one_line(tmp_path):
    done = launch('--data', 'digits', '--bs', 9, '--epochs', 1, '--out', 'out', cwd=tmp_path)
    err = done.stderr
    assert done.returncode != 0
    assert err.count('ifnd_train: --bs=9 cannot be shared evenly by 2 processes') == err.count('ifnd_train:') == 1

DIVERGING = """
import math, os, sys, time
import ifnd_nb.training as training
from fastai.callback.core import Callback
class Break(Callback):
    def before_batch(self):
        time.sleep(.02 * int(os.environ['RANK'])) # one is slower
        if not self.training or self.iter!=5 or hasattr(self.learn, 'ifnd'): return
        self.learn.model.module.encoder_q.head[0].weight.data.fill_(math.nan)
run_learner = training.run_learner
def broken(*args, **kwargs):
    learn = run_learner(*args, **kwargs)
    learn.add_cb(Break())
    return learn
training.run_learner = broken
from ifnd_nb.cli import main
import gc
from torch.nn.parallel import DistributedDataParallel
main(sys.argv[1:])
held = [o for o in gc.get_objects() if type(o) is DistributedDataParallel]
if held: sys.exit(f'{len(held)} models keep the group, whose threads may abort the process as it ends')
"""

def test_a_baseline_that_diverges_in_two_processes_ends_in_all(tmp_path):
    "Both must see it at the same batch, or one waits for the other for ever"
    (tmp_path/'diverging.py').write_text(DIVERGING)
    args = '--data', 'digits', '--bs', 32, '--epochs', 1, '--queue-size', 64, '--beside-baseline', '--out', 'out'
    done = launch(*args, cwd=tmp_path, script=['diverging.py'])
    said = [l for l in done.stderr.splitlines() if l.startswith('ifnd_train')]
    assert done.returncode==0 and len(said)==1, done.stderr
    assert 'the run is whole, but the baseline beside it is not: the loss became nan' in said[0]
    assert (tmp_path/'out'/'report.png').exists()

def test_a_command_whose_processes_mpi_started_writes_once(tmp_path):
    port = str(free_port())
    def started(rank):
        others = 'WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE'
        mpi = dict(SIZE=2, RANK=rank, LOCAL_RANK=rank, LOCAL_SIZE=2)
        env = {k: v for k, v in os.environ.items()
               if not k.startswith(('OMPI_', 'PMI_', 'MASTER_')) and k not in others}
        env.update({f'OMPI_COMM_WORLD_{k}': str(v) for k, v in mpi.items()})
        env.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=port, OMP_NUM_THREADS='1', MPLBACKEND='Agg')
        words = [os.path.join(os.path.dirname(sys.executable), 'ifnd_train'),
                 *'--data digits --epochs 1 --queue_size 256 --out out'.split()]
        return subprocess.Popen(words, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    both = [started(rank) for rank in range(2)]
    try: (out, err), (other, other_err) = (p.communicate(timeout=300) for p in both)
    finally:
        for p in both: p.kill()
    assert [p.returncode for p in both] == [0, 0], err + other_err
    assert out.count('k-NN accuracy:') == 1 and 'k-NN' not in other and 'held out' not in other
    assert 'all_gather_into_tensor' not in err + other_err
    assert {p.name for p in (tmp_path/'out').iterdir()} =={*run_files} - {'left_out.txt'}
    assert len((tmp_path/'out'/'metrics.csv').read_text().splitlines()) == 2
