"Modules, README and saved outputs are what the notebooks say"
import json, os, re, subprocess, sys
from pathlib import Path

import pytest
from test_packaging import ROOT, copy_tree, tracked

NOTEBOOKS = sorted((ROOT/f for f in tracked() if re.fullmatch(r'nbs/(\w+/)?\w+\.ipynb', f) and (ROOT/f).exists()))

def below(path): return path.relative_to(ROOT/'nbs').as_posix()

def command(name): return str(Path(sys.executable).with_name(name))

@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    "The tracked tree with its modules made anew and its notebooks cleaned"
    tree = copy_tree(tmp_path_factory.mktemp('tree'))
    for f in (tree/'ifnd_nb').glob('*.py'):
        if f.name != '__init__.py': f.unlink()
    env = {**os.environ, 'PYTHONPATH': str(tree)}
    for name in ('nbdev-export', 'nbdev-clean'):
        subprocess.run([command(name)], cwd=tree, check=True, capture_output=True, env=env)
    return tree

def test_modules_are_what_the_notebooks_export(exported):
    here, there = ({f.name: f.read_text() for f in (root/'ifnd_nb').glob('*.py')} for root in (ROOT, exported))
    assert here.keys() == there.keys(), 'a module without a notebook, or a notebook without its module'
    assert [n for n in here if here[n] != there[n]] == []

def test_notebooks_are_clean(exported):
    assert NOTEBOOKS
    assert [below(p) for p in NOTEBOOKS if p.read_text() != (exported/'nbs'/below(p)).read_text()] == []

def test_readme_is_the_index_notebook(exported):
    from ifnd_nb._readme import main
    assert main(exported, check=True) == 0
    (exported/'README.md').write_text('stale')
    assert main(exported, check=True) == 1

def test_readme_has_exactly_two_set_up_commands():
    section = re.search(r'## Set up\n(.*?)\n## ', (ROOT/'README.md').read_text(), re.S)[1]
    commands = re.findall(r'```bash\n(.*?)\n```', section, re.S)
    assert len(commands) == 2 and all('\n' not in c for c in commands)
    assert 'ifnd_train' in commands[0] and 'nbdev-test' in commands[1] and 'pytest' in commands[1]

def saved_text(nb):
    for cell in nb['cells']:
        for out in cell.get('outputs', []):
            assert out.get('name') != 'stderr' and out['output_type'] != 'error'
            for kind, v in [('text', out.get('text', ''))] + list(out.get('data', {}).items()):
                if not kind.startswith('image'): yield ''.join(v)

@pytest.mark.parametrize('path', NOTEBOOKS, ids=below)
def test_saved_outputs_are_fit_to_read(path):
    nb = json.loads(path.read_text())
    text = '\n'.join(saved_text(nb))
    found = re.search(r'Warning|/root/|/work/|/home/|/tmp/|site-packages|█|\|-{5}|%\s*\[', text)
    assert not found, f'{below(path)}: {text[max(0, found.start()-60):found.end()+60]!r}'
    code = [c for c in nb['cells'] if c['cell_type']=='code']
    assert not code or any(c['outputs'] for c in code), 'no saved outputs: run nbdev-test --save'

def test_no_path_of_a_machine_is_tracked():
    mine = {'tests/test_sync.py', 'tests/test_packaging.py'}
    for f in tracked():
        if f in mine or f.endswith('.png') or not (ROOT/f).exists(): continue
        found = re.search(r'/root/|/work/|/home/\w+/|\bfiles\.pythonhosted|pypi\.org/simple',
                          (ROOT/f).read_text(errors='ignore'))
        assert not found, f'{f}: {found}'
