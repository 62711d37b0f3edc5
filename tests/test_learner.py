"The command: the whole job on small data, every kind of bad input, and going on after an interruption"
import csv, json, os, pickle, re, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest, torch
from PIL import Image
from fastai.callback.core import Callback
from safetensors import safe_open

from ifnd_nb import data
from ifnd_nb.cli import main
from ifnd_nb.start import start_run
from ifnd_nb.training import do_run
from ifnd_nb.files import write_atomic
from ifnd_nb.folders import run_files
from ifnd_nb.runs import load_checkpoint

TINY = dict(data='digits', strategy='none', detector='ifnd', features='keys', arch='small_resnet', epochs=1, bs=64, lr=1e-3, queue_size=256, tau=.1, momentum=.99, seed=1)

def command(*args, cwd, name='ifnd_train'):
    return subprocess.run([Path(sys.executable).with_name(name), *map(str, args)], capture_output=True, text=True, cwd=cwd,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg'})

def pictures(folder, n=24, kind='jpg', side=40):
    rng = np.random.default_rng(0)
    for i in range(n):
        sub = folder/f'class{i % 2}'; sub.mkdir(parents=True, exist_ok=True)
        Image.fromarray((rng.integers(0, 60, (side, side, 3)) + 160 * (i % 2)).astype(np.uint8)).save(sub/f'{i}.{kind}')
    return folder

def cut(path): path.write_bytes(path.read_bytes()[:len(path.read_bytes())//2])

def snapshot(folder): return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}

def test_the_whole_job_on_a_folder(tmp_path):
    pictures(tmp_path/'pics')
    done = command('--data', 'pics', '--size', 32, '--arch', 'resnet18', '--epochs', 2, '--bs', 8, '--queue_size', 32, '--out', 'out', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path/'out'
    assert {p.name for p in out.iterdir()} =={*run_files} - {'left_out.txt'}
    metrics = json.loads((out/'metrics.json').read_text())
    assert {'knn', 'linear', 'fn_precision', 'fn_recall', 'images_per_second', 'seconds', 'config'} <= metrics.keys()
    assert done.stdout.strip().splitlines()[-1] == f"k-NN accuracy: {100*metrics['knn']:.2f} % ({metrics['neighbours']} neighbours; {metrics['config']['images']['valid']['n']} held-out images: 20% of the images, drawn by seed 42)"
    assert [r['epoch'] for r in csv.DictReader((out/'metrics.csv').open())] == ['0', '1']
    import torchvision
    with safe_open(out/'encoder.safetensors', 'pt') as f:
        assert f.metadata()['arch'] == 'resnet18' and f.metadata()['size'] == '32'
        missing, unexpected = torchvision.models.resnet18().load_state_dict({k: f.get_tensor(k) for k in f.keys()}, strict=False)
    assert not unexpected and set(missing) == {'fc.weight', 'fc.bias'}

@pytest.mark.parametrize('source', ['digits', 'glyphs', 'folder'])
def test_the_baseline_on_each_kind_of_data(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data._NAMED, 'glyphs', lambda train: data.glyphs(5, 30)) # fewer, for speed
    monkeypatch.setenv('MPLBACKEND', 'Agg')
    if source == 'folder': source = str(pictures(tmp_path/'pics'))
    main(['--data', source, '--strategy', 'none', '--epochs', '2', '--bs', '8' if 'pics' in source else '32', '--queue_size', '64'])
    said, metrics = capsys.readouterr().out, json.loads((tmp_path/'ifnd_out'/'metrics.json').read_text())
    assert 'epoch 2/2' in said and not {'\r', '\x1b'} & set(said) and 'untrained encoder' in said and metrics['config']['strategy'] == 'none' # a line an epoch, and the rows to beat
    assert said.strip().splitlines()[-1] == f"k-NN accuracy: {100*metrics['knn']:.2f} % ({metrics['neighbours']} neighbours; {dict(digits=359, glyphs=30).get(source, 5)} held-out images: 20% of the images, drawn by seed 42)"
    rows = list(csv.DictReader((tmp_path/'ifnd_out'/'metrics.csv').open()))
    assert len(rows) == 2 and 'removed' not in rows[0] and metrics['seconds'] > sum(float(r['train_seconds']) for r in rows) > 0

def bad_folder(tmp_path): p = pictures(tmp_path/'bad'); cut(p/'class0'/'4.jpg'); return p
def empty_folder(tmp_path): p = tmp_path/'empty'; p.mkdir(); (p/'notes.txt').write_text('no image'); return p

@pytest.mark.parametrize('change,words', [
    (dict(data='no/such/folder'), 'no/such/folder'), (dict(data='digit'), "did you mean 'digits'"), (dict(data=empty_folder), 'holds no images'),
    (dict(data=bad_folder, bs=4), "4.jpg' is damaged"), (dict(bs=5000), 'bs=5000'), (dict(arch='resnet19'), "arch='resnet19'"),
    (dict(strategy='attrack'), "strategy='attrack'"), (dict(arch='alexnet', size=16), 'size=16'), (dict(out='/dev/null/run'), '/dev/null/run'),
    (dict(epochs=0), 'epochs=0'), (dict(workers=-1), 'workers=-1'), (dict(tau=0.), 'tau=0'), (dict(lr=-1.), 'lr=-1'), (dict(queue_size=0), 'queue_size=0')], ids=lambda o: o if isinstance(o, str) else '-'.join(o))
def test_bad_input_is_one_line_and_leaves_out_as_it_was(change, words, tmp_path):
    change = {k: str(v(tmp_path)) if callable(v) else v for k, v in change.items()}
    out = tmp_path/'out'; out.mkdir(); (out/'mine.txt').write_text('keep')
    before = snapshot(tmp_path)
    with pytest.raises((ValueError, OSError)) as e: start_run(**{'out': str(out), **TINY, **change})
    assert words in str(e.value) and '\n' not in str(e.value)
    assert snapshot(tmp_path) == before

def test_the_command_says_it_on_stderr_with_exit_code_2(tmp_path):
    done = command('--data', 'digit', cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("ifnd_train: --data='digit'") and len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
    done = command('--epochs', 'many', cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and '--epochs' in done.stderr
    done = command('--data', 'digit', cwd=tmp_path, name='ifnd_compare')
    assert done.returncode == 2 and done.stderr.startswith("ifnd_compare: argument --data: invalid choice: 'digit'") and len(done.stderr.strip().splitlines()) == 1

def test_the_command_names_a_torn_image_and_goes_on_without_it_if_told(tmp_path):
    args = '--data', bad_folder(tmp_path), '--bs', 4, '--size', 16, '--epochs', 1, '--queue_size', 8, '--out', 'out'
    done = command(*args, cwd=tmp_path)
    assert done.returncode == 2 and "4.jpg' is damaged" in done.stderr and 'add --skip-bad to go on' in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path/'out').exists()
    done = command(*args, '--skip_bad', cwd=tmp_path)
    assert done.returncode == 0 and 'left out: 1 damaged image' in done.stdout and (tmp_path/'out'/'encoder.safetensors').exists()

@pytest.mark.parametrize('change,words', [(dict(n_clusters='5000'), 'n-clusters=[5000] must be a whole number from 1 to 1438'), (dict(n_clusters='ten'), "n-clusters='ten'")], ids=str)
def test_what_the_callback_refuses_is_one_line_too(change, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as e: main(['--data', 'digits', '--out', str(tmp_path/'out'), *(o for k, v in change.items() for o in (f'--{k}', v))])
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.startswith(f'ifnd_train: --{words}') and len(said.strip().splitlines()) == 1

def test_a_resumed_run_keeps_its_arguments(tmp_path, capsys):
    with pytest.raises(SystemExit) as e: main(['--resume', str(tmp_path), '--bs', '9', '--tau', '0.2'])
    assert e.value.code == 2 and 'leave out --bs, --tau' in capsys.readouterr().err

def test_images_without_labels_end_with_where_the_encoder_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i, f in enumerate(sorted(pictures(tmp_path/'sub').rglob('*.jpg'))): f.rename(tmp_path/f'{i}.jpg')
    main(['--data', str(tmp_path), '--epochs', '1', '--bs', '8', '--out', 'out'])
    assert 'encoder.safetensors' in capsys.readouterr().out.strip().splitlines()[-1]
    assert json.loads((tmp_path/'out'/'metrics.json').read_text())['knn'] is None

@pytest.mark.parametrize('change', [dict(detector='oracle'), dict(detector='topk', strategy='attract'), dict(detector='quantile'), dict(features='pass'), dict(n_clusters='5,10')], ids=str)
def test_every_detector_and_source_by_its_name(change, tmp_path):
    learn, cfg, _ = start_run(out=tmp_path/'a', **{**TINY, 'strategy': 'eliminate', **change, 'epochs': 2})
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, cfg['lr'])
    assert len(load_checkpoint(tmp_path/'a')['rows']) == 2 and all(p.isfinite().all() for p in learn.model.parameters())

def test_skip_bad_goes_on(tmp_path, capsys):
    learn, _, _ = start_run(out=tmp_path/'out', **{**TINY, 'data': str(bad_folder(tmp_path)), 'bs': 4, 'skip_bad': True, 'size': 32})
    assert len(learn.dls.train_ds) + len(learn.dls.valid_ds) == 23 and 'left out: 1 damaged image' in capsys.readouterr().out

def test_a_run_is_never_written_over(tmp_path):
    (tmp_path/'metrics.json').write_text('{}')
    with pytest.raises(FileExistsError, match='holds a run already'): start_run(out=tmp_path, **TINY)

@pytest.mark.parametrize('strategy', ['none', 'attract'])
def test_resume_ends_where_an_uninterrupted_run_ends(strategy, tmp_path):
    learn, cfg, out = start_run(out=tmp_path/'a', **{**TINY, 'epochs': 3, 'strategy': strategy})
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, cfg['lr'])
    b, cfg, _ = start_run(out=tmp_path/'b', **{**TINY, 'epochs': 3, 'strategy': strategy})
    def stop(self=b.run_files):
        type(self).after_epoch(self)
        if self.epoch == 0: raise KeyboardInterrupt
    b.run_files.after_epoch = stop
    with pytest.raises(KeyboardInterrupt), b.no_bar(), b.no_logging(): b.fit_one_cycle(3, cfg['lr'])
    assert len(load_checkpoint(tmp_path/'b')['rows']) == 1
    c, cfg, _ = start_run(resume=tmp_path/'b')
    with c.no_bar(), c.no_logging(): c.fit_one_cycle(3, cfg['lr'], start_epoch=c.run_files.start_epoch)
    for (n, p), q in zip(learn.model.state_dict().items(), c.model.state_dict().values()): assert torch.equal(p, q), n
    rows = [[{k: v for k, v in r.items() if k != 'train_seconds'} for r in load_checkpoint(tmp_path/x)['rows']] for x in 'ab']
    assert repr(rows[0]) == repr(rows[1])

def test_a_killed_command_resumes_in_a_new_process_to_the_same_bits(tmp_path):
    args = '--data', 'digits', '--strategy', 'attract', '--n_clusters', '10,20', '--epochs', 4, '--queue_size', 256
    assert command(*args, '--out', 'whole', cwd=tmp_path).returncode == 0
    run = subprocess.Popen([Path(sys.executable).with_name('ifnd_train'), *map(str, args), '--out', 'killed'], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           env={**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg'})
    while not (tmp_path/'killed'/'checkpoint').exists() and run.poll() is None: time.sleep(.05)
    run.kill(); run.wait()
    assert 1 <= len(load_checkpoint(tmp_path/'killed')['rows']) < 4
    done = command('--resume', 'killed', cwd=tmp_path)
    assert done.returncode == 0 and re.search(r'going on after [123] of 4 epochs', done.stdout)
    a, b = (load_checkpoint(tmp_path/d) for d in ('whole', 'killed'))
    for name, p in a['model'].items(): assert torch.equal(p, b['model'][name]), name # parameters, queue, keys, pseudo labels
    assert (a['model']['detector.pseudo'] >= 0).any()
    x, y = (json.loads((tmp_path/d/'metrics.json').read_text()) for d in ('whole', 'killed'))
    same = lambda m: {k: v for k, v in m.items() if k not in ('images_per_second', 'seconds')}
    assert same(x) == same(y)

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

def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    learn, cfg, out = start_run(out=tmp_path/'a', **TINY)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, cfg['lr'])
    state = load_checkpoint(out); state['config']['queue_size'] = 99; torch.save(state, out/'checkpoint')
    with pytest.raises(ValueError, match='does not fit this model'): start_run(resume=out)

def test_write_atomic_keeps_the_old_file_when_writing_fails(tmp_path):
    write_atomic(tmp_path/'a', 'old')
    with pytest.raises(TypeError): write_atomic(tmp_path/'a', 3)
    assert (tmp_path/'a').read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['a']

def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    learn, cfg, out = start_run(out=tmp_path/'a', **{**TINY, 'epochs': 3})
    class Break(Callback):
        def before_batch(self):
            if self.training and self.epoch == 1 and self.iter == 2: self.learn.model.encoder_q.head[0].weight.data.fill_(float('nan'))
    learn.add_cb(Break())
    with pytest.raises(FloatingPointError, match='nan in epoch 2, and the checkpoint after 1 epochs is kept.*smaller lr than 0.001'), learn.no_bar(), learn.no_logging(): do_run(learn, cfg, out)
    state = load_checkpoint(out)
    assert len(state['rows']) == 1 and all(v.isfinite().all() for v in state['model'].values())
