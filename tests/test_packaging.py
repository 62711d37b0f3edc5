"settings.ini says it once: everything built from it must say the same"
import re, shutil, subprocess, sys, zipfile
from configparser import ConfigParser
from importlib.metadata import EntryPoint, distribution
from email import message_from_string
from pathlib import Path

import pytest, yaml

ROOT = Path(__file__).parent.parent

@pytest.fixture(scope='module')
def cfg():
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']

def tracked():
    done = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split('\n')[:-1]

def copy_tree(to):
    for f in tracked():
        if not (ROOT/f).exists(): continue
        (to/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/f, to/f)
    return to

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "A wheel, built from an sdist, built from the tracked files"
    tree = copy_tree(tmp_path_factory.mktemp('tree'))
    subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '-o', 'out'], cwd=tree, check=True,
                   capture_output=True)
    return zipfile.ZipFile(next((tree/'out').glob('*.whl')))

def in_wheel(wheel, name):
    return wheel.read(next(n for n in wheel.namelist() if n.endswith('.dist-info/' + name))).decode()

def version(): return re.search(r'__version__ = "(.+)"', (ROOT/'ifnd_nb'/'__init__.py').read_text())[1]

def norm(req): return re.sub(r'\s+', '', req).lower().replace('_', '-').replace("'", '"')

def assert_metadata(meta, cfg):
    want = [norm(r) for r in cfg['requirements'].split()]
    extras = [k.removesuffix('_requirements') for k in cfg if k.endswith('_requirements')]
    want += [norm(f'{r}; extra == "{e}"') for e in extras for r in cfg[f'{e}_requirements'].split()]
    assert sorted(norm(r) for r in meta.get_all('Requires-Dist')) == sorted(want)
    assert all('>=' in r and '==' not in r for r in cfg['requirements'].split())
    assert meta['Name'] in ('ifnd_nb', 'ifnd-nb') and meta['Version'] == version()
    assert meta['Summary'] == cfg['description']
    assert meta['Requires-Python'] == f">={cfg['min_python']}"
    assert cfg['license'] in (meta['License'], meta['License-Expression'])
    assert f"Programming Language :: Python :: {cfg['max_python']}" in meta.get_all('Classifier')

def test_wheel_carries_the_metadata(wheel, cfg): assert_metadata(message_from_string(in_wheel(wheel, 'METADATA')), cfg)

def test_wheel_carries_all_modules(wheel):
    modules = {f for f in tracked() if re.match(r'ifnd_nb/.+\.(py|mplstyle)$', f)}
    assert {n for n in wheel.namelist() if '.dist-info/' not in n} == modules and modules

def test_every_command_of_the_wheel_is_a_function(wheel, cfg):
    found = ConfigParser(); found.read_string(in_wheel(wheel, 'entry_points.txt'))
    scripts = dict(o.replace(' ', '').split('=') for o in cfg['console_scripts'].split('\n'))
    assert dict(found['console_scripts']) == scripts and dict(found['nbdev']) == {'ifnd_nb': 'ifnd_nb._modidx:d'}
    for name, value in scripts.items(): assert callable(EntryPoint(name, value, 'console_scripts').load()), name

def test_installed_package_says_the_same(cfg):
    assert_metadata(distribution('ifnd_nb').metadata, cfg)

def test_workflows_cover_the_oldest_and_newest_python(cfg):
    test = yaml.safe_load((ROOT/'.github'/'workflows'/'test.yaml').read_text())
    assert test['jobs']['test']['strategy']['matrix']['python'] == [cfg['min_python'], cfg['max_python']]
