"""The emulated device catches what it is for: each mistake planted here fails on CUDA, or is wrong in silence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from emulated_cuda import Device, DeviceError, emulated_cuda

from sip_engine.kernels.rms_norm import rms_norm


@pytest.fixture
def cuda() -> Iterator[Device]:
    with emulated_cuda() as device:
        yield device


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(float(np.prod(shape)), device="cuda").view(shape)


def test_tensors_say_cuda_and_hold_values(cuda: Device) -> None:
    x = numbers(2, 3)
    assert x.is_cuda and x.device == torch.device("cuda", 0) and x.get_device() == 0
    y = x[1:] * 2 + 1
    y[:, 0] = -1.0
    x.index_copy_(0, torch.tensor([0], device=x.device), y)
    assert x.tolist() == [[-1.0, 9.0, 11.0], [3.0, 4.0, 5.0]]
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


def test_gradients_are_those_of_the_cpu(cuda: Device) -> None:
    def gradient(device: str) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3).to(device))
        hidden = torch.linspace(0, 1, 12).view(4, 3).to(device) @ weight.T
        hidden[:, 0].tanh_()
        (hidden.softmax(1).log() * hidden).sum().backward()
        assert weight.grad is not None
        return weight.grad.cpu()

    assert torch.equal(gradient("cuda"), gradient("cpu"))


def test_a_module_moves_with_its_parameters_attributes(cuda: Device) -> None:
    layer = torch.nn.Linear(2, 3)
    before: Any = layer.weight
    before.partition_dim = 0
    layer.to("cuda")
    assert layer.weight is before and before.is_cuda and before.partition_dim == 0
    assert isinstance(layer.weight, torch.nn.Parameter)
    assert layer(numbers(1, 2)).device.type == "cuda"


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.cat([x, torch.ones(3)]),
        lambda x: x.index_select(0, torch.tensor([0])),
        lambda x: rms_norm(x[None], torch.ones(3), 1e-5),
    ],
)
def test_two_devices_in_one_operation(cuda: Device, mistake) -> None:
    with pytest.raises(DeviceError, match=r"same device|cpu tensor\?"):
        mistake(numbers(3))


def test_a_number_on_the_host_may_take_part(cuda: Device) -> None:
    assert (numbers(3) * torch.tensor(2.0)).tolist() == [0.0, 2.0, 4.0]


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x[0] > 1),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: x.repeat_interleave(x.long()),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: torch.from_numpy(np.ones(3)).to(x.device),
        lambda x: torch.ones(3).to(x.device, non_blocking=True),  # not pinned
        lambda x: x[[0, 1]],
        lambda x: torch.cuda.synchronize(),
    ],
)
def test_what_waits_is_counted_and_refused_while_capturing(cuda: Device, waits) -> None:
    x = numbers(3)
    with cuda.watch() as seen:
        waits(x)
    assert seen["synchronise"] >= 1
    assert all(place.startswith("tests/test_emulated_cuda.py:") for place in seen.places["synchronise"])
    with pytest.raises(DeviceError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        waits(x)


@pytest.mark.parametrize(
    "goes_on",
    [
        lambda x: x.masked_fill_(x > 1, 0.0),
        lambda x: x.repeat_interleave(2),
        lambda x: torch.zeros_like(x).copy_(x),
        lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: rms_norm(x[None], x, 1e-5),
    ],
)
def test_what_does_not_wait_is_not_counted(cuda: Device, goes_on) -> None:
    x = numbers(3)
    with cuda.watch() as seen:
        goes_on(x)
    assert seen["synchronise"] == seen["wait"] == 0


def test_launches_and_allocations_are_counted(cuda: Device) -> None:
    x = numbers(4, 4)
    with cuda.watch() as seen:
        y = x.view(16)[2:] + 1  # one kernel, one result; views are free
        y.mul_(2)
        rms_norm(x, x[0], 1e-5)
    assert (seen["launch"], seen["triton"], seen["allocate"]) == (3, 1, 2)


def test_new_memory_holds_poison(cuda: Device) -> None:
    assert torch.empty(3, device="cuda").cpu().isnan().all()
    assert numbers(3).new_empty(2).cpu().isnan().all()


def test_a_read_arrives_when_it_was_waited_for(cuda: Device) -> None:
    host = torch.zeros(3).pin_memory()
    host.copy_(numbers(3), non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    assert host.isnan().all(), "read too early"
    assert not done.query()
    done.synchronize()
    assert host.tolist() == [0.0, 1.0, 2.0]


def test_a_pinned_buffer_is_not_rewritten_under_its_upload(cuda: Device) -> None:
    host = torch.zeros(3).pin_memory()
    host.to("cuda", non_blocking=True)
    host.fill_(1.0)
    with pytest.raises(DeviceError, match="rewritten"):
        torch.cuda.current_stream().synchronize()


def test_streams_wait_for_each_other(cuda: Device) -> None:
    x, side = numbers(3), torch.cuda.Stream()
    with torch.cuda.stream(side), pytest.raises(DeviceError, match="not told to wait"):
        x.add_(1)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.add_(1)
        done = side.record_event()
    with pytest.raises(DeviceError, match="not told to wait"):
        _ = x + 1
    done.wait()
    assert x.tolist() == [1.0, 2.0, 3.0]


def captured(x: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2
        x.add_(1)
    return graph, y


def test_a_graph_computes_when_it_is_replayed(cuda: Device) -> None:
    x = numbers(3)
    graph, y = captured(x)
    assert x.tolist() == [0.0, 1.0, 2.0] and y.cpu().isnan().all()
    with cuda.watch() as seen:
        graph.replay()
        graph.replay()
    assert seen["allocate"] == seen["launch"] == seen["synchronise"] == 0
    assert x.tolist() == [2.0, 3.0, 4.0] and y.tolist() == [2.0, 4.0, 6.0]
    x.zero_()  # the same memory, with other values
    graph.replay()
    assert y.tolist() == [0.0, 0.0, 0.0]


def test_a_graph_runs_triton_and_reads_pinned_memory(cuda: Device) -> None:
    host, x = torch.ones(1, 4).pin_memory(), torch.zeros(1, 4, device="cuda")
    weight, graph = numbers(4), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.copy_(host, non_blocking=True)
        y = rms_norm(x, weight, 0.0)
    graph.replay()
    assert y.tolist() == [[0.0, 1.0, 2.0, 3.0]]


def test_replaying_with_freed_memory(cuda: Device) -> None:
    x = numbers(3)
    graph, _ = captured(x)
    del x
    with pytest.raises(DeviceError, match="freed or rebound"):
        graph.replay()


def test_replaying_with_rebound_memory(cuda: Device) -> None:
    parameter = torch.nn.Parameter(numbers(3), requires_grad=False)
    graph, _ = captured(parameter)
    parameter.data = parameter.data.clone()
    with pytest.raises(DeviceError, match="freed or rebound"):
        graph.replay()


def test_a_graph_of_the_same_pool_overwrites(cuda: Device) -> None:
    pool = torch.cuda.graph_pool_handle()
    graphs, x = [torch.cuda.CUDAGraph() for _ in range(2)], numbers(3)
    results = []
    for graph in graphs:
        with torch.cuda.graph(graph, pool=pool):
            results.append(x + 1)
    graphs[0].replay()
    assert results[0].tolist() == [1.0, 2.0, 3.0]
    graphs[1].replay()
    assert results[0].cpu().isnan().all()


def test_capture_needs_a_stream_of_its_own_and_no_allocator_calls(cuda: Device) -> None:
    with pytest.raises(DeviceError, match="non-default stream"):
        torch.cuda.CUDAGraph().capture_begin()
    with pytest.raises(DeviceError, match="empty_cache"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.cuda.empty_cache()
    with pytest.raises(DeviceError, match="without a preceding"):
        torch.cuda.CUDAGraph().replay()


def test_nothing_is_left_behind() -> None:
    with emulated_cuda():
        pass
    assert not torch.cuda.is_available()
    assert not torch.ones(3).is_cuda
