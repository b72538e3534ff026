"""Quantised weights, one file a format: a frozen base in 4 to 8 bits, dequantised layer by layer.

A format is a `Format`, as `nf4()` gives one: `load(source, quantise=nf4())` quantises while loading, and
`quantise(params, nf4())` params in memory. A quantised matrix is a `Weight`, so LoRA over it (QLoRA) is
`Lora(w=Nf4(...))` and no layer has a flag for it.

| format | bits a number | scales |
|---|---|---|
| `nf4()`, `nf4(double=False)` | 4.13, 4.5 | float32 for 64 numbers; in 8 bits where `double` |
| `int8()` | 8 | float32 for each output |
| `fp8()`, `fp8(per_tensor=True)` | 8 | float32 for each output, for the matrix |
| `q4_1()` | 5 | float16 step and least number for 32 numbers |
| `q8_0()` | 8.5 | float16 for 32 numbers |
| `stored()` | as the GGUF file | as the GGUF file, of Q4_1 or Q8_0 |

Nothing trains in here: gradients go through a product to `x` and never to codes or scales, and both passes
dequantise anew, so that under `nn.scan` one layer at a time is dense.

Of qwix 0.1.8, which has these formats too and runs on the versions of JAX that we support, the tests take
FP8 as the truth, and the code nothing. Measured on a matrix of 1024 x 1024 on CPU with JAX 0.10.2: its NF4
codes are ours, but each takes a byte (JAX holds `uint4` so there) where two share one here; its scales have
no eight-bit form; quantising takes 8 bytes a number beside the matrix, and here 0.06; and autodiff of its
`dequantize` keeps the dense matrix for the backward pass, 4 bytes a number where our codes and scales are
0.56. Its INT8 and FP8 would serve, at 0.45 s of import for what is three lines here.
"""

from trainjax.quant.format import LAYERS, Format, dense, quantise
from trainjax.quant.fp8 import Fp8, fp8
from trainjax.quant.int8 import Int8, int8
from trainjax.quant.nf4 import Nf4, nf4
from trainjax.quant.q4_1 import Q41, q4_1
from trainjax.quant.q8_0 import Q80, q8_0
from trainjax.quant.quantised import Quantised, layout
from trainjax.quant.stored import stored

__all__ = [
    "LAYERS",
    "Format",
    "Fp8",
    "Int8",
    "Nf4",
    "Q41",
    "Q80",
    "Quantised",
    "dense",
    "fp8",
    "int8",
    "layout",
    "nf4",
    "q4_1",
    "q8_0",
    "quantise",
    "stored",
]
