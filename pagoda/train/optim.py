"""The optimizers: AdamW, 8-bit AdamW, Lion, Adafactor, Muon, and what memory each needs.

`make_optimizer` sorts the parameters into groups and returns a `torch.optim.Optimizer`. AdamW is PyTorch's fused one,
on a CPU our kernel. The others are written here as plain loops over parameters, piece by piece, so that a step needs
next to no memory of its own. They count in float32 whatever the parameters are, know FSDP2's sharded parameters
(DTensors cut by rows), and keep nothing but tensors in their state, each cut like its parameter: a checkpoint loads at
another world size.

Weight decay goes to everything with rows and columns (embeddings and head too, as in nanoGPT and transformers), not to
norms, biases and other vectors. The rate of a group is `group["lr_scale"] * schedule(step)`: the loop sets it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.functional import pad

from pagoda.common import PagodaError, one_of
from pagoda.ops import cpu
from pagoda.ops.optim import Adam, adamw_, adamw_takes

CHUNK = 2**18  # elements that a step works on at once: its temporaries stay in the processor's cache
BLOCK = 256  # elements that share a scale in 8-bit states
SMALL = 4096  # elements below which a matrix keeps float32 states in 8-bit AdamW

Named = Iterable[tuple[str, Tensor]]


def make_optimizer(
    name: str,
    named_parameters: Named,
    lr: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] | None = None,
    eps: float = 1e-8,
    lr_scale: Callable[[str], float] = lambda name: 1.0,
) -> torch.optim.Optimizer:
    """An optimizer over those of the parameters that require gradients.

    name      adamw, adamw8bit, lion, adafactor or muon
    lr        one meaning everywhere: Muon's updates are scaled to the size of AdamW's (Lion wants 3 to 10 times less)
    betas     of the averages of gradient and squared gradient; without it (0.9, 0.95), and (0.9, 0.99) for Lion.
              Adafactor has none of its own; Muon and its momentum of 0.95 leave them to its AdamW part
    eps       added to AdamW's denominator; Lion and Adafactor do without
    lr_scale  of a parameter, by its name: what its learning rate is multiplied by

    Raises PagodaError for an unknown name, for nothing to train, and for shards that are no rows.
    """
    kind = optimizer_class(name)
    groups = parameter_groups(name, named_parameters, weight_decay, lr_scale)
    for group in groups:
        for p in group["params"]:
            if (
                name != "adamw"
                and isinstance(p, DTensor)
                and any(x not in (Shard(0), Replicate()) for x in p.placements)
            ):
                raise PagodaError(
                    f"{name} works on parameters sharded by rows, not {p.placements}: use --optimizer adamw"
                )
    betas = betas or ((0.9, 0.99) if name == "lion" else (0.9, 0.95))
    return kind(groups, lr=lr, betas=tuple(betas), eps=eps)


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    return OPTIMIZERS[one_of("optimizer", name, OPTIMIZERS)]


def parameter_groups(
    name: str, named_parameters: Named, weight_decay: float, lr_scale: Callable[[str], float] = lambda name: 1.0
) -> list[dict]:
    """Groups by weight decay and by `special`: what the optimizer has a rule for (8-bit states, Muon's matrices)."""
    groups: dict[tuple[bool, bool, float], dict] = {}
    for parameter_name, p in named_parameters:
        if not p.requires_grad:
            continue
        parts = parameter_name.split(".")
        matrix = p.dim() >= 2 and parts[-1] != "bias"
        special = matrix and (
            (name == "adamw8bit" and p.numel() >= SMALL)
            or (name == "muon" and not {"embed", "pos_embed", "head"} & set(parts))
        )
        decay = weight_decay if matrix else 0.0
        told = {"weight_decay": decay, "special": special, "lr_scale": lr_scale(parameter_name)}
        groups.setdefault((matrix, special, told["lr_scale"]), {"params": [], **told})["params"].append(p)
    if not groups:
        raise PagodaError("nothing to train: no parameter requires a gradient")
    return list(groups.values())


def state_bytes(name: str, named_parameters: Named, shards: int = 1) -> int:
    """Bytes of state that the optimizer holds behind its first step; parameters may be on the meta device.

    shards    processes that share each parameter by rows: the bytes are then those of the first, which has most
    """
    kind, total = optimizer_class(name), 0
    for group in parameter_groups(name, named_parameters, 0.0):
        for p in group["params"]:
            total += sum(local(t).nbytes for t in kind.new_state(shard_of(p, shards), group).values())
    return total


def step_bytes(name: str, named_parameters: Named, shards: int = 1) -> int:
    """Bytes that a step needs at most for a moment, beside parameters, gradients and states."""
    kind, most = optimizer_class(name), 0
    for group in parameter_groups(name, named_parameters, 0.0):
        for p in group["params"]:
            most = max(most, kind.temporary(p, shard_of(p, shards), group))
    return most


def shard_of(p: Tensor, shards: int) -> Tensor:
    """The first of that many parts of p's rows, without memory."""
    p = local(p)
    rows = -(-len(p) // shards) if p.dim() else 1
    return torch.empty((rows, *p.shape[1:]), dtype=p.dtype, device="meta")


# --- what the optimizers share


def local(t: Tensor) -> Tensor:
    """The rows of a sharded tensor that this process holds (the same memory), or the tensor itself."""
    return t.to_local() if isinstance(t, DTensor) else t


def zeros_by_row(p: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros with as many rows as p, sharded like p."""
    mine = local(p)
    return sharded(torch.zeros((len(mine), *shape[1:]), dtype=dtype, device=mine.device), p, shape)


def sharded(rows: Tensor, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor of that shape of which each process has its own rows, cut as another is."""
    if not isinstance(like, DTensor):
        return rows
    told = {"shape": torch.Size(shape), "stride": torch.empty(shape, device="meta").stride()}
    return DTensor.from_local(rows, like.device_mesh, like.placements, run_check=False, **told)


def sum_over_shards(p: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that adds up what the processes found on their rows of p."""

    def add(t: Tensor) -> Tensor:
        if isinstance(p, DTensor):
            for i, placement in enumerate(p.placements):
                if placement.is_shard():
                    dist.all_reduce(t, group=p.device_mesh.get_group(i))
        return t

    return add


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same rows of all tensors, about CHUNK elements of the first at a time."""
    first = tensors[0]
    if first.dim() > 2:
        for parts in zip(*tensors):
            yield from chunks(*parts)
        return
    if first.dim() == 0:
        tensors = tuple(t.view(1) for t in tensors)
    rows = max(1, CHUNK // max(1, first.shape[1:].numel()))
    yield from zip(*(t.split(rows) for t in tensors))


class Optimizer(torch.optim.Optimizer):
    """Updates one parameter after the other. A subclass says what it remembers (`new_state`), what it does (`update`,
    on the local rows of parameter, gradient and state), and the bytes it needs for a moment (`temporary`)."""

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p] = self.new_state(p, group)
                state = self.state[p]
                if "step" in state:
                    state["step"] += 1
                self.update(p, local(p), local(p.grad), {k: local(t) for k, t in state.items()}, group)

    def load_state_dict(self, state_dict: dict) -> None:
        """PyTorch's own would cast every state to the parameter's dtype: 8-bit codes and float32 factors too."""
        super().load_state_dict({**state_dict, "state": {}})
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, parameters):
            if i in state_dict["state"]:
                state = state_dict["state"][i].items()
                self.state[p] = {k: t if k == "step" else t.to(local(p).device) for k, t in state}


def adam_state(p: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """What AdamW remembers, under PyTorch's names."""
    return {
        "step": torch.zeros((), dtype=torch.float32),
        "exp_avg": torch.zeros_like(p, dtype=dtype),
        "exp_avg_sq": torch.zeros_like(p, dtype=dtype),
    }


def adam_step(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: float, group: dict) -> None:
    """AdamW (Loshchilov and Hutter 2019) in place, on float32."""
    b1, b2 = group["betas"]
    m.lerp_(g, 1 - b1)
    v.mul_(b2).addcmul_(g, g, value=1 - b2)
    denominator = v.sqrt().div_(math.sqrt(1 - b2**step)).add_(group["eps"])
    p.mul_(1 - group["lr"] * group["weight_decay"])
    p.addcdiv_(m, denominator, value=-group["lr"] / (1 - b1**step))


def adam_update(p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict) -> None:
    step = state["step"].item()
    for p_, g_, m_, v_ in chunks(p, g, state["exp_avg"], state["exp_avg_sq"]):
        p32, m32, v32 = p_.float(), m_.float(), v_.float()  # of float32 tensors these are the tensors themselves
        adam_step(p32, g_.float(), m32, v32, step, group)
        p_.copy_(p32), m_.copy_(m32), v_.copy_(v32)


# --- the optimizers


class AdamW(torch.optim.AdamW):
    """PyTorch's, fused: one pass over memory; states have the parameter's dtype. On a CPU our kernel does the same for
    all parameters at once."""

    def __init__(self, groups: list[dict], **options):
        super().__init__(groups, fused=True, **options)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        groups, lists = self.param_groups, []
        if cpu.kernels is not None and groups[0]["params"][0].is_cpu:
            lists = [[self.tensors_of(p, group) for p in group["params"] if p.grad is not None] for group in groups]
        if not lists or not all(adamw_takes(tensors) for tensors in lists):
            super().step(closure)
            return
        for tensors, group in zip(lists, groups):
            adamw_(tensors, group["lr"], group["betas"], group["eps"], group["weight_decay"])

    def tensors_of(self, p: Tensor, group: dict) -> Adam:
        state = self.state[p]
        if not state:
            state.update(self.new_state(p, group))
        average, square = local(state["exp_avg"]), local(state["exp_avg_sq"])
        return local(p).detach(), local(p.grad), average, square, state["step"]

    @staticmethod
    def new_state(p: Tensor, group: dict) -> dict[str, Tensor]:
        state = adam_state(p)
        return {**state, "step": state["step"].to(local(p).device)}  # where the fused kernel counts

    @staticmethod
    def temporary(p: Tensor, shard: Tensor, group: dict) -> int:
        return 0


class AdamW8bit(Optimizer):
    """AdamW with both averages in 8 bits (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization").

    Each value is one of 256 codes of a dynamic map, times the largest magnitude of its block: BLOCK neighbours of a row
    (the last block of a row may be shorter). Blocks never cross rows, so that a shard of rows is a shard of the states,
    and a rare token's row of the embedding does not share its scale with a frequent one's. Vectors, and matrices of
    fewer than SMALL elements, keep float32.
    """

    @staticmethod
    def new_state(p: Tensor, group: dict) -> dict[str, Tensor]:
        if not group["special"]:
            return adam_state(p, dtype=torch.float32)
        scales = (*p.shape[:-1], -(-p.shape[-1] // BLOCK))
        state = {"step": torch.zeros((), dtype=torch.float32)}
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            state[name] = zeros_by_row(p, p.shape, torch.uint8)
            local(state[name]).fill_(127 if signed else 0)  # the code of 0
            state[f"{name}_scale"] = zeros_by_row(p, scales, torch.float32)
        return state

    def update(self, whole: Tensor, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict) -> None:
        if not group["special"]:
            return adam_update(p, g, state, group)
        step = state["step"].item()
        names = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
        for p_, g_, m8, m_scale, v8, v_scale in chunks(p, g, *(state[name] for name in names)):
            p32, m, v = p_.float(), dequantize(m8, m_scale, True), dequantize(v8, v_scale, False)
            adam_step(p32, g_.float(), m, v, step, group)
            p_.copy_(p32), quantize_(m8, m_scale, m, True), quantize_(v8, v_scale, v, False)

    @staticmethod
    def temporary(p: Tensor, shard: Tensor, group: dict) -> int:
        return 9 * 4 * chunk_elements(shard)


@cache
def dynamic_map(signed: bool) -> Tensor:
    """The 256 values that a code stands for, ascending, (256,) float32.

    A leading run of zeros is a decimal exponent, what is left of the byte a fraction between 0.1 and 1: seven decades,
    the highest with 64 values (of either sign; twice as many without signs), each lower one with half as many.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        n = 2**exponent * (1 if signed else 2)
        fractions = [0.1 + 0.9 * (i + 0.5) / n for i in range(n)]
        values += [f * 10.0 ** (exponent - 6) for f in fractions]
        if signed:
            values += [-f * 10.0 ** (exponent - 6) for f in fractions]
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def nearest_codes(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The map, and the nearest code by a float's upper 18 bits, (2**18,) uint8: searching each value takes 20 x longer.

    Nine bits of mantissa place the border between two codes within a thousandth; codes lie at least a hundredth apart.
    Without signs no value but 0 itself becomes 0: the second average divides, and would make of a tiny one a huge step.
    """
    values = dynamic_map(signed)
    upper = torch.arange(2**18, dtype=torch.int64)
    middles = ((upper << 14) + 2**13).to(torch.uint32).view(torch.float32)
    codes = torch.bucketize(middles, (values[1:] + values[:-1]) / 2)
    if not signed:
        codes.clamp_(min=1)
        codes[0] = 0  # where 0 is, and with it what is below 1e-40
    return values.to(device), codes.to(device, torch.uint8)


def dequantize(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """codes (R, C) uint8 and scales (R, ceil(C / BLOCK)) to (R, C) float32."""
    values = nearest_codes(signed, codes.device)[0].index_select(0, codes.flatten().int()).view(codes.shape)
    return values.mul_(by_column(scales, codes.shape[1]))


def quantize_(codes: Tensor, scales: Tensor, x: Tensor, signed: bool) -> None:
    """Write x (R, C) float32 into codes and scales; x is used up."""
    columns = x.shape[1]
    scales.copy_(pad(x.abs(), (0, -columns % BLOCK)).view(len(x), -1, BLOCK).amax(-1))
    x.div_(by_column(scales, columns).clamp(min=torch.finfo(torch.float32).tiny))
    upper = x.view(torch.int32).bitwise_right_shift_(14).bitwise_and_(2**18 - 1)
    codes.copy_(nearest_codes(signed, codes.device)[1].index_select(0, upper.flatten()).view(codes.shape))


def by_column(scales: Tensor, columns: int) -> Tensor:
    """(R, blocks) to (R, columns)."""
    return scales[..., None].expand(*scales.shape, BLOCK).flatten(1)[:, :columns]


class Lion(Optimizer):
    """Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms": steps by the sign of averaged gradients."""

    @staticmethod
    def new_state(p: Tensor, group: dict) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(p)}

    def update(self, whole: Tensor, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict) -> None:
        (b1, b2), lr = group["betas"], group["lr"]
        for p_, g_, m_ in chunks(p, g, state["exp_avg"]):
            p32, g32, m32 = p_.float(), g_.float(), m_.float()
            p32.mul_(1 - lr * group["weight_decay"]).add_(g32.lerp(m32, b1).sign_(), alpha=-lr)
            p_.copy_(p32), m_.copy_(m32.lerp_(g32, 1 - b2))

    @staticmethod
    def temporary(p: Tensor, shard: Tensor, group: dict) -> int:
        return (1 if p.dtype == torch.float32 else 6) * 4 * chunk_elements(shard)


class Adafactor(Optimizer):
    """Shazeer and Stern 2018: the squared gradients' average as a product of a row and a column, and no first average.

    The rate is absolute, as in transformers' `scale_parameter=False, relative_step=False` and unlike PyTorch's, whose
    rate is relative to the parameter's size; the factors are float32 always. A stack of experts is so many matrices.
    """

    @staticmethod
    def new_state(p: Tensor, group: dict) -> dict[str, Tensor]:
        state = {"step": torch.zeros((), dtype=torch.float32)}
        if p.dim() < 2:
            return state | {"exp_avg_sq": torch.zeros_like(p, dtype=torch.float32)}
        state["row"] = zeros_by_row(p, p.shape[:-1], torch.float32)
        if p.dim() > 2:
            state["column"] = zeros_by_row(p, (*p.shape[:-2], p.shape[-1]), torch.float32)
        else:  # the same in every process
            state["column"] = torch.zeros(p.shape[-1], dtype=torch.float32, device=local(p).device)
        return state

    def update(self, whole: Tensor, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict) -> None:
        decay = 1 - state["step"].item() ** -0.8
        total = sum_over_shards(whole)
        if p.dim() < 2:
            v, g = state["exp_avg_sq"], g.float()
            v.mul_(decay).add_(g.square().add_(1e-30), alpha=1 - decay)
            update = g * v.rsqrt()
            rms = (total(update.square().sum()) / whole.numel()).sqrt()
            p.copy_(
                p.float().mul_(1 - group["lr"] * group["weight_decay"]).sub_(update * (group["lr"] / rms.clamp(min=1)))
            )
        elif p.dim() == 2:
            self.update_matrix(p, g, state["row"], state["column"], decay, len(whole), total, group)
        else:
            matrices = zip(*(t.flatten(0, -n) for t, n in ((p, 3), (g, 3), (state["row"], 2), (state["column"], 2))))
            for p_, g_, row, column in matrices:
                self.update_matrix(p_, g_, row, column, decay, len(p_), lambda t: t, group)

    def update_matrix(
        self,
        p: Tensor,
        g: Tensor,
        row: Tensor,
        column: Tensor,
        decay: float,
        n_rows: int,
        total: Callable[[Tensor], Tensor],
        group: dict,
    ) -> None:
        """p and g (R, C), row (R,), column (C,): R of the matrix's n_rows rows; `total` adds up over the others."""
        squares, lr = torch.zeros_like(column), group["lr"]
        for g_, row_ in chunks(g, row):
            square = g_.float().square().add_(1e-30)
            row_.lerp_(square.mean(1), 1 - decay)
            squares += square.sum(0)
        column.lerp_(total(squares) / n_rows, 1 - decay)
        by_row = (row / (total(row.sum()) / n_rows)).rsqrt_()
        by_col = column.rsqrt()
        norm = torch.zeros((), device=p.device)
        for g_, r in chunks(g, by_row):
            norm += (g_.float() * r[:, None]).mul_(by_col).square_().sum()
        rms = (total(norm) / (n_rows * len(column))).sqrt()
        by_col *= lr / rms.clamp(min=1)  # no update larger than lr in the mean
        for p_, g_, r in chunks(p, g, by_row):
            p32 = p_.float().mul_(1 - lr * group["weight_decay"])
            p_.copy_(p32.sub_((g_.float() * r[:, None]).mul_(by_col)))

    @staticmethod
    def temporary(p: Tensor, shard: Tensor, group: dict) -> int:
        vectors = 3 * 4 * (shard.shape[-1] + shard.shape[-2]) if p.dim() > 1 else 12 * shard.numel()
        return vectors + (2 if p.dtype == torch.float32 else 4) * 4 * chunk_elements(shard)


class Muon(Optimizer):
    """Jordan et al. 2024: the momentum of each hidden matrix, made orthogonal; AdamW for embeddings, head and vectors.

    Updates are scaled by 0.2 sqrt(max(rows, columns)) (Liu et al. 2025, "Muon is Scalable for LLM Training"), the size
    that AdamW's have: both parts share learning rate and weight decay. Each expert of a stack is a matrix of its own. A
    matrix sharded by rows is gathered, and orthogonalised by every process.
    """

    @staticmethod
    def new_state(p: Tensor, group: dict) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(p)} if group["special"] else adam_state(p)

    def update(self, whole: Tensor, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict) -> None:
        if not group["special"]:
            return adam_update(p, g, state, group)
        m = state["momentum_buffer"]
        m.lerp_(g, 1 - 0.95)
        if p.dim() == 2:
            momentum = sharded(g.lerp(m, 0.95).to(ns_dtype(p)), whole, whole.shape)
            update = orthogonal(momentum.full_tensor() if isinstance(momentum, DTensor) else momentum)
            return self.move(p, own_rows(update, whole), max(whole.shape), group)
        p, g, m = (t.flatten(0, -3) for t in (p, g, m))
        n = max(1, CHUNK // p[0].numel()) if len(p) else 1
        for p_, g_, m_ in zip(p.split(n), g.split(n), m.split(n)):
            self.move(p_, orthogonal(g_.lerp(m_, 0.95).to(ns_dtype(p))), max(p.shape[-2:]), group)

    def move(self, p: Tensor, update: Tensor, length: int, group: dict) -> None:
        """Rows of matrices whose longer side is `length`, rounded once."""
        rate = group["lr"] * 0.2 * math.sqrt(length)
        for p_, u_ in chunks(p, update):
            p_.copy_(p_.float().mul_(1 - group["lr"] * group["weight_decay"]).add_(u_, alpha=-rate))

    @staticmethod
    def temporary(p: Tensor, shard: Tensor, group: dict) -> int:
        if not group["special"]:
            return (2 if p.dtype == torch.float32 else 6) * 4 * chunk_elements(shard)
        rows, columns = p.shape[-2:]
        n = 1 if p.dim() == 2 else max(1, min(CHUNK // (rows * columns), shard.shape[:-2].numel()))
        return 4 * (n * (3 * rows * columns + 2 * min(rows, columns) ** 2) + 2 * chunk_elements(shard))


def ns_dtype(p: Tensor) -> torch.dtype:
    """bf16 is exact enough for the iteration, and faster wherever it is not emulated."""
    return torch.float32 if cpu.emulates(p.new_empty(0, dtype=torch.bfloat16)) else torch.bfloat16


def orthogonal(x: Tensor) -> Tensor:
    """x (..., R, C) with its singular values moved near 1 (0.7 to 1.2): five steps of a Newton-Schulz quintic."""
    if x.dim() == 2:
        return orthogonal(x[None])[0]
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def own_rows(full: Tensor, like: Tensor) -> Tensor:
    """The rows that this process holds of a tensor sharded like another."""
    if not isinstance(like, DTensor):
        return full
    everywhere = [Replicate()] * like.device_mesh.ndim
    return (
        DTensor.from_local(full, like.device_mesh, everywhere, run_check=False)
        .redistribute(placements=like.placements)
        .to_local()
    )


def chunk_elements(shard: Tensor) -> int:
    """Elements of the largest piece that `chunks` makes."""
    return min(shard.numel(), max(CHUNK, shard.shape[-1] if shard.dim() else 1))


OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": AdamW,
    "adamw8bit": AdamW8bit,
    "lion": Lion,
    "adafactor": Adafactor,
    "muon": Muon,
}
