"The site, built from the saved notebooks: whole, offline, and as a reader's browser shows it"
import json, re, shutil, subprocess, sys, threading, time
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip('zensical', reason='the site needs the extra docs')
from ifnd_nb._site import Site, _code_cell, _prose

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p.relative_to(ROOT/'nbs').with_suffix('').as_posix() for p in (ROOT/'nbs').rglob('*.ipynb')
                   if '.ipynb_checkpoints' not in p.parts)
MODULES = sorted(p.stem for p in (ROOT/'ifnd_nb').glob('[a-z]*.py') if p.stem != 'all')

class Page(HTMLParser):
    "What a page refers to, and what can be referred to in it"
    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.ids, self.text, self.tags = [], [], set(), path.read_text(encoding='utf-8'), set()
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        if attrs.get('id'): self.ids.add(attrs['id'])
        if tag=='a' and attrs.get('href'): self.links.append(attrs['href'])
        loaded = tag!='link' or attrs.get('rel') in ('stylesheet', 'icon', 'preload', 'modulepreload', 'preconnect')
        if loaded and tag!='a': self.loads += [attrs[k] for k in ('href', 'src', 'srcset', 'poster', 'data') if attrs.get(k)]

@pytest.fixture(scope='module')
def built(tmp_path_factory):
    to = tmp_path_factory.mktemp('site')/'out'
    done = subprocess.run([sys.executable, '-m', 'ifnd_nb._site', to], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode==0, done.stdout + done.stderr
    return to

@pytest.fixture(scope='module')
def pages(built): return {p.relative_to(built).as_posix(): Page(p) for p in sorted(built.rglob('*.html')) if p.name != '404.html'}

def cells(name): return json.loads((ROOT/'nbs'/f'{name}.ipynb').read_text(encoding='utf-8'))['cells']

def test_each_notebook_and_module_has_a_page(pages):
    want = {f'{n}.html' for n in NOTEBOOKS} | {f'api/{m}.html' for m in MODULES} | {'api/index.html'}
    assert set(pages)==want

def test_no_link_is_dead(built, pages):
    dead = []
    for name, page in pages.items():
        for to in page.links + page.loads:
            url = urlsplit(to)
            if url.scheme: continue
            target = (built/name).parent/unquote(url.path) if url.path else built/name
            if not target.resolve().exists(): dead.append((name, to))
            elif url.fragment and target.suffix=='.html':
                there = pages[target.resolve().relative_to(built.resolve()).as_posix()]
                if unquote(url.fragment) not in there.ids: dead.append((name, to))
    assert dead==[]

def test_nothing_is_loaded_from_elsewhere(built, pages):
    assert [(n, u) for n, p in pages.items() for u in p.loads if urlsplit(u).netloc] == []
    styles = '\n'.join(p.read_text(encoding='utf-8') for p in built.rglob('*.css'))
    assert re.findall(r'url\(["\']?(?:https?:)?//[^)]*|@import[^;]*//[^;]*', styles)==[]

def test_the_site_names_no_tool(pages):
    footers = {re.sub(r'<[^>]*>', ' ', p.text.partition('<footer')[2]).split('{')[0] for p in pages.values()}
    assert not any(re.search('zensical|material|mkdocs', f, re.I) for f in footers)

def test_the_api_lists_every_public_name(pages):
    for m in MODULES: assert set(import_module(f'ifnd_nb.{m}').__all__) <= pages[f'api/{m}.html'].ids, m
    assert any('ContrastiveLearner.epoch_table' in p.ids for p in pages.values()) # patched in, by another cell

def test_an_entry_says_what_each_parameter_is(pages):
    text = pages['api/contrast.html'].text
    assert 'temperature' in text and '<code>0.1</code>' in text and '#defines-moco_logits' in text

def in_page(line, page): return re.sub(r'\s', '', line) in re.sub(r'<[^>]*>|\s', '', page.text).replace('&#39;', "'").replace('&quot;', '"')

def test_hidden_code_is_left_out(pages):
    seen = 0
    for name in NOTEBOOKS:
        code = [''.join(c['source']) for c in cells(name) if c['cell_type']=='code']
        hidden = [c for c in code if re.search(r'^#\| (hide|echo: false)$', c, re.M)]
        shown = '\n'.join(c for c in code if c not in hidden)
        for line in {l.strip() for c in hidden for l in c.splitlines() if len(l) > 40 and not re.search('[<>&#]', l)}:
            if line not in shown:
                assert not in_page(line, pages[f'{name}.html']), (name, line)
                seen += 1
    assert seen or not any('#| hide' in ''.join(c['source']) for n in NOTEBOOKS for c in cells(n))

def test_directives_are_not_shown(pages):
    assert [n for n, p in pages.items() if re.search(r'<span class="c1">#\|', p.text)]==[]

def test_solutions_are_folded(pages):
    for name in NOTEBOOKS:
        titles = [t for c in cells(name) for t in re.findall(r'^#\| code-fold: true\n# (.+)', ''.join(c['source']), re.M)]
        folded = re.findall(r'<details[^>]*>\s*<summary>(.*?)</summary>', pages[f'{name}.html'].text)
        assert len(folded) >= len(titles), name

def one_cell(source, outputs=()): return dict(cell_type='code', source=source, outputs=list(outputs))

def test_what_becomes_of_a_cell():
    made = lambda source: _code_cell(one_cell(source, [dict(output_type='stream', text='seen')]), 'learn/x', 3, 'Title')[0]
    assert made('#| hide\nx = 1')=='' and 'x = 1' not in made('#| echo: false\nx = 1') and 'seen' in made('#| echo: false\nx = 1')
    assert 'x = 1' in made('#| eval: false\nx = 1') and '#|' not in made('#| eval: false\nx = 1')
    folded = made('#| code-fold: true\n# Solution of exercise 1\nx = 1')
    assert '<summary>Solution of exercise 1</summary>' in folded and folded.index('<details') < folded.index('seen') < folded.index('</details>')
    assert '<div id="defines-f">' in made('#| export\ndef f(): pass') and 'defines' not in made('def f(): pass')

def test_a_list_after_a_line_of_text_stays_a_list():
    site = Site.__new__(Site); site.entries = {}
    assert _prose(site, 'a.md', 'You will\n- read\n- draw')=='You will\n\n- read\n- draw'
    assert _prose(site, 'a.md', '- read\n- draw\n  - well')=='- read\n- draw\n  - well'
    assert _prose(site, 'a.md', '```\n$x$ [a](b.ipynb)\n```')=='```\n$x$ [a](b.ipynb)\n```'
    assert 'math' in _prose(site, 'a.md', '$x$') and 'math' not in _prose(site, 'a.md', '`$x$`, for $5 or $6')

def test_a_dead_link_fails_the_build(tmp_path):
    pages = tmp_path/'pages'; pages.mkdir()
    (tmp_path/'mkdocs.yml').write_text((ROOT/'mkdocs.yml').read_text().split('nav:')[0] + 'docs_dir: pages\nsite_dir: site\n')
    for text, rc in (('# Title\n', 0), ('# Title\n\n[dead](gone.md)\n', 1)):
        (pages/'index.md').write_text(text)
        done = subprocess.run([sys.executable, '-m', 'zensical', 'build', '--strict'], cwd=tmp_path, capture_output=True)
        assert done.returncode==rc, done.stderr

def test_the_search_index_knows_the_words(built):
    found = {w for i in json.loads((built/'search.json').read_text())['items'] for w in re.findall(r'\w+', i['title'] + i['text'])}
    assert {'temperature', 'spherical_kmeans', 'IFNDCallback', 'attracted'} <= found

CHROME = next((p for n in ('chromium', 'google-chrome', 'chromium-browser', 'chrome') if (p := shutil.which(n))), None)
DRIVER = shutil.which('chromedriver')
FLAGS = ('--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run --hide-scrollbars '
         '--disable-background-networking --disable-component-update --disable-sync --process-per-site --in-process-gpu '
         '--disable-features=BackForwardCache,SpareRendererForSitePerProcess,ProactivelySwapBrowsingInstance') # fast

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture(scope='module')
def address(built):
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=built)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()

@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    if not (CHROME and DRIVER): pytest.skip('no browser: apt-get install chromium chromium-driver')
    selenium = pytest.importorskip('selenium.webdriver', reason='no selenium: it drives the browser')
    from selenium.webdriver.chrome.service import Service
    options = selenium.ChromeOptions()
    options.binary_location = CHROME
    for flag in [*FLAGS.split(), f'--user-data-dir={tmp_path_factory.mktemp("chrome")}']: options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    driver = selenium.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()

def screen(browser, width):
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 800))

# What is wrong with the page that the browser shows
LOOK = r"""
const wrong = [], root = document.documentElement, article = document.querySelector('article')
if (root.scrollWidth > root.clientWidth + 1) wrong.push(`wider than the screen: ${root.scrollWidth}`)
for (const m of article.querySelectorAll('math')) {
  const box = m.getBoundingClientRect()
  if (!m.closest('details:not([open])') && !(box.width > 1 && box.height > 1)) wrong.push('an empty equation: ' + m.textContent)
  if (/\\[a-zA-Z]/.test(m.textContent) || m.querySelector('merror')) wrong.push('raw LaTeX: ' + m.textContent)
}
for (const i of document.images) if (i.loading != 'lazy' && !i.naturalWidth) wrong.push('no image: ' + i.src)
const prose = article.cloneNode(true)
prose.querySelectorAll('code, pre, math, script, style').forEach(e => e.remove())
const raw = prose.textContent.match(/\$[^$\n]+\$|\\(frac|sum|exp|log|tau|cdot|text)\b|!?\[[^\]\n]*\]\([^)\n]*\)|^#+ /m)
if (raw) wrong.push('raw Markdown: ' + raw[0])
if (article.querySelector('.highlight:not(.no-copy)') && !document.querySelector('button.md-code__button')) wrong.push('no copy button')
for (const e of performance.getEntriesByType('resource'))
  if (new URL(e.name).origin != location.origin) wrong.push('from elsewhere: ' + e.name)
return wrong
"""

def test_every_page_is_right_in_a_browser(browser, address, pages):
    screen(browser, 390)
    wrong, start = {}, time.perf_counter()
    for name in pages:
        browser.get(f'{address}/{name}')
        faults = browser.execute_script(LOOK) + [o['message'] for o in browser.get_log('browser') if o['level']=='SEVERE']
        if faults: wrong[name] = faults
    print(f'{len(pages)} pages in {time.perf_counter() - start:.0f} seconds')
    assert wrong=={}

def until(browser, script, *args):
    "What a script returns, as soon as that is true"
    from selenium.webdriver.support.ui import WebDriverWait
    return WebDriverWait(browser, 20).until(lambda b: b.execute_script(script, *args))

def test_search_finds_a_page(browser, address):
    screen(browser, 1200)
    browser.get(f'{address}/index.html')
    until(browser, "const b = document.querySelector('.md-search__button'); if (b) b.click(); return b")
    roots = "const roots = [document, ...[...document.querySelectorAll('*')].map(e => e.shadowRoot).filter(Boolean)];"
    until(browser, roots + "return roots.map(r => r.querySelector('input[role=combobox]')).find(Boolean)").send_keys('spherical_kmeans')
    links = until(browser, roots + """
const links = roots.flatMap(r => [...r.querySelectorAll('[role=listbox] a')]).map(a => a.href); return links.length ? links : null""")
    assert any('api/kmeans.html' in u for u in links)

def test_plots_and_text_can_be_seen_in_the_dark(browser, address):
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[dict(name='prefers-color-scheme', value='dark')]))
    browser.get(f'{address}/learn/06_removal.html')
    browser.execute_script('localStorage.clear()') # what earlier pages chose
    browser.refresh()
    colours = browser.execute_script("""
const of = (e, p) => getComputedStyle(document.querySelector(e))[p].match(/[\\d.]+/g).slice(0, 3).reduce((a, b) => a + +b, 0) / 3
return [of('body', 'backgroundColor'), of('article p', 'color'), of('article img.plot', 'backgroundColor')]""")
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[]))
    assert colours[0] < 60 and colours[1] > 120 and colours[2]==255
