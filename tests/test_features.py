"Features and weights for use elsewhere"
import json, os, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch, torchvision
from safetensors.torch import load_file
from ifnd_nb.cli import embed_main, export_main, main
from ifnd_nb.images import read_image
from ifnd_nb.loaders import two_view_dls
from ifnd_nb.moco import moco_learner
from ifnd_nb.weights import load_encoder, save_encoder
from helpers import deep, folder, one_line, refused, SMALL, timm

pytestmark = pytest.mark.usefixtures('in_a_folder')

@pytest.mark.skipif(sys.platform!='linux', reason='names are bytes on Linux')
def test_names_that_are_no_text():
    folder('base')
    Path(os.fsdecode(b'base/cat/caf\xe9.txt')).write_text('x')
    Path('base/dog/000.png').rename(os.fsdecode(b'base/dog/caf\xe9.png'))
    main(['--data', 'base', *SMALL])
    assert b'caf\xe9.txt' in Path('ifnd_out/left_out.txt').read_bytes()
    Path('base/owl').rename(os.fsdecode(b'base/\xe9'))
    main(['--data', 'base', *SMALL, '--out', 'again'])
    assert Path('again/report.png').exists()
    for to in ('f.csv', 'f.npz'): embed_main(['ifnd_out', '--data', 'base', '--to', to, '--device', 'cpu'])
    assert b'dog/caf\xe9.png' in Path('f.csv').read_bytes()

def test_deep_images_are_read_alike_by_weights_alone():
    rng = np.random.default_rng(0)
    for i in range(40): deep(f'd/{"ab"[i % 2]}/{i}.png', rng.integers(0, 3000, (16, 16)).astype('u2'))
    main(['--data', 'd', *SMALL, '--out', 'run'])
    export_main(['run', '--to', 'w.pth'])
    for i in range(4): deep(f'e/{i}.png', rng.integers(0, 200, (16, 16)).astype('u2'))
    for args in (['run', '--to', 'a.npz'], ['small_resnet', '--from-weights', 'w.pth', '--to', 'b.npz']):
        embed_main([*args, '--data', 'e', '--device', 'cpu'])
    assert np.allclose(np.load('a.npz')['features'], np.load('b.npz')['features'], atol=1e-5)
    assert load_encoder('run/encoder.safetensors')[1]['levels']==(0, 4095)

@pytest.fixture
def run():
    folder('base')
    main(['--data', 'base', *SMALL, '--out', 'run'])
    return Path('run')

def test_features_with_file_names(run, capsys):
    embed_main(['run', '--data', 'base', '--to', 'f.npz', '--device', 'cpu'])
    embed_main(['run/encoder.safetensors', '--data', 'base', '--to', 'f.csv', '--device', 'cpu', '--bs', '7'])
    f, t = np.load('f.npz'), pd.read_csv('f.csv')
    assert f['files'][:2].tolist()==['cat/000.png', 'cat/001.png'] and f['names'].tolist()==['cat', 'dog', 'owl']
    assert f['features'].shape==(60, 512)
    assert t.file.tolist()==f['files'].tolist() and t.label.tolist()==[f['names'][y] for y in f['labels']]
    assert np.allclose(t.iloc[:, 2:], f['features'], atol=1e-4)
    body, meta = load_encoder('run/encoder.safetensors')
    x = torch.stack([read_image(f'base/{p}') for p in f['files'][:3]]).float() / 255
    x = (x - torch.tensor(meta['mean'])[:, None, None]) / torch.tensor(meta['std'])[:, None, None]
    assert np.allclose(body(x).detach(), f['features'][:3], atol=1e-4)

def test_features_of_any_architecture(capsys):
    folder('base', size=32)
    embed_main(['resnet18', '--data', 'base', '--to', 'u.npz', '--device', 'cpu'])
    assert 'resnet18 is untrained' in capsys.readouterr().out and np.load('u.npz')['features'].shape==(60, 512)
    torch.save(torchvision.models.resnet18().state_dict(), 'w.pth')
    embed_main(['resnet18', '--data', 'base', '--from-weights', 'w.pth', '--to', 'w.npz', '--device', 'cpu', '--size',
                '48'])
    assert 'untrained' not in capsys.readouterr().out
    learn = moco_learner(two_view_dls('base', size=32, bs=16, device='cpu'), 'resnet18', queue_size=16)
    save_encoder(learn, 'e.safetensors')
    export_main(['e.safetensors', '--to', 'x.pth'])
    for args in (['e.safetensors', '--to', 'a.npz'], ['resnet18', '--from-weights', 'x.pth', '--to', 'b.npz'],
                 ['resnet18', '--from-weights', 'e.safetensors', '--to', 'c.npz']):
        embed_main([*args, '--data', 'base', '--device', 'cpu'])
    assert np.allclose(np.load('a.npz')['features'], np.load('b.npz')['features'], atol=1e-5)
    assert np.allclose(np.load('a.npz')['features'], np.load('c.npz')['features'], atol=1e-5)
    embed_main(['small_resnet', '--data', 'digits', '--to', 'd.npz', '--device', 'cpu'])
    assert np.load('d.npz')['files'][:2].tolist()==['0', '1']

def test_features_of_all_parts_and_of_flat_folders(run):
    folder('s/train', ('a', 'b'), 5), folder('s/val', ('a', 'b'), 3), folder('flat', ('.',), 4)
    embed_main(['run', '--data', 's', '--to', 's.npz', '--device', 'cpu'])
    embed_main(['run', '--data', 'flat', '--to', 'flat.csv', '--device', 'cpu'])
    f = np.load('s.npz')
    assert len(f['files'])==16 and f['files'][0]=='train/a/000.png' and f['names'].tolist()==['a', 'b']
    assert 'label' not in pd.read_csv('flat.csv')

@pytest.mark.parametrize('args,words',
                         [(['nothing', '--data', 'base'], "arch='nothing' is not known"),
                          (['base', '--data', 'base'], 'holds no encoder.safetensors'), (['run'], 'data is not given' ),
                          (['run', '--data', 'base', '--to', 'x.txt'], "--to='x.txt' must end in"),
    (['run', '--data', 'base', '--to', 'no/x.npz'], 'no such folder'),
    (['run', '--data', 'base', '--to', 'here.npz'], 'is there already'),
    (['no/such', '--data', 'base'], 'neither a file nor'), (['run', '--data', 'base', '--size', '0'], '--size=0'),
    (['run', '--data', 'base', '--from-weights', 'w.pth'], "--from-weights='w.pth' changes nothing"),
    (['run', '--data', 'base', '--max-cache-gb', 'nan'], '--max-cache-gb=nan'), ([], 'required: encoder')])
def test_embed_refuses_in_one_line(args, words, run, capsys):
    Path('here.npz').write_text('x')
    capsys.readouterr()
    assert refused(*args, main=embed_main)==2
    said = one_line(capsys)
    assert words in said and said.startswith('ifnd_embed: ') and Path('here.npz').read_text()=='x'

@pytest.mark.parametrize('arch,size,ours,end',
                         [('resnet18', 32, 'torchvision', '.safetensors'), ('resnet18', 32, 'torchvision', '.pth'),
                          ('mobilenet_v3_small', 32, 'torchvision', '.pth'),
                          ('convnext_atto', 32, 'timm', '.safetensors')])
def test_weights_that_other_libraries_load(arch, size, ours, end, capsys):
    if ours=='timm': timm(arch)
    x = torch.rand(16, 3, size, size)
    learn = moco_learner(two_view_dls(x, size=size, bs=8, device='cpu'), arch, queue_size=16)
    save_encoder(learn, 'e.safetensors', arch)
    export_main(['e.safetensors', '--to', f'w{end}'])
    about = json.loads(Path('w.json').read_text())
    weights = torch.load('w.pth', weights_only=True) if end=='.pth' else load_file('w.safetensors')
    theirs = torchvision.models.get_model(arch) if ours=='torchvision' else timm(arch)
    lack = theirs.load_state_dict(weights, strict=False)
    assert not lack.unexpected_keys and lack.missing_keys
    assert all(k.split('.')[0] in ('fc', 'classifier', 'head', 'heads') for k in lack.missing_keys)
    assert about['library']==ours and about['arch']==arch and len(about['mean'])==3 and about['size']==size
    body = learn.model.body.eval()
    theirs.eval()
    first = lambda net: next(m for m in net.modules() if isinstance(m, torch.nn.Conv2d)).weight
    assert torch.equal(first(theirs), first(body))
    assert refused('e.safetensors', '--to', f'w{end}', main=export_main)==2
