"""Layers whose weights don't stay on the device: each is fetched while the layer before it computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from common.checkpoint_reader import CheckpointReader
from common.errors import FieldError

from .weight import Weight

NUM_BUFFERS = 2  # one for the layer that computes, one for the next
ALIGNMENT = 256  # bytes


class Source(Protocol):
    """Where a layer's weights are when they aren't on the device."""

    def fill(self, layer: nn.Module) -> None:
        """Write the weights to the layer's parameters."""
        ...


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """The checkpoint's files, which are mapped into memory: the operating system reads what is needed, and keeps it
    cached if it can. path: the layer's, in the model."""

    reader: CheckpointReader
    path: str

    def fill(self, layer: nn.Module) -> None:
        load_weights(layer, self.reader, self.path)


@dataclass(frozen=True, slots=True)
class HostSource:
    """Tensors in host memory, pinned for a GPU, by the parameter's name in the layer."""

    weights: dict[str, Tensor]

    def fill(self, layer: nn.Module) -> None:
        for name, parameter in layer.named_parameters():
            parameter.copy_(self.weights[name], non_blocking=True)


class LayerFetcher:
    """Gives each offloaded layer one of two buffers on the device when its turn comes.

    The layers compute in the same order in every step, and after the last one, the first one's turn comes again. So
    what to fetch next is always known. Keeping the most recently used layers instead would be useless: with fewer
    buffers than layers, the least recently used layer is the one that is needed next.

    layers, sources: in the order of computation. num_fetched: how often a layer was fetched.
    """

    def __init__(self, layers: Sequence[nn.Module], sources: Sequence[Source], device: str) -> None:
        self.layers, self.sources, self.num_fetched = layers, sources, 0
        size = max(map(num_bytes, layers))
        buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(NUM_BUFFERS)]
        self._parameters = [[views(layer, buffer) for buffer in buffers] for layer in layers]
        for layer, (parameters, _) in zip(layers, self._parameters, strict=True):
            set_parameters(layer, parameters)  # they aren't the layer's weights yet, but on the right device
        self._held: list[int | None] = [None] * NUM_BUFFERS  # which layer's weights each buffer has, or is getting
        self._fetches: list[Fetch | None] = [None] * NUM_BUFFERS
        self._start = start_on_stream(device) if device.startswith("cuda") else start_in_thread()
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda *_, index=index: self.before(index))
        self.fetch(0, buffer=0)

    @property
    def num_bytes_saved(self) -> int:
        """How much less memory the weights need on the device, buffers included."""
        sizes = [num_bytes(layer) for layer in self.layers]
        return sum(sizes) - NUM_BUFFERS * max(sizes)

    def before(self, index: int) -> None:
        """Layer `index` is about to compute: wait for its weights, and fetch those of the next offloaded layer."""
        buffer = self.buffer_of(index)
        self.wait(buffer)
        following = (index + 1) % len(self.layers)
        if following not in self._held:
            self.fetch(following, 1 - buffer)

    def buffer_of(self, index: int) -> int:
        """The buffer that holds a layer's weights, or is getting them."""
        if index not in self._held:  # the last step has failed on its way
            self.fetch(index, buffer=0)
        return self._held.index(index)

    def fetch(self, index: int, buffer: int) -> None:
        """Start to fetch a layer's weights into a buffer. The layer that used it before has computed, or will have when
        the device comes to this fetch."""
        self.num_fetched += 1
        self._held[buffer] = None
        layer, source = self.layers[index], self.sources[index]
        set_parameters(layer, self._parameters[index][buffer])
        self._fetches[buffer] = self._start(lambda: source.fill(layer))
        self._held[buffer] = index  # not if it could not be started

    def wait(self, buffer: int) -> None:
        """Until the buffer's weights have arrived. Raises what fetching them has raised."""
        fetch, self._fetches[buffer] = self._fetches[buffer], None
        held, self._held[buffer] = self._held[buffer], None
        if fetch is not None:
            fetch.wait()
        self._held[buffer] = held  # not if it has failed


class Fetch(Protocol):
    """A fetch that was started."""

    def wait(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ThreadFetch:
    future: Future[None]

    def wait(self) -> None:
        self.future.result()


@dataclass(frozen=True, slots=True)
class StreamFetch:
    """The device's current stream waits for the event, not this thread."""

    event: torch.cuda.Event
    device: str

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.event)


def start_in_thread() -> Callable[[Callable[[], None]], Fetch]:
    """On a CPU: another thread copies."""
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")

    @torch.inference_mode()
    def run(fill: Callable[[], None]) -> None:
        fill()

    return lambda fill: ThreadFetch(thread.submit(run, fill))


def start_on_stream(device: str) -> Callable[[Callable[[], None]], Fetch]:
    """On a GPU: another stream copies, when all that was launched before the fetch has run."""
    stream = torch.cuda.Stream(device)

    def start(fill: Callable[[], None]) -> Fetch:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            fill()
            event = torch.cuda.Event()
            event.record(stream)
        return StreamFetch(event, device)

    return start


def choose_layers(sizes: Sequence[int], num_bytes: int) -> list[int]:
    """Which layers to offload, so that the device needs num_bytes less, buffers included: as few as possible, evenly
    spread. So between two of them others compute, and there is more time to fetch the next. If that's more than is
    possible, all layers.

    sizes: of all layers, in bytes. Raises FieldError if there are not more layers than buffers.
    """
    if not num_bytes:
        return []
    if len(sizes) <= NUM_BUFFERS:
        raise FieldError("cpu_offload_gb", f"expected more than {NUM_BUFFERS} layers on a rank, got {len(sizes)}")
    for count in range(1, len(sizes) + 1):
        chosen = [number * len(sizes) // count for number in range(count)]
        offloaded = [sizes[index] for index in chosen]
        if sum(offloaded) - NUM_BUFFERS * max(offloaded) >= num_bytes:
            break
    return chosen


def num_bytes(layer: nn.Module) -> int:
    """Of a layer's weights in a buffer, where each begins at a multiple of ALIGNMENT."""
    return sum(-(-parameter.nbytes // ALIGNMENT) * ALIGNMENT for parameter in layer.parameters())


def views(layer: nn.Module, buffer: Tensor) -> dict[str, nn.Parameter]:
    """A buffer, [num_bytes], as the parameters of a layer, one after the other."""
    found, start = {}, 0
    for name, parameter in layer.named_parameters():
        view = buffer[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        found[name] = nn.Parameter(view, requires_grad=False)
        start += -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
    return found


def set_parameters(layer: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        owner, _, kind = name.rpartition(".")
        setattr(layer.get_submodule(owner), kind, parameter)


def load_weights(layer: nn.Module, reader: CheckpointReader, path: str) -> None:
    """Load a layer's weights from a checkpoint: those of all modules in it that have any of their own."""
    for name, module in layer.named_modules():
        has_weights = any(isinstance(child, Weight) for child in module.children())
        if has_weights or (next(module.parameters(recurse=False), None) is not None and not isinstance(module, Weight)):
            module.load(reader, f"{path}.{name}")
