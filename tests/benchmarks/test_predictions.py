"""Rates of microbenchmarks, and predictions beside measurements; the ranks themselves run over a real link, when it is measured."""

import json
import sys

import pytest
import torch

from benchmark_scripts import load_script
from deepfuse.profiling.bench import Bench
from deepfuse.profiling.bench_device import facts
from deepfuse.profiling.bench_results import Results

micro, predictions, calibrate = (load_script(name) for name in ("microbenchmarks", "predictions", "calibrate"))
FLOPS, MEMORY, OPERANDS, GRADIENTS = 2e11, 1.5e10, 6e9, 9e9
LAUNCH, LINK, LATENCY, LATER, SHARE = 1e-5, 33e6, 5e-4, 2e-3, 0.1


def taken():
    """Seconds of a machine of just these rates."""
    seconds = {f"sum {micro.MEMORY}": 12 * micro.MEMORY / MEMORY + LAUNCH, f"sum {micro.SMALL}": LAUNCH}
    for M, K, N in micro.PRODUCTS:
        bytes_moved = 4 * (M * K + K * N + M * N)
        product = 2 * M * K * N / FLOPS + bytes_moved / OPERANDS + LAUNCH
        gradient = 2 * M * K * N / FLOPS + bytes_moved / GRADIENTS + LAUNCH
        seconds |= {f"product {M} {K} {N}": product, f"product {M} {K} {N} and its gradients": product + 2 * gradient}
    small, *large = micro.MESSAGES
    seconds[f"message {small}"] = LATENCY
    # of two ranks, half of a message stays
    seconds |= {f"message {rows}": LATENCY + 16 * rows / LINK for rows in large}
    return {**seconds, micro.BESIDE: 0.2, micro.LATE: micro.MESSAGES_LATE * (LATENCY + LATER)}


def test_rates_are_those_that_the_times_were_made_of():
    found = micro.rates(taken(), SHARE, 2)
    assert found["device"]["flops"]["float32"] == pytest.approx(FLOPS)
    assert found["device"]["memory_bandwidth"] == pytest.approx(MEMORY) and found["device"]["launch_seconds"] == LAUNCH
    assert found["products"] == {
        "bandwidth": pytest.approx(OPERANDS),
        "gradient_bandwidth": pytest.approx(GRADIENTS),
    }
    assert found["network"] == {"bandwidth": pytest.approx(LINK), "latency": LATENCY}
    assert found["exchange"] == {"share": SHARE, "latency": pytest.approx(LATER)}


@pytest.mark.parametrize(("measured", "share"), [(-0.1, 0.0), (0.99, micro.MOST)])
def test_a_message_holds_no_less_than_nothing_and_leaves_something(measured, share):
    assert micro.rates(taken(), measured, 2)["exchange"]["share"] == share


def test_a_message_beside_products_is_not_earlier_than_alone():
    assert micro.rates({**taken(), micro.LATE: 0.0}, SHARE, 2)["exchange"]["latency"] == 0


class Sent:
    """A message that is there after three looks."""

    def __init__(self):
        self.looks = 0

    def is_completed(self):
        self.looks += 1
        return self.looks > 3

    def wait(self):
        pass


def test_the_share_of_a_message_is_what_the_same_products_take_longer(monkeypatch):
    now = [0.0]
    sent = Sent()
    monkeypatch.setattr(micro.dist, "all_to_all_single", lambda *_, async_op: sent)
    monkeypatch.setattr(micro.time, "perf_counter", lambda: now[0])

    def product():
        now[0] += 4.0 if sent.looks < 4 else 3.0

    beside = micro.Beside(product, torch.zeros(2))
    beside()
    assert beside.shares == [0.25]


@pytest.mark.parametrize(
    "wrong",
    [
        {f"sum {micro.MEMORY}": LAUNCH / 2},
        {f"message {rows}": LATENCY / 2 for rows in micro.MESSAGES[1:]},
    ],
)
def test_times_that_do_not_grow_with_the_work_are_refused(wrong):
    with pytest.raises(
        ValueError, match=r"^microbenchmarks: want times that grow with the work, got .*; measure again$"
    ):
        micro.rates({**taken(), **wrong}, SHARE, 2)


@pytest.fixture
def ranks(monkeypatch):
    """Ranks that measure nothing, and what they were asked."""
    asked = []

    def run(specs, rate, script, **environment):
        asked.append((specs, rate, script, environment))
        found = []
        for spec in specs:
            names = [f"{n} {name}" for n in spec["tokens"] for name in predictions.PLANS]
            seconds = taken()
            times = {name: [s] * 5 for name, s in seconds.items()}
            found.append(
                {
                    "times": {**times, **{name: [0.25] * 5 for name in names}},
                    micro.SHARE: [SHARE] * 5,
                    "imbalance": {str(n): 1.0 for n in spec["tokens"]},
                    "refused": [f"128 {predictions.CHUNKED}"],
                }
            )
        return found

    monkeypatch.setattr(predictions, "run_ranks", run)
    for module in (predictions, calibrate):
        monkeypatch.setattr(module, "missing", lambda: "")
    return asked


def test_predictions_stand_beside_what_was_measured(ranks, monkeypatch):
    monkeypatch.setattr(
        predictions,
        "predicted",
        lambda backward, tokens, calibration: {n: dict.fromkeys(predictions.PLANS, 0.2) for n in tokens},
    )
    bench = Bench(
        Results(suite="predictions", command="", device=facts(torch.device("cpu")), versions={}), only="prefill, 66"
    )
    predictions.suite(bench)
    rows = {row.name: row for row in bench.results.rows}
    row = rows[f"prefill, 66 MB/s, 1024 tokens, {predictions.NAME}"]
    assert row.figures == {"measured": (250, 250, 250), "predicted": (200, 200, 200)}
    assert row.facts["difference"] == "-20.0%"
    refused = rows[f"prefill, 66 MB/s, 128 tokens, {predictions.CHUNKED}"]
    assert list(refused.figures) == ["measured"] and refused.facts["difference"] == "refused"
    assert rows[f"prefill, 66 MB/s, {micro.BESIDE}"].facts["rates"] == (
        "200 GFLOP/s, 15.0 GB/s, 6.0 of products, 9.0 of gradients, launch 10 us; link 33.0 MB/s, 500 us, holds 10.0% of a "
        "processor, 2000 us later beside products"
    )
    ((specs, rate, script, environment),) = ranks
    assert rate == 66e6 and script == "prediction_ranks.py" and "MALLOC_MMAP_MAX_" in environment
    assert [spec["tokens"] for spec in specs] == [(16, 128, 1024, 4096, 8192)]


def test_a_layer_by_hand(monkeypatch):
    # the parts of 1024 tokens: 2 of 4 experts of 256 each, and a shared expert 32 times as wide, at a width of 512
    quick = {**taken(), micro.LATE: 0.0}
    found = predictions.predicted(False, {1024: 1.0}, micro.rates(quick, 0.0, 2))[1024]
    messages = 2 * 1024 * 512 * 4 / LINK + 3 * LATENCY
    shared = 2 * 1024 * 512 * 3 * 32 * 256
    arithmetic = shared * (1 + 2 / 32) / FLOPS
    # weights and activations of some 0.3 GB besides
    assert arithmetic + 0.01 < found[predictions.SEQUENTIAL] - messages < arithmetic + 0.04
    # all of it is hidden but the message of counts, by a shared expert that takes longer than all messages
    assert found[predictions.NAME] < found[predictions.SEQUENTIAL] - 0.9 * min(messages, shared / FLOPS)


def test_messages_of_the_forward_pass_are_not_hidden_by_the_backward_pass():
    # a link at which dispatch and combine take twice as long as the shared expert forward, and as long as its gradients
    shared = 2 * 1024 * 512 * 3 * 32 * 256 / FLOPS
    slow = {"bandwidth": 2 * 1024 * 512 * 4 / (2 * shared), "latency": 0.0}
    calibration = micro.rates({**taken(), micro.LATE: 0.0}, 0.0, 2) | {"network": slow}
    found = predictions.predicted(True, {1024: 1.0}, calibration)[1024]
    saved = found[predictions.SEQUENTIAL] - found[predictions.NAME]
    # 4 of messages: forward no more is hidden than the shared expert takes, with what it reads a tenth more; backward 2, but for
    # what is lost as each of its three gradients runs in one piece
    assert 2.7 * shared < saved < 3.2 * shared


def test_the_script_writes_what_the_simulation_takes(ranks, tmp_path, monkeypatch, capsys):
    out = tmp_path / "rates.json"
    monkeypatch.setattr(sys, "argv", ["calibrate.py", str(out), "--rate", "20"])
    # the script has a copy of the suite's functions
    monkeypatch.setattr(calibrate, "measured_by_ranks", predictions.measured_by_ranks)
    calibrate.main()
    assert json.loads(out.read_text()) == json.loads(capsys.readouterr().out) == micro.rates(taken(), SHARE, 2)
    ((specs, rate, _, _),) = ranks
    assert rate == 20e6 and specs[0]["tokens"] == []


@pytest.mark.parametrize(
    ("arguments", "missing", "error"),
    [
        (["--rate", "-1"], "", "want --rate >= 0, got -1.0"),
        (["--rate", "nan"], "", "want --rate >= 0, got nan"),
        (["--rate", "5"], "needs root", "a link with --rate needs root; without it messages go over the loopback"),
    ],
)
def test_a_rate_that_cannot_be_is_refused(arguments, missing, error, ranks, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(calibrate, "missing", lambda: missing)
    monkeypatch.setattr(sys, "argv", ["calibrate.py", str(tmp_path / "a.json"), *arguments])
    with pytest.raises(SystemExit):
        calibrate.main()
    assert error in capsys.readouterr().err and not ranks
