"settings.ini says it once: everything built from it must say the same"
import re, shutil, subprocess, sys, zipfile
from configparser import ConfigParser
from importlib.metadata import distribution
from email import message_from_string
from pathlib import Path

import pytest, yaml

ROOT = Path(__file__).parent.parent

@pytest.fixture(scope='module')
def cfg():
    parser = ConfigParser(delimiters=['=']); parser.read(ROOT/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']

def tracked(): return subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split('\n')[:-1]

def copy_tree(to):
    for f in tracked():
        if (ROOT/f).exists(): (to/f).parent.mkdir(parents=True, exist_ok=True); shutil.copy2(ROOT/f, to/f)
    return to

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "A wheel, built from an sdist, built from the tracked files"
    tree = copy_tree(tmp_path_factory.mktemp('tree'))
    subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '-o', 'out'], cwd=tree, check=True, capture_output=True)
    return zipfile.ZipFile(next((tree/'out').glob('*.whl')))

def in_wheel(wheel, name): return wheel.read(next(n for n in wheel.namelist() if n.endswith('.dist-info/' + name))).decode()

def version(): return re.search(r'"(.+)"', (ROOT/'ifnd_nb'/'__init__.py').read_text())[1]

def norm(req): return re.sub(r'\s+', '', req).lower().replace('_', '-').replace("'", '"')

def assert_metadata(meta, cfg):
    want = [norm(r) for r in cfg['requirements'].split()]
    want += [norm(f'{r}; extra == "{e}"') for e in ('dev', 'bench', 'distributed', 'log') for r in cfg[f'{e}_requirements'].split()]
    assert sorted(norm(r) for r in meta.get_all('Requires-Dist')) == sorted(want)
    assert all('>=' in r and '==' not in r for r in cfg['requirements'].split())
    assert meta['Name'] in ('ifnd_nb', 'ifnd-nb') and meta['Version'] == version() and meta['Summary'] == cfg['description']
    assert meta['Requires-Python'] == f">={cfg['min_python']}" and cfg['license'] in (meta['License'], meta['License-Expression'])
    assert f"Programming Language :: Python :: {cfg['max_python']}" in meta.get_all('Classifier')

def test_wheel_carries_the_metadata(wheel, cfg): assert_metadata(message_from_string(in_wheel(wheel, 'METADATA')), cfg)

def test_wheel_carries_the_commands_and_all_modules(wheel, cfg):
    entries = in_wheel(wheel, 'entry_points.txt').replace(' ', '')
    assert 'ifnd_train=ifnd_nb.cli:main' in entries and 'ifnd_nb=ifnd_nb._modidx:d' in entries
    modules = {f for f in tracked() if re.match(r'ifnd_nb/.+\.py$', f)}
    assert {n for n in wheel.namelist() if '.dist-info/' not in n} == modules and modules

def test_installed_package_says_the_same(cfg):
    dist = distribution('ifnd_nb')
    assert_metadata(dist.metadata, cfg)
    assert [e.value for e in dist.entry_points if e.name=='ifnd_train'] == ['ifnd_nb.cli:main']

def test_workflows_cover_the_oldest_and_newest_python(cfg):
    test = yaml.safe_load((ROOT/'.github'/'workflows'/'test.yaml').read_text())
    assert test['jobs']['test']['strategy']['matrix']['python'] == [cfg['min_python'], cfg['max_python']]
    steps = ' '.join(s.get('run', '') for s in test['jobs']['test']['steps'])
    assert all(c in steps for c in ('nbdev-test', 'pytest', 'nbdev-export', 'nbdev-clean', '_readme'))
    deploy = yaml.safe_load((ROOT/'.github'/'workflows'/'deploy.yaml').read_text())
    used = [s['uses'] for s in deploy['jobs']['deploy']['steps'] + test['jobs']['test']['steps'] if 'uses' in s]
    assert any('quarto' in u for u in used) and any(s.get('run') == 'nbdev-docs' for s in deploy['jobs']['deploy']['steps'])
    assert all(re.search(r'@v\d', u) for u in used), 'an action that is not pinned'

def test_top_level_is_as_agreed():
    assert {f.split('/')[0] for f in tracked()} == {'.ci', '.github', '.gitignore', 'LICENSE', 'MANIFEST.in', 'README.md', 'ifnd_nb',
        'nbs', 'pyproject.toml', 'settings.ini', 'setup.py', 'tests'}
