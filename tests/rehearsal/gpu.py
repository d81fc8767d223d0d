"""A GPU that is not there: tensors without values that claim to be on `cuda:0`, and notes of what it would cost.

`rehearsal()` is a context in which `cuda:0` can be used without a driver. What runs on the host runs for real; what
runs on the device only has shapes. Its `Watch` notes

- waits: the host reads the device, or the size of a result depends on values;
- copies to the device that wait: blocking, or from memory that is not pinned;
- tensors of two devices in one operation;
- launches of kernels, and the bytes that live on the device.

What reaches the host from the device is one number. Streams order nothing here, and a kernel takes no time.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.utils._python_dispatch import TorchDispatchMode

from tests.rehearsal.backward import Backward

ROOT = Path(__file__).resolve().parents[2]
GPU = torch.device("cuda:0")
WAIT, BLOCKING, UNPINNED, MIX = "wait", "blocking copy", "unpinned copy", "device mix"

# the host reads a value within these, whatever their arguments, see the kernels in ATen/native/cuda
READS_INSIDE = (
    "aten::bincount", "aten::linalg_eig", "aten::linalg_inv", "aten::_linalg_", "aten::linspace.Scalar_Tensor",
    "aten::linspace.Tensor", "aten::multinomial",
)  # fmt: skip
# what takes a number of the host where others do not, and what the shapes alone would let pass
NO_HOST = ("aten::cat", "aten::clamp", "aten::stack")
FUSED = ("aten::_fused_",)  # optimizers: no shapes to work out, and no kernel for tensors without values
NO_KERNEL = (
    "aten::alias", "aten::detach", "aten::empty", "aten::lift", "aten::new_empty", "aten::record_stream",
    "aten::resize_", "aten::set_", "aten::_local_scalar_dense", "aten::_reshape_alias", "aten::_unsafe_view",
    "prim::", "profiler::",
)  # fmt: skip
DEVICE_SEED = 1 << 60
BLOCK = 512  # bytes: the allocator's unit


class Finding(NamedTuple):
    """What was noted, and the function of the project (`file:function`) that did it; the rest is for the message."""

    kind: str
    where: str
    what: str
    line: int

    def __str__(self) -> str:
        return f"{self.kind} in {self.where} (line {self.line}): {self.what}"


class Watch(TorchDispatchMode):
    """Runs the operations of the host, works out the shapes of the device's, and notes what they cost.

    Attributes:
        findings: in the order in which they happened.
        launches: kernels.
        live: bytes on the device.
        peak: most of them so far.
        value: what the host reads.
    """

    def __init__(self, value: int) -> None:
        super().__init__()
        self.value = value
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.backward = Backward()
        self.findings: list[Finding] = []
        self.launches = self.live = self.peak = 0
        self._stored: dict[int, weakref.finalize] = {}
        self._pinned: dict[int, Any] = {}  # storages of the host by address; kept, so that none is used again

    def note(self, kind: str, what: str) -> None:
        """Note what the innermost function of the project does."""
        frame, others = sys._getframe(1), (str(Path(__file__).parent), f"{ROOT}/.venv/")
        while frame.f_back is not None:
            file = frame.f_code.co_filename
            if file.startswith(f"{ROOT}/") and not file.startswith(others):
                break
            frame = frame.f_back
        file = frame.f_code.co_filename.removeprefix(f"{ROOT}/")
        node = self.backward.node
        if node:
            what = f"{what} (backward of {node})"
        self.findings.append(Finding(kind, f"{file}:{frame.f_code.co_name}", what, frame.f_lineno))

    def count(self, *kinds: str) -> int:
        """Number of findings of these kinds."""
        return sum(one.kind in kinds for one in self.findings)

    # --- pinned memory

    def pin(self, tensor: Tensor) -> Tensor:
        """The same tensor of the host, its memory pinned from now on."""
        storage = tensor.untyped_storage()
        self._pinned[storage.data_ptr()] = storage
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether a tensor of the host lies in pinned memory."""
        return tensor.untyped_storage().data_ptr() in self._pinned

    # --- operations

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_in((*args, *kwargs.values()))
        target = kwargs.get("device")
        target = None if target is None else torch.device(target).type
        if target != "cuda" and not any(tensor.device.type == "cuda" for tensor in tensors):
            if kwargs.get("pin_memory"):
                return self.pin(op(*args, **kwargs | {"pin_memory": False}))
            return op(*args, **kwargs)
        name = op.name()
        if name in ("aten::_to_copy", "aten::copy_"):
            result, handled = self._copied(name, args, kwargs)
            if handled:
                return result
        self._look(name, args, kwargs, tensors)
        result = None if name.startswith(FUSED) else self._shaped(op, name, types, args, kwargs)
        made = tensors_in((result,))
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)
        if not (views and made) and not name.startswith(NO_KERNEL):
            self.launches += 1
        for tensor in made:
            self._hold(tensor)
        return result

    def _shaped(self, op: Any, name: str, types: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operation of the device, without values."""
        key = key_of(op, args, kwargs)
        known = key and SHAPES.get(key)
        if known:
            return known.again(op, self.fake, args, kwargs)
        try:
            result = self.fake.dispatch(op, types, args, kwargs)
            if key:
                SHAPES[key] = Shape.of(op, name, args, result)
            return result
        except (DataDependentOutputException, DynamicOutputShapeException):
            self.note(WAIT, f"{name} depends on values")
            if name == "aten::_local_scalar_dense":
                return torch.full((), self.value, dtype=args[0].dtype).item()
            with self.fake:
                return made_up(name, args, kwargs)
        except RuntimeError as error:
            if "device" in str(error):
                self.note(MIX, f"{name}: {str(error).splitlines()[0]}")
            raise

    def _copied(self, name: str, args: Any, kwargs: Any) -> tuple[Any, bool]:
        """Note copies between the devices; one to the host gives `value` everywhere."""
        if name == "aten::copy_":
            target, source = args[:2]
            device, free = target.device, len(args) > 2 and args[2]
        else:
            target, source = None, args[0]
            device, free = (
                torch.device(kwargs.get("device") or source.device),
                kwargs.get("non_blocking", False),
            )
        if source.device.type == device.type:
            return None, False
        size = tuple(source.shape)
        if device.type == "cuda":
            if name == "aten::copy_" and source.dim() == 0:
                return None, False  # a number: an argument of the kernel
            if not free:
                self.note(BLOCKING, f"{size} to the device")
            elif not self.is_pinned(source):
                self.note(UNPINNED, f"{size} to the device")
            return None, False
        self.launches += 1
        if target is None:
            target = torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            if free:
                self.pin(target)
        if not (free and self.is_pinned(target)):
            self.note(WAIT, f"{size} to the host")
        return target.fill_(self.value), True

    def _look(self, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        """Note what only the kernel would show: reads inside, masks that are counted, indices of the host."""
        if name.startswith(READS_INSIDE) or (name == "aten::histc" and args[2:3] == args[3:4]):
            self.note(WAIT, f"{name} reads a value inside")
        if name.startswith(("aten::index.", "aten::index_put", "aten::_index_put")):
            indices = [index for index in args[1] if index is not None]
            if any(index.device.type == "cpu" and index.dim() for index in indices):
                self.note(WAIT, f"{name}: indices are copied from the host")
            masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
            # one number under one mask is filled in; everything else is counted first
            reads = name == "aten::index.Tensor"  # whose size says so itself
            filled = not reads and len(indices) == 1 and args[2].numel() == 1 and not any(args[3:])
            if masks and not reads and not filled:
                self.note(WAIT, f"{name}: counts its mask")
        generator = kwargs.get("generator")
        if generator is not None and generator.initial_seed() < DEVICE_SEED:
            self.note(MIX, f"{name}: a generator of the host")
        if name.startswith(NO_HOST) and any(one.device.type == "cpu" for one in tensors):
            self.note(MIX, f"{name}: a number of the host")

    def _hold(self, tensor: Tensor) -> None:
        """Count the memory of a tensor of the device for as long as it lives."""
        if not isinstance(tensor, FakeTensor):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        if key in self._stored or not size:
            return

        def forget() -> None:
            self.live -= size
            del self._stored[key]

        self._stored[key] = weakref.finalize(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Those among arguments or results, also in lists."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
    return found


def made_up(name: str, args: Any, kwargs: Any) -> Any:
    """A result whose size depends on values, as large as it can be."""
    first = args[0]
    device, count = first.device, first.numel()
    if name in ("aten::equal", "aten::allclose"):
        return True
    if name == "aten::nonzero":
        return torch.empty(count, first.dim(), dtype=torch.int64, device=device)
    if name == "aten::masked_select":
        return torch.empty(count, dtype=first.dtype, device=device)
    if name == "aten::repeat_interleave.Tensor":
        return torch.empty(count, dtype=torch.int64, device=device)
    if name == "aten::bincount":
        length = kwargs.get("minlength") or (args[2] if len(args) > 2 else 1)
        return torch.empty(length, dtype=torch.int64, device=device)
    if name.startswith(("aten::_unique", "aten::unique")):
        values = torch.empty(count, dtype=first.dtype, device=device)
        return values, *(torch.empty(count, dtype=torch.int64, device=device) for _ in range(2))
    if name == "aten::index.Tensor":
        shape, axis = [], 0
        for index in args[1]:
            masked = index is not None and index.dtype in (torch.bool, torch.uint8)
            shape.append(first.shape[axis] if index is None else index.numel())
            axis += index.dim() if masked else 1
        return torch.empty((*shape, *first.shape[axis:]), dtype=first.dtype, device=device)
    raise NotImplementedError(f"{name}: say in made_up how large its result can be")


# --- results that are known from the time before: working them out is most of a rehearsal ------------------------


class Shape(NamedTuple):
    """How to make the results of an operation again.

    Attributes:
        kind: "own" (the first argument), "view" (of an argument) or "new".
        new: shape, strides and type of each, None where there is none.
        single: whether there is one, not a tuple.
    """

    kind: str
    new: tuple[Any, ...] = ()
    single: bool = True

    @staticmethod
    def of(op: Any, name: str, args: Any, result: Any) -> Shape | None:
        """From the first time; None if there is no such way."""
        if name.startswith(NO_KERNEL) and name != "aten::detach":
            return None
        aliases = [one.alias_info for one in op._schema.returns]
        single = isinstance(result, Tensor)
        results = (result,) if single else result
        if not isinstance(results, tuple) or any(
            one is not None and (one.constant is not None or one.device != GPU) for one in results
        ):
            return None
        if not any(aliases):
            shapes = (one if one is None else (one.shape, one.stride(), one.dtype) for one in results)
            return Shape("new", tuple(shapes), single)
        if not single:
            return None
        if not aliases[0].is_write:
            return Shape("view")
        return Shape("own") if result is args[0] else None

    def again(self, op: Any, fake: FakeTensorMode, args: Any, kwargs: Any) -> Any:
        """The results."""
        if self.kind == "own":
            return args[0]
        if self.kind == "view":
            with in_kernel_invocation_manager(fake):
                return FakeTensor(fake, op(*args, **kwargs), GPU)
        made = [
            one
            if one is None
            else FakeTensor(fake, torch.empty_strided(one[0], one[1], dtype=one[2], device="meta"), GPU)
            for one in self.new
        ]
        return made[0] if self.single else tuple(made)


SHAPES: dict[Any, Shape | None] = {}  # by `key_of`


def key_of(op: Any, args: Any, kwargs: Any) -> Any:
    """What the shapes of an operation's results depend on; None if on more than can be said here."""
    found: list[Any] = [op, torch.get_default_dtype()]
    host = op is torch.ops.aten._to_copy.default  # of whatever values
    known = _described(args, host, found) and _described(kwargs.items(), host, found)
    return tuple(found) if known else None


def _described(values: Iterable[Any], host: bool, found: list[Any]) -> bool:
    """Add to `found` what matters of some arguments; whether that is all, as tensors of the host are not known."""
    for value in values:
        if isinstance(value, Tensor):
            fake = isinstance(value, FakeTensor)
            if value.constant is not None if fake else not host:
                return False
            device = value.fake_device if fake else value.device
            found += (value.shape, value.stride(), value.dtype, device)
        elif isinstance(value, list | tuple):
            found.append(len(value))
            if not _described(value, host, found):
                return False
        else:
            found += (type(value), value)
    return True


# --- what torch.cuda and torch.distributed are replaced by --------------------------------------------------------


class Generator(torch.Generator):
    """A generator of the host; one that was asked for on the device is known by its seed."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls)
        made.place = torch.device(device)
        return made.manual_seed(0)

    def manual_seed(self, seed: int) -> Generator:
        super().manual_seed(seed + (DEVICE_SEED if self.place.type == "cuda" else 0))
        return self

    @property
    def device(self) -> torch.device:
        return self.place


class Stream:
    """Orders nothing: what is on a stream is there at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event


class Reduced(nn.Module):
    """In place of DistributedDataParallel: the module alone."""

    def __init__(self, module: nn.Module, **_: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module(*args)

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @staticmethod
    def _set_params_and_buffers_to_ignore_for_model(module: nn.Module, names: Any) -> None:
        pass


def _moved(module: nn.Module, change: Any, recurse: bool = True) -> nn.Module:
    """In place of `nn.Module._apply`, which cannot put tensors with and without values into each other's place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = change(parameter.detach())
                part._parameters[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = change(buffer)
    return module


def forget_caches() -> None:
    """Empty what functions of the project keep: a tensor of this device is of no use outside, nor one from there."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("common.", "projects.")):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


@contextlib.contextmanager
def rehearsal(value: int = 0) -> Iterator[Watch]:
    """A context in which `cuda:0` can be used without a driver, and collectives of any number of processes.

    What the host reads of the device is `value`. SyncBatchNorm is BatchNorm here; a collective leaves its tensors as
    they are.
    """
    watch = Watch(value)

    class Event(Stream):
        def record(self, stream: Any = None) -> None:
            pass

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            watch.note(WAIT, "waits for an event")

    def waits(*args: Any) -> None:
        watch.note(WAIT, "waits for the device")

    replaced: list[tuple[Any, str, Any]] = [
        (torch, "Generator", Generator),
        (
            torch,
            "inference_mode",
            lambda *_: torch.no_grad(),
        ),  # it would hide copies inside of other operations
        (torch.cuda, "Stream", Stream),
        (torch.cuda, "Event", Event),
        (torch.cuda, "current_stream", Stream),
        (torch.cuda, "stream", lambda _: contextlib.nullcontext()),
        (torch.cuda, "synchronize", waits),
        (torch.cuda, "_lazy_init", _nothing),  # looks for the driver
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.cuda, "is_bf16_supported", lambda *_: True),
        (nn.Module, "_apply", _moved),
        (torch.Tensor, "record_stream", _nothing),
        (torch.Tensor, "pin_memory", lambda self, *_: watch.pin(self.clone())),
        (torch.Tensor, "is_pinned", lambda self: watch.is_pinned(self)),
        (FakeTensor, "tolist", lambda self: self.cpu().tolist()),
        (torch.Tensor, "backward", lambda self: watch.backward.run(self)),
        (torch._C, "_current_graph_task_id", watch.backward.task),
        (torch.nn.parallel, "DistributedDataParallel", Reduced),
        (torch.nn.functional, "_verify_batch_size", _nothing),  # SyncBatchNorm takes one value per channel
        *((torch.distributed, name, _nothing) for name in ("all_reduce", "all_gather", "broadcast")),
    ]
    with contextlib.ExitStack() as stack:
        forget_caches()
        stack.callback(forget_caches)
        for owner, name, stand_in in replaced:
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        stack.enter_context(mock.patch("common.models.placing.DistributedDataParallel", Reduced))
        lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) shows the copy it makes
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        torch._C._ensureCUDADeviceGuardSet()
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))  # which some builds lack: one count
        stack.enter_context(watch.backward.saved())
        stack.enter_context(watch)
        yield watch
