"What a run is told: names, defaults and limits"
from pathlib import Path
import pytest, torch
from ifnd_nb.cli import main
from ifnd_nb.config import run_config
from helpers import one_line, refused

pytestmark = pytest.mark.usefixtures('in_a_folder')

@pytest.mark.parametrize('args,words',
                         [(['--device', 'cuda'], "device='cuda' is not there; use --device='cpu'"),
                          (['--device', 'gpu'], "device='gpu' is not known"),
                          (['--device', 'mps'], "device='mps' is not there"),
    (['--seed', str(2**40)], 'seed='), (['--seed', '-1'], 'seed=-1'), (['--tau', '.001'], 'tau=0.001'),
    (['--strategy', 'none', '--beside-baseline'], 'leave out --beside-baseline')], ids=str)
def test_what_cannot_be_is_said_at_once(args, words, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit) as e: main(['--data', 'digits', *args])
    err = capsys.readouterr().err
    assert e.value.code==2 and words in err and err.count('\n')==1 and not Path('ifnd_out').exists()

def test_cifar_has_its_own_size(): assert run_config(data='cifar10').size==run_config(data='cifar100').size==32

@pytest.mark.parametrize('args,words',
                         [(['--lr', 'inf'], '--lr=inf'), (['--lr', 'nan'], '--lr=nan'), (['--tau', 'nan'], '--tau=nan'),
                          (['--momentum', '1'], '--momentum=1.0'), (['--threads', '100000'], '--threads=100000'),
    (['--strategy', 'none', '--n-clusters', '3'], "--n-clusters='3' changes nothing with --strategy='none'"),
    (['--detector', 'topk', '--acceptance', '.5'], "changes nothing with --detector='topk'"),
    (['--out', ''], '--out: is empty'), (['--wd', 'inf'], '--wd=inf'), (['--workers', '999'], '--workers=999')])
def test_values_that_cannot_be_or_do_nothing(args, words, capsys):
    assert refused('--data', 'digits', *args)==2
    assert words in one_line(capsys) and not list(Path().iterdir())

@pytest.mark.parametrize('given, words', [
    (dict(data=torch.rand(9, 1, 8, 8)), 'data is a Tensor'), (dict(data='digits', epoch=3), 'did you mean epochs'),
    (dict(data='digits', beside_baselin=False), 'did you mean beside_baseline')])
def test_what_a_run_cannot_take(given, words):
    with pytest.raises(TypeError, match=words): run_config(**given)

@pytest.mark.parametrize('given, words', [
    (dict(epochs='5'), "epochs='5' must be a whole number"), (dict(dim=16.5), 'dim=16.5 must be a whole number'),
    (dict(bs=True), 'bs=True'), (dict(lr='fast'), "lr='fast' must be above 0"), (dict(acceptance=lambda t: t), 'acceptance='),
    (dict(acceptance=[1]), r'acceptance=\[1\]'), (dict(detector=['ifnd']), r"detector=\['ifnd'\] is not known"),
    (dict(n_clusters=len), 'n_clusters=')])
def test_values_of_another_kind_are_named(given, words):
    with pytest.raises(ValueError, match=words): run_config(data='digits', **given)

@pytest.mark.parametrize('data', [None, 'digits', 'cifar10'])
def test_what_is_left_out_is_both_with_stable_clusters(data):
    cfg = run_config(**{} if data is None else dict(data=data))
    assert (cfg.strategy, cfg.recipe, cfg.n_clusters, cfg.acceptance) == ('both', 'stable', None, None)

def test_an_explicit_no_wins_over_the_first_run(): assert run_config(beside_baseline=False).beside_baseline is False

def test_choices_are_those_that_there_are():
    from dataclasses import fields
    from ifnd_nb.config import Config
    from ifnd_nb.recipes import recipes
    choices = {f.name: f.type.__metadata__[1].choices for f in fields(Config)}
    assert set(choices['recipe']) == set(recipes)

def test_numbers_of_numpy_become_plain():
    import numpy as np
    cfg = run_config(data='digits', epochs=np.int64(3), lr=np.float32(.5))
    assert (type(cfg.epochs), type(cfg.lr)) == (int, float) and cfg.epochs == 3
