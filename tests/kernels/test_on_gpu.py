"""What only a device can get wrong: far offsets, other streams, graphs, bases and strides that nothing aligns.

As far as a CPU has them, the same tests run in the interpreter, at small size.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from op_cases import OPS, Tensors, compare, make, run
from torch import Tensor

ROOT = Path(__file__).parents[2]
HALF = [torch.float16, torch.bfloat16]
FAR = 2**31  # elements: more than 32 bits can count
EDGE = 64  # rows
ONE_OF_EACH = ["gate", "gated_activation", "masked_norm", "split_triton", "split_triton, plain"]  # kind of kernel


@pytest.mark.parametrize(
    ("dtype", "name"),
    [*product([torch.float32], ONE_OF_EACH), *product([torch.float16], OPS)],
    ids=str,
)
def test_ragged(name: str, dtype: torch.dtype, device: str) -> None:
    """An odd width and tails everywhere: what compute-sanitizer looks at below."""
    tensors, upstream = make(OPS[name], 77, 37, dtype, device)
    compare(OPS[name], run(OPS[name], OPS[name].ours, tensors, upstream), tensors, upstream)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_an_expanded_gradient(name: str, dtype: torch.dtype, device: str) -> None:
    """As ``y.sum(0)`` gives it: one row for all tokens, at stride 0."""
    tensors, upstream = make(OPS[name], 70, 40, dtype, device)
    upstream = upstream[:1].expand_as(upstream)
    assert upstream.stride(0) == 0
    compare(OPS[name], run(OPS[name], OPS[name].ours, tensors, upstream), tensors, upstream)


def shifted(tensor: Tensor) -> Tensor:
    """The same values from one element after an aligned address."""
    room = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return room[1:].copy_(tensor.flatten()).view_as(tensor)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_bases_that_nothing_aligns(name: str, device: str) -> None:
    tensors, upstream = make(OPS[name], 70, 40, torch.float16, device)
    moved = {key: shifted(tensor) for key, tensor in tensors.items()}
    assert {tensor.data_ptr() % 16 for tensor in moved.values()} == {2}
    compare(OPS[name], run(OPS[name], OPS[name].ours, moved, shifted(upstream)), tensors, upstream)


@pytest.fixture
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Large tests take turns: the processes of a run share one GPU's memory."""
    with Path(tmp_path_factory.getbasetemp().parent, "large").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("T", "D"), [(150, 40), pytest.param(FAR // 4096 + EDGE, 4096, marks=pytest.mark.gpu)], ids=["near", "far"]
)
@pytest.mark.parametrize("name", OPS)
def test_the_last_rows(name: str, T: int, D: int, device: str) -> None:
    """All rows between the first and the last few are 0, so the reference of these few has the sums over all too."""
    if D == 4096 and torch.cuda.mem_get_info()[0] < 20 * FAR:
        pytest.skip("needs 43 GB of free memory")
    op = OPS[name]
    tensors, upstream = make(op, T, D, torch.float16, device, ends=EDGE)
    got = run(op, op.ours, tensors, upstream)
    few = {key: both_ends(tensor, T) for key, tensor in (tensors | {"": upstream}).items()}
    compare(op, {key: both_ends(tensor, T) for key, tensor in got.items()}, few, few.pop(""))


def both_ends(tensor: Tensor, T: int) -> Tensor:
    """The first and the last rows, where it has a row for each token."""
    return torch.cat([tensor[:EDGE], tensor[-EDGE:]]) if tensor.shape[0] == T else tensor


KERNELS = [pytest.param(name, {}, marks=pytest.mark.gpu) for name in OPS]
EAGER = [(name, {"backend": "torch"}) for name in ("gate", "gated_activation", "masked_norm", "split_triton")]


def replayed(step: Callable[[], Tensors], refill: Callable[[], None]) -> Tensors:
    """What a step gives for other inputs in the same memory: replayed from a graph; on a CPU, run again."""
    if not torch.cuda.is_available():
        step()
        refill()
        return step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles all, and libraries set up what they need
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    refill()
    graph.replay()
    torch.cuda.synchronize()
    return captured


@pytest.mark.parametrize(("name", "how"), [*KERNELS, *EAGER], ids=str)
def test_a_replayed_graph(name: str, how: dict[str, str], device: str) -> None:
    op = OPS[name]
    tensors, upstream = make(op, 70, 40, torch.float16, device)
    others, other_upstream = make(op, 70, 40, torch.float16, device)

    def refill() -> None:
        for key, tensor in tensors.items():
            tensor.copy_(others[key])
        upstream.copy_(other_upstream)

    got = replayed(lambda: run(op, partial(op.ours, **how), tensors, upstream), refill)
    compare(op, got, others, other_upstream)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gate", "gated_activation", "masked_norm", "split_triton", "split_cublas"])
def test_a_side_stream_while_the_default_one_is_busy(name: str, device: str) -> None:
    """A kernel on the wrong stream would not have run yet when its results are fetched."""
    op, side = OPS[name], torch.cuda.Stream()
    tensors, upstream = make(op, 70, 40, torch.float16, device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(op, op.ours, tensors, upstream)  # compiles; and the allocator has memory of this stream
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # cycles: half a second
    with torch.cuda.stream(side):
        fetched = {key: tensor.cpu() for key, tensor in run(op, op.ours, tensors, upstream).items()}
    assert not torch.cuda.default_stream().query(), "the default stream was idle, so nothing was tested"
    torch.cuda.synchronize()
    compare(op, {key: tensor.to(device) for key, tensor in fetched.items()}, tensors, upstream)


@pytest.mark.gpu
@pytest.mark.parametrize(("tool", "cases"), [("memcheck", "test_ragged"), ("racecheck", "test_ragged and float32")])
def test_compute_sanitizer(tool: str, cases: str) -> None:
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not there; it comes with the CUDA toolkit")
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", cases]
    # Each tensor an allocation of its own, so that a step past its end is seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
