"""Verifiers for tests of the trainer: they judge what an untrained policy can do."""

from __future__ import annotations

import time


def short(completion: str, ground_truth: str) -> bool:
    """About half of what a policy without any training writes."""
    return completion.count("\n") % 2 == 0


def late(completion: str, ground_truth: str) -> bool:
    time.sleep(60 if "a1" in completion else 0)
    return completion.count("\n") % 2 == 0


def broken(completion: str, ground_truth: str) -> bool:
    if "a1" in completion:
        raise ValueError("cannot judge this")
    return completion.count("\n") % 2 == 0


def easy(completion: str, ground_truth: str) -> bool:
    return True


def harsh(completion: str, ground_truth: str) -> float:
    """Rewards below zero: what is wrong costs 1, and some of what is right is worth half."""
    return -1.0 if len(completion) % 8 else 0.5
