"Things by name: found in the source, one of each kind of one's own, and what is said of an unknown one"
import subprocess, sys
import pytest, torch
from helpers_method import bright_loaders, columns, fit, learner
from ifnd_nb import loggers as loggers_room
from ifnd_nb.config import run_config
from ifnd_nb.detectors import Detector
from ifnd_nb.loaders import two_view_dls, view_settings
from ifnd_nb.registry import compared, detectors, loggers, named_sets, OneOf, Registry, scores, strategies
from ifnd_nb.removal import eliminate
from ifnd_nb.scoring import score_features, ScoreCallback

kinds = dict(detectors=detectors, strategies=strategies, scores=scores, named_sets=named_sets, loggers=loggers,
             compared=compared)

IMPORTED = """
from pathlib import Path
from importlib import import_module
import ifnd_nb, ifnd_nb.registry as r
for f in Path(ifnd_nb.__path__[0]).glob('*.py'):
    if f.stem not in ('__init__', '_modidx', '_readme'): import_module(f'ifnd_nb.{f.stem}')
for kind in %r:
    o = getattr(r, kind)
    print(kind, sorted(o.rooms)==sorted(o.things), *sorted(o.things))
"""

def test_names_read_from_the_source_are_those_registered():
    done = subprocess.run([sys.executable, '-c', IMPORTED % list(kinds)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = {kind: (same, names) for kind, same, *names in map(str.split, done.stdout.splitlines())}
    assert said == {kind: ('True', sorted(o.rooms)) for kind, o in kinds.items()}
    assert all(o.rooms for o in kinds.values())

@pytest.mark.parametrize('kind', kinds)
def test_a_registry_is_a_mapping(kind):
    o = kinds[kind]
    names = list(o)
    assert len(o) == len(names) == len(set(names)) and all(n in o and callable(o[n]) for n in names)
    assert 'nothing' not in o and repr(o) == f"{kind}: {', '.join(names)}" and dict(o).keys() == set(names)

@pytest.mark.parametrize('kind', kinds)
def test_an_unknown_name_says_what_is_known(kind):
    o = kinds[kind]
    with pytest.raises(ValueError) as e: o['nothing']
    assert str(e.value) == f"{o.argument}='nothing' is not known; use one of: {', '.join(o)}"

def test_a_thing_is_added_with_what_it_tells():
    toys = Registry('toys', 'toy')
    assert len(toys) == 0 and list(toys) == []
    @toys.add('top', size=3)
    def spin(): return 'spun'
    @toys.add('kite')
    class Kite: pass
    assert list(toys) == ['top', 'kite'] and len(toys) == 2 and toys['top'] is spin and spin.size == 3
    assert toys['kite'] is Kite
    both = OneOf(toys, ('none',))
    assert list(both) == ['top', 'kite', 'none'] and 'none' in both and 'top' in both and 'ball' not in both
    assert repr(both) == 'top, kite, none'

# ---- one of each kind

@pytest.fixture(scope='module')
def dls(): return bright_loaders()

def test_a_detector_of_ones_own(dls, monkeypatch):
    class Halves(Detector):
        def __init__(self, n): super().__init__(); self.n, self.epochs = n, []
        @classmethod
        def of(cls, images, model, run): return cls(len(images))
        def forward(self, logits, idx, queue_idx):
            return ((idx[:, None] % 2 == queue_idx % 2) & (queue_idx >= 0) & (idx[:, None] != queue_idx))[None]
    with pytest.raises(ValueError, match="detector='halves'"): learner(dls, detector='halves')
    monkeypatch.setitem(detectors.things, 'halves', Halves)
    learn = fit(learner(dls, detector='halves'), 2)
    assert isinstance(learn.model.detector, Halves) and learn.model.detector.n == 96
    assert .3 < columns(learn)['removed'] < .7
    assert run_config(data='digits', detector='halves').detector == 'halves'

def test_a_strategy_of_ones_own(dls, monkeypatch):
    asked = []
    def mine(logits, masks): asked.append(masks.shape); return eliminate(logits, masks)
    with pytest.raises(ValueError, match="strategy='mine'"): learner(dls, strategy='mine')
    monkeypatch.setitem(strategies.things, 'mine', mine)
    learn = fit(learner(dls, strategy='mine', acceptance=1.), 2)
    assert asked[0] == (2, 16, 64) and columns(learn)['removed'] > 0
    assert run_config(data='digits', strategy='mine').strategy == 'mine'

def test_a_score_of_ones_own(dls, monkeypatch):
    monkeypatch.setitem(scores.things, 'half', lambda train_x, train_y, x, y, seed=0: .5)
    x, y = torch.randn(12, 3), torch.arange(12) % 2
    assert score_features(x, y, x, y)['half'] == .5
    learn = fit(learner(dls, [ScoreCallback('half')]), 1)
    assert columns(learn)['half'] == .5

def test_a_named_set_of_ones_own(monkeypatch):
    def dots(train=True): return torch.full((40 if train else 10, 1, 8, 8), 7 if train else 9, dtype=torch.uint8)
    for k, v in dict(size=12, epochs=3, preset=dict(flip=0.), held_out=True).items(): setattr(dots, k, v)
    with pytest.raises(FileNotFoundError, match="data='dots' is neither a folder nor a known name"):
        two_view_dls('dots', bs=8)
    with pytest.raises(ValueError, match="preset='dots' is not known"): view_settings('dots', None, 8)
    monkeypatch.setitem(named_sets.things, 'dots', dots)
    dls = two_view_dls('dots', bs=8)
    assert (len(dls.train_ds), len(dls.valid_ds)) == (40, 10) and (dls.valid_ds.batch(range(10))[0] == 9).all()
    assert dls.train_ds.name == 'dots'
    assert dls.train_ds.preset == view_settings('dots', dls.train_ds, 8) == dict(flip=0.)
    cfg = run_config(data='dots')
    assert (cfg.size, cfg.epochs, cfg.data) == (12, 3, 'dots') and run_config(data='dots', epochs=5).epochs == 5

def test_a_logger_of_ones_own(tmp_path, monkeypatch):
    class Told: pass
    def mine(out, cfg): told = Told(); told.out, told.cfg = out, cfg; return told
    monkeypatch.setitem(loggers.things, 'mine', mine)
    cb, = loggers_room.log_callbacks('mine', tmp_path, dict(lr=1))
    assert type(cb) is Told and cb.out == tmp_path and cb.cfg == dict(lr=1)
    assert loggers_room.check_log('mine, tensorboard')[0] == 'mine'
    with pytest.raises(ValueError, match="log='theirs' is not known; use one of: .*mine"):
        loggers_room.check_log('mine,theirs')
    mine.package = 'no_such_package'
    with pytest.raises(ValueError, match="log='mine' needs a package.*pip install no_such_package"):
        loggers_room.check_log('mine')

def test_data_to_compare_on_of_ones_own(tmp_path, monkeypatch):
    from ifnd_nb.experiments import compare
    def dots(seed): asked.append(seed); return bright_loaders()
    dots.epochs, dots.other, dots.kwargs, asked = 1, lambda seed: bright_loaders(), dict(queue_size=32), []
    kw = dict(methods='none', seeds=1, part='1/1', to=tmp_path/'grid.csv', resume=False)
    with pytest.raises(ValueError, match="data='dots' is not known; use one of: digits"): compare('dots', **kw)
    monkeypatch.setitem(compared.things, 'dots', dots)
    compare('dots', **kw)
    rows = (tmp_path/'grid.csv').read_text().splitlines()
    want = [['dots', m, '0'] for m in ('raw pixels', 'untrained encoder', 'none')]
    assert [r.split(',')[:3] for r in rows[1:]] == want and asked == [0] * 3

def test_a_notebook_run_anew_is_no_news(recwarn):
    "Its own name and the name of its function are those of the package"
    own = dict(strategies.own)
    @strategies.add('eliminate')
    def eliminate(logits, masks): return logits.sum()
    assert not [w for w in recwarn if "was the package's" in str(w.message)] and strategies['eliminate'] is eliminate
    with pytest.warns(UserWarning, match="strategy='attract' was the package's"):
        @strategies.add('attract')
        def mine(logits, masks): return logits.mean()
    strategies.own.clear(); strategies.own.update(own)
