"""A policy gradient over many actions, by plain torch and by `swl.torch.linear_log_prob`, from the same seed.

A context has a best action, and an action pays by how near it is. The policy is a hidden layer and a head of one score per action;
its loss is that of REINFORCE with an entropy bonus, ``−(reward − mean)·log p(action) − bonus·entropy``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

import swl.torch

CONTEXT, HIDDEN, BONUS, TEMPERATURE = 8, 32, 0.01, 1.0

Scores = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def by_torch(hidden: Tensor, head: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Store all logits, their log-softmax and its exponentials."""
    log_p = (hidden @ head.T / TEMPERATURE).log_softmax(-1)
    return log_p.gather(1, action[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def by_swl(hidden: Tensor, head: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Store none."""
    log_prob, entropy = swl.torch.linear_log_prob(hidden, head, action, temperature=TEMPERATURE, entropy=True)
    return log_prob, entropy


def train(scores: Scores, steps: int, actions: int, batch: int) -> list[float]:
    """Return the mean reward of each step."""
    torch.manual_seed(0)
    places = torch.nn.functional.normalize(torch.randn(actions, CONTEXT), dim=1)
    body = torch.nn.Linear(CONTEXT, HIDDEN)
    head = torch.nn.Parameter(0.1 * torch.randn(actions, HIDDEN))
    optimizer = torch.optim.Adam([*body.parameters(), head], lr=0.02)
    rewards = []
    for _ in range(steps):
        context = torch.nn.functional.normalize(torch.randn(batch, CONTEXT), dim=1)
        hidden = torch.tanh(body(context))
        with torch.no_grad():
            action = torch.multinomial((hidden @ head.T / TEMPERATURE).softmax(-1), 1)[:, 0]
        reward = (context * places[action]).sum(1)
        log_prob, entropy = scores(hidden, head, action)
        loss = -((reward - reward.mean()) * log_prob + BONUS * entropy).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rewards.append(reward.mean().item())
    return rewards


def main() -> None:
    """Train twice and print both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--actions", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()
    curves = [train(scores, args.steps, args.actions, args.batch) for scores in (by_torch, by_swl)]
    print("reward    first     last")
    for name, curve in zip(("torch", "swl"), curves, strict=True):
        print(f"{name:6} {curve[0]:8.3f} {sum(curve[-10:]) / 10:8.3f}")
    print(f"steps with the same actions: {sum(a == b for a, b in zip(*curves, strict=True))} of {args.steps}")


if __name__ == "__main__":
    main()
