"""Threads on one optimized model, while weights come and go and while it is copied."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from optimized import assert_close, images, network, pair
from torch import Tensor, nn

import fusedres


def test_eight_threads_on_one_model_get_the_same_results() -> None:
    eager = network()
    model = copy.deepcopy(eager)
    fusedres.optimize(model)
    x = [images(1 + i % 3, 3, 8 + i % 5, 8) for i in range(48)]

    def call(t: Tensor) -> Tensor:
        with torch.no_grad():
            return model(t)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(call, x))
    with torch.no_grad():
        for y, t in zip(results, x, strict=True):
            assert torch.equal(y, model(t))
            assert_close(y, eager, t)


def test_threads_in_two_dtypes_get_the_results_of_the_weights_of_the_time() -> None:
    model, _ = pair()
    states = [copy.deepcopy(model.state_dict()), network().state_dict()]
    inputs = [images(1 + i % 3, 3, 8 + i % 2, 8) for i in range(6)]

    def call(index: int) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=index % 2 == 1):
            return model(inputs[index % len(inputs)])

    expected = []
    for state in states:
        model.load_state_dict(state)
        expected.append([call(index) for index in range(len(inputs))])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(8) as pool:
            for turn in range(4):
                found = list(pool.map(call, range(96)))
                assert all(
                    torch.equal(y, expected[(turn + 1) % 2][index % len(inputs)]) for index, y in enumerate(found)
                )
                model.load_state_dict(states[turn % 2])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickle.dumps])
def test_it_serves_while_it_is_copied(duplicate: Callable[[nn.Module], object]) -> None:
    model, _ = pair()
    x = images()
    done = threading.Event()

    def call(_: int) -> list[Tensor]:
        with torch.no_grad():
            return [model(x) for _ in range(100)]

    def copies() -> None:
        while not done.is_set():
            duplicate(model)

    expected = call(0)[0]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            pool.submit(copies)
            try:
                results = [y for found in pool.map(call, range(2)) for y in found]
            finally:
                done.set()
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(y, expected) for y in results)
