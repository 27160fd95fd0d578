"""Choice between a kernel and the XLA reference: decided while tracing, never by catching an exception."""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Hashable, Iterator
from typing import Literal

import jax

_log = logging.getLogger(__name__)
_simulated: contextvars.ContextVar[tuple[int, str] | None] = contextvars.ContextVar(
    "simulated", default=None
)
_required: contextvars.ContextVar[bool] = contextvars.ContextVar("required", default=False)

Implementation = Literal["pallas_mosaic_gpu", "xla"]
IMPLEMENTATIONS = ("pallas_mosaic_gpu", "xla")


@contextlib.contextmanager
def require_kernels() -> Iterator[None]:
    """Makes every op that would fall back to XLA raise instead.

    It acts while a function is traced: a function that was compiled outside is not checked again.
    """
    token = _required.set(True)
    try:
        yield
    finally:
        _required.reset(token)


def choice_context() -> Hashable:
    """What choices depend on besides their arguments and the device; whoever keeps traces keeps one for each."""
    return _simulated.get(), _required.get()


def choose(op: str, implementation: str | None, reason: str | None) -> Implementation:
    """The implementation to run.

    Args:
        op: The op's name, for messages.
        implementation: What the caller asked for, None for the kernel where there is one.
        reason: Why the kernel can't take these arguments on this device, None if it can.

    Raises:
        ValueError: If the kernel was asked for, or kernels are required, and there is a reason against it;
            or if the word is unknown.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"{op}: implementation must be None or one of {IMPLEMENTATIONS}; found {implementation!r}"
        )
    if implementation == "xla":
        return "xla"
    if reason is None:
        return "pallas_mosaic_gpu"
    if implementation is not None:
        raise ValueError(f"{op}: the pallas_mosaic_gpu kernel can't run: {reason}")
    if _required.get():
        raise ValueError(f"{op}: kernels are required and there is none for this call: {reason}")
    log_fallback(op, reason)
    return "xla"


@functools.cache
def log_fallback(op: str, reason: str) -> None:
    """Says once that XLA runs something, and why."""
    _log.info("%s runs through XLA: %s", op, reason)


@contextlib.contextmanager
def simulate_gpu(*, num_sms: int = 4, capability: str = "9.0") -> Iterator[None]:
    """Makes ops choose the kernels on a machine without a GPU, for Mosaic GPU's interpret mode."""
    token = _simulated.set((num_sms, capability))
    try:
        yield
    finally:
        _simulated.reset(token)


def num_sms() -> int:
    """Streaming multiprocessors of the default device."""
    simulated = _simulated.get()
    return simulated[0] if simulated else jax.devices()[0].core_count


def device_reason(*capabilities: str) -> str | None:
    """Why the default device can't run kernels for these compute capabilities ("9.0"), None if it can."""
    simulated = _simulated.get()
    if simulated:
        return _capability_reason(simulated[1], capabilities)
    return _device_reason(*capabilities)


@functools.cache
def _device_reason(*capabilities: str) -> str | None:
    device = jax.devices()[0]
    if device.platform != "gpu":
        return f"the device is a {device.platform}, not an NVIDIA GPU"
    return _capability_reason(str(getattr(device, "compute_capability", "")), capabilities)


def _capability_reason(capability: str, capabilities: tuple[str, ...]) -> str | None:
    if capability in capabilities:
        return None
    wanted = " or ".join(capabilities)
    return f"the GPU's compute capability is {capability}, the kernel needs {wanted}"
