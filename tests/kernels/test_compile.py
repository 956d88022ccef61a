"""Every Triton kernel is compiled for an H100, as it would be launched there; that needs no GPU."""

import inspect
import re

import numpy as np
import pytest
import torch

from nnclr.data import augment as A

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402  (after it is known that there is a Triton)
from triton.compiler import ASTSource  # noqa: E402  (likewise)

from nnclr.kernels import augment_triton, lookup_triton, smallest_triton  # noqa: E402  (which import Triton)

H100 = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.uint8: "*u8", torch.int64: "*i64", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"
}  # fmt: skip


class Launches:
    """Stands in for a kernel, and notes what it is launched with."""

    def __init__(self, kernel):
        self.kernel, self.noted = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.noted.append((args, options))


def compiled(kernel, args, options):
    """Compile for these arguments as Triton specialises it: pointers and multiples of 16 are aligned, 1 is constant."""
    given = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
    options = {"enable_fp_fusion": True, **{k: v for k, v in options.items() if k not in kernel.arg_names}}
    signature, constants, aligned = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            aligned[position,] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, constants, aligned), target=H100, options=options).asm


def kernels():
    """(module, name, kernel) of what is launched: what no other one calls."""
    found = [
        (module, name, value)
        for module in (augment_triton, lookup_triton, smallest_triton)
        for name, value in vars(module).items()
        if isinstance(value, triton.runtime.JITFunction)
    ]
    sources = [inspect.getsource(kernel.fn) for _, _, kernel in found]
    return [(m, name, k) for m, name, k in found if sum(bool(re.search(rf"\b{name}\(", s)) for s in sources) == 1]


@pytest.fixture
def noted(monkeypatch, tmp_path):
    """The launches of each kernel; what is compiled does not come from a cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = {}
    for module, name, kernel in kernels():
        made[name] = Launches(kernel)
        monkeypatch.setattr(module, name, made[name])
    return made


def make_views(size, dtype, n=16, whole=False, **view):
    images, views = torch.zeros(n, 3, 256, 256, dtype=torch.uint8), [A.View(size, **view)]
    parameters = [A.draw_parameters(views[0], 0, 0, np.arange(n), 0, 256, 256)]
    augment_triton.augment_triton(images, parameters, views, A.IMAGENET_MEAN, A.IMAGENET_STD, dtype, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_large_views(noted, dtype):
    make_views(224, dtype)
    for name in ("_cut", "_color", "_blur"):
        asm = compiled(noted[name].kernel, *noted[name].noted[0])
        assert len(asm["cubin"]) > 1000
        assert ("wgmma" in asm["ptx"]) == (name != "_color")  # tensor cores


@pytest.mark.parametrize("given", [{"whole": True}, {"jitter": 0.0, "blur": 0.0}], ids=["cut already", "crops only"])
def test_large_views_that_take_less(noted, given):
    make_views(224, torch.bfloat16, **given)
    assert len(compiled(noted["_cut"].kernel, *noted["_cut"].noted[0])["cubin"]) > 1000


@pytest.mark.parametrize("n", [1, 16])
def test_small_views(noted, n):
    make_views(32, torch.bfloat16, n, blur=0.0)
    assert [len(noted[name].noted) for name in ("_cut", "_color", "_blur")] == [1, 0, 0]
    assert len(compiled(noted["_cut"].kernel, *noted["_cut"].noted[0])["cubin"]) > 1000


def test_look_up(noted):
    lookup_triton.nearest_slots_triton(torch.zeros(64, 256), torch.zeros(4096, 256), torch.tensor(4096), 1)
    for name in ("_group_maxima", "_best_of_groups"):
        assert len(compiled(noted[name].kernel, *noted[name].noted[0])["cubin"]) > 1000


def test_smallest(noted):
    with pytest.raises(RuntimeError, match="without effect"):  # since it is only noted
        smallest_triton.run_smallest(torch.device("cpu"))
    assert len(compiled(noted["_write_one"].kernel, *noted["_write_one"].noted[0])["cubin"]) > 1000


def test_no_kernel_is_left_out():
    known = {"_cut", "_color", "_blur", "_group_maxima", "_best_of_groups", "_write_one"}
    assert {name for _, name, _ in kernels()} == known


def test_control_what_a_gpu_cannot_run_is_refused(noted):
    make_views(32, torch.bfloat16, blur=0.0)
    args, options = noted["_cut"].noted[0]
    with pytest.raises(triton.CompilationError):
        compiled(noted["_cut"].kernel, args, {**options, "TILE_X": 24})
