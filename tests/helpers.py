"What tests of several rooms use"
import json, os, struct, subprocess, sys, zlib
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from ifnd_nb.cli import main
from ifnd_nb.loaders import two_view_dls

def smooth(w=40, h=30):
    "A smooth picture whose corners differ, so that a wrong turn or crop shows"
    y, x = np.mgrid[:h, :w]
    return Image.fromarray(np.stack([x*255/(w-1), y*255/(h-1), 255 - x*128/(w-1)], -1).astype(np.uint8))

GREY = smooth().convert('L')

def save_many(folder, n=8, side=20, ext='png', **kw):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n): Image.new('RGB', (side, side), (i*10, 5, 7)).save(folder/f'{i:03}.{ext}', **kw)
    return folder

class Items:
    "A map-style data set of given items"
    def __init__(self, items, **kw): self.items = items; self.__dict__.update(kw)
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]

A = np.random.default_rng(1).integers(0, 256, (6, 9, 9, 3), dtype=np.uint8)

ITEMS = {'pil': [Image.fromarray(a) for a in A], 'array': list(A),
         'tensor': [torch.from_numpy(a.transpose(2, 0, 1).copy()) for a in A],
         'float': [torch.from_numpy(a.transpose(2, 0, 1) / 255) for a in A]}

TINY = dict(data='digits', strategy='none', arch='small_resnet', epochs=1, bs=64, lr=1e-3, queue_size=256, tau=.1,
            momentum=.99, seed=1)

def command(*args, name='ifnd_train', cwd=None, **env):
    return subprocess.run([Path(sys.executable).with_name(name), *map(str, args)], capture_output=True, text=True,
                          cwd=cwd,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg', **env})

def pictures(folder, n=24, kind='jpg', side=40):
    rng = np.random.default_rng(0)
    for i in range(n):
        sub = folder/f'class{i % 2}'; sub.mkdir(parents=True, exist_ok=True)
        Image.fromarray((rng.integers(0, 60, (side, side, 3)) + 160 * (i % 2)).astype(np.uint8)).save(sub/f'{i}.{kind}')
    return folder

def cut(path): path.write_bytes(path.read_bytes()[:len(path.read_bytes())//2])

def bad_folder(tmp_path): p = pictures(tmp_path/'bad'); cut(p/'class0'/'4.jpg'); return p

def metrics(out='ifnd_out'): return json.loads((Path(out)/'metrics.json').read_text())

def small(folder='pics', n=40, **kw):
    "Arguments of a run that takes a second"
    return ['--data', str(pictures(Path(folder), n, 'png', 16, **kw)), '--size', '16', '--bs', '8', '--epochs', '2',
            '--queue-size', '16']

def timm(arch): return pytest.importorskip('timm').create_model(arch)

def picture(path, value=0, size=8, **kw):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(path, **kw)

def folder(root, classes=('cat', 'dog', 'owl'), n=20, size=16):
    rng = np.random.default_rng(0)
    for c in classes:
        (Path(root)/c).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 255, (size, size, 3)).astype('u1')).save(Path(root)/c/f'{i:03}.png')
    return Path(root)

SMALL = '--size', '16', '--bs', '16', '--epochs', '1', '--queue-size', '32', '--n-clusters', '2', '--device', 'cpu'

def refused(*args, main=main):
    "Exit code and the one line"
    with pytest.raises(SystemExit) as e: main([*map(str, args)])
    return e.value.code

def one_line(capsys):
    err = capsys.readouterr().err
    assert err.count('\n')==1, err
    return err.strip()

def arrays(n=96, classes=4, size=16, seed=0):
    y, g = torch.arange(n) % classes, torch.Generator().manual_seed(seed)
    x = torch.randint(0, 60, (n, 1, size, size), generator=g).to(torch.uint8)
    for i in range(n): x[i, 0, y[i]] += 150
    return x, y

def loaders(n=96, **kw):
    x, y = arrays(n)
    return two_view_dls(x, labels=y, size=16, bs=16, device='cpu', **kw)

def quiet(learn, do):
    with learn.no_bar(), learn.no_logging(): return do(learn)

def deep(path, a):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).save(path)

def png_bytes(v=0):
    picture('tmp.png', v)
    return Path('tmp.png').read_bytes()

def chunk(kind, body): return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
