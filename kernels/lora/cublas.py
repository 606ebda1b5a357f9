"""cuBLASLt through its C interface: the one way to say which algorithm a product takes, and to add FP8 products to an output.

T tokens, I in, O out, k the side that is summed over. cuBLAS counts columns first: for it `out` is [O, T], and the weight
stands on the left. Constants are those of cublasLt.h.
"""

from __future__ import annotations

import ctypes
import threading
from ctypes import POINTER, byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.bfloat16: 14, torch.float8_e4m3fn: 28}
COMPUTE_32F, SCALE_32F = 68, 0
TRANSA, A_SCALE, B_SCALE, FAST_ACCUM, A_MODE, B_MODE = 3, 17, 18, 25, 31, 32
OUTER_VECTOR = 3  # a scale for every row of the output, or every column
WORKSPACE = 1  # attribute of a preference: bytes that an algorithm may use
CANDIDATES, ROUNDS = 12, 4
CHANCE = 0.985  # times closer than this are one
ALIGNED = 256  # bytes that algorithms take every address to be a multiple of
KEPT = 512  # plans


class Algorithm(ctypes.Structure):
    _fields_ = [("data", c_uint64 * 8)]


class Found(ctypes.Structure):
    _fields_ = [
        ("algorithm", Algorithm), ("workspace", c_size_t), ("state", c_int), ("waves", c_float), ("reserved", c_int * 4),
    ]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Of out [T, O] and x [T, k] with its stride; weight_step: of the weight's rows."""

    tokens: int
    width: int
    depth: int
    transposed: bool  # the weight is [k, O], else [O, k]
    stride_x: int
    weight_step: int
    dtype: torch.dtype  # of x and the weight
    add: bool


class Plan:
    """One product: descriptors, and the algorithm that it takes."""

    def __init__(self, library: Library, shape: Shape) -> None:
        self.library, self.shape = library, shape
        self.operation = library.made("cublasLtMatmulDescCreate", c_int(COMPUTE_32F), c_int(SCALE_32F))
        self.set(TRANSA, c_int32(0 if shape.transposed else 1))
        rows, columns = (shape.width, shape.depth) if shape.transposed else (shape.depth, shape.width)
        self.weight = self._layout(shape.dtype, rows, columns, shape.weight_step)
        self.x = self._layout(shape.dtype, shape.depth, shape.tokens, shape.stride_x)
        self.out = self._layout(torch.bfloat16, shape.width, shape.tokens, shape.width)
        if shape.dtype == torch.float8_e4m3fn:
            self.set(FAST_ACCUM, ctypes.c_int8(1))
            self.set(A_MODE, c_int32(OUTER_VECTOR))
            self.set(B_MODE, c_int32(OUTER_VECTOR))
            self.set(A_SCALE, c_uint64(256))  # heuristics ask that there be some
            self.set(B_SCALE, c_uint64(256))
        self.candidates = self._candidates()
        self.algorithm: Algorithm | None = None

    def set(self, attribute: int, value: Any) -> None:
        self.library.call("cublasLtMatmulDescSetAttribute", self.operation, c_int(attribute), byref(value),
                          c_size_t(ctypes.sizeof(value)))  # fmt: skip

    def _layout(self, dtype: torch.dtype, rows: int, columns: int, step: int) -> c_void_p:
        kind = c_int(TYPES[dtype])
        return self.library.made("cublasLtMatrixLayoutCreate", kind, c_uint64(rows), c_uint64(columns), c_int64(step))

    def _candidates(self) -> list[Algorithm]:
        """What cuBLAS would take without a workspace, its own favourite first."""
        preference = self.library.made("cublasLtMatmulPreferenceCreate")
        none, found, count = c_size_t(0), (Found * CANDIDATES)(), c_int(0)
        self.library.call("cublasLtMatmulPreferenceSetAttribute", preference, c_int(WORKSPACE), byref(none), c_size_t(8))
        status = self.library.functions.cublasLtMatmulAlgoGetHeuristic(
            self.library.handle, self.operation, self.weight, self.x, self.out, self.out, preference, c_int(CANDIDATES),
            found, byref(count),
        )  # fmt: skip
        self.library.call("cublasLtMatmulPreferenceDestroy", preference)
        return [] if status else [one.algorithm for one in found[: count.value] if one.state == 0]

    def takes(self, algorithm: Algorithm) -> bool:
        """Whether the algorithm, chosen for other tokens, is one for these."""
        found = Found()
        status = self.library.functions.cublasLtMatmulAlgoCheck(
            self.library.handle, self.operation, self.weight, self.x, self.out, self.out, byref(algorithm), byref(found)
        )
        return not status and found.workspace == 0

    def run(self, out: Tensor, x: Tensor, weight: Tensor) -> None:
        if self.algorithm is None:
            self.algorithm = self.library.choose(self, out, x, weight)
        one, beta = c_float(1), c_float(1 if self.shape.add else 0)
        at, stream = c_void_p(out.data_ptr()), c_void_p(torch.cuda.current_stream(out.device).cuda_stream)
        with torch.cuda.device(out.device):
            self.library.call(
                "cublasLtMatmul", self.library.handle, self.operation, byref(one), c_void_p(weight.data_ptr()), self.weight,
                c_void_p(x.data_ptr()), self.x, byref(beta), at, self.out, at, self.out, byref(self.algorithm), c_void_p(0),
                c_size_t(0), stream,
            )  # fmt: skip

    def close(self) -> None:
        for layout in (self.weight, self.x, self.out):
            self.library.call("cublasLtMatrixLayoutDestroy", layout)
        self.library.call("cublasLtMatmulDescDestroy", self.operation)


class Library:
    """cuBLASLt of one device: plans by shape, and the algorithm of every kind of shape that was measured. For any thread."""

    def __init__(self) -> None:
        major = str(torch.version.cuda).partition(".")[0]
        self.functions = ctypes.CDLL(f"libcublasLt.so.{major}")
        self.functions.cublasLtMatmulAlgoGetHeuristic.argtypes = [c_void_p] * 7 + [c_int, POINTER(Found), POINTER(c_int)]
        self.handle = self.made("cublasLtCreate")
        self.lock = threading.Lock()
        self.plans: dict[Shape, Plan | None] = {}
        self.algorithms: dict[tuple[Any, ...], Algorithm] = {}

    def made(self, function: str, *arguments: Any) -> c_void_p:
        pointer = c_void_p()
        self.call(function, byref(pointer), *arguments)
        return pointer

    def call(self, function: str, *arguments: Any) -> None:
        status = getattr(self.functions, function)(*arguments)
        if status:
            raise RuntimeError(f"{function}: status {status}")

    def plan(self, shape: Shape) -> Plan | None:
        """None where cuBLAS has no algorithm."""
        if shape not in self.plans:
            if len(self.plans) >= KEPT:
                for old in self.plans.values():
                    if old is not None:
                        old.close()
                self.plans.clear()
            plan = Plan(self, shape)
            self.plans[shape] = plan if plan.candidates else None
        return self.plans[shape]

    def choose(self, plan: Plan, out: Tensor, x: Tensor, weight: Tensor) -> Algorithm:
        """The algorithm of this kind of shape: of so many tokens, to a power of two. Measured where none has been."""
        own = plan.shape
        kind = ((own.tokens - 1).bit_length(), own.width, own.depth, own.transposed, own.dtype, own.add)
        known = self.algorithms.get(kind)
        if known is None or not plan.takes(known):
            known = self.algorithms[kind] = fastest(plan, out, x, weight)
        return known


def fastest(plan: Plan, out: Tensor, x: Tensor, weight: Tensor) -> Algorithm:
    """cuBLAS' favourite, but for what is faster by more than chance; so too where there is no memory to measure in. The host
    waits, once a kind of shape."""
    try:
        scratch = torch.empty_like(out)
    except torch.OutOfMemoryError:
        return plan.candidates[0]
    times = measure(plan, plan.candidates, scratch, x, weight)
    best = min(range(len(times)), key=lambda index: times[index])
    return plan.candidates[best if times[best] < CHANCE * times[0] else 0]


def measure(plan: Plan, candidates: list[Algorithm], out: Tensor, x: Tensor, weight: Tensor) -> list[float]:
    """-> milliseconds of each, the median of its rounds."""
    times: list[list[float]] = [[] for _ in candidates]
    for turn in range(ROUNDS):
        for own, algorithm in zip(times, candidates, strict=True):
            plan.algorithm = algorithm
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            plan.run(out, x, weight)
            events[1].record()
            events[1].synchronize()
            if turn:
                own.append(events[0].elapsed_time(events[1]))
    return [sorted(own)[len(own) // 2] for own in times]


_libraries: dict[torch.device, Library] = {}
_making = threading.Lock()


def library(device: torch.device) -> Library:
    with _making:
        if device not in _libraries:
            with torch.cuda.device(device):
                _libraries[device] = Library()
        return _libraries[device]


def shape_of(x: Tensor, weight: Tensor, transposed: bool, add: bool) -> Shape:
    width, depth = weight.shape[::-1] if transposed else weight.shape
    assert x.shape[1] == depth and x.stride(1) == 1 == weight.stride(1), f"{tuple(x.shape)} with {tuple(weight.shape)}"
    return Shape(x.shape[0], width, depth, transposed, x.stride(0), weight.stride(0), x.dtype, add)


def product(out: Tensor, x: Tensor, weight: Tensor, transposed: bool, add: bool) -> bool:
    """Whether it was done: out [T, O] = or += x W^T, or x W."""
    assert out.is_contiguous()
    if not all(aligned(one) for one in (out, x, weight)):
        return False
    own = library(out.device)
    with own.lock:
        plan = own.plan(shape_of(x, weight, transposed, add))
        if plan is not None:
            plan.run(out, x, weight)
    return plan is not None


def aligned(one: Tensor) -> bool:
    return one.data_ptr() % ALIGNED == 0


def can_add_fp8(x: Tensor, weight: Tensor) -> bool:
    own = library(x.device)
    with own.lock:
        return aligned(x) and aligned(weight) and own.plan(shape_of(x, weight, False, True)) is not None


def add_fp8_product(out: Tensor, x: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Tensor:
    own = library(out.device)
    with own.lock:
        plan = own.plan(shape_of(x, weight, False, True))
        assert plan is not None and out.is_contiguous() and aligned(out)
        plan.set(A_SCALE, c_uint64(weight_scales.data_ptr()))
        plan.set(B_SCALE, c_uint64(scales.data_ptr()))
        plan.run(out, x, weight)
    return out
