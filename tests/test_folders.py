"What is found in a folder of images, and what is left out"
import json, os, subprocess, sys
from pathlib import Path
import pytest
from ifnd_nb.cli import main
from ifnd_nb.folders import folder_labels, parts_of
from ifnd_nb.sources import image_source
from helpers import folder, one_line, picture, refused, save_many, SMALL

pytestmark = pytest.mark.usefixtures('in_a_folder')

def test_subfolders_are_labels(tmp_path):
    for c in ('cat', 'dog/small', '.hidden'): save_many(tmp_path/'d'/c, 3)
    (tmp_path/'d'/'readme.txt').write_text('no image')
    (tmp_path/'d'/'cat'/'data.h5').write_text('no image'); (tmp_path/'d'/'cat'/'._000.png').write_text('no image')
    images = image_source(tmp_path/'d')
    assert images.vocab==['cat', 'dog'] and images.labels.tolist()==[0]*3 + [1]*3 and images.name=='d'
    save_many(tmp_path/'d', 1)
    assert image_source(tmp_path/'d').labels.tolist()==[-1] + [0]*3 + [1]*3
    assert image_source(tmp_path/'d'/'cat').labels is None
    assert len(image_source([tmp_path/'d'/'cat', str(tmp_path/'d'/'dog')]))==6

def test_order_is_sorted_and_links_are_followed(tmp_path):
    save_many(tmp_path/'real', 3)
    (tmp_path/'root').mkdir()
    for c in ('b', 'a'): (tmp_path/'root'/c).symlink_to(tmp_path/'real', target_is_directory=True)
    (tmp_path/'real'/'loop').symlink_to(tmp_path/'root', target_is_directory=True)
    images = image_source(tmp_path/'root')
    assert images.batch(range(len(images)))[0][:3, 0, 0, 0].tolist()==[0, 10, 20]

def test_no_image_asks_each_of_a_thousand_folders():
    class Counted(list):
        passes = 0
        def __iter__(self):
            self.passes += 1
            return super().__iter__()
    folders = Counted(Path(f'/r/{i}') for i in range(2000))
    files = [Path(f'/r/{i}')/'c'/f'{j}.png' for i in range(2000) for j in range(20)] + [Path('/r/0/d/x.png')]
    assert len(folder_labels(files, folders))==40001 and folders.passes <= 1

@pytest.mark.parametrize('train,held',
                         [('training_set', 'test_set'), ('train', 'dev'), ('Train Images', 'Val Images'),
                          ('train-data', 'valid-data'), ('train2017', 'val2017'), ('train', 'eval'),
                          ('training', 'tests')])
def test_parts_by_other_names(train, held):
    folder(f's/{train}', ('a', 'b'), 5), folder(f's/{held}', ('a', 'b'), 3)
    assert len(image_source('s'))==10 and len(image_source('s', train=False))==6

def test_folders_that_are_no_parts():
    folder('vehicles', ('train', 'plane', 'car'), 4)
    assert image_source('vehicles').vocab==['car', 'plane', 'train'] and parts_of('vehicles') is None
    folder('wrapped/inner', ('a', 'b'), 3)
    assert image_source('wrapped').vocab==['a', 'b']
    folder('wrapped_parts/inner/train', ('a', 'b'), 3), folder('wrapped_parts/inner/val', ('a', 'b'), 3)
    assert len(image_source('wrapped_parts'))==6

def test_a_run_among_the_images_is_no_data(capsys):
    folder('base')
    os.chdir('base')
    for i in range(3):
        main(['--data', '.', *SMALL])
        assert 'base: 48 images' in (said := capsys.readouterr().out) and '3 labels, in memory (cat, dog, owl)' in said
        assert ('earlier run' in said)==(i > 0)
    main(['--resume', 'ifnd_out', '--epochs', '2'])
    assert json.loads(Path('ifnd_out/metrics.json').read_text())['config']['epochs']==2
    main(['--data', '.', *SMALL, '--out', '.', '--beside-baseline'])
    assert len(image_source('.'))==60 and image_source('.').vocab==['cat', 'dog', 'owl']

@pytest.mark.parametrize('name',
                         ['@eaDir', '__MACOSX', '#recycle', '$RECYCLE.BIN', 'System Volume Information', '.thumbnails',
                          '@Recycle', 'lost+found', '__pycache__'])
def test_litter_is_no_class(name, capsys):
    folder('base', n=2), picture(f'base/cat/{name}/x.png'), picture(f'base/{name}/y.png')
    images = image_source('base')
    assert len(images)==6 and images.vocab==['cat', 'dog', 'owl']
    assert ('2 folders of other programs' in capsys.readouterr().out)==(not name.startswith('.'))

def test_what_is_left_out_is_counted_and_listed(capsys):
    folder('base', n=12)
    for i in range(4): Path(f'base/cat/x{i}.png').symlink_to(f'/nowhere/{i}.png')
    for i in range(5): picture(f'base/cat/p{i}.heic', format='png')
    for i in range(2): Path(f'base/dog/p{i}.JXL').write_text('no')
    Path('base/owl/000.png').write_bytes(b'junk')
    for name in ('readme', 'Thumbs.db'): Path('base', name).write_text('x')
    main(['--data', 'base', *SMALL, '--skip-bad'])
    line = next(l for l in capsys.readouterr().out.splitlines() if l.startswith('left out'))
    assert line==('left out: 1 damaged image (000.png); 8 files of other formats (.heic 5, .jxl 2, no ending 1); '
                  '4 dangling links (x0.png, x1.png, x2.png, ...)')
    listed = Path('ifnd_out/left_out.txt').read_text().splitlines()
    assert len(listed)==13 and sum(l.startswith('link\t') for l in listed)==4
    assert any(l.startswith('damaged\t') and l.endswith('owl/000.png') for l in listed)

@pytest.mark.skipif(os.name=='nt', reason='permissions of another kind')
def test_what_may_not_be_read_is_counted():
    folder('base', n=4)
    os.chmod('base/owl', 0), os.chmod('base/cat/000.png', 0)
    code = '''
import os, sys
from ifnd_nb.folders import find_images, left_out_text
from ifnd_nb.sources import image_source
if os.getuid()==0: os.setgroups([]), os.setgid(65534), os.setuid(65534)
print(left_out_text(find_images("base")[1]))
try: image_source("base")
except PermissionError as e: print("refused", e)
print(image_source("base", skip_bad=True))'''
    for d in (Path.cwd(), *Path.cwd().parents)[:-1]:
        if d.owner()==Path.cwd().owner() and str(d).startswith('/tmp/'): os.chmod(d, 0o755)
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                          env={**os.environ, 'MPLCONFIGDIR': '/tmp', 'HOME': '/tmp'})
    os.chmod('base/owl', 0o755)
    assert done.returncode==0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0]=='left out: 1 file or folder that may not be read (owl)'
    assert lines[1].startswith('refused') and '000.png' in lines[1]
    assert 'left out: 2 files or folders that may not be read' in done.stdout and lines[-1].startswith('base: 7 images')

def test_a_stray_image_takes_no_labels_away(capsys):
    folder('base'), picture('base/000.png', size=16)
    main(['--data', 'base', *SMALL])
    assert 'k-NN accuracy' in capsys.readouterr().out

@pytest.mark.parametrize('path,words',
                         [('pics.zip', 'an archive; unpack it'), ('pics.tar.gz', 'an archive'),
                          ('list.csv', 'column of paths'), ('x.npy', 'a file of arrays'), ('clip.mp4', 'a video'),
                          ('photo.heic', 'convert it'),
    ('https://example.org/pics', 'a URL; download'), ('s3://bucket/pics', 'a URL'),
    ('https://example.org/pics.zip', 'a URL')])
def test_other_kinds_of_paths_have_their_own_remedy(path, words, capsys):
    if '://' not in path: Path(path).write_bytes(b'PK')
    for o in (path, [path]):
        with pytest.raises(ValueError, match=words): image_source(o)
    assert refused('--data', path)==2
    assert words in (said := one_line(capsys)) and said.startswith('ifnd_train: --data=') and 'remove it' not in said
