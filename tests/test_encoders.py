"Encoders by their names"
import pytest, torch, torchvision
from torch import nn
from helpers import timm
from ifnd_nb.encoders import create_encoder

@pytest.mark.parametrize('arch,size',
                         [('small_resnet', 8), ('small_resnet', 32), ('resnet18', 32), ('mobilenet_v3_small', 32),
                          ('vit_tiny_patch16_224', 224)])
@pytest.mark.parametrize('channels', [1, 3])
def test_encoders_by_name(arch, size, channels):
    body = create_encoder(arch, channels, size)
    assert body(torch.zeros(2, channels, size, size)).shape == (2, body.n_features)

def test_body_loads_into_torchvision():
    import torchvision
    body = create_encoder('resnet18', 3, 32)
    missing, unexpected = torchvision.models.resnet18().load_state_dict(body.state_dict(), strict=False)
    assert not unexpected and set(missing) == {'fc.weight', 'fc.bias'}

def test_feature_maps_get_pooled():
    assert create_encoder(nn.Conv2d(3, 5, 3), 3, 8).n_features == 5

@pytest.mark.parametrize('args,words',
                         [(('resnet19',), "arch='resnet19'"), (('alexnet', 3, 16), 'size=16'),
                          (('inception_v3', 3, 32), 'size=32')])
def test_impossible_encoders_say_so(args, words):
    with pytest.raises(ValueError, match=words): create_encoder(*args)

# ---- networks of others

@pytest.mark.parametrize('make,n',
                         [(torchvision.models.resnet18, 512), (torchvision.models.vgg11, 512),
                          (torchvision.models.mobilenet_v3_small, 576), (lambda: timm('resnet18'), 512),
                          (lambda: timm('convnext_atto'), 320)])
def test_a_classifier_loses_its_head(make, n):
    net = make()
    keys = set(net.state_dict())
    body = create_encoder(net, 3, 32)
    assert body.n_features==n and set(net.state_dict())==keys # the user's own is as it was
    first = next(iter(body.parameters()))
    assert any(torch.equal(first, p) for p in net.parameters())

@pytest.mark.parametrize('arch,n', [('vgg11', 512), ('vgg16_bn', 512), ('alexnet', 256), ('squeezenet1_1', 512)])
def test_no_head_is_larger_than_its_network(arch, n): assert create_encoder(arch, 3, 64).n_features==n
