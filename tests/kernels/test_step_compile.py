"""Every launch of a captured step compiles for sm_90 as the step itself makes it: driven over meta tensors, not run.

Constants, alignments and numbers of warps are those of the launch, so none is listed here. A kernel may not take the
compiler minutes either: a step of a new shape waits for all of them.
"""

from __future__ import annotations

import pytest
from triton_cases import run

SCRIPT = """
import time
from types import SimpleNamespace
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton_cases import hazards
from pelagos.evals.step_bench import cut_config
from pelagos.kernels.layout import CacheLayout
from pelagos.model import cuda_forward
from pelagos.model.cuda_weights import Weights

class Sm90:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = get_current_stream = lambda self, device=None: 0

driver.set_active(Sm90())
torch.Tensor.is_cuda = property(lambda self: True)
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=132)
cuda_forward.Prefill = lambda *operands: None  # reads its weights
launch, names, dense = JITFunction.run, set(), {dense}

def compiled(kernel, *operands, grid, warmup, **options):
    begun, name = time.process_time(), f"{{kernel.__module__.split('.')[-1]}}.{{kernel.__name__}}"
    made = launch(kernel, *operands, grid=grid, warmup=True, **options)
    took, found = time.process_time() - begun, hazards(made.asm["ptx"])
    assert took < 60 and not found, (name, took, found, options)
    names.add(name)

JITFunction.run = compiled
config, meta = cut_config({shape!r}, {layers!r}), torch.device("meta")
layout, context = CacheLayout(config, "released", 0), {context}
pools = [torch.zeros((64, size), dtype=torch.uint8, device=meta) for size in (layout.page_bytes, layout.slot_bytes)]
with torch.inference_mode():
    step = cuda_forward.CudaForward(Weights(config, meta), layout, *pools, positions=context)
    step._cuda = True
    step._step({rows}, dense, False)
wanted = "site._mix_token_kernel router._route_kernel decode_attention._attend_kernel fp4_experts._product_kernel"
assert names >= set(wanted.split()), names
assert ("skinny_gemm._kept_kernel" if {rows} == 1 else "cache_write._kernel") in names, names
assert dense or "indexer._score_kernel" in names, names
print("compiled")
"""


def compiled(**case: object) -> None:
    assert run(SCRIPT.format(**case), interpret=False) == "compiled\n"


def test_step_of_nano_compiles():
    compiled(shape="nano", layers="2:4", context=8192, rows=1, dense=False)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 8, 32])
@pytest.mark.parametrize("context", [8192, 1 << 20])
@pytest.mark.parametrize("shape", ["nano", "pro"])
def test_steps_compile(shape, context, rows):
    """A layer of CSA and one of HCA."""
    compiled(shape=shape, layers="2:4", context=context, rows=rows, dense=False)


@pytest.mark.slow
def test_step_of_a_short_context_compiles_for_pro():
    compiled(shape="pro", layers="2:4", context=8192, rows=1, dense=True)
