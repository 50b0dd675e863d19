"""The CUDA driver calls that this package makes, checked. Imported only once a GPU path is chosen."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

from cuda.bindings import driver

from ..errors import AllReduceError


def call(name: str, *args: Any) -> Any:
    """Call ``cuda.bindings.driver.<name>``; returns its outputs (none, one, or a tuple).

    Raises:
        AllReduceError: with the call's name and CUDA's own words.
    """
    error, *out = getattr(driver, name)(*args)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise AllReduceError(f"{name}: {describe(error)}")
    return out[0] if len(out) == 1 else tuple(out) or None


def describe(error) -> str:
    _, text = driver.cuGetErrorString(error)
    return f"{error.name} ({text.decode() if text else 'no description'})"


@contextlib.contextmanager
def beside_captures() -> Iterator[None]:
    """This thread's calls inside are none of a graph that anybody captures: calls that wait, or take or give back memory, are
    refused otherwise, and spoil that capture."""
    mode = call("cuThreadExchangeStreamCaptureMode", driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
    try:
        yield
    finally:
        call("cuThreadExchangeStreamCaptureMode", mode)


class Module:
    """A loaded cubin. Never unloaded: a captured graph may still hold its kernels."""

    def __init__(self, cubin: bytes):
        self._module = call("cuModuleLoadData", cubin)

    def kernel(self, name: str):
        return call("cuModuleGetFunction", self._module, name.encode())


_modules: dict[tuple[int, bytes], Module] = {}


def load_module(cubin: bytes) -> Module:
    """``cubin`` in the current context: loaded once, as it stays for good, however many communicators come and go."""
    key = int(call("cuCtxGetCurrent")), cubin
    if key not in _modules:
        _modules[key] = Module(cubin)
    return _modules[key]


class _Attribute(ctypes.Structure):
    """``CUlaunchAttribute``: every value that is used here is an int at the start of its 64 bytes."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_uint32), ("value", ctypes.c_int * 16)]


class _Config(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


class _Node(ctypes.Structure):
    """``CUDA_KERNEL_NODE_PARAMS_v2``."""

    _fields_ = [
        ("kernel", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("arguments", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("library_kernel", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    ]


class _Edge(ctypes.Structure):
    """``CUgraphEdgeData``."""

    _fields_ = [("from_port", ctypes.c_ubyte), ("to_port", ctypes.c_ubyte), ("type", ctypes.c_ubyte), ("pad", ctypes.c_ubyte * 5)]


# What dependent launch is in a graph: CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC, CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC.
_DEPENDENT = _Edge(from_port=1, type=1)


@cache
def _entry(name: str) -> Callable[..., int]:
    """The driver's own entry: a call through the bindings builds Python objects each time."""
    try:
        return getattr(ctypes.CDLL("libcuda.so.1"), name)
    except AttributeError:
        raise AllReduceError(f"{name}: this driver is too old to have it") from None


def address_of(name: str) -> int:
    """Of the driver's own entry, for C."""
    function: Any = _entry(name)
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def failure(what: str, error: int) -> AllReduceError:
    return AllReduceError(f"{what}: {describe(driver.CUresult(error))}")


def _check(what: str, error: int) -> None:
    if error:
        raise failure(what, error)


class KernelLaunch:
    """One kernel with its grid and argument block, ready to be launched again and again.

    ``arguments`` are ctypes values; the launch reads what they hold at that moment. Not for two threads at once.

    Attributes:
        node: the same for a graph, as the driver takes it, but for what says when it may start.
        pdl: whether it is a dependent launch.
        cluster: blocks of a cluster, as the kernel was compiled.
        kernel, pointers: the kernel's handle, and where the addresses of its arguments lie: what the driver takes beside a config.
    """

    def __init__(
        self,
        kernel,
        arguments: Sequence[ctypes._SimpleCData | ctypes.Structure],
        grid: int,
        block: int,
        shared_bytes: int = 0,
        pdl: bool = False,
        ranks: int = 1,
        cluster: int = 1,
    ):
        attributes = []
        if pdl:
            attributes.append(driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
        if ranks > 1:
            attributes.append(driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE)
        table = (_Attribute * len(attributes))(*(_Attribute(int(a), 0, (ctypes.c_int * 16)(1)) for a in attributes))
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        self.arguments, self.grid, self.pdl, self.cluster = arguments, grid, pdl, cluster
        self._config = _Config((grid, ranks, 1), (block, 1, 1), shared_bytes, None, table, len(attributes))
        self.kernel, self.pointers = int(kernel), ctypes.addressof(pointers)
        self._keep = (kernel, table, pointers)
        self._stream: int | None = None
        # Pointers that ctypes need not convert at each call. The kernel's handle is one to the driver only.
        handle = ctypes.c_char.from_address(self.kernel)
        node = _Node(self.kernel, self._config.grid, self._config.block, shared_bytes, self.pointers)
        self.node = ctypes.byref(node)
        references = (ctypes.byref(held) for held in (self._config, handle, pointers))
        self._call = partial(_entry("cuLaunchKernelEx"), *references, None)

    def __call__(self, stream: int) -> None:
        if stream != self._stream:
            self._config.stream = self._stream = stream
        error = self._call()
        if error:
            raise failure("kernel launch", error)

    def config_of_its_own(self) -> tuple[ctypes.Structure, int]:
        """A ``CUlaunchConfig`` of the same launch, for who calls the driver himself, and the address of its stream. It lives no longer
        than this object."""
        config = _Config.from_buffer_copy(self._config)
        return config, ctypes.addressof(config) + _Config.stream.offset


class Graph:
    """A graph of kernels, one after the other, whose nodes are updated to as many launches, or fewer, again and again. Not for two threads
    at once.

    ``launches`` are what it begins with, ``stream`` holds the one to launch it on. Those that are dependent are so in the graph,
    but for the first. No cooperative launches: that attribute is left behind. A node that was updated to a kernel with clusters keeps
    them: a kernel without, later, would run with these (seen on sm_90, CUDA 13.0).

    Attributes:
        launch: the driver's own call, which returns its error.
    """

    def __init__(self, launches: Sequence[KernelLaunch], stream: ctypes.c_void_p):
        with beside_captures():
            self._graph = call("cuGraphCreate", 0)
            try:
                nodes = _add_nodes(ctypes.c_void_p(int(self._graph)), launches)
                self._executable = call("cuGraphInstantiate", self._graph, 0)
            except AllReduceError:
                call("cuGraphDestroy", self._graph)
                raise
        executable = ctypes.c_void_p(int(self._executable))
        self._enabled = len(nodes)
        self._enable = [partial(_entry("cuGraphNodeSetEnabled"), executable, node) for node in nodes]
        self._update = [partial(_entry("cuGraphExecKernelNodeSetParams_v2"), executable, node) for node in nodes]
        self.launch: Callable[[], int] = partial(_entry("cuGraphLaunch"), executable, stream)

    def update(self, launches: Sequence[KernelLaunch]) -> None:
        """Be ``launches`` from now on, with the values that their arguments hold now. What is in flight stays what it is."""
        before, self._enabled = self._enabled, len(launches)
        for enable in self._enable[before : self._enabled]:
            _check("graph update", enable(ctypes.c_uint(1)))
        for enable in self._enable[self._enabled : before]:
            _check("graph update", enable(ctypes.c_uint(0)))
        for update, launch in zip(self._update[: self._enabled], launches, strict=True):
            _check("graph update", update(launch.node))

    def close(self) -> None:
        """What is in flight comes to its end."""
        with beside_captures():
            call("cuGraphExecDestroy", self._executable)
            call("cuGraphDestroy", self._graph)


def _add_nodes(graph: ctypes.c_void_p, launches: Sequence[KernelLaunch]) -> list[ctypes.c_void_p]:
    add, link = _entry("cuGraphAddKernelNode_v2"), _entry("cuGraphAddDependencies_v2")
    nodes: list[ctypes.c_void_p] = []
    for launch in launches:
        node = ctypes.c_void_p()
        _check("graph node", add(ctypes.byref(node), graph, None, ctypes.c_size_t(0), launch.node))
        if nodes:
            edge = ctypes.byref(_DEPENDENT) if launch.pdl else None
            ends = ctypes.byref(nodes[-1]), ctypes.byref(node)
            _check("graph edge", link(graph, *ends, edge, ctypes.c_size_t(1)))
        nodes.append(node)
    return nodes
