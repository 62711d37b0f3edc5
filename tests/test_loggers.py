"Epochs told to TensorBoard and Weights & Biases"
import csv, sys
from importlib.util import find_spec
from pathlib import Path
import pytest
from ifnd_nb.cli import main
from ifnd_nb.registry import loggers
from helpers import folder, one_line, refused, SMALL

pytestmark = pytest.mark.usefixtures('in_a_folder')
needs_tensorboard = pytest.mark.skipif(find_spec('tensorboard') is None, reason='needs tensorboard')

def test_a_logger_that_cannot_begin_is_one_line(monkeypatch, capsys):
    def broken(out, cfg): raise RuntimeError('no key')
    monkeypatch.setitem(loggers.things, 'tensorboard', broken)
    folder('base')
    assert refused('--data', 'base', *SMALL, '--log', 'tensorboard')==1
    assert one_line(capsys)=="ifnd_train: --log='tensorboard' cannot begin: no key"

def events(path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    return EventAccumulator(str(path)).Reload()

@needs_tensorboard
def test_logs_of_tensorboard():
    folder('base')
    main(['--data', 'base', *SMALL, '--log', 'tensorboard', '--beside-baseline'])
    for out in ('ifnd_out', 'ifnd_out/baseline'):
        logged, rows = events(f'{out}/tensorboard'), list(csv.DictReader(open(f'{out}/metrics.csv')))
        assert [e.value for e in logged.Scalars('knn')]==[pytest.approx(float(r['knn'])) for r in rows]
        assert logged.Scalars('train_loss')[-1].value==pytest.approx(float(rows[-1]['train_loss']))

@needs_tensorboard
def test_logs_count_on_after_a_pause():
    folder('base')
    main(['--data', 'base', *SMALL, '--log', 'tensorboard', '--out', 'run'])
    main(['--resume', 'run', '--epochs', '3'])
    steps = sorted(e.step for f in Path('run/tensorboard').iterdir() for e in events(f).Scalars('valid_loss'))
    assert steps==[3, 6, 9]

def test_logs_of_wandb(monkeypatch, capsys):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline'), monkeypatch.setenv('WANDB_SILENT', 'true')
    folder('base')
    main(['--data', 'base', *SMALL, '--log', 'wandb'])
    assert any(Path('ifnd_out/wandb').iterdir())

def test_a_logger_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    assert refused('--data', 'digits', '--log', 'wandb')==2
    assert one_line(capsys)=="ifnd_train: --log='wandb' needs a package that is not installed; pip install wandb"
