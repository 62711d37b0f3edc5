"A run that is killed at any moment, many times over, ends where an undisturbed one ends, and nothing in its folder is ever torn"
import errno, json, multiprocessing, os, random, time
import pandas as pd, pytest, torch
from PIL import Image
from safetensors import safe_open
from ifnd_nb import learner, runs
from ifnd_nb.cli import main
from ifnd_nb.runs import load_checkpoint, load_config
from test_learner import pictures

pytestmark = pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='looks into /proc')
fork = multiprocessing.get_context('forkserver') # children start with all imported, so that they train for most of their short lives
fork.set_forkserver_preload(['ifnd_nb.all'])

def _run(folder, args):
    os.chdir(folder); os.environ['MPLBACKEND'] = 'Agg'
    torch.set_num_threads(1)
    with open(os.devnull, 'w') as sink:
        os.dup2(sink.fileno(), 1), os.dup2(sink.fileno(), 2)
        main(args)

def start(folder, *args):
    p = fork.Process(target=_run, args=(str(folder), [*map(str, args)])); p.start(); return p

def check_whole(out):
    "All that stands in the folder can be read to its end"
    seen = {p.name for p in out.iterdir() if not p.name.startswith('.')} if out.exists() else set()
    if 'config.json' in seen: load_config(out)
    if 'checkpoint' in seen: load_checkpoint(out)
    if 'metrics.csv' in seen: assert not pd.read_csv(out/'metrics.csv')[['epoch', 'train_loss']].isna().any(axis=None)
    if 'metrics.json' in seen: json.loads((out/'metrics.json').read_text())
    if 'report.png' in seen: Image.open(out/'report.png').load()
    if 'encoder.safetensors' in seen:
        with safe_open(out/'encoder.safetensors', 'pt') as f: [f.get_tensor(k) for k in f.keys()]
    return seen

def check_same(out, whole):
    "Both runs ended alike"
    a, b = map(load_checkpoint, (whole, out))
    assert a['model'].keys()==b['model'].keys() and all(torch.equal(v, b['model'][k]) for k, v in a['model'].items())
    plain = lambda rows: repr([{k: v for k, v in r.items() if k!='train_seconds'} for r in rows])
    assert plain(a['rows'])==plain(b['rows']) and len(b['rows'])==8
    assert check_whole(out)==check_whole(whole)
    assert (out/'encoder.safetensors').read_bytes()==(whole/'encoder.safetensors').read_bytes()

def test_killed_many_times_at_random_points(tmp_path):
    args = '--data', pictures(tmp_path/'pics', 60, 'png', 16), '--size', 16, '--bs', 8, '--epochs', 8, '--queue_size', 64, '--n_clusters', '3,6', '--strategy', 'attract', '--arch', 'small_resnet'
    start(tmp_path, *args, '--out', 'first').join() # from now on all is imported
    p = start(tmp_path, *args, '--out', 'whole')
    begun = time.perf_counter(); p.join(); took = time.perf_counter() - begun
    assert p.exitcode == 0
    rng, kills, runs = random.Random(0), 0, 0
    while kills < 25: # some come before the first checkpoint, some while files are written
        runs, out = runs + 1, tmp_path/f'killed{runs}'
        while not (out/'report.png').exists():
            going_on = (out/'config.json').exists()
            p = start(tmp_path, *(('--resume', out) if going_on else (*args, '--out', out)))
            p.join(rng.uniform(.1, .7) * took if kills < 25 else None)
            if p.is_alive(): p.kill(); p.join(); kills += 1
            else: assert p.exitcode == 0
            check_whole(out)
        check_same(out, tmp_path/'whole')

@pytest.mark.parametrize('epochs', [1, 2])
def test_a_run_that_ends_between_its_first_two_files_goes_on(epochs, tmp_path, monkeypatch):
    args = ['--data', str(pictures(tmp_path/'pics', 60, 'png', 16)), '--size', '16', '--bs', '8', '--epochs', str(epochs), '--queue_size', '64', '--arch', 'small_resnet']
    monkeypatch.setenv('MPLBACKEND', 'Agg')
    main([*args, '--out', str(tmp_path/'whole')])
    real = runs.write_atomic
    def cut(path, data):
        if len(list((tmp_path/'out').glob('[!.]*')))==2: raise KeyboardInterrupt
        real(path, data)
    for room in (runs, learner): monkeypatch.setattr(room, 'write_atomic', cut)
    with pytest.raises(SystemExit): main([*args, '--out', str(tmp_path/'out')])
    assert {p.name for p in (tmp_path/'out').iterdir()}=={'config.json', 'checkpoint'}
    for room in (runs, learner): monkeypatch.setattr(room, 'write_atomic', real)
    main(['--resume', str(tmp_path/'out')])
    assert check_whole(tmp_path/'out')==check_whole(tmp_path/'whole') and len(pd.read_csv(tmp_path/'out'/'metrics.csv'))==epochs
    assert all(torch.equal(v, load_checkpoint(tmp_path/'out')['model'][k]) for k, v in load_checkpoint(tmp_path/'whole')['model'].items())

@pytest.mark.parametrize('at', ['metrics.csv', 'checkpoint', 'encoder.safetensors', 'metrics.json'])
def test_a_full_disk_is_one_line_and_keeps_what_was_there(at, tmp_path, monkeypatch, capsys):
    real, second = os.fsync, []
    def full(fd): # the second time that this file is written, or the first if there is but one
        if os.readlink(f'/proc/self/fd/{fd}').endswith(f'.{at}.tmp') and (second or at not in ('metrics.csv', 'checkpoint')): raise OSError(errno.ENOSPC, 'No space left on device')
        if os.readlink(f'/proc/self/fd/{fd}').endswith(f'.{at}.tmp'): second.append(1)
        real(fd)
    monkeypatch.setattr(runs.os, 'fsync', full); monkeypatch.setenv('MPLBACKEND', 'Agg')
    with pytest.raises(SystemExit) as e: main(['--data', str(pictures(tmp_path/'pics', 60, 'png', 16)), '--size', '16', '--bs', '8', '--epochs', '2', '--queue_size', '64', '--out', str(tmp_path/'out')])
    said = capsys.readouterr().err
    assert e.value.code == 1 and 'No space left on device' in said and said.count('\n') == 1
    seen = check_whole(tmp_path/'out')
    assert not [p for p in (tmp_path/'out').iterdir() if p.name.endswith('.tmp')]
    assert len(load_checkpoint(tmp_path/'out')['rows']) == (1 if at=='checkpoint' else 2) and (at in seen) == (at in ('metrics.csv', 'checkpoint'))

def test_a_place_that_cannot_be_written_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as e: main(['--data', str(pictures(tmp_path/'pics', 60, 'png', 16)), '--size', '16', '--bs', '8', '--out', '/proc/run'])
    said = capsys.readouterr().err
    assert e.value.code == 2 and '/proc/run' in said and said.count('\n') == 1
