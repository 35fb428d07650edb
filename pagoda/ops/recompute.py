"""Activations that are cheaper to make again than to keep.

A product with a weight keeps its input for the weight's gradient. Where that input is the result of a norm or a gate,
whose own inputs are kept anyway, it can be made again on the way back: for a gated transformer that is a third of the
memory of all activations, for 2 % of a step's time. So norms and gates say on their result how it was made, and
`linear` keeps the recipe instead. Of small models, whose activations are no burden, everything is kept.
"""

from collections.abc import Callable

from torch import Tensor

SMALL = 2**20  # bytes


def made_by(y: Tensor, function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """y, marked: `function(*tensors)`, without gradients, gives the same bits. Copies and views are not marked, and
    a change in place, of y or of what it is made from, ends it."""
    if y.nbytes > SMALL:
        y.recipe = function, tensors, _versions(y, *tensors)
    return y


def to_keep(x: Tensor) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """(function, tensors): what to keep in place of x, and the function that gives x from it."""
    function, tensors, versions = getattr(x, "recipe", (None, (), None))
    return (function, tensors) if function and versions == _versions(x, *tensors) else (_itself, (x,))


def _versions(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None or t.is_inference() else t._version for t in tensors]


def _itself(x: Tensor) -> Tensor:
    return x
