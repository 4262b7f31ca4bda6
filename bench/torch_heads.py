"""What a head costs in PyTorch, as people write it and with swl.torch: seconds, peak memory, lines of user code.

python bench/torch_heads.py                                # each measurement in a process of its own; loss and all gradients

The lines are those of the functions below, which are what is measured. `language model` is a Llama of one layer from
transformers, left out where that is not installed; its peak is that above the model, all others' above inputs and gradients.
"""

from __future__ import annotations

import argparse
import inspect
import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - as torch's own documentation calls it
from memory import resident

import swl.torch


def loss_plain(x: Any, W: Any, t: Any) -> Any:
    return F.cross_entropy(F.linear(x, W), t)


def loss_swl(x: Any, W: Any, t: Any) -> Any:
    return swl.torch.linear_cross_entropy(x, W, t)


def log_prob_plain(x: Any, W: Any, t: Any) -> Any:
    log_p = F.log_softmax(F.linear(x, W), dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return (log_p.gather(1, t[:, None])[:, 0] + 0.01 * entropy).mean()


def log_prob_swl(x: Any, W: Any, t: Any) -> Any:
    log_p, entropy = swl.torch.linear_log_prob(x, W, t, entropy=True)
    return (log_p + 0.01 * entropy).mean()


def kl_plain(x: Any, W: Any, teacher_x: Any, teacher_W: Any) -> Any:
    student = F.log_softmax(F.linear(x, W), dim=-1)
    teacher = F.log_softmax(F.linear(teacher_x, teacher_W), dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def kl_swl(x: Any, W: Any, teacher_x: Any, teacher_W: Any) -> Any:
    return swl.torch.linear_kl(x, W, teacher_x, teacher_W)


def language_model_plain(model: Any, ids: Any) -> Any:
    return model(input_ids=ids, labels=ids).loss


def language_model_swl(model: Any, ids: Any) -> Any:
    swl.torch.apply_to(model) if type(model.lm_head) is torch.nn.Linear else None
    return model(input_ids=ids, labels=ids).loss


TASKS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "loss": (loss_plain, loss_swl),
    "log-probability and entropy": (log_prob_plain, log_prob_swl),
    "distillation": (kl_plain, kl_swl),
    "language model": (language_model_plain, language_model_swl),
}


def operands(task: str, N: int, D: int, C: int) -> tuple[list[Any], list[Any]]:
    """Make what a task takes, and what its gradients are of."""
    torch.manual_seed(0)
    x, W = torch.randn(N, D, requires_grad=True), (torch.randn(C, D) / D**0.5).requires_grad_()
    t = torch.randint(0, C, (N,))
    if task == "language model":
        import transformers

        size = {"hidden_size": D, "intermediate_size": D, "num_hidden_layers": 1, "num_attention_heads": 4}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=C, **size))
        return [model, t[None]], list(model.parameters())
    if task == "distillation":
        return [x, W, torch.randn(N, D), torch.randn(C, D) / D**0.5], [x, W]
    return [x, W, t], [x, W]


def child(job: dict[str, Any]) -> None:
    """Print bytes above what is there and the gradients, and the seconds of the fastest of three."""
    task, N, D, C = job["task"], job["N"], job["D"], job["C"]
    function = TASKS[task][job["swl"]]

    def step(given: list[Any], leaves: list[Any]) -> int:
        gradients = torch.autograd.grad(function(*given), leaves)
        return sum(g.nbytes for g in gradients)

    step(*operands(task, 8, 16, 64))  # compiles, and starts threads
    given = operands(task, N, D, C)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    held = step(*given)
    peak, seconds = resident("VmHWM") - before - held, []
    for _ in range(3):
        start = time.perf_counter()
        step(*given)
        seconds.append(time.perf_counter() - start)
    print(json.dumps([peak, min(seconds)]))


def lines(function: Callable[..., Any]) -> int:
    """Count the lines of a function's body."""
    return len(inspect.getsource(function).strip().splitlines()) - 1


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, metavar="N")
    parser.add_argument("--inputs", type=int, default=768, metavar="D")
    parser.add_argument("--classes", type=int, default=32_000, metavar="C")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(json.loads(options.child))
        return
    print("| loss and all gradients | torch's time ÷ swl's | peak, swl | peak, torch | lines, swl | lines, torch |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for task, functions in TASKS.items():
        if task == "language model" and find_spec("transformers") is None:
            continue
        found = []
        for ours in (False, True):
            job = {"task": task, "swl": ours, "N": options.rows, "D": options.inputs, "C": options.classes}
            command = [sys.executable, "-W", "ignore", __file__, "--child", json.dumps(job)]
            found.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
        (torchs, slow), (swls, fast) = found
        plain, short = map(lines, functions)
        row = f"{slow / fast:.2f}", f"{swls / 2**20:.0f} MiB", f"{torchs / 2**20:.0f} MiB", f"{short}", f"{plain}"
        print(f"| {task} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
