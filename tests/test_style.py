"Rooms stay small, lines short, imports without circles, and the star surface is what README and lessons use"
import ast, json, re
from pathlib import Path

import pytest

import ifnd_nb.all

ROOT = Path(__file__).parent.parent
ROOMS = sorted(p for p in (ROOT/'ifnd_nb').glob('*.py') if p.name != '_modidx.py')

def too_long(line):
    "120 characters; a documented parameter may have 160 with its comment"
    return len(line.split(' # ')[0]) > 120 or len(line) > 160

@pytest.mark.parametrize('path', ROOMS, ids=lambda p: p.stem)
def test_lines_are_short(path):
    text = path.read_text()
    doc = ast.parse(text).body[0]
    header = doc.end_lineno if isinstance(doc, ast.Expr) else 0 # the docstring comes from prose
    made = re.search(r'^__all__ = \[.*?\]', text, re.M | re.S) # by nbdev
    lines = {i: s for i, s in enumerate(text.splitlines(), 1) if i > header and not (made and s in made[0])}
    assert {i: s for i, s in lines.items() if too_long(s)} == {}

@pytest.mark.parametrize('path', ROOMS, ids=lambda p: p.stem)
def test_rooms_and_functions_are_small(path):
    assert len(path.read_text().splitlines()) <= 350
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 40] == []

def imports(path):
    "Rooms that a room imports when it is imported itself"
    return {n.module for n in ast.parse(path.read_text()).body if isinstance(n, ast.ImportFrom) and n.level and n.module}

def test_imports_form_no_circle():
    below = {p.stem: imports(p) for p in ROOMS}
    while below: # take off the lowest floor
        lowest = {m for m, needs in below.items() if not needs & below.keys()}
        assert lowest, f'a circle among {sorted(below)}'
        below = {m: needs for m, needs in below.items() if m not in lowest}

def test_what_the_command_imports_is_light():
    below, seen = {'cli'}, set()
    while below:
        seen |= below
        below = {m for b in below for m in imports(ROOT/'ifnd_nb'/f'{b}.py')} - seen
    heavy = [m for m in seen if re.search(r'^(import|from) .*\b(torch|fastai|pandas|matplotlib)\b', (ROOT/'ifnd_nb'/f'{m}.py').read_text(), re.M)]
    assert heavy == []

def code_of(path):
    cells = json.loads(path.read_text())['cells']
    return '\n'.join(''.join(c['source']) for c in cells)

def test_the_star_surface_is_used():
    names = ifnd_nb.all.__all__
    assert 40 <= len(names) <= 65
    lessons = '\n'.join(code_of(p) for p in [ROOT/'nbs'/'index.ipynb', *(ROOT/'nbs'/'learn').glob('*.ipynb')])
    assert [n for n in names if not re.search(rf'\b{n}\b', lessons)] == []

def test_rooms_and_notebooks_pair_up():
    "Each room is made by one notebook"
    made = [m for p in (ROOT/'nbs').glob('*/*.ipynb') for m in re.findall(r'^#\| default_exp (\w+)', code_of(p), re.M)]
    assert sorted(made) == sorted(p.stem for p in ROOMS if p.stem != '__init__')
