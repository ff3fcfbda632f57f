"""The Triton back end: its cases in Triton's interpreter (or on the GPU), refusals, CUDA graphs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexmoe.errors import FlexmoeError
from flexmoe.kernels import experts
from test_kernels import make, route, tokens

HERE = Path(__file__).parent


def test_cases_in_a_process_of_their_own():
    pytest.importorskip("triton")
    variables = dict(os.environ, PYTHONPATH=os.pathsep.join([str(HERE), *sys.path]))
    if not torch.cuda.is_available():
        variables["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(HERE / "triton_cases.py")], env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout


def test_forced_without_a_gpu_says_why_not(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    routed = (tokens(3, 16), *route(3, 4, 2), make([8] * 4, 16), torch.full((1, 4), 8))
    with pytest.raises(FlexmoeError, match="'triton' was asked for and cannot run: tensors are on"):
        experts(*routed, backend="triton")


def test_the_bench_runs():
    pytest.importorskip("triton")
    command = [sys.executable, str(HERE.parent / "bench" / "kernels_gpu.py"), "--try"]
    variables = dict(os.environ, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("three budgets") == 2 and "wrote" not in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "T, dtype", [(1, torch.float32), (40, torch.float32), (400, torch.bfloat16)]
)
def test_a_captured_graph_follows_widths_and_budgets_changed_in_place(T, dtype):
    from triton_cases import on_device

    E, I, H = 8, 96, 128
    weights = on_device(make([I] * E, H, dtype))
    x_TH = tokens(T, H, dtype).cuda()
    index_TK, weight_TK = (t.cuda() for t in route(T, E, 2, dtype))
    width_BE = torch.full((3, E), I).int().cuda()
    token_budget_T = torch.zeros(T).int().cuda()
    routed = (x_TH, index_TK, weight_TK, weights, width_BE, token_budget_T)
    experts(*routed, backend="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TH = experts(*routed, backend="triton")
    for seed in range(3):
        torch.manual_seed(seed)
        width_BE.copy_(torch.randint(0, I + 1, (3, E)))
        token_budget_T.copy_(torch.randint(0, 3, (T,)))
        graph.replay()
        want, off = experts(*routed, backend="torch"), 1e-4 if dtype is torch.float32 else 3e-2
        torch.testing.assert_close(out_TH, want, rtol=off, atol=off)
