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
