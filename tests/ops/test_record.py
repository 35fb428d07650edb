"""Recordings: the same bits as the calls that were recorded, with any number of threads, beside other work too."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch

from pagoda.ops import cpu
from pagoda.ops.attention import attention
from pagoda.ops.cpu.record import Recording
from pagoda.ops.formats import pack
from pagoda.ops.linear import embedding, linear, linear_many
from pagoda.ops.norm import add_rms_norm, rms_norm


@pytest.fixture(params=[1, 2, 3])  # 3: more than there are cores, on the smallest machines
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def layers(format: str, rows: int):
    """A function of `ids` and `k` as a decode step is: small loops and large ones, some by one thread, some by all."""
    weights = [pack(torch.randn(n, m) / m**0.5, format) for n, m in [(50, 256), (256, 256), (64, 256), (700, 256)]]
    table, gain = weights[0], torch.ones(256)
    ids, k = torch.randint(50, (rows,)), torch.randn(rows * 300, 1, 64)
    lengths = dict(cu_seqlens=torch.arange(rows + 1, dtype=torch.int32), max_seqlen=1, max_seq_len=300)
    lengths |= dict(seq_lens=torch.full((rows,), 300, dtype=torch.int32))
    pages = dict(block_table=torch.arange(rows * 6, dtype=torch.int32).view(rows, 6))

    def function():
        x = embedding(ids, table)
        for _ in range(3):
            q, _ = linear_many(rms_norm(x, gain, 1e-5), [weights[1], weights[2]])
            paged = k.view(-1, 50, 1, 64)
            y = attention(q.view(rows, 4, 64), paged, paged, scale=0.125, **lengths, **pages)
            x, h = add_rms_norm(x, linear(y.flatten(1), weights[1]), gain, 1e-5)
        return linear(h, weights[3])

    return ids, k, function


@pytest.mark.parametrize("format", ["float32", "bf16", "int8", "int4", "nf4"])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_recording_does_what_it_recorded(kernels, threads, format, rows):
    ids, k, function = layers(format, rows)
    recording = Recording(function)
    assert recording.complete
    for _ in range(4):
        ids.copy_(torch.randint(50, (rows,)))
        k.normal_()
        assert torch.equal(recording().clone(), function())


def test_threads_may_change_between_two_runs(kernels):
    _, _, function = layers("int8", 1)
    recording, before = Recording(function), torch.get_num_threads()
    expected = function().clone()
    for n in (2, 1, 3, 2):
        torch.set_num_threads(n)
        assert torch.equal(recording(), expected)
    torch.set_num_threads(before)


def test_busy_cores_make_it_slower_and_nothing_else(kernels):
    _, _, function = layers("int4", 2)
    recording, expected, over = Recording(function), function().clone(), threading.Event()
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    others = [threading.Thread(target=lambda: [sum(range(10**5)) for _ in iter(over.is_set, True)]) for _ in range(3)]
    for other in others:
        other.start()
    try:
        start = time.monotonic()
        while time.monotonic() - start < 1:
            assert torch.equal(recording(), expected)
    finally:
        over.set()
        for other in others:
            other.join()
        torch.set_num_threads(before)


def test_threads_that_record_or_compute_do_not_meet(kernels):
    """What one thread calls while another records is not the other's."""
    _, _, function = layers("int8", 1)
    expected, n_calls, over = function().clone(), len(Recording(function).calls), threading.Event()

    @torch.no_grad()
    def record():
        for _ in range(30):
            recording = Recording(function)
            assert len(recording.calls) == n_calls
            assert torch.equal(recording(), expected)

    @torch.no_grad()
    def compute():
        x, gain = torch.randn(3, 64), torch.ones(64)
        y = rms_norm(x, gain, 1e-5)
        while not over.is_set():
            assert torch.equal(rms_norm(x, gain, 1e-5), y)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            other, *recorders = pool.submit(compute), pool.submit(record), pool.submit(record)
            wait(recorders)
            over.set()
            for done in (*recorders, other):
                done.result()
    finally:
        sys.setswitchinterval(before)
    assert cpu.kernels is kernels


def test_a_bad_row_number_is_an_error_and_leaves_the_recording_whole(kernels, threads):
    ids, _, function = layers("int8", 1)
    recording, expected = Recording(function), function().clone()
    good = ids.clone()
    ids.fill_(50)
    with pytest.raises(IndexError):
        recording()
    ids.copy_(good)
    assert torch.equal(recording(), expected)


def test_what_is_not_a_kernel_makes_a_recording_incomplete(kernels):
    x = torch.randn(3, 4)
    assert not Recording(lambda: rms_norm(x * 2, torch.ones(4), 1e-5)).complete


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("columns", [1, 33, 70000])
def test_rows_of_a_plain_matrix(kernels, dtype, columns):
    weight = torch.randn(11, columns).to(dtype)
    ids = torch.randint(11, (4, 5))
    assert torch.equal(embedding(ids, weight), weight[ids])
    assert embedding(ids[:0], weight).shape == (0, 5, columns)
    assert torch.equal(embedding(ids.T, weight.T.contiguous().T), weight[ids.T])
    for bad in (11, -1):
        with pytest.raises(IndexError):
            embedding(torch.tensor([bad]), weight)


def test_operations_between_kernels_are_repeated_too(kernels, threads):
    """Both ways through a small network: additions, a lookup and its gradient, and gradients that are added up."""
    table, weight = (torch.randn(n, 64, requires_grad=True) for n in (50, 64))
    ids = torch.randint(50, (20,))

    @torch.enable_grad()
    def function():
        x = torch.nn.functional.embedding(ids, table)
        y = add_rms_norm(x, linear(x, weight), table[0], 1e-5)[1]
        loss = (linear(y + x, table).logsumexp(-1) * 2.0).sum() / 3
        table.grad = weight.grad = None
        loss.backward()
        return loss.detach()

    recording = Recording(function, operations=True)
    grads = table.grad, weight.grad
    assert recording.complete
    for _ in range(3):
        ids.copy_(torch.randint(50, (20,)))
        table.add_(0.1)
        found = [t.clone() for t in (recording(), *grads)]
        expected = function(), table.grad, weight.grad
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_depends_on_values_makes_a_recording_incomplete(kernels):
    x = torch.randn(8)
    for function in (lambda: x * float(x[0]), lambda: x[x > 0] + 1, lambda: x + x.nonzero()[0]):
        assert not Recording(function, operations=True).complete
