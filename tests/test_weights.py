"Encoders as files, and weights from elsewhere"
from pathlib import Path
import pytest, torch, torchvision
from ifnd_nb.cli import main
from ifnd_nb.encoders import create_encoder
from ifnd_nb.embedding import embed
from ifnd_nb.loaders import plain_dl
from ifnd_nb.moco import moco_learner
from ifnd_nb.start import start_run
from ifnd_nb.weights import load_encoder, save_encoder
from helpers import loaders, quiet, small

pytestmark = pytest.mark.usefixtures('in_a_folder')

def test_training_starts_from_published_weights(capsys):
    torch.manual_seed(7)
    net = torchvision.models.resnet18()
    torch.save(net.state_dict(), 'net.pth')
    learn, cfg, _ = start_run(data=small()[1], from_weights='net.pth', arch='resnet18', size=32, bs=8, epochs=1)
    assert torch.equal(learn.model.body.conv1.weight, net.conv1.weight) and learn.model.body.n_features==512
    torch.save(dict(model=net), 'net.pkl'); Path('junk').write_bytes(b'junk')
    for args, words in ((['net.pth', '--arch', 'resnet50'], "does not fit --arch='resnet50'"),
                        (['net.pth'], 'give --arch'), (['none.pth'], 'is no file'), (['junk'], 'damaged'),
                        (['net.pkl'], 'damaged')):
        with pytest.raises(SystemExit) as e: main([*small(), '--out', 'no', '--from-weights', *args])
        err = capsys.readouterr().err
        assert e.value.code==2 and words in err and err.count('\n')==1 and not Path('no').exists()

def test_an_encoder_comes_ready_to_use(tmp_path):
    learn = moco_learner(loaders(), queue_size=32, path=tmp_path)
    quiet(learn, lambda l: l.fit(1))
    save_encoder(learn, 'e.safetensors')
    body, meta = load_encoder('e.safetensors')
    x, before = torch.rand(8, 1, 16, 16), {k: v.clone() for k, v in body.state_dict().items()}
    assert not body.training and meta['arch']=='small_resnet'
    torch.testing.assert_close(body(x)[:1], body(x[:1]))
    for k, v in body.state_dict().items(): assert torch.equal(v, before[k])

def test_a_saved_encoder_gives_the_same_features(tmp_path):
    learn = moco_learner(loaders(), queue_size=32, path=tmp_path)
    quiet(learn, lambda l: l.fit(1))
    save_encoder(learn, 'e.safetensors')
    dl, bodies = plain_dl(learn.dls), (learn.model.body, load_encoder('e.safetensors')[0])
    for p, q in zip(*(body.state_dict().values() for body in bodies)): assert torch.equal(p, q)
    a, b = (embed(body, dl, no_bar=True)[0] for body in bodies)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5) # other order of the numbers in memory

def test_a_module_must_be_named_to_be_saved():
    learn = moco_learner(loaders(), create_encoder('small_resnet', 1, 16))
    save_encoder(learn, 'a.safetensors')
    learn = moco_learner(loaders(),
                         torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.AdaptiveAvgPool2d(1),
                                             torch.nn.Flatten()), path='.')
    for arch in ('', torch.nn.Linear(1, 1)):
        with pytest.raises(ValueError, match='arch='): save_encoder(learn, 'b.safetensors', arch)
