"Folders and files of runs, whole at any moment"
import math, os, pickle, threading
from pathlib import Path
import pytest, torch
from fastai.callback.core import Callback
from ifnd_nb.detectors import ClusterDetector
from ifnd_nb.runs import claim_folder, load_checkpoint, load_config
from ifnd_nb.start import start_run
from ifnd_nb.training import do_run
from helpers import command, metrics, pictures, quiet, small, TINY
from helpers_method import EVER

pytestmark = pytest.mark.usefixtures('in_a_folder')

def test_a_run_is_never_written_over(tmp_path):
    (tmp_path/'metrics.json').write_text('{}')
    with pytest.raises(FileExistsError, match='holds a run already'): start_run(out=tmp_path, **TINY)

@pytest.mark.parametrize('strategy', ['none', 'attract', 'both'])
def test_resume_ends_where_an_uninterrupted_run_ends(strategy, tmp_path, monkeypatch):
    monkeypatch.setattr(ClusterDetector, 'trust', EVER)
    learn, cfg, out = start_run(out=tmp_path/'a', **{**TINY, 'epochs': 3, 'strategy': strategy})
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, cfg.lr)
    b, cfg, _ = start_run(out=tmp_path/'b', **{**TINY, 'epochs': 3, 'strategy': strategy})
    def stop(self=b.run_files):
        type(self).after_epoch(self)
        if self.epoch == 0: raise KeyboardInterrupt
    b.run_files.after_epoch = stop
    with pytest.raises(KeyboardInterrupt), b.no_bar(), b.no_logging(): b.fit_one_cycle(3, cfg.lr)
    assert len(load_checkpoint(tmp_path/'b')['rows']) == 1
    c, cfg, _ = start_run(resume=tmp_path/'b')
    with c.no_bar(), c.no_logging(): c.fit_one_cycle(3, cfg.lr, start_epoch=c.run_files.start_epoch)
    for (n, p), q in zip(learn.model.state_dict().items(), c.model.state_dict().values()): assert torch.equal(p, q), n
    rows = [[{k: v for k, v in r.items() if k != 'train_seconds'} for r in load_checkpoint(tmp_path/x)['rows']]
            for x in 'ab']
    assert repr(rows[0]) == repr(rows[1]) and (strategy == 'none' or rows[0][-1]['removed'] > 0)

class Harm:
    def __reduce__(self): return (os.system, ('touch harmed',))

@pytest.mark.parametrize('content', [b'', b'not a checkpoint', pickle.dumps(Harm())])
def test_a_bad_checkpoint_is_refused_and_runs_nothing(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'checkpoint').write_bytes(content)
    with pytest.raises(ValueError, match='damaged or no checkpoint'): start_run(resume=tmp_path)
    torch.save(dict(x=Harm()), tmp_path/'checkpoint')
    with pytest.raises(ValueError, match='damaged or no checkpoint'): start_run(resume=tmp_path)
    assert not (tmp_path/'harmed').exists()

def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    learn, cfg, out = start_run(out=tmp_path/'a', **{**TINY, 'epochs': 3})
    class Break(Callback):
        def before_batch(self):
            if self.training and self.epoch == 1 and self.iter == 2:
                self.learn.model.encoder_q.head[0].weight.data.fill_(float('nan'))
    learn.add_cb(Break())
    said = 'nan in epoch 2, and the checkpoint after 1 epochs is kept.*smaller lr than 0.001'
    with pytest.raises(FloatingPointError, match=said): quiet(learn, lambda l: do_run(l, cfg, out))
    state = load_checkpoint(out)
    assert len(state['rows']) == 1 and all(v.isfinite().all() for v in state['model'].values())

def test_a_loss_that_is_no_number_stops_at_once(monkeypatch):
    learn, cfg, out = start_run(data=small(n=400)[1], size=16, bs=4, epochs=3, queue_size=16, strategy='none')
    class Break(Callback):
        seen = 0
        def before_batch(self):
            if self.training: self.seen += 1
            if self.training and self.epoch==1 and self.iter==3:
                self.learn.model.encoder_q.head[0].weight.data.fill_(math.nan)
    learn.add_cb(Break())
    monkeypatch.setattr('ifnd_nb.runs.monotonic', iter(range(10**6)).__next__) # each batch takes a second
    said = 'nan in epoch 2, and the checkpoint after 1 epochs is kept'
    with pytest.raises(FloatingPointError, match=said): quiet(learn, lambda l: do_run(l, cfg, out))
    assert next(cb for cb in learn.cbs if isinstance(cb, Break)).seen==len(learn.dls.train) + 4

def test_runs_that_start_together_have_folders_of_their_own():
    got, gate = [], threading.Barrier(12)
    def claim(i): gate.wait(); got.append((claim_folder(dict(seed=i)), i))
    threads = [threading.Thread(target=claim, args=(i,)) for i in range(12)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len({p for p, _ in got})==12 and all(load_config(p)['seed']==i for p, i in got)
    assert {p.name for p, _ in got}=={'ifnd_out', *(f'ifnd_out-{i}' for i in range(2, 13))}

def test_one_name_for_two_runs_is_refused_to_the_second():
    won, lost, gate = [], [], threading.Barrier(8)
    def claim(i):
        gate.wait()
        try: won.append(claim_folder(dict(seed=i), 'mine'))
        except FileExistsError as e: lost.append(str(e))
    threads = [threading.Thread(target=claim, args=(i,)) for i in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(won)==1 and len(lost)==7 and all('holds a run already' in e and '--resume mine' in e for e in lost)
    assert [p.name for p in Path('mine').iterdir()]==['config.json']

def test_commands_that_start_together(tmp_path):
    pictures(Path('pics'), 40, 'png', 16)
    args = '--data', 'pics', '--size', '16', '--bs', '8', '--epochs', '1', '--queue-size', '16', '--strategy', 'none'
    done = []
    threads = [threading.Thread(target=lambda s=s: done.append(command(*args, '--seed', s, cwd=tmp_path)))
               for s in (1, 2)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert [d.returncode for d in done]==[0, 0], done
    for o in ('ifnd_out', 'ifnd_out-2'):
        assert load_config(o)['seed']==load_checkpoint(o)['config']['seed']==metrics(o)['config']['seed']
    assert load_config('ifnd_out')['seed']!=load_config('ifnd_out-2')['seed']
