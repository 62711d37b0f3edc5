"Each lesson is one sitting with a drawing, a summary, two exercises and a way on; evidence answers first"
import re

import pytest
from saved import NBS, cells, prose_of, source

LESSONS = sorted(f'learn/{p.stem}' for p in (NBS/'learn').glob('*.ipynb'))
EVIDENCE = sorted(f'evidence/{p.stem}' for p in (NBS/'evidence').glob('*.ipynb'))
TITLES = [source(cells(n)[0]).splitlines()[0].removeprefix('# ') for n in LESSONS]

def code_of(name): return [source(c) for c in cells(name) if c['cell_type']=='code']

def sentences(text):
    "Sentences of prose, without tables, formulas, code and headings"
    text = re.sub(r'\$\$.*?\$\$', '', text, flags=re.S)
    lines = [l for l in text.splitlines() if not re.match(r'\s*(\||#|>|\$| {4}|\[!\[)', l)]
    text = re.sub(r'\$[^$]*\$|`[^`]*`', 'x', re.sub(r'\]\([^)]*\)', ']', '\n'.join(lines)))
    parts = re.split(r'(?<=[.!?:])["*)]*\s+|\n\s*\n|\n\s*[-\d]+[.]?\s', text)
    return [s for s in parts if len(s.split()) > 2]

def test_there_are_eight_lessons(): assert len(LESSONS)==8

@pytest.mark.parametrize('name', LESSONS)
class TestALesson:
    def test_is_one_sitting(self, name):
        assert len(cells(name)) <= 45
        assert [s for s in code_of(name) if len(s.splitlines()) > 45] == []

    def test_hides_nothing(self, name):
        assert [s for s in code_of(name) if re.search(r'^#\| ?(hide|echo: ?false|include: ?false)', s, re.M)] == []

    def test_opens_with_why_and_ends_with_a_way_on(self, name):
        title, why = (source(c) for c in cells(name)[:2])
        assert re.match(r'# .+\n\n> .+', title)
        assert 'images/colab.svg' in why and f'/nbs/{name}.ipynb' in why
        assert re.search(r'^You will', why, re.M) and 'minutes' in why
        text = prose_of(name)
        assert '## Summary' in text and '## Exercises' in text and '## What goes wrong' in text
        at = LESSONS.index(name) + 1
        if at < len(LESSONS): assert re.search(rf'Next: \[[^]]+\]\({LESSONS[at].split("/")[1]}\.ipynb\)', text)

    def test_installs_itself_on_colab(self, name):
        first = code_of(name)[0]
        assert first.startswith('#| eval: false') and 'pip install' in first

    def test_has_a_drawing(self, name): assert any(re.search(r'^draw_\w+\(\)', s, re.M) for s in code_of(name))

    def test_has_two_exercises_whose_solutions_ran(self, name):
        folded = [c for c in cells(name) if c['cell_type']=='code' and source(c).startswith('#| code-fold: true')]
        told = [re.match(r'#\| code-fold: true\n# Solution of exercise (\d)', source(c)) for c in folded]
        assert [t and t[1] for t in told if t] == ['1', '2']
        assert all(c['outputs'] for c, t in zip(folded, told) if t)

    def test_lines_are_short(self, name):
        long = [l for s in code_of(name) for l in s.splitlines() if len(l.split(' # ')[0]) > 120 or len(l) > 160]
        assert long == []

    def test_sentences_are_short(self, name):
        lengths = [len(s.split()) for s in sentences(prose_of(name))]
        assert sum(lengths) / len(lengths) <= 18 and max(lengths) <= 40, max(sentences(prose_of(name)), key=lambda s: len(s.split()))

    def test_export_cells_show_what_they_do(self, name):
        run = longest = 0
        for c in cells(name):
            if c['cell_type']!='code': continue
            s = source(c)
            only_imports = not re.search(r'^(def|class|@|\w+ = )', s, re.M)
            run = run + 1 if s.startswith('#| export') and not c['outputs'] and not only_imports else run if only_imports else 0
            longest = max(longest, run)
        assert longest <= 3

@pytest.mark.parametrize('name', LESSONS + EVIDENCE)
def test_words_are_plain(name):
    found = re.search(r'\b(rooms?|who knows|to the bit.*to the bit|belongs into|no longer|later rooms)\b', prose_of(name), re.S | re.I)
    assert not found, found

@pytest.mark.parametrize('name', EVIDENCE)
class TestEvidence:
    def test_code_is_folded_and_short(self, name):
        for c in cells(name):
            if c['cell_type'] != 'code': continue
            lines = source(c).splitlines()
            assert lines[0] in ('#| code-fold: true', '#| echo: false')
            if lines[0] == '#| code-fold: true': assert any(s.startswith('# ') for s in lines[1:3]), lines[:3]
            assert [s for s in lines if len(s) > 120] == []
            assert '#| hide' not in lines and not any(s.startswith('assert ') for s in lines)

    def test_outputs_hold_no_warnings(self, name):
        outputs = [o for c in cells(name) for o in c.get('outputs', [])]
        assert [o for o in outputs if o['output_type'] in ('stream', 'error')] == []

    def test_answers_first(self, name):
        verdict = source(cells(name)[1])
        assert cells(name)[1]['cell_type']=='markdown' and len(sentences(verdict)) <= 6
        if name != 'evidence/claims':
            first = next(i for i, c in enumerate(cells(name)) if any('image/png' in o.get('data', {}) for o in c.get('outputs', [])))
            assert first <= 5

    def test_paragraphs_hold_few_numbers(self, name):
        for p in prose_of(name).split('\n\n'):
            if re.match(r'\s*(\||#|>|- )', p): continue
            told = re.sub(r'\$[^$]*\$|`[^`]*`|\]\([^)]*\)|\d{4}-\d\d-\d\d', '', p)
            assert len(re.findall(r'(?<![\w.,-])\d[\d.,]*', told)) <= 8, p

def test_the_glossary_tells_where_each_term_is_taught():
    text = prose_of('reference/glossary')
    terms = re.findall(r'^\| \*\*([^*]+)\*\* \| (.+) \|$', text, re.M)
    assert len(terms) >= 25 and [t for t, _ in terms] == sorted((t for t, _ in terms), key=str.lower)
    for term, meaning in terms:
        for link in re.findall(r'\]\(([^)]+)\)', meaning):
            assert (NBS/'reference'/link).resolve().exists(), link
            taught = prose_of(str((NBS/'reference'/link).resolve().relative_to(NBS).with_suffix('')))
            words = [w for w in re.split(r', | and ', term) if w]
            assert any(w.rstrip('s').lower() in taught.lower() for w in words), (term, link)
