"""Times attention of PyTorch and flash-linear-attention, in the rows of `sparsex bench attention`.

    python scripts/bench_peers.py --lengths 32K 128K 1M --out results/h200/attention_peers.json

Run it where PyTorch is installed, with a CUDA device; it needs nothing else of this project.
Dense attention is PyTorch's (by cuDNN), the sliding window FlexAttention's (512 keys, as a block
mask), and NSA (arXiv:2502.11089) that of flash-linear-attention, with 16 query heads to a KV head,
16 blocks of 64 and without its own window. What is not installed gives a row with the status
"not_installed". As there, outputs and gradients of a few rows are compared with a reference in
f32 (NSA's with the blocks that it chose itself), and what differs gets no time.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

try:
    import torch
except ImportError:
    torch = None

WINDOW, BLOCK, BLOCKS = 512, 64, 16
ROWS = 8  # compared with the reference
OUTPUT_TOLERANCE = 0.03  # in units of the RMS of a row, plus the number itself
GRADIENT_TOLERANCE = 0.02  # of the norm
SHORTEST_SAMPLE = 0.05  # seconds
UNITS = {"K": 1 << 10, "M": 1 << 20}
MEASURED = (
    "milliseconds", "milliseconds_q1", "milliseconds_q3", "samples", "calls_per_sample",
    "speedup_over_dense", "peak_bytes", "max_error", "gradient_error", "measured_heads", "note",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Peer:
    """An implementation to time.

    Attributes:
      system: its name.
      part: of the attention op that it corresponds to.
      one_kv_head: whether it wants a single one.
      make: from a number of tokens to the function of q, k, v [1, T, H, D]; raises ImportError
        where it is not installed.
      masks: from q, k, v and rows [R] to pairs (keys of a block, bool [R, T / that]): the softmaxes
        that a row sums up, over keys or over means of blocks of keys.
    """

    system: str
    part: str
    one_kv_head: bool
    make: Callable
    masks: Callable


def make_dense(tokens: int) -> Callable:
    """PyTorch's causal attention, by cuDNN on a GPU."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q, k, v):
        backend = SDPBackend.CUDNN_ATTENTION if q.is_cuda else SDPBackend.MATH
        with sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
            )
        return out.transpose(1, 2)

    return attend


def dense_masks(q, k, v, rows):
    """All keys up to the row."""
    key = torch.arange(k.shape[1], device=k.device)
    return [(1, key <= rows[:, None])]


def make_window(tokens: int) -> Callable:
    """FlexAttention with a block mask; not compiled on a CPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(batch, head, query, key):
        return (key <= query) & (query - key < WINDOW)

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    mask = create_block_mask(seen, None, None, tokens, tokens, device=device, _compile=cuda)
    compiled = torch.compile(flex_attention, dynamic=False) if cuda else flex_attention

    def attend(q, k, v):
        turned = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(*turned, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return attend


def window_masks(q, k, v, rows):
    """The last WINDOW keys."""
    key = torch.arange(k.shape[1], device=k.device)
    return [(1, (key <= rows[:, None]) & (rows[:, None] - key < WINDOW))]


def make_nsa(tokens: int) -> Callable:
    """NSA without its window: means of blocks, and selected blocks; gates of 1."""
    from fla.ops.nsa.parallel import parallel_nsa

    def attend(q, k, v):
        ones = torch.ones(q.shape[:3], dtype=q.dtype, device=q.device)
        return parallel_nsa(
            q, k, v, g_cmp=ones, g_slc=ones, block_counts=BLOCKS, block_size=BLOCK, window_size=0
        )

    return attend


def nsa_masks(q, k, v, rows):
    """The blocks that NSA itself selects, and the means of complete blocks."""
    from fla.ops.nsa.compression import parallel_nsa_compression
    from fla.ops.nsa.parallel import parallel_nsa_topk
    from fla.ops.utils.pooling import mean_pooling

    common = {"TK": k.shape[1], "block_size": BLOCK, "scale": k.shape[-1] ** -0.5}
    with torch.no_grad():
        k_means, v_means = (mean_pooling(x, BLOCK) for x in (k, v))
        _, lse = parallel_nsa_compression(q=q, k=k_means, v=v_means, **common)
        chosen = parallel_nsa_topk(q=q, k=k_means, lse=lse, block_counts=BLOCKS, **common)
    chosen = chosen[0, rows, 0]  # [R, BLOCKS], -1 for none
    block = torch.arange(k.shape[1] // BLOCK, device=k.device)
    selected = (chosen[:, :, None] == block).any(1).repeat_interleave(BLOCK, dim=1)
    key = torch.arange(k.shape[1], device=k.device)
    complete = (block + 1) * BLOCK - 1 <= rows[:, None]
    return [(1, selected & (key <= rows[:, None])), (BLOCK, complete)]


PEERS = (
    Peer("dense_torch", "op", False, make_dense, dense_masks),
    Peer("flex_window", "local", False, make_window, window_masks),
    Peer("fla_nsa", "op", True, make_nsa, nsa_masks),
)


def attend_rows(q, k, v, masks):
    """The reference: out [R, Hq, D] of query rows q, in f32."""
    dim, out = q.shape[-1], 0
    for size, mask in masks:
        keys, values = (x[0].unflatten(0, (-1, size)).mean(1) for x in (k, v))
        grouped = q.unflatten(1, (keys.shape[1], -1))
        logits = torch.einsum("rhgd,nhd->rhgn", grouped, keys) * dim**-0.5
        weights = logits.masked_fill(~mask[:, None, None], -math.inf).softmax(-1)
        out = out + torch.einsum("rhgn,nhd->rhgd", weights.nan_to_num(0), values).flatten(1, 2)
    return out


def compare(peer: Peer, attend: Callable, inputs, direction: str) -> tuple[float, float | None]:
    """Largest deviation of outputs, and that of the norm of gradients, for a few rows.

    All other rows have the cotangent 0, so these rows decide the gradients of k and v.
    """
    q, k, v = inputs
    tokens = q.shape[1]
    generator = torch.Generator().manual_seed(tokens)
    rows = torch.randint(1, tokens - 1, (ROWS - 2,), generator=generator).unique()
    rows = torch.cat([torch.tensor([0]), rows, torch.tensor([tokens - 1])]).to(q.device)
    exact = [x.detach().float().requires_grad_() for x in (q[0, rows], k, v)]
    expected = attend_rows(*exact, peer.masks(q, k, v, rows))
    out = attend(q, k, v)
    difference = (out[0, rows].float() - expected).abs()
    scale = expected.square().mean(-1, keepdim=True).sqrt() + expected.abs()
    error = (difference / scale.clamp_min(1e-30)).max().item()
    if direction == "forward":
        return error, None
    cotangent = torch.zeros_like(out)
    cotangent[0, rows] = torch.randn_like(out[0, rows])
    gradients = torch.autograd.grad(out, (q, k, v), cotangent)
    wanted = torch.autograd.grad(expected, exact, cotangent[0, rows].float())
    found = gradients[0][0, rows], *gradients[1:]
    errors = [
        ((x.float() - y).norm() / y.norm()).item() for x, y in zip(found, wanted, strict=True)
    ]
    return error, max(errors, key=lambda x: math.inf if math.isnan(x) else x)


def synchronize() -> None:
    """Waits for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def elapsed(call: Callable, calls: int) -> float:
    """Seconds of a call, the mean of several in a row."""
    synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize()
    return (time.perf_counter() - began) / calls


def take_times(call: Callable, samples: int, budget: float) -> tuple[list[float], int]:
    """Seconds of samples, and the calls of which each is the mean."""
    first = elapsed(call, 1)
    if first > budget:
        return [first], 1
    calls = max(1, min(1000, math.ceil(SHORTEST_SAMPLE / first)))
    first = elapsed(call, calls)
    calls = max(1, min(1000, math.ceil(SHORTEST_SAMPLE / first)))
    count = max(1, min(samples, int(budget / (first * calls))))
    return [elapsed(call, calls) for _ in range(count)], calls


def temporaries(call: Callable) -> int | None:
    """Bytes that a call takes beyond what is there before and what it returns."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    results = call()
    after = torch.cuda.memory_allocated()
    del results
    return torch.cuda.max_memory_allocated() - after


def measure(peer: Peer, length: int, heads: tuple[int, int, int], direction: str, options) -> dict:
    """The measured fields of a row; raises what PyTorch raises."""
    query_heads, kv_heads, dim = heads
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(options.seed)
    inputs = [
        torch.randn(1, length, count, dim, dtype=torch.bfloat16, device=device)
        for count in (query_heads, kv_heads, kv_heads)
    ]
    forward = direction == "forward"
    for x in inputs:
        x.requires_grad_(not forward)
    attend = peer.make(length)
    error, gradient_error = compare(peer, attend, inputs, direction)
    fields = {
        "max_error": error if math.isfinite(error) else None,
        "gradient_error": gradient_error,
    }
    if not error <= OUTPUT_TOLERANCE or not (gradient_error or 0) <= GRADIENT_TOLERANCE:
        if gradient_error is not None and not math.isfinite(gradient_error):
            fields["gradient_error"] = None
        return fields | {"status": "wrong", "note": "differs from the reference"}
    cotangent = None if forward else torch.randn_like(inputs[0])

    def call():
        out = attend(*inputs)
        return out if forward else (out, torch.autograd.grad(out, inputs, cotangent))

    peak = temporaries(call)
    times, calls = take_times(call, options.samples, options.seconds)
    spread = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return fields | {
        "milliseconds": 1e3 * spread[1],
        "milliseconds_q1": 1e3 * spread[0],
        "milliseconds_q3": 1e3 * spread[2],
        "samples": len(times),
        "calls_per_sample": calls,
        "peak_bytes": peak,
        "status": "measured",
    }


def make_row(peer: Peer, length: int, direction: str, dense: dict, options) -> dict:
    """A row; `dense` holds the last dense row of each direction."""
    kv_heads = 1 if peer.one_kv_head else options.kv_heads
    row = {
        "system": peer.system,
        "part": peer.part,
        "direction": direction,
        "tokens": length,
        "query_heads": options.query_heads,
        "kv_heads": kv_heads,
        "head_dim": options.head_dim,
        "selection": None,
        "implementation": "pytorch" if peer.system != "fla_nsa" else "flash-linear-attention",
        **dict.fromkeys(MEASURED),
    }
    if torch is None:
        return row | {"status": "not_installed", "note": "PyTorch"}
    heads, factor, last = (options.query_heads, kv_heads, options.head_dim), 1, dense.get(direction)
    if peer.system == "dense_torch" and last and last["status"] == "measured":
        predicted = last["milliseconds"] / 1e3 * (length / last["tokens"]) ** 2
        if predicted > options.dense_seconds:
            heads, factor = (1, 1, options.head_dim), options.query_heads
            row["note"] = f"measured with 1 of {factor} query heads; times and bytes scaled up"
    row["measured_heads"] = heads[0]
    try:
        row |= measure(peer, length, heads, direction, options)
    except ImportError as error:
        return row | {"status": "not_installed", "note": str(error)}
    except torch.OutOfMemoryError:
        return row | {"status": "out_of_memory"}
    except Exception as error:  # the other peers are measured all the same
        return row | {"status": "failed", "note": " ".join(str(error).split())[:200]}
    for name in ("milliseconds", "milliseconds_q1", "milliseconds_q3", "peak_bytes"):
        row[name] = row[name] and factor * row[name]
    reference = row if peer.system == "dense_torch" else last
    if peer.part == "op" and row["status"] == "measured" and reference:
        if reference["tokens"] == length and reference["status"] == "measured":
            row["speedup_over_dense"] = reference["milliseconds"] / row["milliseconds"]
            if reference["kv_heads"] != kv_heads:
                row["note"] = f"compared with dense attention of {options.kv_heads} KV heads"
    return row


@functools.cache
def describe() -> dict:
    """Machine, versions and commit."""

    def output(*command):
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    cuda = torch is not None and torch.cuda.is_available()
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    versions = {"python": platform.python_version()}
    for name in ("torch", "triton", "flash-linear-attention", "fla-core"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    here = str(pathlib.Path(__file__).parent)
    return {
        "commit": os.environ.get("SPARSEX_COMMIT")
        or output("git", "-C", here, "rev-parse", "HEAD"),
        "hardware": {
            "kind": torch.cuda.get_device_name() if cuda else platform.processor(),
            "count": torch.cuda.device_count() if cuda else os.cpu_count(),
            "driver": driver.splitlines()[0] if driver else None,
        },
        "versions": versions,
    }


def write(path: pathlib.Path, rows: list[dict], options: argparse.Namespace) -> None:
    """Writes the results file, atomically."""
    config = {name: str(value) for name, value in vars(options).items() if name != "out"}
    results = {
        "benchmark": "attention_peers",
        "command": shlex.join(["python", *sys.argv]),
        "config": config | {"dtype": "bfloat16"},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **describe(),
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    fresh.replace(path)


def parse_length(text: str) -> int:
    """Tokens: 4096, 32K, 1M."""
    unit = UNITS.get(text[-1].upper(), 1)
    length = int(text.rstrip("KkMm")) * unit
    if length % BLOCK or length < 2 * WINDOW:
        raise argparse.ArgumentTypeError(f"{text}: use a multiple of {BLOCK} from {2 * WINDOW} on")
    return length


def main() -> int:
    """Measures and returns the exit status: 1 if a row is wrong or failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", nargs="+", type=parse_length, default=["32K", "128K"])
    parser.add_argument("--directions", nargs="+", default=["forward", "forward_backward"],
                        choices=["forward", "forward_backward"])  # fmt: skip
    parser.add_argument("--query-heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=2, help="NSA has 1")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--samples", type=int, default=20, help="times taken, at most")
    parser.add_argument("--seconds", type=float, default=10, help="time budget of a row")
    parser.add_argument("--dense-seconds", type=float, default=60,
                        help="dense attention that would take longer has one head")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="results file (JSON)")
    options = parser.parse_args()
    options.lengths = sorted(x if isinstance(x, int) else parse_length(x) for x in options.lengths)
    rows: list[dict] = []
    dense: dict[str, dict] = {}
    for length in options.lengths:
        for direction in options.directions:
            for peer in PEERS:
                row = make_row(peer, length, direction, dense, options)
                if peer.system == "dense_torch":
                    dense[direction] = row
                rows.append(row)
                write(options.out, rows, options)
                time_taken = row["milliseconds"] and f"{row['milliseconds']:.3g} ms"
                said = [row["system"], str(length), direction, time_taken or row["status"]]
                print(*said, row["note"] or "", flush=True)
    return int(any(row["status"] in ("wrong", "failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
