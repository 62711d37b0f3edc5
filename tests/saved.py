"What notebooks say and what their saved outputs show, for tests of prose"
import json
from pathlib import Path

NBS = Path(__file__).parent.parent/'nbs'

def cells(name):
    "The cells of a notebook, as 'learn/03_instance_discrimination'"
    return json.loads((NBS/f'{name}.ipynb').read_text())['cells']

def source(cell): return ''.join(cell['source'])

def text_of(cell):
    "All text that a cell printed or returned"
    parts = [o.get('text') or o.get('data', {}).get('text/plain', '') for o in cell.get('outputs', [])]
    return '\n'.join(''.join(p) for p in parts)

def output_of(name, piece):
    "The saved text output of the one code cell that holds `piece`"
    found = [c for c in cells(name) if c['cell_type']=='code' and piece in source(c)]
    assert len(found)==1, f'{len(found)} cells of {name} hold {piece!r}'
    return text_of(found[0])

def prose_of(name):
    "All prose of a notebook"
    return '\n\n'.join(source(c) for c in cells(name) if c['cell_type']=='markdown')
