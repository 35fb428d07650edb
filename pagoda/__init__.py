"""Pagoda: own a large language model. Pretrain it, finetune it, shrink it, measure it and serve it, from one codebase.

from pagoda import LLM
llm = LLM.load("smollm2-135m-instruct")
print(llm.chat([{"role": "user", "content": "What is a pagoda?"}]).text)
"""

import os
from typing import TYPE_CHECKING, Any

# Threads that wait for others look so many times before they sleep (libgomp reads it when torch is imported). Left to
# itself it is 300,000 times, and who shares the machine with another busy process spends most of the time looking.
# PyTorch's own operations wait for each other a hundred times more often than the kernels, and pay for it.
if "OMP_WAIT_POLICY" not in os.environ and os.environ.get("PAGODA_KERNELS") != "reference":
    os.environ.setdefault("GOMP_SPINCOUNT", "6000")

__version__ = "0.1.0"
__all__ = ["LLM", "PagodaError", "Sampling", "load", "save"]

if TYPE_CHECKING:
    from pagoda.common import PagodaError
    from pagoda.engine.llm import LLM
    from pagoda.engine.options import Sampling
    from pagoda.models.loader import load, save

_WHERE = {
    "LLM": "pagoda.engine.llm",
    "PagodaError": "pagoda.common",
    "Sampling": "pagoda.engine.options",
    "load": "pagoda.models.loader",
    "save": "pagoda.models.loader",
}


def __getattr__(name: str) -> Any:
    """Names are imported when first used, so that `pagoda --help` does not wait for torch."""
    if name not in _WHERE:
        raise AttributeError(f"module 'pagoda' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)
