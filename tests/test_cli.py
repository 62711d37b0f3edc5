"The commands: options, messages of one line, exit codes"
import subprocess, sys
from pathlib import Path
import pytest
from ifnd_nb import cli, training
from ifnd_nb.cli import in_shell, main
from ifnd_nb.registry import compared, detectors, named_sets, strategies
from helpers import bad_folder, command, folder, one_line, refused, small, SMALL

pytestmark = pytest.mark.usefixtures('in_a_folder')

def test_the_command_says_it_on_stderr_with_exit_code_2(tmp_path):
    done = command('--data', 'digit', cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("ifnd_train: --data='digit'")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
    done = command('--epochs', 'many', cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and '--epochs' in done.stderr
    done = command('--data', 'digit', cwd=tmp_path, name='ifnd_compare')
    assert done.returncode == 2 and done.stderr.startswith("ifnd_compare: argument --data: invalid choice: 'digit'")
    assert len(done.stderr.strip().splitlines()) == 1

def test_the_command_names_a_torn_image_and_goes_on_without_it_if_told(tmp_path):
    args = '--data', bad_folder(tmp_path), '--bs', 4, '--size', 16, '--epochs', 1, '--queue_size', 8, '--out', 'out'
    done = command(*args, cwd=tmp_path)
    assert done.returncode == 2 and "4.jpg' is damaged" in done.stderr and 'add --skip-bad to go on' in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path/'out').exists()
    done = command(*args, '--skip_bad', cwd=tmp_path)
    assert done.returncode == 0 and 'left out: 1 damaged image' in done.stdout
    assert (tmp_path/'out'/'encoder.safetensors').exists()

@pytest.mark.parametrize('change,words',
                         [(dict(n_clusters='5000'), 'n-clusters=[5000] must be a whole number from 1 to 1438'),
                          (dict(n_clusters='ten'), "n-clusters='ten'")], ids=str)
def test_what_the_callback_refuses_is_one_line_too(change, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        main(['--data', 'digits', '--out', str(tmp_path/'out'), *(o for k, v in change.items() for o in (f'--{k}', v))])
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.startswith(f'ifnd_train: --{words}') and len(said.strip().splitlines()) == 1

def test_a_backend_that_is_missing_costs_nothing(tmp_path):
    done = command(*small(), '--strategy', 'none', MPLBACKEND='module://nothere')
    assert done.returncode==0 and (Path('ifnd_out')/'report.png').exists(), done.stderr

def test_memory_that_runs_out_is_one_line(capsys):
    with pytest.raises(SystemExit) as e: main([*small(), '--queue-size', str(10**13)])
    err = capsys.readouterr().err
    assert e.value.code==2 and 'memory ran out; use a smaller --bs, --size, --queue-size or --dim' in err
    assert err.count('\n')==1

@pytest.mark.parametrize('workers', [0, 1])
def test_a_file_that_vanishes_is_one_line(workers, capsys, monkeypatch):
    folder('base', n=40, size=24)
    start = training.start_run
    def then_remove(**kw):
        out = start(**kw)
        Path('base/cat/003.png').unlink()
        return out
    monkeypatch.setattr(training, 'start_run', then_remove)
    assert refused('--data', 'base', *SMALL, '--max-cache-gb', 0, '--workers', workers, '--valid', 0)==1
    assert "base/cat/003.png" in one_line(capsys)

@pytest.mark.parametrize('name', ['ifnd_train', 'ifnd_embed', 'ifnd_export', 'ifnd_compare'])
def test_help_is_light_and_spells_options_with_dashes(name):
    done = command('--help', name=name)
    options = [w for w in done.stdout.replace('[', ' ').replace(']', ' ').split() if w.startswith('--')]
    assert done.returncode==0 and options and not any('_' in o for o in options)
    assert command('--version', name=name).stdout.startswith('ifnd_nb ')
    code = (f'import sys; from ifnd_nb.cli import {name}, command_parser; command_parser({name}).format_help(); '
            'print([m for m in ("torch", "fastai", "numpy", "matplotlib") if m in sys.modules])')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip()=='[]'

def test_choices_are_those_that_there_are():
    choices = lambda command, option: next(a.choices for a in cli.command_parser(command)._actions if a.dest==option)
    assert set(choices(cli.ifnd_train, 'strategy'))=={*strategies, 'none'}
    assert set(choices(cli.ifnd_train, 'detector'))==set(detectors)
    assert set(choices(cli.ifnd_compare, 'data'))=={*compared}
    shown = cli.command_parser(cli.ifnd_train).format_help()
    assert '{eliminate,attract,both,none}' in shown and '{auto,fp32,bf16,fp16}' in shown
    assert all(n in shown for n in named_sets)

@pytest.mark.parametrize('args,words',
                         [(['photos'], 'did you mean --data photos?'),
                          (['--strategy', 'attrack'], "invalid choice: 'attrack'"),
                          (['--acceptance', '2'], "--acceptance='2' must be a number from 0 to 1"),
    (['--acceptance', 'cubic'], "--acceptance='cubic'"), (['--valid', '1.5'], "--valid='1.5' must be a share"),
    (['--dim', '0'], '--dim=0'), (['--wd', '-1'], '--wd=-1'), (['--max-cache-gb', '-1'], '--max-cache-gb=-1'),
    (['--precision', 'fp64'], 'invalid choice'), (['--log', 'paper'], "--log='paper' is not known"),
    (['--queue_size', '0'], '--queue-size=0'), (['--bs'], 'expected one argument')])
def test_usage_is_one_line_and_exit_code_2(args, words, capsys):
    assert refused('--data', 'digits', *args) if args[0]!='photos' else refused(*args)==2
    assert words in one_line(capsys) and not list(Path().iterdir())

@pytest.mark.parametrize('package', ['torch', 'fastai.learner', 'sklearn'])
def test_an_interrupt_while_packages_are_imported(package):
    code = f'''
import os, signal, sys
class Interrupt:
    def find_spec(self, name, *args):
        if name=={package!r}: os.kill(os.getpid(), signal.SIGINT)
from ifnd_nb.cli import main
sys.argv[0] = 'ifnd_train'
sys.meta_path.insert(0, Interrupt())
main(['--data', 'digits', '--out', 'o'])'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode==130 and done.stderr=='ifnd_train: interrupted; nothing was begun\n'
    assert not Path('o').exists()

def test_arguments_become_options():
    names = ['queue_size', 'bs', 'data', 'skip_bad', 'n_clusters', 'valid']
    for python, shell in [("queue_size=0 must be at least 1", "--queue-size=0 must be at least 1"),
                          ("use a smaller bs or queue_size", "use a smaller bs or --queue-size"),
                          ("data=df['path'], data='x'", "data=df['path'], --data='x'"),
                          ("pass skip_bad=True to go on", "add --skip-bad to go on"),
                          ("n_clusters=[1, 2] is", "--n-clusters=[1, 2] is"),
                          ("metadata=3, valid_ds", "metadata=3, valid_ds"),
                          ("'/data/skip_bad/x' and /a/queue_size are gone",
                           "'/data/skip_bad/x' and /a/queue_size are gone")]:
        assert in_shell(python, names)==shell
    said = ('Caught FileNotFoundError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n'
            '  File "x"\nFileNotFoundError: [Errno 2] a.png\n')
    assert in_shell(said, names)=='FileNotFoundError: [Errno 2] a.png'
