"Networks in half the precision where it pays; all else in fp32"
import pytest, torch
from helpers_method import bright_loaders, columns, fit, learner, same
from ifnd_nb.encoders import create_encoder
from ifnd_nb.moco import MoCo
from ifnd_nb.precision import bf16_pays, computing_in, precisions

CPU, CUDA = torch.device('cpu'), torch.device('cuda')

@pytest.mark.parametrize('has', [(), ('avx512_bf16',), ('amx_tile',)])
def test_auto_on_a_processor_goes_by_its_instructions(has, monkeypatch):
    for o in ('avx512_bf16', 'amx_tile'):
        monkeypatch.setattr(torch.cpu, f'_is_{o}_supported', lambda o=o: o in has, raising=False)
    assert bf16_pays(CPU, 16)==bf16_pays(CPU, 224)==bool(has)
    assert not bf16_pays(torch.device('mps'), 224)

@pytest.mark.parametrize('size, capability, pays', [(32, (9, 0), False), (64, (8, 0), False), (96, (8, 0), True), (224, (9, 0), True),
                                                    (224, (7, 5), False)])
def test_auto_on_a_gpu_goes_by_size_and_instructions(size, capability, pays, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    assert bf16_pays(CUDA, size) is pays

def kinds(precision, training=True, cast=False):
    "What the head computes in, and what comes out"
    model, seen = MoCo(create_encoder('small_resnet', 1, 16), 8, 32, precision=precision).train(training), set()
    for net in (model.encoder_q, model.encoder_k): net.head.register_forward_hook(lambda m, x, out: seen.add(out.dtype))
    with torch.autocast('cpu', torch.float16, enabled=cast): out = model(*torch.rand(2, 4, 1, 16, 16))
    return seen, {o.dtype for o in out}

@pytest.mark.parametrize('training', [True, False])
def test_networks_compute_in_it_and_embeddings_leave_in_fp32(training, monkeypatch):
    assert kinds('fp32', training)==({torch.float32},) * 2
    assert kinds('bf16', training)==({torch.bfloat16}, {torch.float32})
    for pays in (True, False):
        monkeypatch.setattr('ifnd_nb.precision.bf16_pays', lambda device, size: pays)
        assert kinds('auto', training)[0]=={torch.bfloat16 if pays else torch.float32}

def test_what_fastai_has_put_in_force_stays():
    for precision in precisions: assert kinds(precision, cast=True)[0]=={torch.float16}

def test_other_names_are_refused():
    for wrong in ('fp16', 'half', None):
        with pytest.raises(ValueError, match=r"precision=.* is not known; use one of auto, fp32, bf16, or fastai's learn.to_fp16\(\)"):
            learner(bright_loaders(), precision=wrong)

@pytest.mark.parametrize('strategy', ['eliminate', 'attract', 'both'])
def test_training_in_bf16_keeps_all_in_fp32_and_repeats(strategy):
    a, b = (fit(learner(bright_loaders(), strategy=strategy, precision='bf16'), 2) for _ in range(2))
    same(a, b)
    assert columns(a)['removed'] > 0
    assert {o.dtype for o in (*a.model.parameters(), *a.model.buffers()) if o.is_floating_point()}=={torch.float32}
    assert all(p.isfinite().all() for p in a.model.parameters())

def test_a_context_for_each():
    x = torch.rand(1, 3, 32, 32)
    with computing_in('bf16', x): assert (x[0, 0] @ x[0, 0]).dtype==torch.bfloat16
    with computing_in('fp32', x): assert (x[0, 0] @ x[0, 0]).dtype==torch.float32
