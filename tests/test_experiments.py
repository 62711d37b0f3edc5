"A grid of runs: parts cover all of it once, and one that was stopped goes on where it was"
import math
import pandas as pd, pytest, torch
from ifnd_nb import experiments
from ifnd_nb.callback import IFNDCallback
from ifnd_nb.data import two_view_dls
from ifnd_nb.experiments import run_grid, run_once

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
    monkeypatch.setattr(experiments, 'run_reference', lambda dls, method, seed, k: dict(knn=.1, one_label=.1))
    return done

grid = dict(sources={'a': lambda seed: Loaders, 'b': lambda seed: Loaders}, methods={m: (lambda labels, seed, m=m: [m]) for m in ('none', 'x')}, seeds=range(3), epochs=1)

def test_parts_cover_a_grid_once(runs, tmp_path):
    for part in range(3): run_grid(**grid, to=tmp_path/'all.csv', part=(part, 3))
    t = pd.read_csv(tmp_path/'all.csv')
    assert len(t) == 2 * 4 * 3 and not t.duplicated(['data', 'method', 'seed']).any() and len(runs) == 2 * 2 * 3
    assert set(t.method) == {'raw pixels', 'untrained encoder', 'none', 'x'}

def test_a_stopped_grid_goes_on(runs, tmp_path):
    with pytest.raises(KeyboardInterrupt): run_grid(**grid, to=tmp_path/'all.csv', stop=True)
    before = (tmp_path/'all.csv').read_text()
    run_grid(**grid, to=tmp_path/'all.csv')
    assert (tmp_path/'all.csv').read_text().startswith(before)
    assert len(pd.read_csv(tmp_path/'all.csv')) == 24 and len(runs) == 12 + 1 # the one that was stopped ran twice

def test_a_run_repeats_itself():
    def once():
        dls = two_view_dls(torch.rand(80, 1, 16, 16, generator=torch.Generator().manual_seed(0)), labels=torch.arange(80) % 4, bs=16, seed=1)
        return run_once(dls, [IFNDCallback([4], acceptance=1.)], 1, 2, queue_size=32)
    a, b = once(), once()
    assert {k: v for k, v in a.items() if k != 'seconds'} == {k: v for k, v in b.items() if k != 'seconds'} and a['removed'] > 0
