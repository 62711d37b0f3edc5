"Of encoders_of_use"
import pytest, torch, torchvision
from ifnd_nb.encoders import create_encoder
from helpers import timm

pytestmark = pytest.mark.usefixtures('in_a_folder')

@pytest.mark.parametrize('make,n', [(torchvision.models.resnet18, 512), (torchvision.models.vgg11, 512), (torchvision.models.mobilenet_v3_small, 576), (lambda: timm('resnet18'), 512), (lambda: timm('convnext_atto'), 320)])
def test_a_classifier_loses_its_head(make, n):
    net = make()
    keys = set(net.state_dict())
    body = create_encoder(net, 3, 32)
    assert body.n_features==n and set(net.state_dict())==keys # the user's own is as it was
    first = next(iter(body.parameters()))
    assert any(torch.equal(first, p) for p in net.parameters())

@pytest.mark.parametrize('arch,n', [('vgg11', 512), ('vgg16_bn', 512), ('alexnet', 256), ('squeezenet1_1', 512)])
def test_no_head_is_larger_than_its_network(arch, n): assert create_encoder(arch, 3, 64).n_features==n
