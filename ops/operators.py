"""Registers operators with PyTorch, under the name `dyvm`.

torch.compile and torch.export take a registered operator as one node: they ask its fake kernel for
the sizes of its results, and its backward formula for its gradient, and never look inside.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.compiler.config
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

_NAMESPACE = "dyvm"
_PLAIN = (Tensor, nn.Parameter)
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # torch.autograd's is_grads_batched
# Not torch.library.custom_op, whose wrapper costs more time at every call.
_library = torch.library.Library(_NAMESPACE, "DEF")

_DispatchKey = torch._C.DispatchKey
_AUTOGRAD_KEYS = (
    _DispatchKey.AutogradFunctionality,
    _DispatchKey.AutogradCPU,
    _DispatchKey.AutogradCUDA,
    _DispatchKey.ADInplaceOrView,
)


def _version(folder: Path = Path(__file__).parent) -> str:
    """Of the operators: a digest of this package's sources."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# torch.compile keeps compiled programs on disk and knows operators by their names alone: one whose
# results had other sizes, in another version of this project, must not be found there.
torch.compiler.config.cache_key_tag += f" {_NAMESPACE} {_version()}"


def register(
    schema: str,
    implementation: Callable,
    fake: Callable,
    *,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> torch._ops.OpOverload:
    """Define an operator and return it.

    Args:
        schema: name, arguments and results in PyTorch's notation. No result may be a view of an
            argument or of another result.
        implementation: computes the results, on any device; called below autograd.
        fake: gives results of the same sizes, types and strides without values.
        setup_context, backward: as in `torch.library.register_autograd`; the backward formula is
            not differentiable itself.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            f"{_NAMESPACE}::{name}",
            once_differentiable(backward),
            setup_context=setup_context,
            lib=_library,
        )
    return getattr(getattr(torch.ops, _NAMESPACE), name).default


def plain(*tensors: Tensor | None) -> bool:
    """Whether these are tensors with numbers of their own: of no subclass, and while nothing
    traces, counts or maps (torch.func).
    """
    # Within torch.func also what is made of plain tensors is wrapped.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    for tensor in tensors:  # a loop: this stands before every small step of a layer
        if tensor is not None and (type(tensor) not in _PLAIN or _is_batched(tensor)):
            return False
    return _get_current_dispatch_mode() is None and not torch.jit.is_tracing()


def plain_on_cpu(*tensors: Tensor | None) -> bool:
    """Whether these are `plain` tensors whose numbers lie in this process's memory."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_cpu:
            return False
    return plain(*tensors)


def direct_on_cpu(
    operator: torch._ops.OpOverload,
    implementation: Callable,
    *,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """A registered operator as a function that takes plain tensors on a CPU past PyTorch's
    dispatcher, which would take a tenth of a small model's training step.

    Arguments as of `register`; the implementation must not depend on autocast.
    """
    run = implementation
    if backward is not None:

        def forward(ctx, *inputs):  # a setup_context would have its signature looked up each time
            output = implementation(*inputs)
            setup_context(ctx, inputs, output)
            return output

        members = {"forward": forward, "backward": once_differentiable(backward)}
        members = {name: staticmethod(function) for name, function in members.items()}
        name = operator.name().replace("::", "_")  # what graphs and profiles call it
        run = type(name, (torch.autograd.Function,), members).apply

    def call(*arguments):
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        return (run if plain_on_cpu(*tensors) else operator)(*arguments)

    return call


def needs_gradient(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd will ask for a gradient of what is computed from these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def refuse_forward_mode(what: str) -> None:
    """Registered operators would drop tangents without a word: raise NotImplementedError where
    forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad) are being taken.
    """
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"{what} has no forward-mode derivative (torch.func.jvp, forward_ad); backward() and "
            "torch.autograd.grad work"
        )


@contextmanager
def recording():
    """Autograd within an operator's implementation, which PyTorch calls with autograd cut off."""
    with ExitStack() as stack:
        for key in _AUTOGRAD_KEYS:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch.enable_grad())
        yield
