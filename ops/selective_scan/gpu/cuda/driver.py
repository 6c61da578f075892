"""Loads and launches programs by the CUDA driver, on the devices and streams of PyTorch."""

import ctypes
from functools import lru_cache

import torch

_PREFERRED_SHARED_MEMORY_CARVEOUT = 9  # of CUfunction_attribute; in percent

_Handle = ctypes.c_void_p  # of contexts, modules, functions, streams
_SIGNATURES = {
    "cuGetErrorName": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuDeviceGet": (ctypes.POINTER(ctypes.c_int), ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(_Handle), ctypes.c_int),
    "cuCtxSetCurrent": (_Handle,),
    "cuModuleLoadData": (ctypes.POINTER(_Handle), ctypes.c_char_p),
    "cuModuleGetFunction": (ctypes.POINTER(_Handle), _Handle, ctypes.c_char_p),
    "cuFuncSetAttribute": (_Handle, ctypes.c_int, ctypes.c_int),
    "cuLaunchKernel": (
        _Handle,
        *[ctypes.c_uint] * 7,
        _Handle,
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.POINTER(ctypes.c_void_p),
    ),
}


class DriverError(RuntimeError):
    """A call of the driver failed; the message is one line."""


@lru_cache(maxsize=1)
def _driver():
    try:
        return _with_signatures(ctypes.CDLL("libcuda.so.1"))
    except (OSError, AttributeError) as error:
        raise DriverError(f"the CUDA driver cannot be used: {error}") from error


def _with_signatures(library):
    for name, types in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, ctypes.c_int
    return library


def _call(name: str, *arguments) -> None:
    code = getattr(_driver(), name)(*arguments)
    if code != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(text))
        raise DriverError(f"{name} failed: {(text.value or b'unknown error').decode()} ({code})")


@lru_cache(maxsize=None)
def _context(device: int) -> _Handle:
    """The device's primary context, which is PyTorch's."""
    ordinal, context = ctypes.c_int(), _Handle()
    _call("cuDeviceGet", ctypes.byref(ordinal), device)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), ordinal)
    return context


class Kernel:
    """A function of a program, loaded on a device.

    All memory that the multiprocessor has for both goes to shared memory rather than to its cache.

    Raises DriverError.
    """

    def __init__(self, program: bytes, name: str, device: int):
        self._device = device
        self._module, self._function = _Handle(), _Handle()
        with torch.cuda.device(device):
            _call("cuCtxSetCurrent", _context(device))
            _call("cuModuleLoadData", ctypes.byref(self._module), program)
            _call("cuModuleGetFunction", ctypes.byref(self._function), self._module, name.encode())
            _call("cuFuncSetAttribute", self._function, _PREFERRED_SHARED_MEMORY_CARVEOUT, 100)

    def __call__(
        self, grid: tuple[int, int, int], threads: int, argument: ctypes.Structure
    ) -> None:
        """Launches blocks of `threads` on the device's current stream; `argument`: the function's
        only parameter, copied.
        """
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        with torch.cuda.device(self._device):
            # A thread of autograd may not have met the device yet.
            _call("cuCtxSetCurrent", _context(self._device))
            stream = torch.cuda.current_stream(self._device).cuda_stream
            _call(
                "cuLaunchKernel", self._function, *grid, threads, 1, 1, 0, stream, parameters, None
            )
