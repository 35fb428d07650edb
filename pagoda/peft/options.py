"""Which finetuning methods there are, and the options of each. Free of torch: adapter.py finds a method's code by name.

`METHODS` maps the name that a user gives to the options; several names joined by commas are worn together (MAM is
`prefix,parallel`; UniPELT without its gates is `lora,prefix,pfeiffer`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pagoda.common import PagodaError, demand, did_you_mean, one_of


class Options:
    """What all methods share. `module`: the file beside this one with the class `Method`, or another named `kind`;
    `peft_type`: the method's name in adapter_config.json; `peft_names`: options that are called otherwise there."""

    module: ClassVar[str]
    kind: ClassVar[str] = "Method"
    peft_type: ClassVar[str]
    peft_names: ClassVar[str] = ""

    @classmethod
    def names_in_peft(cls) -> dict[str, str]:
        return dict(pair.split("=") for pair in cls.peft_names.split())

    def __post_init__(self):
        """What holds for whatever options of these names a method has."""
        for name in ("rank", "init_rank", "every", "size", "length", "n_virtual"):
            if hasattr(self, name):
                demand(self, **{name: (getattr(self, name) >= 1, "a whole number above 0")})
        if hasattr(self, "dropout"):
            demand(self, dropout=(0 <= self.dropout < 1, "at least 0 and below 1"))


@dataclass
class LoRA(Options):
    """Low-rank updates of linear layers (Hu et al. 2021), over a packed base QLoRA (Dettmers et al. 2023).

    Args:
        rank: of every update.
        alpha: an update is scaled by alpha / rank.
        dropout: of the update's input.
        targets: layers by the end of their transformers name (q_proj,v_proj) or by patterns of whole names (regular
            expressions), separated by commas; all-linear is every linear layer but the head.
        rslora: scale by alpha / sqrt(rank) (Kalajdzievski 2023).
        dora: learn the length of every row besides (DoRA, Liu et al. 2024).
        plus_ratio: learning rate of the B matrices over that of the A matrices (LoRA+, Hayou et al. 2024; 1: equal).
    """

    module: ClassVar[str] = "lora"
    peft_type: ClassVar[str] = "LORA"
    peft_names: ClassVar[str] = (
        "rank=r alpha=lora_alpha dropout=lora_dropout targets=target_modules rslora=use_rslora dora=use_dora"
    )
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str = "all-linear"
    rslora: bool = False
    dora: bool = False
    plus_ratio: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        demand(self, plus_ratio=(self.plus_ratio > 0, "above 0"))


@dataclass
class AdaLoRA(Options):
    """LoRA as P diag(L) Q, whose ranks go where they matter while it trains (Zhang et al. 2023).

    Args:
        rank: the average that is left in the end.
        init_rank: what every layer starts with.
        alpha: an update is scaled by alpha / init_rank.
        dropout: of the update's input.
        targets: which layers, as for LoRA.
        warmup_steps: steps before ranks are taken away.
        final_steps: steps at the end with the ranks that are left.
        every: steps between two decisions.
        beta1: smoothing of a weight's importance.
        beta2: smoothing of its uncertainty.
        orthogonal: weight of the extra loss that keeps P and Q orthogonal.
        total_steps: of the whole run (0: what the trainer says).
    """

    module: ClassVar[str] = "adalora"
    peft_type: ClassVar[str] = "ADALORA"
    peft_names: ClassVar[str] = (
        "rank=target_r init_rank=init_r alpha=lora_alpha dropout=lora_dropout targets=target_modules "
        "warmup_steps=tinit final_steps=tfinal every=deltaT orthogonal=orth_reg_weight total_steps=total_step"
    )
    rank: int = 8
    init_rank: int = 12
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str = "all-linear"
    warmup_steps: int = 0
    final_steps: int = 0
    every: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonal: float = 0.5
    total_steps: int = 0

    def __post_init__(self):
        super().__post_init__()
        demand(self, rank=(self.rank <= self.init_rank, f"at most init_rank {self.init_rank}"))


@dataclass
class IA3(Options):
    """A learned factor per channel of keys, values and the MLP's inside (IA3, Liu et al. 2022).

    Args:
        targets: layers whose results are scaled, as for LoRA (empty: those of keys and values, and the MLP's last).
        feedforward: which of them are scaled at their input instead (empty: the MLP's last).
    """

    module: ClassVar[str] = "ia3"
    peft_type: ClassVar[str] = "IA3"
    peft_names: ClassVar[str] = "targets=target_modules feedforward=feedforward_modules"
    targets: str = ""
    feedforward: str = ""


@dataclass
class BitFit(Options):
    """Train the biases and nothing else (Ben Zaken et al. 2022)."""

    module: ClassVar[str] = "bitfit"
    peft_type: ClassVar[str] = "BITFIT"


@dataclass
class Houlsby(Options):
    """Bottlenecks behind attention and behind the MLP of every layer (Houlsby et al. 2019).

    Args:
        size: width of the bottleneck.
        activation: gelu, relu or silu.
        dropout: inside the bottleneck.
    """

    module: ClassVar[str] = "bottleneck"
    peft_type: ClassVar[str] = "HOULSBY"
    places: ClassVar[tuple[str, ...]] = ("attn", "mlp")
    parallel: ClassVar[bool] = False
    size: int = 64
    activation: str = "gelu"
    dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        one_of("activation", self.activation, ("gelu", "relu", "silu"))


@dataclass
class Pfeiffer(Houlsby):
    """Bottlenecks behind the MLP only (Pfeiffer et al. 2020)."""

    peft_type: ClassVar[str] = "PFEIFFER"
    places: ClassVar[tuple[str, ...]] = ("mlp",)


@dataclass
class Parallel(Houlsby):
    """Bottlenecks beside the MLP, scaled (He et al. 2022); together with `prefix` it is their MAM adapter.

    Args:
        activation: gelu, relu or silu.
        scale: what its result is multiplied by.
    """

    peft_type: ClassVar[str] = "PARALLEL"
    places: ClassVar[tuple[str, ...]] = ("mlp",)
    parallel: ClassVar[bool] = True
    activation: str = "relu"
    scale: float = 4.0


@dataclass
class LlamaAdapter(Options):
    """Learned prompts in the upper layers, attended to through a gate that starts shut (Zhang et al. 2023).

    Args:
        length: tokens of a prompt.
        layers: how many layers from the top (0: all but the first two).
    """

    module: ClassVar[str] = "llama_adapter"
    peft_type: ClassVar[str] = "ADAPTION_PROMPT"
    peft_names: ClassVar[str] = "length=adapter_len layers=adapter_layers"
    length: int = 10
    layers: int = 0

    def __post_init__(self):
        super().__post_init__()
        demand(self, layers=(self.layers >= 0, "0 or more"))


@dataclass
class AdapterV2(LlamaAdapter):
    """The same, with a learned bias and factor at every linear layer, and the norms trained (Gao et al. 2023)."""

    kind: ClassVar[str] = "MethodV2"
    peft_type: ClassVar[str] = "ADAPTER_V2"


@dataclass
class Prefix(Options):
    """Keys and values before every sequence, in every layer, made by a small network (Li & Liang 2021).

    Args:
        n_virtual: virtual tokens.
        projection: make them from embeddings by a network of two layers; else they are parameters themselves.
        hidden: width of that network (0: that of a layer's keys).
    """

    module: ClassVar[str] = "virtual"
    kind: ClassVar[str] = "PrefixMethod"
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    peft_names: ClassVar[str] = "n_virtual=num_virtual_tokens projection=prefix_projection hidden=encoder_hidden_size"
    n_virtual: int = 20
    projection: bool = True
    hidden: int = 0


@dataclass
class PTuningV2(Prefix):
    """Keys and values before every sequence, in every layer, as parameters (P-Tuning v2, Liu et al. 2021).

    Args:
        projection: make them from embeddings by a network of two layers; else they are parameters themselves.
    """

    projection: bool = False


@dataclass
class Prompt(Options):
    """Embeddings of virtual tokens before every sequence (prompt tuning, Lester et al. 2021).

    Args:
        n_virtual: virtual tokens.
        init: vocab starts them as tokens drawn from the vocabulary, random from a normal distribution.
    """

    module: ClassVar[str] = "virtual"
    kind: ClassVar[str] = "PromptMethod"
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    peft_names: ClassVar[str] = "n_virtual=num_virtual_tokens init=prompt_tuning_init"
    n_virtual: int = 20
    init: str = "vocab"

    def __post_init__(self):
        super().__post_init__()
        one_of("init", self.init, ("vocab", "random"))


@dataclass
class PTuning(Options):
    """Embeddings of virtual tokens, made by an encoder (P-Tuning, Liu et al. 2021).

    Args:
        n_virtual: virtual tokens.
        encoder: mlp or lstm.
        hidden: width of the encoder (0: that of the model).
        layers: of the LSTM.
        dropout: between the layers of the LSTM.
    """

    module: ClassVar[str] = "virtual"
    kind: ClassVar[str] = "PTuningMethod"
    peft_type: ClassVar[str] = "P_TUNING"
    peft_names: ClassVar[str] = (
        "n_virtual=num_virtual_tokens encoder=encoder_reparameterization_type hidden=encoder_hidden_size "
        "layers=encoder_num_layers dropout=encoder_dropout"
    )
    n_virtual: int = 20
    encoder: str = "mlp"
    hidden: int = 0
    layers: int = 2
    dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        demand(self, layers=(self.layers >= 1, "a whole number above 0"))
        one_of("encoder", self.encoder, ("mlp", "lstm"))


METHODS: dict[str, type[Options]] = {
    "lora": LoRA,
    "qlora": LoRA,  # over a base that was loaded with quantize="nf4"
    "adalora": AdaLoRA,
    "ia3": IA3,
    "bitfit": BitFit,
    "houlsby": Houlsby,
    "pfeiffer": Pfeiffer,
    "parallel": Parallel,
    "llama_adapter": LlamaAdapter,
    "adapter_v2": AdapterV2,
    "prefix": Prefix,
    "prompt": Prompt,
    "p_tuning": PTuning,
    "p_tuning_v2": PTuningV2,
}


def named(methods: str) -> list[str]:
    """The names in a text such as `lora` or `prefix,parallel`; none for `full`, which trains all weights instead.
    Raises PagodaError for a name that is not known."""
    names, known = [name.strip() for name in methods.split(",")], ["full", *METHODS]
    for name in names:
        if name not in known:
            raise PagodaError(f"unknown method '{name}'{did_you_mean(name, known)}; there are {', '.join(known)}")
    if names == ["full"]:
        return []
    if "full" in names:
        raise PagodaError("full trains all weights, so no adapter can be worn beside it: name it alone")
    return names
