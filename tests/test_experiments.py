"A grid of runs: parts cover all of it once, and one that was stopped goes on where it was"
import math
from types import SimpleNamespace
import pandas as pd, pytest, torch
from ifnd_nb.cli import compare_main
from ifnd_nb import experiments
from ifnd_nb.ifnd import IFNDCallback
from ifnd_nb.loaders import two_view_dls
from ifnd_nb.embedding import flat_pixels
from ifnd_nb.experiments import run_grid, run_once
from ifnd_nb.registry import compared

class Loaders:
    class train_ds: labels = torch.zeros(3, dtype=torch.int64)

@pytest.fixture
def runs(monkeypatch):
    "Runs that take no time and are counted"
    done = []
    def once(dls, cbs, seed, epochs, **kw):
        done.append((*cbs, seed))
        if len(done) == 4 and kw.get('stop'): raise KeyboardInterrupt
        return dict(knn=.5, one_label=.25, removed=math.nan, fn_precision=math.nan, fn_recall=math.nan, seconds=1.)
    monkeypatch.setattr(experiments, 'run_once', once)
    monkeypatch.setattr(experiments, 'run_reference', lambda dls, method, seed, **kw: dict(knn=.1, one_label=.1))
    return done

grid = dict(sources={'a': lambda seed: Loaders, 'b': lambda seed: Loaders},
            methods={m: (lambda labels, seed, m=m: [m]) for m in ('none', 'x')}, seeds=range(3), epochs=1)

def test_parts_cover_a_grid_once(runs, tmp_path):
    for part in range(3): run_grid(**grid, to=tmp_path/'all.csv', part=(part, 3))
    t = pd.read_csv(tmp_path/'all.csv')
    assert len(t) == 2 * 4 * 3 and not t.duplicated(['data', 'method', 'seed']).any() and len(runs) == 2 * 2 * 3
    assert set(t.method) == {'raw pixels', 'untrained encoder', 'none', 'x'}

def test_parts_that_begin_at_once_write_one_head(runs, tmp_path, monkeypatch):
    to, head, now = tmp_path/'all.csv', ','.join(experiments._keys + experiments._scores), [0.]
    def wait(s, other=None):
        now[0] += s
        if other and now[0] > .5 and not other.stat().st_size: other.write_text(head + '\n')
    def clock(other=None): return SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: wait(s, other))
    to.touch() # another part has just made it, and fills it while this one waits
    monkeypatch.setattr(experiments, 'time', clock(to))
    run_grid(**grid, to=to)
    assert to.read_text().splitlines().count(head) == 1 and len(pd.read_csv(to)) == 24
    (to := tmp_path/'empty.csv').touch() # nobody fills it
    monkeypatch.setattr(experiments, 'time', clock())
    run_grid(**grid, to=to)
    assert to.read_text().splitlines().count(head) == 1 and len(pd.read_csv(to)) == 24

def test_a_stopped_grid_goes_on(runs, tmp_path):
    with pytest.raises(KeyboardInterrupt): run_grid(**grid, to=tmp_path/'all.csv', stop=True)
    before = (tmp_path/'all.csv').read_text()
    run_grid(**grid, to=tmp_path/'all.csv')
    assert (tmp_path/'all.csv').read_text().startswith(before)
    assert len(pd.read_csv(tmp_path/'all.csv')) == 24 and len(runs) == 12 + 1 # the one that was stopped ran twice

def test_a_method_can_train_longer(monkeypatch, tmp_path):
    epochs = []
    monkeypatch.setattr(experiments, 'run_once', lambda dls, cbs, seed, n, **kw: epochs.append(n) or dict(knn=.5))
    monkeypatch.setattr(experiments, 'run_reference', lambda *args, **kw: dict(knn=.1))
    run_grid({'a': lambda seed: Loaders}, {'x': lambda labels, seed: [], 'y': (lambda labels, seed: [], 1.1)}, [0], 15,
             tmp_path/'all.csv')
    assert epochs == [15, 17]

def test_a_run_repeats_itself():
    def once():
        dls = two_view_dls(torch.rand(80, 1, 16, 16, generator=torch.Generator().manual_seed(0)),
                           labels=torch.arange(80) % 4, bs=16, seed=1)
        return run_once(dls, [IFNDCallback([4], acceptance=1.)], 1, 2, queue_size=32)
    a, b = once(), once()
    assert {k: v for k, v in a.items() if k != 'seconds'} == {k: v for k, v in b.items() if k != 'seconds'}
    assert a['removed'] > 0

def test_a_file_keeps_its_columns(runs, tmp_path):
    "A grid goes on in a file that has fewer columns"
    (tmp_path/'old.csv').write_text('data,method,seed,knn,seconds\na,none,0,0.4,2.0\n')
    run_grid(**grid, to=tmp_path/'old.csv')
    t = pd.read_csv(tmp_path/'old.csv')
    assert t.columns.tolist() == ['data', 'method', 'seed', 'knn', 'seconds'] and len(t) == 24 and t.knn.iloc[0] == .4
    assert set(t.knn.iloc[1:]) == {.5, .1}

@pytest.mark.parametrize('sizes, share', [((150, 30, 300), .01), ((1, 7), .5), ((20,), 1.)])
def test_some_of_each_class(sizes, share):
    y = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[torch.randperm(sum(sizes))]
    i = experiments.some_of_each(y, share, 3)
    assert len(i.unique()) == len(i) and torch.equal(i, experiments.some_of_each(y, share, 3))
    assert y[i].bincount().tolist() == [max(1, round(n * share)) for n in sizes]

def test_the_linear_probes():
    "Of features that are the class, and of those that are noise"
    def loaders(signal):
        y, g = torch.arange(400) % 4, torch.Generator().manual_seed(0)
        x = torch.randint(0, 60, (400, 1, 8, 8), generator=g).to(torch.uint8)
        if signal: x[torch.arange(400), 0, y] += 150
        return two_view_dls(x, labels=y, seed=0)
    good, bad = loaders(True), loaders(False)
    s = experiments.encoder_scores(good, flat_pixels, other=bad)
    assert s['linear'] > .95 and s['one_percent'] > .8 and s['transfer'] < .5
    assert set(s) == {'knn', 'one_label', 'linear', 'one_percent', 'transfer'}
    assert experiments.encoder_scores(bad, flat_pixels, other=good)['transfer'] > .95
    assert set(experiments.encoder_scores(good, flat_pixels)) == {'knn', 'one_label'}

def quick():
    "Loaders of a comparison that takes no time"
    def loaders(seed): return Loaders
    loaders.epochs, loaders.other = 1, loaders
    return loaders

@pytest.mark.parametrize('args, said',
                         [(['--data', 'x'], "--data: invalid choice: 'x'"),
                          (['--methods', 'none;x'], "'x' is not known"), (['--seeds', '0'], 'seeds=0'),
                          (['--part', '3/2'], "part='3/2'"), (['--to', 'no/where.csv'], 'no such folder')])
def test_the_command_refuses_in_one_line(args, said, capsys):
    with pytest.raises(SystemExit) as e: compare_main(args)
    err = capsys.readouterr().err
    assert e.value.code == 2 and said in err and err.count('\n') == 1

def test_the_command_goes_on(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(compared.things, 'digits', quick())
    to = str(tmp_path/'c.csv')
    compare_main(['--to', to, '--seeds', '1', '--methods', 'none;oracle, attract'])
    assert len(pd.read_csv(to)) == 4
    said = capsys.readouterr().out
    assert said.count('k-NN') == 4 and said.endswith(f'{to}: all of this part is there\n')
    with pytest.raises(SystemExit): compare_main(['--to', to, '--seeds', '2'])
    assert '--resume' in capsys.readouterr().err
    compare_main(['--to', to, '--seeds', '2', '--methods', 'none;oracle, attract', '--resume'])
    t = pd.read_csv(to)
    assert len(t) == 8 and not t.duplicated(['method', 'seed']).any()

def test_a_run_whose_line_was_cut_off_runs_anew(runs, tmp_path):
    (tmp_path/'cut.csv').write_text('data,method,seed,knn\na,none,0,0.4\na,x,1,0')
    run_grid(**grid, to=tmp_path/'cut.csv')
    t = pd.read_csv(tmp_path/'cut.csv')
    assert len(t) == 24 and not t.duplicated(['data', 'method', 'seed']).any() and t.knn.iloc[0] == .4
    assert t[(t.data=='a') & (t.method=='x')].knn.tolist() == [.5] * 3

def test_an_empty_file_is_a_new_one_and_another_file_is_refused(runs, tmp_path):
    (tmp_path/'empty.csv').touch()
    run_grid(**grid, to=tmp_path/'empty.csv')
    assert len(pd.read_csv(tmp_path/'empty.csv')) == 24
    (tmp_path/'other.csv').write_text('a,b\n1,2\n')
    with pytest.raises(ValueError, match='no column data, method, seed'): run_grid(**grid, to=tmp_path/'other.csv')
    assert (tmp_path/'other.csv').read_text() == 'a,b\n1,2\n'

def test_parts_of_the_command_share_a_file(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(compared.things, 'digits', quick())
    for part in ('1/2', '2/2'):
        compare_main(['--to', str(tmp_path/'c.csv'), '--seeds', '1', '--methods', 'none', '--part', part])
    assert sorted(pd.read_csv(tmp_path/'c.csv').method) == ['none', 'raw pixels', 'untrained encoder']

def test_probes_without_a_column_are_not_run(runs, tmp_path, monkeypatch):
    (tmp_path/'old.csv').write_text('data,method,seed,knn\n')
    def other(seed): raise AssertionError('loaded for nothing')
    run_grid(**grid, to=tmp_path/'old.csv', others={'a': other, 'b': other})
