"""The optimizers, beside PyTorch's, transformers' and their papers' formulas in float64."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from pagoda.common import PagodaError
from pagoda.train import optim
from pagoda.train.optim import OPTIMIZERS, make_optimizer, state_bytes, step_bytes

SHAPES = {
    "embed.weight": (50, 300),
    "layers.0.up.weight": (31, 300),
    "layers.0.down.weight": (300, 31),
    "layers.0.up.bias": (31,),
    "layers.0.experts": (4, 10, 300),
    "layers.0.norm.weight": (300,),
    "layers.0.gate": (),
    "head.weight": (50, 300),
}


def parameters(dtype=torch.float32, shapes=SHAPES, seed=0) -> dict[str, nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return {n: nn.Parameter(torch.randn(s, generator=g).mul(0.1).to(dtype)) for n, s in shapes.items()}


def set_gradients(named: dict[str, nn.Parameter], step: int) -> None:
    """Gradients of very different sizes, the same for a step in every call; some rows get none, as rare tokens do."""
    g = torch.Generator().manual_seed(100 + step)
    for p in named.values():
        grad = torch.randn(p.shape, generator=g) * 10 ** torch.randn(p.shape, generator=g)
        if p.dim() > 1:
            grad[step % 3 :: 3] = 0
        p.grad = (grad * 1e-3).to(p.dtype)


def train(named, optimizer, steps, lr=1e-2) -> None:
    for step in steps:
        set_gradients(named, step)
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * lr / (1 + step)
        optimizer.step()


def doubles(named) -> dict[str, torch.Tensor]:
    return {n: p.detach().double() for n, p in named.items()}


def assert_close(named, expected, rtol=1e-5, atol=1e-6):
    for n, p in named.items():
        torch.testing.assert_close(
            p.detach().double(), expected[n].double(), rtol=rtol, atol=atol, msg=lambda m, n=n: f"{n}: {m}"
        )


def decays(name: str) -> bool:
    return len(SHAPES[name]) >= 2


# --- each against an independent implementation


def test_adamw_is_torchs_with_decay_on_matrices_only():
    named, theirs = parameters(), parameters()
    optimizer = make_optimizer("adamw", named.items(), 1e-2, weight_decay=0.3, betas=(0.8, 0.9))
    groups = [
        {"params": [p for n, p in theirs.items() if decays(n) == flag], "weight_decay": 0.3 * flag, "lr_scale": 1}
        for flag in (True, False)
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9), foreach=False)
    train(named, optimizer, range(5))
    train(theirs, reference, range(5))
    assert_close(named, theirs)


def test_lion_follows_its_paper():
    named = parameters()
    x, m = doubles(named), dict.fromkeys(named, 0.0)
    train(named, make_optimizer("lion", named.items(), 1e-2, weight_decay=0.3), range(5))
    replay = parameters()
    for step in range(5):
        set_gradients(replay, step)
        lr = 1e-2 / (1 + step)
        for n, p in replay.items():
            g = p.grad.double()
            x[n] = x[n] - lr * (torch.sign(0.9 * m[n] + 0.1 * g) + 0.3 * decays(n) * x[n])
            m[n] = 0.99 * m[n] + 0.01 * g
    assert_close(named, x)


def test_adafactor_is_transformers_with_an_absolute_rate():
    """transformers clips a stack of experts as one: it gets the experts one by one here."""
    from transformers import Adafactor  # not above: the spawned processes import this file

    named, theirs = parameters(), parameters()
    experts = [nn.Parameter(e.clone()) for e in theirs["layers.0.experts"].data]
    optimizer = make_optimizer("adafactor", named.items(), 1e-2, weight_decay=0.3)
    flat = [(n, p) for n, p in theirs.items() if n != "layers.0.experts"] + [("layers.0.experts", e) for e in experts]
    reference = Adafactor(
        [{"params": [p for n, p in flat if decays(n) == flag], "weight_decay": 0.3 * flag} for flag in (True, False)],
        lr=1e-2,
        scale_parameter=False,
        relative_step=False,
    )
    train(named, optimizer, range(5))
    for step in range(5):
        set_gradients(theirs, step)
        for expert, grad in zip(experts, theirs["layers.0.experts"].grad):
            expert.grad = grad
        for group in reference.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        reference.step()
    theirs["layers.0.experts"] = torch.stack(experts)
    assert_close(named, theirs, rtol=1e-4)


def orthogonal_in_float64(g: torch.Tensor) -> torch.Tensor:
    """The quintic acts on the singular values alone."""
    u, s, v = torch.linalg.svd(g.double(), full_matrices=False)
    s = s / s.norm().clamp(min=1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ v


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (3, 8, 24)])
def test_muons_update_is_the_quintic_of_the_singular_values(shape):
    g = torch.randn(shape)
    stack = g if g.dim() == 3 else g[None]
    expected = torch.stack([orthogonal_in_float64(m) for m in stack]).view(shape)
    torch.testing.assert_close(optim.orthogonal(g).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(optim.orthogonal(g.bfloat16()).double(), expected, rtol=0.05, atol=0.05)


def test_muon_follows_its_formula_and_adamw_where_it_does_not_apply(monkeypatch):
    monkeypatch.setattr(optim, "ns_dtype", lambda p: torch.float32)
    named, theirs = parameters(), parameters()
    hidden = {"layers.0.up.weight", "layers.0.down.weight", "layers.0.experts"}
    x, m = doubles(named), dict.fromkeys(hidden, 0.0)
    train(named, make_optimizer("muon", named.items(), 1e-2, weight_decay=0.3), range(4))
    rest = [
        {"params": [p for n, p in theirs.items() if decays(n) == flag and n not in hidden], "weight_decay": 0.3 * flag}
        for flag in (True, False)
    ]
    reference = torch.optim.AdamW(rest, betas=(0.9, 0.95), foreach=False)
    for step in range(4):
        set_gradients(theirs, step)
        lr = 1e-2 / (1 + step)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        for n in hidden:
            g = theirs[n].grad.double()
            m[n] = 0.95 * m[n] + 0.05 * g
            update = 0.05 * g + 0.95 * m[n]
            stack = update if update.dim() == 3 else update[None]
            update = torch.stack([orthogonal_in_float64(u) for u in stack]).view(update.shape)
            x[n] = x[n] * (1 - lr * 0.3) - lr * 0.2 * math.sqrt(max(update.shape[-2:])) * update
    assert_close({n: named[n] for n in hidden}, x, rtol=1e-3, atol=2e-4)
    assert_close({n: p for n, p in named.items() if n not in hidden}, theirs)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch 2.9 brought Muon")
def test_muon_is_torchs(monkeypatch):
    monkeypatch.setattr(optim, "ns_dtype", lambda p: torch.bfloat16)
    shapes = {"layers.0.weight": (40, 24), "layers.1.weight": (24, 40)}
    named, theirs = parameters(shapes=shapes), parameters(shapes=shapes)
    train(named, make_optimizer("muon", named.items(), 1e-2, weight_decay=0.1), range(4))
    reference = torch.optim.Muon(theirs.values(), weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    reference.param_groups[0]["lr_scale"] = 1.0
    train(theirs, reference, range(4))
    assert_close(named, theirs, atol=3e-3)


# --- 8 bits


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_the_published_one(signed):
    """As bitsandbytes builds it: midpoints between equal steps of 0.1 to 1, a decade lower with half as many steps."""
    published = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1 if signed else 2 ** (i + 1) + 1, dtype=torch.float64)
        middles = 10.0 ** (i - 6) * (edges[1:] + edges[:-1]) / 2
        published += middles.tolist() + (-middles).tolist() * signed
    assert len(published) == 256
    torch.testing.assert_close(optim.dynamic_map(signed), torch.tensor(sorted(published)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(7, 256), (5, 600), (3, 100)])
def test_every_block_is_rounded_to_the_nearest_code_of_its_own_scale(signed, shape):
    x = torch.randn(shape) * 10 ** torch.randn(shape)
    x = x if signed else x.square()
    x[0] = 0
    codes, scales = torch.zeros(shape, dtype=torch.uint8), torch.zeros(shape[0], -(-shape[1] // 256))
    optim.quantize_(codes, scales, x.clone(), signed)
    back = optim.dequantize(codes, scales, signed)
    for row, result in zip(x, back):
        for block, got in zip(row.split(256), result.split(256)):
            scale = block.abs().max()
            values = optim.dynamic_map(signed) * scale
            if not signed:  # a tiny second average does not become 0: it divides
                values = torch.where(values == 0, math.inf, values)
            error = (block[:, None] - values).abs().min(1).values
            zero = block == 0
            assert torch.equal(got[zero], torch.zeros(int(zero.sum())))
            assert ((block - got).abs() <= error + 2e-3 * block.abs())[~zero].all()
    codes_again = torch.zeros_like(codes)
    optim.quantize_(codes_again, scales.clone(), back.clone(), signed)
    assert torch.equal(codes_again, codes), "values that are codes stay what they are"


def regression(name: str, steps: int = 300) -> tuple[float, list[torch.Tensor]]:
    """Mean squared error of a small network behind some steps, and its states."""
    g = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Linear(16, 300), nn.GELU(), nn.Linear(300, 16))
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g) / p.shape[-1] ** 0.5
    x = torch.randn(256, 16, generator=g)
    y = torch.sin(2 * x) * x.roll(1, 1)
    optimizer = make_optimizer(name, net.named_parameters(), 3e-3, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        loss = (net(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), [t for state in optimizer.state.values() for t in state.values()]


def test_eight_bits_train_like_thirty_two():
    (full, _), (eight, states) = regression("adamw"), regression("adamw8bit")
    assert any(t.dtype == torch.uint8 for t in states)
    assert full < 0.02
    assert abs(eight - full) < 0.1 * full


@pytest.mark.parametrize("name", ["lion", "adafactor", "muon"])
def test_the_others_train_too(name):
    assert regression(name)[0] < 0.2 < regression(name, steps=1)[0]


# --- all of them


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_continued_from_its_state_is_the_same_run_bit_for_bit(name, dtype, tmp_path):
    whole = parameters(dtype)
    train(whole, make_optimizer(name, whole.items(), 1e-2), range(6))
    again = parameters(dtype)
    train(again, make_optimizer(name, again.items(), 1e-2), range(6))
    half = parameters(dtype)
    first = make_optimizer(name, half.items(), 1e-2)
    train(half, first, range(3))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    rest = {n: nn.Parameter(p.detach().clone()) for n, p in half.items()}
    second = make_optimizer(name, rest.items(), 1e-2)
    second.load_state_dict(torch.load(tmp_path / "state.pt"))
    kept = [{k: t.dtype for k, t in s.items()} for s in second.state.values()]
    assert kept == [{k: t.dtype for k, t in s.items()} for s in first.state.values()]
    train(rest, second, range(3, 6))
    for n, p in whole.items():
        assert p.isfinite().all()
        assert torch.equal(p, again[n]), n
        assert torch.equal(p, rest[n]), n


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pieces_do_not_change_the_result(name, monkeypatch):
    whole, pieces = parameters(), parameters()
    train(whole, make_optimizer(name, whole.items(), 1e-2), range(3))
    monkeypatch.setattr(optim, "CHUNK", 700)
    train(pieces, make_optimizer(name, pieces.items(), 1e-2), range(3))
    assert_close(pieces, whole, rtol=1e-5, atol=1e-3 if name == "muon" else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_predicted_memory_is_what_the_optimizer_holds(name, dtype):
    named = parameters(dtype)
    optimizer = make_optimizer(name, named.items(), 1e-2)
    train(named, optimizer, range(1))
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    meta = {n: nn.Parameter(p.detach().to("meta")) for n, p in named.items()}
    assert state_bytes(name, meta.items()) == held
    frozen = {n: p.requires_grad_(n == "embed.weight") for n, p in meta.items()}
    assert 0 < state_bytes(name, frozen.items()) < held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_needs_no_more_memory_than_predicted(name, dtype, monkeypatch):
    monkeypatch.setattr(optim, "CHUNK", 2**14)
    for shape in ({"embed.weight": (2000, 256)}, {"layers.0.weight": (300, 256)}, {"layers.0.experts": (8, 128, 256)}):
        named = parameters(dtype, shape)
        optimizer = make_optimizer(name, named.items(), 1e-2)
        train(named, optimizer, range(2))
        with torch.profiler.profile(profile_memory=True) as profile:
            optimizer.step()
        now = most = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        assert most <= step_bytes(name, named.items()) + 4096


def test_a_zero_gradient_moves_nothing_and_leaves_finite_states():
    """PyTorch's checkpointing makes states by a step with gradients and rate of zero."""
    for name in OPTIMIZERS:
        named = parameters()
        before = copy.deepcopy(named)
        optimizer = make_optimizer(name, named.items(), 1e-2)
        for p in named.values():
            p.grad = torch.zeros_like(p)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
        assert all(torch.equal(named[n], before[n]) for n in named)
        assert all(t.isfinite().all() for state in optimizer.state.values() for t in state.values())


def test_mistakes():
    with pytest.raises(PagodaError, match="did you mean 'adamw'"):
        make_optimizer("adamm", parameters().items(), 1e-3)
    with pytest.raises(PagodaError, match="nothing to train"):
        make_optimizer("adamw", [("x", nn.Parameter(torch.ones(2), requires_grad=False))], 1e-3)


# --- sharded by rows


class Net(nn.Module):
    """A module that holds our parameters under their names (FSDP2 takes no scalars)."""

    def __init__(self):
        super().__init__()
        self.values = nn.ParameterDict({n.replace(".", "/"): p for n, p in parameters().items() if p.dim()})

    def named(self) -> dict[str, nn.Parameter]:
        return {n.removeprefix("values.").replace("/", "."): p for n, p in self.named_parameters()}


def sharded(rank: int, world: int, folder: str) -> None:
    """Train two steps, save, load into a fresh optimizer, train two more; rank 0 writes the whole parameters."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    results = {}
    for name in OPTIMIZERS:
        net = fully_shard(Net(), mesh=mesh)
        optimizer = make_optimizer(name, net.named().items(), 1e-2)
        for step in range(4):
            if step == 2:
                state = {"optimizer": get_optimizer_state_dict(net, optimizer)}
                dcp.save(state, checkpoint_id=f"{folder}/{name}{world}")
                optimizer = make_optimizer(name, net.named().items(), 1e-2)
                optimizer.zero_grad()  # PyTorch makes the states to load into only where there are no gradients
                state = {"optimizer": get_optimizer_state_dict(net, optimizer)}
                # the other world's checkpoint where there is one: one process loads what two have saved
                dcp.load(state, checkpoint_id=f"{folder}/{name}{2 if world == 1 else world}")
                set_optimizer_state_dict(net, optimizer, state["optimizer"])
            full = parameters()
            set_gradients(full, step)
            for n, p in net.named().items():
                own = full[n].grad.chunk(world)
                own = own[rank] if rank < len(own) else full[n].grad[:0]
                p.grad = DTensor.from_local(
                    own.contiguous(), mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
                )
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + step)
            optimizer.step()
        held = sum(optim.local(t).nbytes for s in optimizer.state.values() for t in s.values())
        assert rank or held == state_bytes(name, parameters_of(net), world), name
        results[name] = {n: p.full_tensor().detach() for n, p in net.named().items()}
    columns = nn.Parameter(distribute_tensor(torch.ones(4, 8), mesh, [Shard(1)]))
    with pytest.raises(PagodaError, match="sharded by rows"):
        make_optimizer("lion", [("x", columns)], 1e-2)
    if rank == 0:
        torch.save(results, f"{folder}/results{world}.pt")
    dist.barrier()  # one that ends while the other still talks to it may be aborted
    dist.destroy_process_group()


def parameters_of(net: Net):
    return {n: nn.Parameter(torch.empty(p.shape, device="meta")) for n, p in net.named().items()}.items()


def test_two_processes_train_like_one_and_their_states_load_into_one(tmp_path):
    torch.multiprocessing.spawn(sharded, (2, str(tmp_path)), nprocs=2)
    sharded(0, 1, str(tmp_path))
    for name in OPTIMIZERS:
        named = {n: p for n, p in parameters().items() if p.dim()}
        optimizer = make_optimizer(name, named.items(), 1e-2)
        for step in range(4):
            set_gradients(full := parameters(), step)
            for n, p in named.items():
                p.grad = full[n].grad
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + step)
            optimizer.step()
        for world in (2, 1):
            results = torch.load(tmp_path / f"results{world}.pt")[name]
            assert_close(named, results, rtol=1e-5, atol=1e-3 if name == "muon" else 1e-6)
