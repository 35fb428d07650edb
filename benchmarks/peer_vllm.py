"""vLLM on the CPU: output tokens per second for many requests at once. One JSON line per case.

usage: peer_vllm.py HF_DIR NEW_TOKENS PROMPTS.json      (its compilation takes a minute and a half)
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def main() -> None:
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    llm = LLM(sys.argv[1], dtype="bfloat16", max_model_len=2048)
    load = time.perf_counter() - start
    n_new = int(sys.argv[2])
    params = SamplingParams(max_tokens=n_new, temperature=0, ignore_eos=True)
    for case, prompts in json.loads(Path(sys.argv[3]).read_text()).items():
        llm.reset_prefix_cache()
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        rate = len(prompts) * n_new / (time.perf_counter() - start)
        print(json.dumps({"case": case, "rate": rate, "load": load}), flush=True)


if __name__ == "__main__":
    main()
