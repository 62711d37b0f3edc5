"A run that is killed at any moment, many times over, ends where an undisturbed one ends, and nothing is ever torn"
import errno, itertools, json, multiprocessing, os, re, signal
import pandas as pd, pytest, torch
from PIL import Image
from safetensors import safe_open
from ifnd_nb import runs, training
from ifnd_nb.cli import main
from ifnd_nb.runs import load_checkpoint, load_config
from helpers import command, pictures

pytestmark = pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='looks into /proc')
fork = multiprocessing.get_context('forkserver') # children start with all imported
fork.set_forkserver_preload(['ifnd_nb.all', 'ifnd_nb.training'])

def die_at(moment):
    "Have this process killed when files are written: at the n-th call of those that put them on disk"
    count = itertools.count(1)
    def deadly(real):
        def call(*args, **kw):
            if next(count)==moment: os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kw)
        return call
    for name in ('fsync', 'replace', 'link'): setattr(os, name, deadly(getattr(os, name)))

def _run(folder, args, moment):
    os.chdir(folder)
    os.environ['MPLBACKEND'] = 'Agg'
    torch.set_num_threads(1)
    with open(os.devnull, 'w') as sink: os.dup2(sink.fileno(), 1), os.dup2(sink.fileno(), 2)
    if moment: die_at(moment)
    main(args)

def run(folder, *args, moment=None):
    "Exit code of a command in a process of its own, which may be killed in it"
    p = fork.Process(target=_run, args=(str(folder), [*map(str, args)], moment))
    p.start()
    p.join()
    return p.exitcode

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

def small_run(tmp_path, epochs):
    return ['--data', pictures(tmp_path/'pics', 60, 'png', 16), '--size', 16, '--bs', 8, '--epochs', epochs,
            '--queue_size', 64, '--arch', 'small_resnet']

def test_killed_many_times_at_any_moment(tmp_path):
    args, out = [*small_run(tmp_path, 8), '--n_clusters', '3,6', '--strategy', 'attract'], tmp_path/'killed'
    assert run(tmp_path, *args, '--out', 'whole')==0
    kills = 0
    for moment in itertools.count(1): # each process lives a little longer than the one before
        going_on = (out/'config.json').exists()
        code = run(tmp_path, *(('--resume', out) if going_on else (*args, '--out', out)), moment=moment)
        check_whole(out)
        if code==0: break
        assert code==-signal.SIGKILL
        kills += 1
    assert kills >= 15
    check_same(out, tmp_path/'whole')

def test_a_killed_command_resumes_in_a_new_process_to_the_same_bits(tmp_path):
    args = '--data', 'digits', '--strategy', 'attract', '--n_clusters', '10,20', '--epochs', 4, '--queue_size', 256
    assert command(*args, '--out', 'whole', cwd=tmp_path).returncode==0
    assert run(tmp_path, *args, '--out', 'killed', moment=12)==-signal.SIGKILL
    assert 1 <= len(load_checkpoint(tmp_path/'killed')['rows']) < 4
    done = command('--resume', 'killed', cwd=tmp_path)
    assert done.returncode==0 and re.search(r'going on after [123] of 4 epochs', done.stdout)
    a, b = (load_checkpoint(tmp_path/d) for d in ('whole', 'killed'))
    for name, p in a['model'].items():
        assert torch.equal(p, b['model'][name]), name # parameters, queue, bank, pseudo labels
    assert (a['model']['detector.pseudo'] >= 0).any()
    x, y = (json.loads((tmp_path/d/'metrics.json').read_text()) for d in ('whole', 'killed'))
    same = lambda m: {k: v for k, v in m.items() if k not in ('images_per_second', 'seconds')}
    assert same(x)==same(y)

@pytest.mark.parametrize('epochs', [1, 2])
def test_a_run_that_ends_between_its_first_two_files_goes_on(epochs, tmp_path, monkeypatch):
    args = [*map(str, small_run(tmp_path, epochs))]
    monkeypatch.setenv('MPLBACKEND', 'Agg')
    main([*args, '--out', str(tmp_path/'whole')])
    real = runs.write_atomic
    def cut(path, data):
        if len(list((tmp_path/'out').glob('[!.]*')))==2: raise KeyboardInterrupt
        real(path, data)
    for room in (runs, training): monkeypatch.setattr(room, 'write_atomic', cut)
    with pytest.raises(SystemExit): main([*args, '--out', str(tmp_path/'out')])
    assert {p.name for p in (tmp_path/'out').iterdir()}=={'config.json', 'checkpoint'}
    for room in (runs, training): monkeypatch.setattr(room, 'write_atomic', real)
    main(['--resume', str(tmp_path/'out')])
    assert check_whole(tmp_path/'out')==check_whole(tmp_path/'whole')
    assert len(pd.read_csv(tmp_path/'out'/'metrics.csv'))==epochs
    assert all(torch.equal(v, load_checkpoint(tmp_path/'out')['model'][k]) for k,
               v in load_checkpoint(tmp_path/'whole')['model'].items())

@pytest.mark.parametrize('at', ['metrics.csv', 'checkpoint', 'encoder.safetensors', 'metrics.json'])
def test_a_full_disk_is_one_line_and_keeps_what_was_there(at, tmp_path, monkeypatch, capsys):
    real, second = os.fsync, []
    def full(fd): # the second time that this file is written, or the first if there is but one
        if os.readlink(f'/proc/self/fd/{fd}').endswith(f'.{at}.tmp') and (second
                or at not in ('metrics.csv', 'checkpoint')):
            raise OSError(errno.ENOSPC, 'No space left on device')
        if os.readlink(f'/proc/self/fd/{fd}').endswith(f'.{at}.tmp'): second.append(1)
        real(fd)
    monkeypatch.setattr(runs.os, 'fsync', full); monkeypatch.setenv('MPLBACKEND', 'Agg')
    with pytest.raises(SystemExit) as e: main([*map(str, small_run(tmp_path, 2)), '--out', str(tmp_path/'out')])
    said = capsys.readouterr().err
    assert e.value.code == 1 and 'No space left on device' in said and said.count('\n') == 1
    seen = check_whole(tmp_path/'out')
    assert not [p for p in (tmp_path/'out').iterdir() if p.name.endswith('.tmp')]
    assert len(load_checkpoint(tmp_path/'out')['rows']) == (1 if at=='checkpoint' else 2)
    assert (at in seen) == (at in ('metrics.csv', 'checkpoint'))

def test_a_place_that_cannot_be_written_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as e: main([*map(str, small_run(tmp_path, 1)), '--out', '/proc/run'])
    said = capsys.readouterr().err
    assert e.value.code == 2 and '/proc/run' in said and said.count('\n') == 1
