"""FP8 products that add themselves to what an output holds, by cuBLASLt's C interface: PyTorch's cannot, and to read and write
the output once more for LoRA's deltas takes longer than the deltas do.

T tokens, I in, O out. cuBLAS counts columns first: for it `out` is [O, T], and the weight stands on the left. Constants are
those of cublasLt.h.
"""

from __future__ import annotations

import ctypes
import threading
from ctypes import POINTER, byref, c_float, c_int, c_int8, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

BF16, FP8 = 14, 28
COMPUTE_32F, SCALE_32F = 68, 0
TRANSA, A_SCALE, B_SCALE, FAST_ACCUM, A_MODE, B_MODE = 3, 17, 18, 25, 31, 32
OUTER_VECTOR = 3  # a scale for every row of the output, or every column
ALIGNED = 256  # bytes that algorithms take every address to be a multiple of
SOME_ADDRESS = 256  # the heuristics ask that there be one
KEPT = 512  # plans


class _Algorithm(ctypes.Structure):
    _fields_ = [("data", c_uint64 * 8)]


class _Found(ctypes.Structure):
    _fields_ = [
        ("algorithm", _Algorithm), ("workspace", c_size_t), ("state", c_int), ("waves", c_float), ("reserved", c_int * 4),
    ]  # fmt: skip


class _Shape(NamedTuple):
    """Of out [T, O] += x [T, I] weight [O, I]^T, both with the strides of their rows."""

    tokens: int
    width: int
    depth: int
    stride_x: int
    stride_weight: int


class _Plan:
    """One product: descriptors, and the algorithm that cuBLAS takes for it without a workspace; None where it has none."""

    def __init__(self, library: _Library, shape: _Shape) -> None:
        self.library = library
        self.operation = library.made("cublasLtMatmulDescCreate", c_int(COMPUTE_32F), c_int(SCALE_32F))
        self.set(TRANSA, c_int32(1))
        self.set(FAST_ACCUM, c_int8(1))
        for mode, scale in ((A_MODE, A_SCALE), (B_MODE, B_SCALE)):
            self.set(mode, c_int32(OUTER_VECTOR))
            self.set(scale, c_uint64(SOME_ADDRESS))
        self.weight = self._layout(FP8, shape.depth, shape.width, shape.stride_weight)
        self.x = self._layout(FP8, shape.depth, shape.tokens, shape.stride_x)
        self.out = self._layout(BF16, shape.width, shape.tokens, shape.width)
        self.algorithm = self._choose()

    def set(self, attribute: int, value: Any) -> None:
        size = c_size_t(ctypes.sizeof(value))
        self.library.call("cublasLtMatmulDescSetAttribute", self.operation, c_int(attribute), byref(value), size)

    def run(self, out: Tensor, x: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor) -> None:
        assert self.algorithm is not None, "can_add_fp8 says so"
        self.set(A_SCALE, c_uint64(weight_scales.data_ptr()))
        self.set(B_SCALE, c_uint64(scales.data_ptr()))
        one, at = c_float(1), c_void_p(out.data_ptr())
        with torch.cuda.device(out.device):
            self.library.call(
                "cublasLtMatmul", self.library.handle, self.operation, byref(one), c_void_p(weight.data_ptr()), self.weight,
                c_void_p(x.data_ptr()), self.x, byref(one), at, self.out, at, self.out, byref(self.algorithm), c_void_p(0),
                c_size_t(0), c_void_p(torch.cuda.current_stream(out.device).cuda_stream),
            )  # fmt: skip

    def close(self) -> None:
        for layout in (self.weight, self.x, self.out):
            self.library.call("cublasLtMatrixLayoutDestroy", layout)
        self.library.call("cublasLtMatmulDescDestroy", self.operation)

    def _layout(self, kind: int, rows: int, columns: int, step: int) -> c_void_p:
        sizes = c_uint64(rows), c_uint64(columns), c_int64(step)
        return self.library.made("cublasLtMatrixLayoutCreate", c_int(kind), *sizes)

    def _choose(self) -> _Algorithm | None:
        preference = self.library.made("cublasLtMatmulPreferenceCreate")  # its default: no workspace
        found, count = _Found(), c_int(0)
        status = self.library.functions.cublasLtMatmulAlgoGetHeuristic(
            self.library.handle, self.operation, self.weight, self.x, self.out, self.out, preference, 1, byref(found),
            byref(count),
        )  # fmt: skip
        self.library.call("cublasLtMatmulPreferenceDestroy", preference)
        return None if status or not count.value or found.state else found.algorithm


class _Library:
    """cuBLASLt of one device, and the plans made so far. For any thread that holds `lock`."""

    def __init__(self) -> None:
        major = str(torch.version.cuda).partition(".")[0]
        self.functions = ctypes.CDLL(f"libcublasLt.so.{major}")
        self.functions.cublasLtMatmulAlgoGetHeuristic.argtypes = [c_void_p] * 7 + [c_int, POINTER(_Found), POINTER(c_int)]
        self.handle = self.made("cublasLtCreate")
        self.lock = threading.Lock()
        self.plans: dict[_Shape, _Plan] = {}

    def made(self, function: str, *arguments: Any) -> c_void_p:
        pointer = c_void_p()
        self.call(function, byref(pointer), *arguments)
        return pointer

    def call(self, function: str, *arguments: Any) -> None:
        status = getattr(self.functions, function)(*arguments)
        if status:
            raise RuntimeError(f"{function}: status {status}")

    def plan(self, x: Tensor, weight: Tensor) -> _Plan:
        shape = _Shape(x.shape[0], *weight.shape, x.stride(0), weight.stride(0))
        if shape not in self.plans:
            if len(self.plans) >= KEPT:
                for old in self.plans.values():
                    old.close()
                self.plans.clear()
            self.plans[shape] = _Plan(self, shape)
        return self.plans[shape]


_libraries: dict[torch.device, _Library] = {}
_making = threading.Lock()


def can_add_fp8(x: Tensor, weight: Tensor) -> bool:
    """Whether `add_fp8_product` is there for these: on Hopper with CUDA 12.9 or later."""
    if not x.is_cuda or not (_aligned(x) and _aligned(weight)):
        return False
    library = _library(x.device)
    with library.lock:
        return library.plan(x, weight).algorithm is not None


def add_fp8_product(out: Tensor, x: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Tensor:
    """out [T, O] += the product of rows in e4m3: x [T, I] and weight [O, I] with scales [T, 1] and [O, 1], in place."""
    assert x.stride(1) == 1 == weight.stride(1) and out.is_contiguous() and _aligned(out)
    library = _library(out.device)
    with library.lock:
        library.plan(x, weight).run(out, x, scales, weight, weight_scales)
    return out


def _library(device: torch.device) -> _Library:
    with _making:
        if device not in _libraries:
            with torch.cuda.device(device):
                _libraries[device] = _Library()
        return _libraries[device]


def _aligned(one: Tensor) -> bool:
    return one.data_ptr() % ALIGNED == 0
