"""How the scripts beside this one time what they repeat. Python alone: each runs in an environment of its own."""

import resource
import time
from collections.abc import Callable


def repeated(work: Callable[[int], None], repeats: int, tokens: int) -> dict:
    """What `repeats` calls of work(seed) took after one that compiles; each makes so many new tokens."""
    work(0)
    wall, cpu = [], []
    for seed in range(1, repeats + 1):
        start = time.perf_counter(), time.process_time()
        work(seed)
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"new_tokens": tokens, "seconds": wall, "cpu_seconds": cpu, "peak_rss_mb": rss}
