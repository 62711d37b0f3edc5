"A CUDA GPU that is none: tensors remember that they were sent there; a call that mixes devices fails as on a GPU"
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU, CUDA = torch.device('cpu'), torch.device('cuda', 0)

class MixedDevices(RuntimeError): pass

def tensors(*o): return [t for t in tree_leaves(o) if isinstance(t, torch.Tensor)]

def owner(t):
    "What remembers where a tensor is: its storage, which views share, or a sparse tensor"
    return t.untyped_storage() if t.layout==torch.strided else t

def place(o):
    "The device that `o` names, or None"
    if isinstance(o, torch.device): return o
    return torch.device(o) if isinstance(o, str) and o.split(':')[0] in ('cpu', 'cuda') else None

class _Operations(TorchDispatchMode):
    "Each operation, those of the backward pass too, has all its tensors in one place, and leaves its results there"
    def __init__(self, gpu): super().__init__(); self.gpu = gpu
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        gpu, given, name = self.gpu, tensors(args, kwargs), f.overloadpacket.__name__
        there = any(map(gpu.holds, given))
        # elsewhere a CPU's single number may meet a GPU's tensor
        strict = name in ('index', 'index_put_', 'index_put', 'cat', 'stack')
        here = [t for t in given if not gpu.holds(t) and (t.dim() or strict)]
        if there and here and name!='copy_':
            raise MixedDevices(f'{name}: tensors on the GPU meet one of shape {tuple(here[0].shape)} on the CPU')
        gpu.operations[name] = gpu.operations.get(name, 0) + 1
        if there: gpu.there[name] = gpu.there.get(name, 0) + 1
        out = f(*args, **(kwargs or {}))
        return gpu.take(out) if there and name!='copy_' else out # what is copied stays where it is copied to

class FakeCuda(TorchFunctionMode):
    "`with FakeCuda() as gpu:`; `gpu.operations` counts them by name, `gpu.there` those with a tensor on the GPU"
    def __init__(self): super().__init__(); self.operations, self.there, self.mode = {}, {}, _Operations(self)
    def __enter__(self):
        self.mode.__enter__()
        self.engine, torch.autograd._engine_run_backward = torch.autograd._engine_run_backward, self.backward
        return super().__enter__()
    def __exit__(self, *e):
        super().__exit__(*e)
        torch.autograd._engine_run_backward = self.engine
        self.mode.__exit__(*e)

    def backward(self, *args, **kwargs):
        "The mode is off inside of a call, but functions with a backward pass of their own need it"
        TorchFunctionMode.__enter__(self)
        try: return self.engine(*args, **kwargs)
        finally: TorchFunctionMode.__exit__(self, None, None, None)

    def holds(self, t): return getattr(owner(t), 'on_gpu', False)
    def take(self, o):
        for t in tensors(o): owner(t).on_gpu = True
        return o

    def move(self, t, goal, dtype=None, memory_format=torch.preserve_format):
        "Tensor.to: a copy where the device changes"
        out = t.to(dtype or t.dtype, memory_format=memory_format)
        if goal is None or self.holds(t)==(goal.type=='cuda'): return self.take(out) if self.holds(t) else out
        return self.take(out.clone()) if goal.type=='cuda' else torch.from_numpy(out.detach().numpy().copy())

    def __torch_function__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if f==torch.Tensor.device.__get__: return CUDA if self.holds(args[0]) else CPU
        if f==torch.Tensor.is_cuda.__get__: return self.holds(args[0])
        if f in (torch.Tensor.numpy, torch.Tensor.__array__) and self.holds(args[0]):
            raise MixedDevices('a tensor on the GPU cannot become an array of NumPy')
        if f is torch.Tensor.cpu: return self.move(args[0], CPU)
        if f is torch.Tensor.cuda: return self.move(args[0], CUDA)
        if f is torch.Tensor.to:
            asked = [*args[1:], kwargs.get('device')]
            like = next((o for o in asked if isinstance(o, torch.Tensor)), None)
            goal = next((p for p in map(place, asked) if p),
                        None if like is None else CUDA if self.holds(like) else CPU)
            kinds = (o if isinstance(o, torch.dtype) else o.dtype
                     for o in (*args[1:], kwargs.get('dtype')) if isinstance(o, (torch.dtype, torch.Tensor)))
            kind = next(kinds, args[0].dtype)
            return self.move(args[0], goal, kind, kwargs.get('memory_format', torch.preserve_format))
        goal = None if f is torch._C._nn._parse_to else place(kwargs.get('device'))
        if goal and goal.type=='cuda' and kwargs.get('generator') is not None:
            raise MixedDevices('a generator on the CPU draws nothing on the GPU')
        out = f(*args, **{**kwargs, 'device': 'cpu'} if goal else kwargs)
        there = goal.type=='cuda' if goal else f is torch.Tensor.new_tensor and self.holds(args[0])
        if goal and goal.type=='cpu' and isinstance(out, torch.Tensor) and self.holds(out): return self.move(out, CPU)
        return self.take(out) if there else out
